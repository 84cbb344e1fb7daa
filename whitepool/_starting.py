"""Starts: how many are due, what became of them, and when opening the pool has succeeded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from . import _sizing as sizing
from ._backoff import (
    EARLY_DEATH_WINDOW,
    FAILURE_RESET_AFTER,
    Backoff,
    EarlyDeaths,
    draw_pause_full,
)
from ._entry import Entry, Reason
from ._errors import PoolStartError, describe
from ._log import PoolLog
from ._options import Options
from ._roster import Roster
from ._sharing import GAP, Sharing
from ._statistics import Counters

T = TypeVar("T")


class Starter(Generic[T]):
    """Starts the workers of one pool, and keeps account of what became of the starts.

    Args:
      sharing: knows whether the server is full.
      start_one: starts one worker, by adding it to the roster and running its task.
    """

    def __init__(
        self,
        roster: Roster[T],
        options: Options,
        counters: Counters,
        log: PoolLog,
        sharing: Sharing[T],
        *,
        start_one: Callable[[], None],
    ) -> None:
        self.backoff = Backoff()
        """When the next start may be tried, and why the last one failed."""
        self.opened = trio.Event()
        """Set when the pool has its workers, or when opening it has failed for good (`final_error`)."""
        self.final_error: PoolStartError | None = None
        """Why the pool can't be opened, and it is pointless to try again."""
        self.is_doubtful = False
        """Whether the next worker has to give a sign of life before it counts as open, because one has
        left that had not answered a probe, or whose peer had said why. Its successor may be no better:
        a proxy such as PgBouncer accepts connections also while its server is down."""
        self._roster = roster
        self._options = options
        self._counters = counters
        self._log = log
        self._sharing = sharing
        self._start_one = start_one
        self._early_deaths = EarlyDeaths()
        self._observers: list[Callable[[float], None]] = []
        self.down_since: float | None = None
        """Since when the pool is down. None while it is not."""
        # Whether it has been told that the server is full, which is told once.
        self._full_is_told = False

    @property
    def is_failing(self) -> bool:
        """Whether the last start failed."""
        return self.backoff.last_error is not None

    @property
    def is_down(self) -> bool:
        """Whether no worker is alive, and starts fail."""
        return self.is_failing and not self._roster.open

    def is_hopeless(self, joined_at: float, timeout: float) -> bool:
        """Say whether the pool had been down for longer than `timeout` when a task joined the queue.

        A task that joined earlier keeps its time: a server that is restarted is back in a moment.
        """
        return self.down_since is not None and joined_at - self.down_since > timeout

    def is_pausing(self, now: float) -> bool:
        """Say whether a start has failed, and the next one has to wait."""
        return now < self.backoff.retry_at and not self._roster.opening

    @property
    def target(self) -> int:
        """Workers to keep open, whether a task waits for them or not."""
        return 0 if self._options.lazy else self._roster.pool_size

    def start_missing(self, *, unprovided: int, draining: bool, now: float) -> None:
        """Start the workers that are missing, for `unprovided` waiters and for the target of the pool.

        While `draining`, workers are started only for the tasks that wait.
        """
        roster = self._roster
        missing = sizing.how_many_to_start(
            unprovided=unprovided,
            opening=roster.opening,
            lasting=roster.lasting,
            target=0 if draining else self._sharing.target(self.target, now),
            room=self._sharing.room(now),
            at_once=sizing.starts_at_once(
                max_starting=self._options.max_starting,
                is_failing=self.is_failing or self._sharing.is_full(now),
                is_pausing=now < self.backoff.retry_at,
            ),
        )
        if missing > 0:
            self._sharing.wants_worker = False  # to close one and open another would be pointless
        for _ in range(missing):
            self._start_one()

    def may_retire(self, *, waiting: int, now: float) -> bool:
        """Say whether a worker that is to be replaced may go now, while so many tasks wait."""
        roster = self._roster
        # A pool that was made smaller than the peer allows starts none, so it would not learn that the
        # peer takes connections again: an old failure keeps no worker for ever.
        is_recent = now <= self.backoff.last_failure + FAILURE_RESET_AFTER
        return sizing.may_retire(
            lasting=roster.lasting,
            target=self.target,
            waiting=waiting,
            open_now=roster.open,
            total=len(roster.entries),
            limit=roster.limit,
            is_failing=self.is_failing and is_recent,
        ) or self._sharing.may_exchange(waiting=waiting, now=now)

    def on_retired(self, now: float) -> None:
        """Note that a worker that is to be replaced has gone."""
        if self._sharing.is_full(now):
            self._sharing.on_exchange(now)
            self.backoff.retry_at = -math.inf  # its place is free in this moment

    def try_by(self, time: float) -> None:
        """Have the next start wait until that time at the longest."""
        self.backoff.retry_at = min(self.backoff.retry_at, time)

    def on_opened(self, entry: Entry[T]) -> None:
        """Note that a worker has been opened: the starts after it need no pause."""
        if self.is_failing and not self._full_is_told:
            self._log.info("start_recovered", failures=self.backoff.failures)
        self.down_since = None
        self.is_doubtful = False
        self.backoff.succeeded(begun=entry.opened_at - entry.opening_time)
        self._sharing.on_opened(entry.opened_at)
        if self._sharing.is_full(entry.opened_at):
            # There was one place. In this time, each pool that has no worker tries to get the next.
            self.backoff.retry_at = max(self.backoff.retry_at, entry.opened_at + GAP)
        self._log.debug("worker_started", seconds=round(entry.opening_time, 6))
        for observe in self._observers:
            observe(entry.opening_time)

    def on_failed(self, error: Exception, begun: float, now: float, *, is_full: bool) -> None:
        """Note that a worker could not be opened; that had begun at the time `begun`.

        The next start has to wait until `backoff.retry_at`, and the caller has to wake the supervisor
        then. A `PoolStartError` before the pool is open is final. If the server `is_full`, the pool is
        content with the workers that it has, if there is one, and goes on trying.
        """
        self._counters["start_failures"] += 1
        pause = draw_pause_full(self._roster.open, self.backoff.failures) if is_full else None
        self._back_off(error, begun, now, pause)
        if is_full:
            self._sharing.on_refused(now)
            if not self._full_is_told:
                self._log.warning("server_full", open=self._roster.open, error=describe(error))
        else:
            self._log.throttled_warning("start_failed", error=describe(error))
        self._full_is_told = is_full
        if isinstance(error, PoolStartError) and not self.opened.is_set():
            self.final_error = error
            self.opened.set()

    def count_death(self, entry: Entry[T], reason: Reason, now: float) -> bool:
        """Note that an open worker has died; say whether that counts as a failed start.

        It does if workers keep dying early: otherwise they would be replaced without end, and without a
        pause. As after `on_failed`, the caller then has to wake the supervisor at `backoff.retry_at`.
        """
        # One early death for each worker that the pool may have can be an accident.
        if not self._early_deaths.too_many(self._roster.limit, opened_at=entry.opened_at, now=now):
            return False
        error = ConnectionError(f"workers are lost within {EARLY_DEATH_WINDOW} s of opening: {reason}")
        self._back_off(error, entry.opened_at, now)
        return True

    def _back_off(self, error: Exception, begun: float, now: float, pause: float | None = None) -> None:
        # A lazy pool has made no attempt while it was not used: what was then says nothing of now.
        if begun > self.backoff.last_failure + FAILURE_RESET_AFTER:
            self.down_since = None
        self.backoff.failed(error, begun=begun, now=now, pause=pause)
        self.note_if_down(now)

    def note_if_down(self, now: float) -> None:
        """Note since when the pool is down. To be called when a start has failed or a worker leaves."""
        if self.down_since is None and self.is_down:
            self.down_since = now

    def set_opened_if_complete(self, now: float) -> None:
        """Set `opened` if enough workers are open, and ready to be used: of a full server, one."""
        enough = min(1, self._min_ready) if self._full_is_told else self._min_ready
        if self._roster.open - self._roster.servicing >= enough:
            self._set_opened()
        if (
            self._full_is_told
            and not self.is_failing
            and not self._sharing.is_full(now)
            and self._roster.lasting >= self.target
        ):
            self._full_is_told = False
            self._log.info("start_recovered", failures=self.backoff.failures)

    def _set_opened(self) -> None:
        if not self.opened.is_set():
            self.opened.set()
            self._log.info("pool_opened", workers=self._roster.open)

    @property
    def _min_ready(self) -> int:
        min_ready = self._options.min_ready
        return self.target if min_ready is None else min(min_ready, self.target)

    async def wait_opened(self) -> None:
        """Return when the pool has as many workers as it has to have to be open: `min_ready`.

        Raises `PoolStartError` after `start_timeout`, or as soon as it is pointless to try again.
        """
        options = self._options
        with trio.move_on_after(options.start_timeout):
            await self.opened.wait()
        if self.final_error is not None:
            raise self.final_error
        if not self.opened.is_set():
            error = self.backoff.last_error
            reason = f"; the last start failed: {describe(error)}" if error else ""
            raise PoolStartError(
                f"{options.name}: {self._roster.open} of {self._min_ready} workers started "
                f"within {options.start_timeout:g} s{reason}"
            ) from error

    def why_none_starts(self, now: float) -> Exception | None:
        """Return why the last start failed, if no worker can be started now as far as is known."""
        return self.backoff.recent_error(now, self._options.start_timeout)

    def observe(self, observe: Callable[[float], None]) -> None:
        """Report the seconds that each worker took to open: those that are open, and those to come."""
        for entry in self._roster.entries:
            if entry.is_open:
                observe(entry.opening_time)
        self._observers.append(observe)
