"""Maintenance: retires workers that are surplus, too old or unused, probes the rest, and has checkouts
that last for too long reported.

The loop here asks `_sizing` which workers are due, evicts or marks them, and wakes the supervisor,
which replaces them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from . import _sizing as sizing
from ._entry import Entry, Reason
from ._options import Options
from ._roster import Roster

T = TypeVar("T")


class Maintenance(Generic[T]):
    """Looks at the workers of one pool whenever one of them may have come due.

    Args:
      evict: closes a worker for a reason.
      replace: called when workers were marked that are to be replaced.
      report_held: reports checkouts that last for too long; returns when the next comes due.
    """

    def __init__(
        self,
        roster: Roster[T],
        options: Options,
        *,
        evict: Callable[[Entry[T], Reason], None],
        replace: Callable[[], None],
        report_held: Callable[[float], float],
    ) -> None:
        self._roster = roster
        self._options = options
        self._evict = evict
        self._replace = replace
        self._report_held = report_held
        self._now = trio.lowlevel.current_clock().current_time
        self._nap = trio.CancelScope()
        # When an idle worker was last suspected to be of no use; when all suspects were last probed,
        # and when they are to be, because they could not be at once.
        self._suspected_at = -math.inf
        self._suspects_probed_at = -math.inf
        self._suspects_due = math.inf

    def probe_all(self) -> None:
        """Have all idle workers probed at once: what made one of them useless may go for all.

        It is done at most once in `PROBE_ALL_PAUSE`; if it is too early, it is done later. Not just
        half of them are probed, so a client may have to wait: it would get one of the suspects
        otherwise. With ``check_interval=math.inf`` no worker is ever probed.
        """
        if self._options.check_interval == math.inf:
            return
        self._suspected_at = now = self._now()
        self._suspects_due = max(now, self._suspects_probed_at + sizing.PROBE_ALL_PAUSE)
        self._nap.deadline = min(self._nap.deadline, self._probe_suspects(now))

    @enable_ki_protection
    async def run(self) -> None:
        """Do what is due, and sleep until more may be. It never ends."""
        shortest = sizing.shortest_period(self._options)
        while True:
            began = self._now()
            due = min(
                self._evict_surplus(began),
                self._mark_expired(began),
                self._probe(began),
                self._report_held(began),
            )
            wake_at = min(sizing.next_maintenance(began, due, shortest), self._probe_suspects(began))
            with trio.CancelScope(deadline=wake_at) as self._nap:
                await trio.sleep_forever()

    # Each of these returns when the next worker comes due.

    def _evict_surplus(self, now: float) -> float:
        """Evict overflow workers that no client has needed for `overflow_ttl`.

        Any idle worker will do: the ones that were idle for the longest go, however they were started.
        """
        roster, options = self._roster, self._options
        excess = roster.lasting - roster.pool_size
        surplus, next_due = sizing.surplus(roster.idle, excess, options.overflow_ttl, now)
        for entry in surplus:
            self._evict(entry, "overflow")
        return next_due

    def _mark_expired(self, now: float) -> float:
        """Mark workers that are alive and well, but too old, or unused for too long.

        They go when the supervisor has their replacements, if the pool wants any.
        """
        roster, options = self._roster, self._options
        too_old, lifetime_due = sizing.lifetime_expired(roster.entries, now)
        for entry in too_old:
            roster.mark(entry, "lifetime")
        unused, idle_due = sizing.idle_expired(roster.idle, options.idle_timeout, now)
        for entry in unused:
            roster.mark(entry, "idle")
        if too_old or unused:
            self._replace()
        return min(lifetime_due, idle_due)

    def _probe(self, now: float) -> float:
        """Have idle workers probed that have given no sign of life for `check_interval`.

        Each comes back through the supervisor's channel, or is evicted.
        """
        roster = self._roster
        interval = self._options.check_interval
        silent, next_due = sizing.probe_due(roster.idle, len(roster.probes), interval or math.inf, now)
        self._have_probed(silent, now)
        return next_due

    def _probe_suspects(self, now: float) -> float:
        """Have all suspects probed, if that is due."""
        if self._suspects_due <= now:
            self._suspects_due = math.inf
            self._suspects_probed_at = now
            self._have_probed(sizing.suspects(self._roster.idle, self._suspected_at), now)
        return self._suspects_due

    def _have_probed(self, entries: Iterable[Entry[T]], now: float) -> None:
        for entry in entries:
            self._roster.begin_probe(entry, now)
            entry.task.probe()
