"""Waits until a socket can be read: in Trio, or, where many answers arrive together, in a cheaper way.

Trio makes a note of each wait, and takes it back afterwards. It is cheaper to have it do so once for
many tasks. On Linux, one epoll descriptor holds their sockets. Descriptors of this kind nest: this one
can be read when one of its sockets can. One task waits for it in Trio, and wakes the others. To switch
to that task costs as much as some waits save, so it is done only where many are woken at a time.
"""

from __future__ import annotations

import math
import select
import sys
from collections.abc import Awaitable

import trio
from outcome import Error
from trio.lowlevel import Abort, RaiseCancelT, RunVar, Task, reschedule

PAUSE = 1000
"""How many waits are left to Trio before a trial of waiting together, and from one to the next."""

WORTHWHILE = 3
"""How many tasks have to be woken at a time, on average, for waiting together to be worth it."""

FIRST_GUESS = 2 * WORTHWHILE
"""The average from which a trial starts. Where answers come one by one, it falls below what is
worthwhile in a dozen waits, so trials cost half a percent of a query."""

_READABLE_ONCE = select.EPOLLIN | select.EPOLLONESHOT if sys.platform == "linux" else 0


class _Together:
    """The tasks of one run of Trio that wait together."""

    def __init__(self) -> None:
        self.tasks: dict[int, Task] = {}
        """The task that waits for each descriptor."""
        self.pause = PAUSE if sys.platform == "linux" else math.inf
        """How many of the next waits are left to Trio."""
        self._average = float(FIRST_GUESS)
        """How many tasks are woken at a time, lately."""
        self._epoll: select.epoll | None = None

    def wait_readable(self, fileno: int) -> Awaitable[None]:
        """Wait together with others. The wait begins before this is awaited."""
        if fileno in self.tasks:
            raise trio.BusyResourceError("another task is waiting for this connection")
        try:
            self._arm(fileno)
        except (OSError, ValueError, RuntimeError):
            # No more descriptors can be had, or the run is ending: it has no room for another task, or
            # the task is gone and has closed the epoll descriptor.
            return trio.lowlevel.wait_readable(fileno)  # noqa: ASYNC105  # the caller awaits it
        self.tasks[fileno] = trio.lowlevel.current_task()

        def abort(_: RaiseCancelT) -> Abort:
            del self.tasks[fileno]
            return Abort.SUCCEEDED

        return trio.lowlevel.wait_task_rescheduled(abort)  # noqa: ASYNC105

    def _arm(self, fileno: int) -> None:
        """Have the kernel report once that a descriptor can be read, be it that it can by now.

        For that once it remembers files that were closed without our knowing, and of which a copy
        exists in a child process, say. Their number may be another connection's by then, whose task
        will look in vain, and wait again.
        """
        if self._epoll is None:
            epoll = select.epoll()
            trio.lowlevel.spawn_system_task(self._wake_tasks, epoll)
            self._epoll = epoll
        try:
            self._epoll.modify(fileno, _READABLE_ONCE)
        except FileNotFoundError:
            self._epoll.register(fileno, _READABLE_ONCE)

    async def _wake_tasks(self, epoll: select.epoll) -> None:
        """Wake the tasks whose sockets can be read, until the run ends."""
        try:
            while True:
                await trio.lowlevel.wait_readable(epoll)
                events = epoll.poll(0)
                for fileno, _ in events:
                    if fileno in self.tasks:  # it is not, if its wait was cancelled
                        reschedule(self.tasks.pop(fileno))
                self._average += (len(events) - self._average) / 16
                if self._average < WORTHWHILE:
                    self.pause, self._average = PAUSE, float(FIRST_GUESS)
        finally:
            # Tasks that clean up, shielded, have to wait in Trio from now on.
            epoll.close()
            while self.tasks:
                reschedule(self.tasks.popitem()[1])


_of_this_run: RunVar[_Together] = RunVar("whitepool_readiness")


def _together() -> _Together:
    try:
        return _of_this_run.get()
    except LookupError:
        _of_this_run.set(_Together())
        return _of_this_run.get()


def wait_readable(fileno: int) -> Awaitable[None]:
    """Wait as `trio.lowlevel.wait_readable` does, or return early: look then, and wait again.

    The wait begins before this is awaited.
    """
    together = _together()
    if together.pause > 0:
        together.pause -= 1
        return trio.lowlevel.wait_readable(fileno)  # noqa: ASYNC105  # the caller awaits it
    return together.wait_readable(fileno)


def notify_closing(fileno: int) -> None:
    """Have the tasks that wait for a descriptor, if any, raise `trio.ClosedResourceError`."""
    trio.lowlevel.notify_closing(fileno)
    task = _together().tasks.pop(fileno, None)
    if task is not None:
        reschedule(task, Error(trio.ClosedResourceError("another task closed this connection")))
