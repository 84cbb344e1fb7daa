"""The shelf of idle workers, and the line of tasks that wait for one.

Both are plain data, changed between two awaits: Trio runs one task at a time, so no lock is needed.
At most one of them holds anything: nobody waits while a worker is idle.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar, cast

import trio
from outcome import Error, Value
from trio.lowlevel import (
    Abort,
    Task,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from ._worker import Worker

T = TypeVar("T")


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
        self.take = self.idle.pop if lifo else self.idle.popleft
        """Take the next idle worker off the shelf; IndexError where there is none."""
        self.waiters: OrderedDict[Task, int] = OrderedDict()
        """The line, and the number under which each task joined it. The first waits the longest."""
        self.not_queueing: set[Task] = set()
        """Those in line that wait for a start, not for a return (`Session.nonblock_checkout`)."""
        self._timed_out = timed_out
        self._joined = 0
        # The earliest first. Those who have left stay in it until there are too many of them: most
        # are served long before their deadline, and to look for each would cost more than the wait.
        self._deadlines: list[tuple[float, int, Task]] = []
        self._alarm = trio.CancelScope()

    async def join(self, timeout: float) -> Worker[T]:
        """Wait in line for a worker, for at most `timeout` seconds."""
        task = current_task()
        self._joined = number = self._joined + 1
        self.waiters[task] = number
        if timeout != math.inf:
            deadline = trio.current_time() + timeout
            if len(self._deadlines) > 64 + 2 * len(self.waiters):
                self._deadlines = [entry for entry in self._deadlines if self._waits(entry)]
                heapify(self._deadlines)
            heappush(self._deadlines, (deadline, number, task))
            if deadline < self._alarm.deadline:
                self._alarm.deadline = deadline

        def abort(_: object) -> Abort:
            del self.waiters[task]
            return Abort.SUCCEEDED

        return cast("Worker[T]", await wait_task_rescheduled(abort))

    def serve(self, worker: Worker[T]) -> None:
        """Give a worker to the longest-waiting task."""
        task, _ = self.waiters.popitem(last=False)
        reschedule(task, Value(worker))

    def put_back(self, worker: Worker[T]) -> None:
        """Return a worker that was not used to its old place on the shelf."""
        used_later = sum(other.idle_since > worker.idle_since for other in self.idle)
        self.idle.insert(len(self.idle) - used_later, worker)

    def fail(self, task: Task, error: Exception) -> None:
        """Send a waiting task away."""
        del self.waiters[task]
        reschedule(task, Error(error))

    @enable_ki_protection
    async def keep_time(self) -> None:
        """Send away those whose time is up. One task does it for all of them."""
        while True:
            now = trio.current_time()
            while self._deadlines:
                deadline, _, task = self._deadlines[0]
                if self._waits(self._deadlines[0]):
                    if deadline > now:
                        break
                    self.fail(task, self._timed_out())
                heappop(self._deadlines)
            earliest = self._deadlines[0][0] if self._deadlines else math.inf
            with trio.CancelScope(deadline=earliest) as self._alarm:
                await trio.sleep_forever()

    def _waits(self, entry: tuple[float, int, Task]) -> bool:
        """Say whether a task is still in line: it may have left, and may have joined again."""
        _, number, task = entry
        return self.waiters.get(task) == number
