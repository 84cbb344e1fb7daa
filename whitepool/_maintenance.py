"""Maintenance: retires workers that are surplus, too old or unused, probes the rest, and has checkouts
that last for too long reported.

The loop here asks `_sizing` which workers are due, evicts or marks them, and wakes the supervisor,
which replaces them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from . import _sizing as sizing
from ._entry import SMALLEST_FIRST_LIFETIME, Entry, Reason
from ._options import Options
from ._roster import Roster

T = TypeVar("T")


class Duty:
    """Something that comes due for one worker after the other, of all those in a pool.

    Args:
      look: does what is due, and returns when more is, as things are.
      pause: from one look to the next, at least, in seconds.
      period: how long it takes at least until a worker that changes hands now comes due, in seconds.
    """

    def __init__(self, look: Callable[[float], float], *, pause: float, period: float) -> None:
        self.due = -math.inf
        """When to look again."""
        self._look = look
        self._pause = pause
        self._period = period

    def do_if_due(self, now: float) -> None:
        """Look at the workers, unless none can be due yet."""
        if self.due <= now:
            self.due = sizing.next_look(now, self._look(now), self._pause, self._period)


class Maintenance(Generic[T]):
    """Looks at the workers of one pool whenever one of them may have come due.

    Args:
      evict: closes a worker for a reason.
      replace: called when workers were marked that are to be replaced.
      report_held: reports checkouts that last for too long; returns when the next comes due.
      share: leaves places to other pools; returns when to look again. See `share_by`.
    """

    def __init__(
        self,
        roster: Roster[T],
        options: Options,
        *,
        evict: Callable[[Entry[T], Reason], None],
        replace: Callable[[], None],
        report_held: Callable[[float], float],
        share: Callable[[float], float],
    ) -> None:
        self._roster = roster
        self._options = options
        self._evict = evict
        self._replace = replace
        periods = sizing.periods(options)
        pause = sizing.PAUSE_FRACTION * min(periods)
        self._aging = Duty(self._mark_old, pause=pause, period=periods.lifetime)
        self._sharing = Duty(share, pause=0, period=math.inf)
        # Most pools have no overflow, most of the time: then there is nothing to look for. Nor is there
        # where no worker can be probed.
        self._surplus = Duty(self._evict_surplus, pause=pause, period=math.inf)
        self._surplus_period = periods.surplus
        self._probing = Duty(self._probe, pause=sizing.PROBE_RETRY, period=math.inf)
        self._duties = [
            self._surplus,
            self._aging,
            self._sharing,
            Duty(self._mark_unused, pause=pause, period=periods.idle),
            self._probing,
            Duty(report_held, pause=pause, period=periods.held),
        ]
        # What an idle pool costs is nearly all for probes, and for the wakes that begin them.
        self._probe_pause = sizing.PAUSE_FRACTION * periods.probe
        # A heap: when each worker may have to be probed, at the earliest. A use puts that off, which is
        # found out when it is time, because a use must cost nothing. A number decides between equals.
        self._coming: list[tuple[float, int, Entry[T]]] = []
        self._numbers = count()
        # Workers that are too old, and whose successors have not been opened yet.
        self._successors = 0
        self._now = trio.lowlevel.current_clock().current_time
        self._nap = trio.CancelScope()
        # When an idle worker was last suspected to be of no use; when all suspects were last probed,
        # and when they are to be, because they could not be at once.
        self._suspected_at = -math.inf
        self._suspects_probed_at = -math.inf
        self._suspects_due = math.inf

    def add(self, entry: Entry[T]) -> None:
        """Look after a worker that has been opened, until it has to leave.

        Workers that are opened together, when the pool is opened or recovers, must not reconnect
        together: each may get old much sooner. Their successors come one by one, and stay apart.
        """
        share = entry.jitter if self._successors else random.uniform(SMALLEST_FIRST_LIFETIME, 1)
        self._successors = max(0, self._successors - 1)
        entry.expires_at = entry.opened_at + self._options.max_lifetime * share
        self._look_by(self._aging, entry.expires_at)
        if self._excess > 0:
            self._look_by(self._surplus, entry.opened_at + self._surplus_period)
        if entry.can_be_checked and 0 < self._options.check_interval < math.inf:
            # Those that have left are forgotten when it is their time, or when there are many of them.
            if len(self._coming) > 64 + 2 * len(self._roster.entries):
                self._coming = [item for item in self._coming if item[2].evict_reason is None]
                heapify(self._coming)
            due = sizing.probe_at(entry, self._options.check_interval, self._now())
            heappush(self._coming, (due, next(self._numbers), entry))
            self._look_by(self._probing, due)

    def share_by(self, time: float) -> None:
        """Have `share` called at that time, or before."""
        self._look_by(self._sharing, time)

    def on_resized(self) -> None:
        """Look for overflow workers: the pool may have others, now that its size is another."""
        self._look_by(self._surplus, self._now())

    def _look_by(self, duty: Duty, time: float) -> None:
        duty.due = min(duty.due, time)
        self._nap.deadline = min(self._nap.deadline, time)

    def probe_all(self) -> None:
        """Have all idle workers probed at once: what made one of them useless may go for all.

        It is done at most once in `PROBE_ALL_PAUSE`; if it is too early, it is done later. Not just
        half of them are probed, so a client may have to wait: it would get one of the suspects
        otherwise. It does not wait for long: `WorkerManager._suspect_timeout` limits the probes. With
        ``check_interval=math.inf`` no worker is ever probed.
        """
        if self._options.check_interval == math.inf:
            return
        self._suspected_at = now = self._now()
        self._suspects_due = max(now, self._suspects_probed_at + sizing.PROBE_ALL_PAUSE)
        self._nap.deadline = min(self._nap.deadline, self._probe_suspects(now))

    @enable_ki_protection
    async def run(self) -> None:
        """Do what is due, and sleep until more may be. It never ends."""
        while True:
            began = self._now()
            for duty in self._duties:
                duty.do_if_due(began)
            due = min(duty.due for duty in self._duties)
            wake_at = min(due, self._probe_suspects(began))
            with trio.CancelScope(deadline=wake_at) as self._nap:
                await trio.sleep_forever()

    # -- Duties: each returns when the next worker comes due -----------------------------------------

    @property
    def _excess(self) -> int:
        """Overflow workers, whether they are idle or not."""
        return self._roster.lasting - self._roster.pool_size

    def _evict_surplus(self, now: float) -> float:
        """Evict overflow workers that no client has needed for `overflow_ttl`.

        Any idle worker will do: the ones that were idle for the longest go, however they were started.
        """
        ttl = self._options.overflow_ttl
        surplus, next_due = sizing.surplus(self._roster.idle, self._excess, ttl, now)
        for entry in surplus:
            self._evict(entry, "overflow")
        # One that is in use may be idle soon.
        return min(next_due, now + self._surplus_period) if self._excess > 0 else math.inf

    def _mark_old(self, now: float) -> float:
        """Mark workers that are alive and well, but too old."""
        too_old, next_due = sizing.lifetime_expired(self._roster.entries, now)
        self._mark(too_old, "lifetime")
        if too_old:
            self._successors = len(self._roster.expiring)
        return next_due

    def _mark_unused(self, now: float) -> float:
        """Mark workers that are alive and well, but unused for too long."""
        unused, next_due = sizing.idle_expired(self._roster.idle, self._options.idle_timeout, now)
        self._mark(unused, "idle")
        return next_due

    def _mark(self, entries: list[Entry[T]], reason: Reason) -> None:
        """Mark workers, which go when the supervisor has their replacements, if the pool wants any."""
        for entry in entries:
            self._roster.mark(entry, reason)
        if entries:
            self._replace()

    def _probe(self, now: float) -> float:
        """Have idle workers probed that have given no sign of life for `check_interval`.

        Each comes back through the supervisor's channel, or is evicted.
        """
        roster, coming, interval = self._roster, self._coming, self._options.check_interval
        room = sizing.room_for_probes(len(roster.idle), len(roster.probes))
        while coming and coming[0][0] <= now:
            _, number, entry = coming[0]
            if entry.evict_reason is not None:
                heappop(coming)
                continue
            if sizing.probe_at(entry, interval, now) <= now:
                if room <= 0:
                    return now  # as soon as may be
                room -= 1
                self._have_probed([entry], now)
            heapreplace(coming, (sizing.probe_at(entry, interval, now), number, entry))
        return max(coming[0][0], now + self._probe_pause) if coming else math.inf

    def _probe_suspects(self, now: float) -> float:
        """Have all suspects probed, if that is due."""
        if self._suspects_due <= now:
            self._suspects_due = math.inf
            self._suspects_probed_at = now
            suspects = sizing.suspects(self._roster.idle, self._suspected_at)
            self._have_probed(suspects, now, are_suspects=True)
        return self._suspects_due

    def _have_probed(
        self, entries: Iterable[Entry[T]], now: float, *, are_suspects: bool = False
    ) -> None:
        for entry in entries:
            self._roster.begin_probe(entry, now)
            entry.task.probe(is_suspect=are_suspects)
