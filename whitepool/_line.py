"""The shelf of idle workers, and the line of tasks that wait for one.

Both are plain data, changed between two awaits: Trio runs one task at a time, so no lock is needed.
At most one of them holds anything: nobody waits while a worker is idle.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

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

from ._overload import stands
from ._worker import Worker

T = TypeVar("T")

Waiter = tuple[int, float, float, int, int, bool]
"""The number under which a task joined, since when it waits, and its timeout. Then, as of the last look
at it: how many had joined and been served ever, and whether anybody was served in the period before."""


class Refusal(Protocol):
    """Makes the error for a task that is sent away: its time is up, or the line stands."""

    def __call__(self, *, early: bool) -> Exception: ...


class Line(Generic[T]):
    """Who waits for a worker, in order, and which workers wait for somebody.

    A waiter costs no cancel scope, as in Trio's own channels: it sleeps, and whoever has news for it
    (a worker, a timeout, the end of the pool) reschedules it with that news as the outcome. Whatever
    happens, it happens once: a task that is rescheduled with a worker can no longer be cancelled out
    of it, and one that is cancelled is out of the line in the same instant.
    """

    def __init__(
        self, *, lifo: bool, patience: float, refusal: Refusal, left_unserved: Callable[[], None]
    ) -> None:
        self.idle: deque[Worker[T]] = deque()
        """The shelf. The right end is the one that was in use last."""
        self.take = self.idle.pop if lifo else self.idle.popleft
        """Take the next idle worker off the shelf; IndexError where there is none."""
        self.waiters: OrderedDict[Task, Waiter] = OrderedDict()
        """The line. The first waits the longest."""
        self.not_queueing: set[Task] = set()
        """Those in line that wait for the pool, not for a client (`Session.nonblock_checkout`)."""
        self._refusal = refusal
        self._left_unserved = left_unserved
        self._joined = 0
        self._served = 0
        # Share of its timeout after which a waiter is looked at again. See `_overload`.
        self._period = patience / 2 if patience < 1 else 1
        # When to look at whom next. Those who have left stay in it until there are too many of them:
        # most are served long before, and to look for each would cost more than the wait.
        self._appointments: list[tuple[float, int, Task]] = []
        self._alarm = trio.CancelScope()
        self._wakes_at = math.inf  # the alarm's deadline, which costs a call to ask
        self._now = trio.lowlevel.current_clock().current_time

    async def join(self, timeout: float) -> Worker[T]:
        """Wait in line for a worker, for at most `timeout` seconds."""
        task = current_task()
        now = self._now()
        self._joined = number = self._joined + 1
        self.waiters[task] = (number, now, timeout, number, self._served, False)
        if timeout != math.inf:
            if len(self._appointments) > 64 + 4 * len(self.waiters):
                self._appointments = [entry for entry in self._appointments if self._waits(entry)]
                heapify(self._appointments)
            first = now + self._period * timeout
            heappush(self._appointments, (first, number, task))
            if first < self._wakes_at:
                self._alarm.deadline = self._wakes_at = first

        def abort(_: object) -> Abort:
            del self.waiters[task]
            self._left_unserved()
            return Abort.SUCCEEDED

        worker: Worker[T] = await wait_task_rescheduled(abort)
        return worker

    def longest_wait(self, now: float) -> float:
        """Return for how many seconds the first in line has been waiting."""
        for _, since, *_ in self.waiters.values():
            return now - since
        return 0

    def serve(self, worker: Worker[T]) -> None:
        """Give a worker to the longest-waiting task."""
        task, _ = self.waiters.popitem(last=False)
        self._served += 1
        reschedule(task, Value(worker))

    def put_back(self, worker: Worker[T]) -> None:
        """Return a worker that was not used to its old place on the shelf."""
        used_later = sum(other.idle_since > worker.idle_since for other in self.idle)
        self.idle.insert(len(self.idle) - used_later, worker)

    def fail(self, task: Task, error: Exception) -> None:
        """Send a waiting task away."""
        del self.waiters[task]
        self._left_unserved()
        reschedule(task, Error(error))

    @enable_ki_protection
    async def keep_time(self) -> None:
        """Send away those whose time is up. One task does it for all of them."""
        while True:
            now = self._now()
            while self._appointments and self._appointments[0][0] <= now:
                entry = heappop(self._appointments)
                if self._waits(entry):
                    self._attend(entry, now)
            self._wakes_at = self._appointments[0][0] if self._appointments else math.inf
            with trio.CancelScope(deadline=self._wakes_at) as self._alarm:
                await trio.sleep_forever()

    def _attend(self, entry: tuple[float, int, Task], now: float) -> None:
        """Look at a task that has waited for one more period, or for all of its timeout."""
        _, number, task = entry
        _, since, timeout, joined, served, flowed = self.waiters[task]
        if now >= since + timeout:
            self.fail(task, self._refusal(early=False))
        elif stands(flowed, self._joined - joined, self._served - served):
            self.fail(task, self._refusal(early=True))
        else:
            flowed = self._served > served
            self.waiters[task] = (number, since, timeout, self._joined, self._served, flowed)
            next_look = now + self._period * timeout
            if not now < next_look < since + timeout:  # nor so soon that it is no later
                next_look = since + timeout
            heappush(self._appointments, (next_look, number, task))

    def _waits(self, entry: tuple[float, int, Task]) -> bool:
        """Say whether a task is still in line: it may have left, and may have joined again."""
        _, number, task = entry
        return self.waiters.get(task, (0,))[0] == number
