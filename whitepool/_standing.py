"""How a pool stands: as a snapshot for its users, and in the errors of tasks that get no worker."""

from __future__ import annotations

from typing import Generic, TypeVar

import trio
from trio.lowlevel import Task

from ._entry import Entry, State
from ._errors import CheckoutTimeout, PoolOverloaded, PoolUnavailable, describe
from ._nesting import holds_one_of
from ._options import Options
from ._roster import Roster
from ._starting import Starter
from ._statistics import Counters, PoolState, PoolStatistics
from ._wait_queue import WaitQueue

T = TypeVar("T")


class Standing(Generic[T]):
    """Describes one pool. It counts the tasks that get no worker, and changes nothing else."""

    queue: WaitQueue[Entry[T]]
    """The tasks that wait. The supervisor sets it, because the queue needs the methods below."""

    def __init__(
        self, options: Options, counters: Counters, roster: Roster[T], starter: Starter[T]
    ) -> None:
        self._options = options
        self._counters = counters
        self._roster = roster
        self._starter = starter
        self._now = trio.lowlevel.current_clock().current_time
        self.last_words: dict[str, str] = {}
        """For each reason: what the peer of the last worker said that left for it, noted by the
        supervisor."""

    def obtainable(self) -> int:
        """Return how many waiters can be served without a client returning a worker."""
        return max(0, self._roster.limit - self._roster.in_use)

    def count_timeout(self, task: Task, timeout: float) -> CheckoutTimeout:
        """Count a waiter whose time is up, and make its error, which says how the pool stands now."""
        self._counters["timeouts"] += 1
        error = CheckoutTimeout(
            f"{self._options.name} has had no worker within {timeout:g} s: {self._how_it_stands()}"
            f"{self._hint_at_nesting(task)}"
        )
        error.__cause__ = self._starter.why_none_starts(self._now())
        return error

    def count_overload(self) -> PoolOverloaded:
        """Count a task that is shed, or refused, and make its error."""
        self._counters["overloads"] += 1
        error = PoolOverloaded(f"{self._options.name} is overloaded: {self._how_it_stands()}")
        error.__cause__ = self._starter.why_none_starts(self._now())
        return error

    def count_unavailable(self) -> PoolUnavailable:
        """Count a task that is refused because the pool is down, and make its error."""
        self._counters["timeouts"] += 1
        error = self._starter.backoff.last_error
        assert error is not None  # that is what it is to be down
        unavailable = PoolUnavailable(
            f"{self._options.name} is down: no worker is alive, and the last start failed: "
            f"{describe(error)}"
        )
        unavailable.__cause__ = error
        return unavailable

    def _how_it_stands(self) -> str:
        roster = self._roster
        error = self._starter.why_none_starts(self._now())
        reason = f"; the last start failed: {describe(error)}" if error else ""
        return (
            f"{roster.in_use} in use, {roster.opening} starting, {roster.servicing} resetting, "
            f"{self.queue.waiting} waiting{reason}"
        )

    def _hint_at_nesting(self, task: Task) -> str:
        """Say so if a task has waited for a worker while it held one, and no other was to be had."""
        if self.obtainable() > 0:
            return ""
        if not holds_one_of(task, self._roster):
            return ""
        return (
            "; this task seems to hold a worker of this pool already: such nested checkouts wait for "
            "each other, so pass the worker on instead"
        )

    def snapshot(self, *, draining: bool, closed: bool) -> PoolStatistics:
        """Return the statistics of the pool, which is `draining` or `closed` or neither."""
        roster = self._roster
        state: PoolState
        if closed:
            state = "closed"
        elif draining:
            state = "draining"
        elif self._starter.is_down:
            state = "down"
        elif roster.idle:
            state = "ready"
        else:
            state = "overflow" if roster.room > 0 else "full"
        now = self._now()
        in_use = [entry for entry in roster.entries if entry.state is State.IN_USE]
        error = self._starter.backoff.last_error
        return PoolStatistics(
            name=str(self._options.name),
            state=state,
            pool_size=roster.pool_size,
            max_overflow=roster.limit - roster.pool_size,
            idle=len(roster.idle),
            in_use=roster.in_use,
            overflow=max(0, roster.open + roster.opening - roster.pool_size),
            starting=roster.opening,
            resetting=roster.servicing,
            waiting=self.queue.waiting,
            longest_wait=self.queue.longest_wait(now),
            longest_use=max((now - entry.in_use_since for entry in in_use), default=0.0),
            waited=self.queue.served,
            wait_time=self.queue.wait_time,
            last_error=describe(error) if error else None,
            **self._counters,
            last_words=self.last_words.copy(),
        )
