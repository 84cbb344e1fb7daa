"""The shelf of idle workers, and the line of tasks that wait for one.

Both are plain data, changed between two awaits: Trio runs one task at a time, so no lock is needed.
At most one of them holds anything: nobody waits while a worker is idle.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar, cast

import trio
from outcome import Error, Value
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from ._worker import Worker

T = TypeVar("T")


class Waiter(Generic[T]):
    """A task in line. It has left the line once `line` is None."""

    __slots__ = ("line", "never_queues", "task")

    def __init__(self, line: Line[T], task: Task, never_queues: bool) -> None:
        self.line: Line[T] | None = line
        self.task = task
        self.never_queues = never_queues
        """It waits for a start, not for a return (`Session.nonblock_checkout`)."""

    def abort(self, _: object) -> Abort:
        """Leave the line because the task was cancelled. (Trio calls this.)"""
        line = cast("Line[T]", self.line)
        del line.waiters[self]
        line.has_left(self)
        return Abort.SUCCEEDED


class Line(Generic[T]):
    """Who waits for a worker, in order, and which workers wait for somebody.

    A waiter costs no cancel scope, as in Trio's own channels: it sleeps, and whoever has news for it
    (a worker, a timeout, the end of the pool) reschedules it with that news as the outcome. Whatever
    happens, it happens once: a task that is rescheduled with a worker can no longer be cancelled out
    of it, and one that is cancelled is out of the line in the same instant.
    """

    def __init__(self, *, lifo: bool, timed_out: Callable[[], Exception]) -> None:
        self.idle: deque[Worker[T]] = deque()
        """The shelf. The right end is the one that was in use last."""
        self.waiters: OrderedDict[Waiter[T], None] = OrderedDict()
        """The line. The first is the longest-waiting."""
        self.take = self.idle.pop if lifo else self.idle.popleft
        """Take the next idle worker off the shelf; IndexError where there is none."""
        self._timed_out = timed_out
        # Deadlines of waiters, the earliest first. Those who have left are swept out in bulk: most
        # are served long before their deadline, and to look for each would cost more than to wait.
        self._deadlines: list[tuple[float, int, Waiter[T]]] = []
        self._joined = 0
        self._left_early = 0
        self._alarm = trio.CancelScope()

    async def join(self, timeout: float, *, never_queues: bool = False) -> Worker[T]:
        """Wait in line for a worker, for at most `timeout` seconds."""
        waiter = Waiter(self, current_task(), never_queues)
        self.waiters[waiter] = None
        if timeout != math.inf:
            deadline = trio.current_time() + timeout
            self._joined += 1
            heappush(self._deadlines, (deadline, self._joined, waiter))
            if deadline < self._alarm.deadline:
                self._alarm.deadline = deadline
        return cast("Worker[T]", await wait_task_rescheduled(waiter.abort))

    def serve(self, worker: Worker[T]) -> None:
        """Give a worker to the longest-waiting task."""
        waiter, _ = self.waiters.popitem(last=False)
        self.has_left(waiter)
        reschedule(waiter.task, Value(worker))

    def fail(self, waiter: Waiter[T], error: Exception) -> None:
        """Send a task away."""
        del self.waiters[waiter]
        self.has_left(waiter)
        reschedule(waiter.task, Error(error))

    def has_left(self, waiter: Waiter[Any]) -> None:
        """Forget a waiter that has been taken out of `waiters`."""
        waiter.line = None
        self._left_early += 1
        if self._left_early > 64 + len(self._deadlines) // 2:
            self._deadlines = [entry for entry in self._deadlines if entry[2].line is not None]
            heapify(self._deadlines)
            self._left_early = 0

    async def keep_time(self) -> None:
        """Send away those whose time is up. One task does it for all of them."""
        while True:
            now = trio.current_time()
            while self._deadlines and (
                self._deadlines[0][0] <= now or self._deadlines[0][2].line is None
            ):
                waiter = heappop(self._deadlines)[2]
                if waiter.line is not None:
                    self.fail(waiter, self._timed_out())
            earliest = self._deadlines[0][0] if self._deadlines else math.inf
            with trio.CancelScope(deadline=earliest) as self._alarm:
                await trio.sleep_forever()
