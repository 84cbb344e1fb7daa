"""The tasks that wait for a worker, in order, and their timeouts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import islice, takewhile
from typing import Any, Generic, TypeVar

import trio
from outcome import Error, Value
from trio.lowlevel import (
    Abort,
    Task,
    cancel_shielded_checkpoint,
    current_task,
    enable_ki_protection,
    reschedule,
)

from . import _overload as overload

E = TypeVar("E")

AT_ONCE = 1000
"""Waiters that get their timers before other tasks have a turn: it takes some half a millisecond."""


class Waiter:
    """A task in a wait queue. `WaitQueue.join` makes it."""

    # It has no __init__: to call one would cost as much as half of the rest of joining the queue.
    __slots__ = ("blocking", "number", "queue", "served_before", "since", "task", "timeout")

    queue: WaitQueue[Any]
    task: Task | None
    """None when it has left the queue."""
    number: int
    """How many tasks had ever joined the queue, with this one."""
    served_before: int
    """How many of them had been served when it joined."""
    since: float
    """When it joined."""
    timeout: float
    blocking: bool
    """Whether it also waits for clients to return workers. (`Session.nonblock_checkout` does not.)"""

    def abort(self, _: object) -> Abort:
        """Leave the queue, because the task is cancelled. Trio calls it."""
        self.queue.remove(self)
        return Abort.SUCCEEDED


Timer = tuple[float, int, Waiter, "overload.Look | None"]
"""When to look at a waiter, its number, the waiter, and what there was to see at the last look."""


class WaitQueue(Generic[E]):
    """The tasks that wait for an entry, first come, first served.

    A waiter costs no cancel scope and no timer of Trio's, as in Trio's own channels. It joins, and
    sleeps: ``await wait_task_rescheduled(waiter.abort)``. The task that has news for it (a worker, a
    timeout, the end of the pool) reschedules it, with that news as the outcome. That happens once: a
    task that was rescheduled with a worker can no longer be cancelled out of it, and one that is
    cancelled is out of the queue in the same instant.

    Args:
      patience: the pool's option, see `_overload`.
      make_timeout: makes the error of a waiter whose time is up, of its task and its timeout.
      make_overload: makes the error of a waiter that is shed.
      on_unserved: called after a task has left without a worker.
      checkouts: returns how many tasks have ever got an entry, also without waiting.
    """

    def __init__(
        self,
        *,
        patience: float,
        make_timeout: Callable[[Task, float], Exception],
        make_overload: Callable[[], Exception],
        on_unserved: Callable[[], None],
        checkouts: Callable[[], int],
    ) -> None:
        self.waiting = 0
        """Tasks that wait."""
        self.served = 0
        """Tasks that have got an entry."""
        self.wait_time = 0.0
        """Seconds that those have waited, in all."""
        self._make_timeout = make_timeout
        self._make_overload = make_overload
        self._on_unserved = on_unserved
        self._checkouts = checkouts
        self._joined = 0
        # The one that has waited for the longest comes first. A task that is not served leaves its
        # waiter here, until there are too many of those: to search for each would take too long.
        self._waiters: deque[Waiter] = deque()
        self._period = overload.period(patience)
        # A heap. No waiter is in it before the time has come to look at any that joined with it or
        # later: most are served long before that. Those that are, leave their timers here for a while.
        self._timers: list[Timer] = []
        self._timed = 0  # the number of the last waiter that has got a timer
        self._sleep = trio.CancelScope()
        self._wakes_at = math.inf  # the deadline of `_sleep`, which costs a call to ask
        self._now = trio.lowlevel.current_clock().current_time
        self._excess = overload.Excess(self._now())

    def join(self, timeout: float, blocking: bool = True) -> Waiter:
        """Put the current task at the end of the queue, for at most `timeout` seconds.

        It must sleep at once, as the class says. It is woken with an entry, or with what `make_timeout`
        or `make_overload` makes, or with what `fail` is given.
        """
        waiter = Waiter()
        waiter.queue = self
        waiter.task = current_task()
        waiter.since = now = self._now()
        waiter.timeout = timeout
        waiter.blocking = blocking
        waiter.served_before = self.served
        waiter.number = self._joined = self._joined + 1
        self.waiting += 1
        self._waiters.append(waiter)
        first_look = now + self._period * timeout
        if first_look < self._wakes_at:
            self._sleep.deadline = self._wakes_at = first_look
        return waiter

    def serve(self, entry: E, now: float) -> None:
        """Give an entry to the task that has waited the longest. Raises `IndexError` if none waits."""
        task = None
        while task is None:
            waiter = self._waiters.popleft()
            task = waiter.task
        waiter.task = None
        self.waiting -= 1
        self.served += 1
        self.wait_time += now - waiter.since
        reschedule(task, Value(entry))

    def fail(self, waiter: Waiter, error: Exception) -> None:
        """Take a waiter out of the queue, and raise an error in it. It must be waiting."""
        reschedule(self.remove(waiter), Error(error))

    def remove(self, waiter: Waiter) -> Task:
        """Take a waiter out of the queue, and return its task. It must be waiting."""
        task, waiter.task = waiter.task, None
        assert task is not None
        self.waiting -= 1
        if len(self._waiters) > 64 + 2 * self.waiting:
            self._waiters = deque(self)
        self._on_unserved()
        return task

    def __iter__(self) -> Iterator[Waiter]:
        """Return the waiters, in order. None may join or leave meanwhile."""
        return (waiter for waiter in self._waiters if waiter.task is not None)

    def nonblocking_beyond(self, on_the_way: int) -> list[Waiter]:
        """Return the nonblocking waiters that have at least `on_the_way` waiters ahead of them."""
        return [waiter for waiter in islice(self, on_the_way, None) if not waiter.blocking]

    def longest_wait(self, now: float) -> float:
        """Return for how many seconds the first waiter has waited; 0 if there is none."""
        for waiter in self:
            return now - waiter.since
        return 0

    # -- Timeouts ------------------------------------------------------------------------------------

    @enable_ki_protection
    async def run_timers(self) -> None:
        """Time out or shed waiters when it is time. One task does it for all of them; it never ends."""
        while True:
            self._wakes_at = math.inf  # a task that joins from here on may change it
            await self._set_timers()
            self._look_at_due()
            if self._timers:
                self._wakes_at = min(self._wakes_at, self._timers[0][0])
            with trio.CancelScope(deadline=self._wakes_at) as self._sleep:
                await trio.sleep_forever()

    async def _set_timers(self) -> None:
        """Set timers for the waiters that have joined since the last time, and still wait."""
        if len(self._timers) > 64 + 4 * self.waiting:
            self._timers = [timer for timer in self._timers if timer[2].task is not None]
            heapify(self._timers)
        untimed = list(takewhile(lambda waiter: waiter.number > self._timed, reversed(self._waiters)))
        self._timed = self._joined
        for count, waiter in enumerate(reversed(untimed), 1):
            if waiter.timeout != math.inf and waiter.task is not None:
                first_look = waiter.since + self._period * waiter.timeout
                heappush(self._timers, (first_look, waiter.number, waiter, None))
            if count % AT_ONCE == 0:
                self._look_at_due()
                await cancel_shielded_checkpoint()

    def _look_at_due(self) -> None:
        now = self._now()
        while self._timers and self._timers[0][0] <= now:
            self._on_timer(heappop(self._timers), now)

    def _on_timer(self, timer: Timer, now: float) -> None:
        """Look at a waiter one period after the last look, or when its time is up."""
        _, number, waiter, last = timer
        if waiter.task is None:
            return
        ends = waiter.since + waiter.timeout
        if now >= ends:
            self.fail(waiter, self._make_timeout(waiter.task, waiter.timeout))
            return
        look = overload.Look(self._joined, self.served, self.wait_time, self._checkouts())
        joining = overload.Look(number, waiter.served_before)
        self._excess.count(now, waiter.since, waiter.timeout, joining, look)
        # At the first look, some that were served in the period may have waited for a moment only.
        if last and overload.is_growing(last, look) and self._excess.is_lasting(waiter.timeout):
            self.fail(waiter, self._make_overload())
        else:
            again = overload.next_look(now, ends, self._period * waiter.timeout)
            heappush(self._timers, (again, number, waiter, look))
