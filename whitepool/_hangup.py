"""Notices that the peer of a worker has hung up, at no cost to the worker's clients."""

from __future__ import annotations

import select
import sys
from contextlib import suppress
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class HangupWatch(Generic[T]):
    """Watches file descriptors for a hang-up of the peer, and for nothing else.

    On Linux, one epoll descriptor holds all of them for as long as their workers live. Descriptors of
    this kind nest: this one becomes readable when a peer hangs up, and Trio waits for that. Ordinary
    traffic wakes no task. On other systems nothing is watched.
    """

    def __init__(self) -> None:
        self.watched: dict[int, T] = {}
        """The worker of each descriptor that is watched."""
        # There is none, and Trio has none to wait for, before there is something to watch.
        self._epoll: select.epoll | None = None
        self._begun = trio.Event()

    def add(self, fileno: int | None, worker: T) -> None:
        """Watch a descriptor, unless it is None, or can't be watched (a regular file)."""
        if sys.platform == "linux" and fileno is not None:
            self._epoll = self._epoll or select.epoll()
            with suppress(OSError, ValueError, OverflowError):
                self._epoll.register(fileno, select.EPOLLRDHUP)
                self.watched[fileno] = worker
                self._begun.set()

    def remove(self, fileno: int | None, worker: T) -> None:
        """Stop watching a descriptor. It need not be watched."""
        # The number may have become another worker's by now.
        if fileno is not None and self.watched.get(fileno) is worker:
            self._forget(fileno)

    def hung_up(self) -> list[T]:
        """Return the workers whose peers have hung up since the last call, and stop watching them."""
        found = []
        if self._epoll is not None and not self._epoll.closed:
            is_stale = False
            for fileno, _ in self._epoll.poll(0):
                if fileno in self.watched and _has_hung_up(fileno):
                    found.append(self.watched[fileno])
                    self._forget(fileno)
                else:
                    is_stale = True
            if is_stale:
                self._renew()
        return found

    async def wait(self) -> None:
        """Return when `hung_up` may have something to return."""
        await self._begun.wait()
        assert self._epoll is not None
        with suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._epoll)

    def close(self) -> None:
        """Stop watching everything. The watched descriptors stay open."""
        self.watched.clear()
        if self._epoll is not None:
            self._epoll.close()

    def _forget(self, fileno: int) -> None:
        assert self._epoll is not None
        del self.watched[fileno]
        with suppress(OSError):  # it was closed, and the kernel has removed it
            self._epoll.unregister(fileno)

    def _renew(self) -> None:
        """Begin again, with a new epoll descriptor for those that are watched.

        A descriptor may have been closed without our knowing. The kernel remembers it for as long as a
        copy of it exists, in a child process, say: it reports its hang-up for ever, and does not let
        us unregister it.
        """
        assert self._epoll is not None
        watched = self.watched.copy()
        trio.lowlevel.notify_closing(self._epoll)
        self.close()
        self._epoll = select.epoll()
        for fileno, worker in watched.items():
            self.add(fileno, worker)


def _has_hung_up(fileno: int) -> bool:
    """Return whether the file that has this number now has hung up.

    The epoll descriptor may have reported a closed file that had the number before.
    """
    poller = select.poll()
    poller.register(fileno, select.POLLRDHUP)
    return bool(poller.poll(0))
