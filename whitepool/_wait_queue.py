"""The tasks that wait for a worker, in order, and their timeouts."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Generic, TypeVar

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

from . import _overload as overload

E = TypeVar("E")

Waiter = tuple[int, float, float, int]
"""The number under which a task joined, when that was, its timeout, and how many tasks had been served
by then. A tuple, because each wait makes one, and to make an object costs five times as much."""

Timer = tuple[float, int, Task, "overload.Look | None"]
"""When to look at a waiter, its number and its task, and what there was to see at the last look."""


class WaitQueue(Generic[E]):
    """The tasks that wait for an entry, first come, first served.

    A waiter costs no cancel scope and no timer of Trio's, as in Trio's own channels. It sleeps, and the
    task that has news for it (a worker, a timeout, the end of the pool) reschedules it, with that news
    as the outcome. That happens once: a task that was rescheduled with a worker can no longer be
    cancelled out of it, and one that is cancelled is out of the queue in the same instant.

    Args:
      patience: the pool's option, see `_overload`.
      make_timeout: makes the error of a waiter whose time is up, of its task and its timeout.
      make_overload: makes the error of a waiter that is shed.
      on_unserved: called after a task has left without a worker.
    """

    def __init__(
        self,
        *,
        patience: float,
        make_timeout: Callable[[Task, float], Exception],
        make_overload: Callable[[], Exception],
        on_unserved: Callable[[], None],
    ) -> None:
        self.waiters: OrderedDict[Task, Waiter] = OrderedDict()
        """The one that has waited for the longest comes first."""
        self.nonblocking: set[Task] = set()
        """Those that do not wait for a client to return a worker (`Session.nonblock_checkout`)."""
        self._make_timeout = make_timeout
        self._make_overload = make_overload
        self._on_unserved = on_unserved
        self.served = 0
        """Tasks that have got an entry."""
        self.wait_time = 0.0
        """Seconds that those have waited, in all."""
        self._joined = 0
        self._period = overload.period(patience)
        # A heap. It keeps the timers of tasks that have left, until there are too many of them: most
        # waiters are served long before their first look, and to search the heap for each would cost
        # more than the wait.
        self._timers: list[Timer] = []
        self._sleep = trio.CancelScope()
        self._wakes_at = math.inf  # the deadline of `_sleep`, which costs a call to ask
        self._now = trio.lowlevel.current_clock().current_time

    async def wait(self, timeout: float) -> tuple[E, float]:
        """Wait at the end of the queue for an entry, for at most `timeout` seconds.

        Returns it, and the time at which the wait began. Raises what `make_timeout` or
        `make_overload` makes, or what `fail` is given. A cancellation takes the task out of the queue.
        """
        task = current_task()
        now = self._now()
        self._joined = number = self._joined + 1
        self.waiters[task] = (number, now, timeout, self.served)
        if timeout != math.inf:
            first_look = now + self._period * timeout
            if len(self._timers) > 64 + 4 * len(self.waiters):
                self._discard_stale_timers()
            heappush(self._timers, (first_look, number, task, None))
            if first_look < self._wakes_at:
                self._sleep.deadline = self._wakes_at = first_look

        def abort(_: object) -> Abort:
            del self.waiters[task]
            self._on_unserved()
            return Abort.SUCCEEDED

        entry: E = await wait_task_rescheduled(abort)
        return entry, now

    async def wait_nonblocking(self) -> tuple[E, float]:
        """Wait without a timeout, as one of the `nonblocking`."""
        task = current_task()
        self.nonblocking.add(task)
        try:
            return await self.wait(math.inf)
        finally:
            self.nonblocking.discard(task)

    def serve(self, entry: E, now: float) -> None:
        """Give an entry to the task that has waited the longest. Raises `KeyError` if none waits."""
        task, waiter = self.waiters.popitem(last=False)
        self.served += 1
        self.wait_time += now - waiter[1]
        reschedule(task, Value(entry))

    def fail(self, task: Task, error: Exception) -> None:
        """Take a waiter out of the queue, and raise an error in it. It must be waiting."""
        del self.waiters[task]
        self._on_unserved()
        reschedule(task, Error(error))

    def blocking(self) -> list[tuple[Task, float, float]]:
        """Return the waiters that have a timeout: each task, when it joined, and the timeout."""
        return [
            (task, since, timeout)
            for task, (_, since, timeout, _) in self.waiters.items()
            if timeout != math.inf
        ]

    def nonblocking_beyond(self, on_the_way: int) -> list[Task]:
        """Return the `nonblocking` waiters that have at least `on_the_way` waiters ahead of them."""
        if not self.nonblocking:
            return []
        return [task for task in islice(self.waiters, on_the_way, None) if task in self.nonblocking]

    def longest_wait(self, now: float) -> float:
        """Return for how many seconds the first waiter has waited; 0 if there is none."""
        for _, since, *_ in self.waiters.values():
            return now - since
        return 0

    # -- Timeouts ------------------------------------------------------------------------------------

    @enable_ki_protection
    async def run_timers(self) -> None:
        """Time out or shed waiters when it is time. One task does it for all of them; it never ends."""
        while True:
            now = self._now()
            while self._timers and self._timers[0][0] <= now:
                timer = heappop(self._timers)
                if self._is_waiting(timer):
                    self._on_timer(timer, now)
            self._wakes_at = self._timers[0][0] if self._timers else math.inf
            with trio.CancelScope(deadline=self._wakes_at) as self._sleep:
                await trio.sleep_forever()

    def _discard_stale_timers(self) -> None:
        """Drop the timers of tasks that have left the queue."""
        self._timers = [timer for timer in self._timers if self._is_waiting(timer)]
        heapify(self._timers)

    def _on_timer(self, timer: Timer, now: float) -> None:
        """Look at a waiter one period after the last look, or when its time is up."""
        _, number, task, last_look = timer
        _, since, timeout, served_at_joining = self.waiters[task]
        last = last_look or overload.Look(number, served_at_joining, served_before=False)
        ends = since + timeout
        if now >= ends:
            self.fail(task, self._make_timeout(task, timeout))
        elif overload.is_growing(last, self._joined, self.served):
            self.fail(task, self._make_overload())
        else:
            look = overload.Look(self._joined, self.served, self.served > last.served)
            again = overload.next_look(now, ends, self._period * timeout)
            heappush(self._timers, (again, number, task, look))

    def _is_waiting(self, timer: Timer) -> bool:
        """Say whether the timer's waiter still waits: it may have left, and its task joined anew."""
        _, number, task, _ = timer
        return self.waiters.get(task, (0,))[0] == number
