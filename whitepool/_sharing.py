"""A server that is full: a pool leaves places to other pools, and sees whether they are wanted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Generic, TypeVar

from ._entry import Entry, Reason, State
from ._roster import Roster

T = TypeVar("T")

FULL_FOR = 30.0
"""Seconds after a refusal for which the server counts as full, or up to a quarter more or less."""

LOOK = 0.25
"""Seconds from one look at the pool to the next, while it may have to leave a place to others."""

BUSY_FOR = 1.0
"""Seconds for which a pool has had no idle worker, and tasks that wait, when it is saturated. A worker
that was idle for so long is not needed."""

GAP = 1.5
"""Seconds for which a place is left to others. A pool that has no worker tries more often."""

PRICE = 0.006
"""The share of its throughput that a saturated pool pays to learn that no other pool wants its places,
in the long run."""

PACE = 1.0
"""Seconds from one idle worker that is let go, because the server is full, to the next."""

SHARE_OVERFLOW = 5.0
"""Seconds, divided by the number of workers: from one that is let go to the next, where others want
the places, and the pool has overflow. So a pool with many loses more of them than one with few."""

SHARE = 30.0
"""The same, when it has no overflow any more."""

EXCHANGE_PAUSE = 5.0
"""Seconds from one worker that goes without a replacement to the next, if none could be opened."""


class Sharing(Generic[T]):
    """Decides when a pool leaves one of its places on the server to other pools.

    A server that is full refuses those pools that need a worker, and tells the others nothing. So
    overflow is a loan: a pool that is saturated closes one worker, and opens no other for `GAP`. If it
    can have one then, no other pool wanted the place, and the next trial comes later. If it is refused,
    it knows that the server is full.

    While that is known, a pool opens one worker at a time, and only for tasks that wait. Workers that
    it does not need go, one by one. If it needs them all, it leaves one place after the other, as
    above: first those of its overflow, then the others, more slowly. It keeps one worker in any case.

    Args:
      waiting: returns how many tasks wait for a worker.
      evict: closes an idle worker for a reason.
      call_in: has `takes` asked of each worker that comes back.
      wake: has the supervisor look at what is missing, and at what is to be replaced.
    """

    def __init__(
        self,
        roster: Roster[T],
        *,
        waiting: Callable[[], int],
        evict: Callable[[Entry[T], Reason], None],
        call_in: Callable[[], None],
        wake: Callable[[], None],
    ) -> None:
        self.wants_worker = False
        """Whether the next worker that comes back is to be closed."""
        self.left_until = -math.inf
        """Until when a place is left to others."""
        self._roster = roster
        self._waiting = waiting
        self._evict = evict
        self._call_in = call_in
        self._wake = wake
        self._full_until = -math.inf
        self._busy_since = math.inf
        self._left_size = 0  # the pool starts none beyond so many before `left_until`
        self._awaits_outcome = False
        # How often no other pool has wanted the place, since one has.
        self._trials_won = 0
        # When a worker was let go last, or it was known what has become of its place; and the factor
        # for the pause that follows: pools must not do it in step.
        self._last = -math.inf
        self._jitter = 1.0
        self._exchange_at = -math.inf

    # -- What follows for starts ---------------------------------------------------------------------

    def is_full(self, now: float) -> bool:
        """Say whether the server is full, as far as is known."""
        return now < self._full_until

    def target(self, target: int, now: float) -> int:
        """Return how many workers to keep open, of the `target`: on a full server, those in use.

        Workers that are to be replaced don't count. There they have no others beside them: they go
        first (`may_exchange`).
        """
        if not self.is_full(now):
            return target
        roster = self._roster
        leaving = sum(entry.state is not State.IDLE for entry in roster.expiring)
        return min(target, max(1, roster.in_use + roster.servicing) - leaving)

    def room(self, now: float) -> int:
        """Return how many workers may be started, less the place that is left to others."""
        roster = self._roster
        if now < self.left_until:
            return min(roster.room, self._left_size - roster.open - roster.opening)
        return roster.room

    def may_exchange(self, *, waiting: int, now: float) -> bool:
        """Say whether a worker that is to be replaced may go before another is there.

        A full server gives no other first. The last one stays while tasks wait.
        """
        roster = self._roster
        is_due = now >= self._exchange_at and not roster.opening
        return self.is_full(now) and is_due and (roster.open > 1 or not waiting)

    # -- What it learns ------------------------------------------------------------------------------

    def on_refused(self, now: float) -> None:
        """Note that the server is full: a start was refused."""
        if self._awaits_outcome:
            self._trials_won = 0
        elif not self.is_full(now):
            self._trials_won = 0
            self._last = now
        self._awaits_outcome = False
        self._full_until = now + FULL_FOR * random.uniform(0.75, 1.25)

    def on_opened(self, now: float) -> None:
        """Note that a worker has been opened."""
        if self._awaits_outcome and now >= self.left_until:
            self._awaits_outcome = False
            self._trials_won += 1
            self._last = now
        self._exchange_at = now

    def on_exchange(self, now: float) -> None:
        """Note that a worker has gone that is to be replaced."""
        self._exchange_at = now + EXCHANGE_PAUSE

    def on_resized(self) -> None:
        """Note that the bounds have changed: the place that was left may never be asked for."""
        self._awaits_outcome = False

    # -- Leaving a place -----------------------------------------------------------------------------

    @property
    def may_be_due(self) -> bool:
        """Whether to `look`, in a moment and again."""
        return max(self._full_until, self.left_until) > -math.inf or self._has_overflow

    def look(self, now: float) -> float:
        """Let an idle worker go, or call one in, if it is time. Return when to look again."""
        self._forget_what_is_over(now)
        self._note_if_busy(now)
        if self._roster.expiring and self.is_full(now):
            self._wake()  # one of them may be due
        if self._may_leave_another(now):
            if self._has_idle_to_spare(now):
                self._last = now
                self._evict(self._roster.idle[0], "overflow")
            elif now >= self._busy_since + BUSY_FOR:
                self.wants_worker = True
                self._call_in()
        times = [time for time in (self._full_until, self.left_until) if time > now]
        return min([now + LOOK, *times]) if self.may_be_due else math.inf

    def takes(self, now: float) -> bool:
        """Say whether a worker that has come back is to be closed. Then its place is left to others."""
        # Others may have gone since the last look.
        if not (self.wants_worker and self._has_places_to_leave(now)):
            return False
        self.wants_worker = False
        self.left_until = now + GAP
        self._left_size = self._roster.open - 1
        self._awaits_outcome = True
        self._last = now
        self._jitter = random.uniform(0.75, 1.25)
        return True

    def _forget_what_is_over(self, now: float) -> None:
        if -math.inf < self._full_until <= now:
            self._full_until = -math.inf
            self._wake()  # what was put off may be started
        if -math.inf < self.left_until <= now:
            self.left_until = -math.inf
            self._wake()

    def _note_if_busy(self, now: float) -> None:
        roster = self._roster
        # On a server that is not full, as far as is known, a pool keeps what is in use. A worker that
        # is being reset or probed is about to serve one of those that wait.
        is_short = self._waiting() > roster.servicing or self.is_full(now)
        if roster.idle or not (is_short and self._has_places_to_leave(now)):
            self._busy_since = math.inf
            self.wants_worker = False
        elif self._busy_since == math.inf:
            self._busy_since = now

    def _may_leave_another(self, now: float) -> bool:
        """Say whether enough time has passed since the last one."""
        # Where another is known to have been wanted, the next follows without a trial.
        is_trial = self._awaits_outcome and not self.is_full(now)
        return not (
            self._roster.opening or self.wants_worker or is_trial or now < self._last + self._pause(now)
        )

    def _has_places_to_leave(self, now: float) -> bool:
        return self._roster.open > 1 and (self._has_overflow or self.is_full(now))

    @property
    def _has_overflow(self) -> bool:
        return self._roster.lasting > self._roster.pool_size

    def _has_idle_to_spare(self, now: float) -> bool:
        roster = self._roster
        if not self.is_full(now) or not roster.idle or roster.open < 2:
            return False
        return now >= roster.idle[0].idle_since + BUSY_FOR

    def _pause(self, now: float) -> float:
        """Return the seconds from one worker that is let go to the next."""
        if self._roster.idle:
            return PACE
        workers = max(1, self._roster.open)
        pause = 0.0
        if self.is_full(now):
            pause = (SHARE_OVERFLOW if self._has_overflow else SHARE) / workers
        if self._trials_won:
            longest = GAP / PRICE / workers
            pause = max(pause, min(longest, GAP * 2.0 ** min(self._trials_won - 2, 10)))
        return self._jitter * pause
