"""Notices a peer that hung up, at no cost to those who use the worker."""

from __future__ import annotations

import select
import sys
from contextlib import suppress
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class HangupWatch(Generic[T]):
    """Watches file descriptors for a hang-up of the peer, and for nothing else.

    On Linux, one epoll descriptor holds all of them for as long as their workers live. Descriptors
    of this kind nest: this one becomes readable when a peer hangs up, and Trio waits for that.
    Ordinary traffic doesn't wake anybody. Elsewhere nothing is watched.
    """

    def __init__(self) -> None:
        self._watched: dict[int, T] = {}
        self._epoll = select.epoll() if sys.platform == "linux" else None

    def __bool__(self) -> bool:
        """Whether anything is watched."""
        return bool(self._watched)

    def add(self, fileno: int | None, worker: T) -> None:
        """Watch a descriptor, unless there is none."""
        if self._epoll is None or fileno is None:
            return
        try:
            self._epoll.register(fileno, select.EPOLLRDHUP)
        except FileExistsError:
            # The number is in use again: the descriptor that had it was closed without our knowing,
            # and a copy of it keeps the old one registered.
            self._epoll.modify(fileno, select.EPOLLRDHUP)
        except (OSError, ValueError):
            return  # it can't be watched: a regular file, or closed already
        self._watched[fileno] = worker

    def remove(self, fileno: int | None, worker: T) -> None:
        """Stop watching a descriptor. It need not be watched."""
        # The number may be another worker's by now.
        if fileno is not None and self._watched.get(fileno) is worker:
            del self._watched[fileno]
            self._forget(fileno)

    def hung_up(self) -> list[T]:
        """Return the workers whose peers have hung up since, and stop watching them."""
        found = []
        if self._epoll is not None and self._watched:
            for fileno, _ in self._epoll.poll(0):
                self._forget(fileno)
                worker = self._watched.pop(fileno, None)
                if worker is not None:
                    found.append(worker)
        return found

    async def wait(self) -> None:
        """Return when `hung_up` may have something to tell."""
        if self._epoll is None:
            await trio.sleep_forever()
        else:
            await trio.lowlevel.wait_readable(self._epoll)

    def close(self) -> None:
        if self._epoll is not None:
            self._watched.clear()
            self._epoll.close()

    def _forget(self, fileno: int) -> None:
        assert self._epoll is not None
        with suppress(OSError):  # it was closed, and the kernel has forgotten it
            self._epoll.unregister(fileno)
