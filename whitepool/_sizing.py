"""How many workers a pool should have, and which of them it should retire, probe or report.

Every decision here is a function of plain values, and changes nothing. `Starter`, `Maintenance` and
`Supervisor` ask, and do what follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple, TypeVar

from ._entry import SMALLEST_JITTER, Entry, State
from ._options import Options

T = TypeVar("T")

PAUSE_FRACTION = 0.05
"""What comes due within this fraction of a period is done together, so that few wakes are needed."""

PROBE_ALL_PAUSE = 1.0
"""Seconds from one time that all idle workers are probed at once to the next."""

PROBE_RETRY = 0.05
"""Seconds after which a probe that was put off, because others are under way, is looked at again."""

MOST_PROBES = 100
"""Probes that are begun together, so that they don't keep other tasks from running for long. The next
follow after `PROBE_RETRY`."""


def how_many_to_start(
    *, unprovided: int, opening: int, lasting: int, target: int, room: int, at_once: int
) -> int:
    """Return how many workers to start now; 0 or less means none.

    Args:
      unprovided: tasks in the wait queue that no probed worker is about to serve.
      opening: workers that are being opened.
      lasting: open workers that are not about to be replaced.
      target: open workers that the pool wants, whether a task waits for them or not.
      room: workers that the pool may still have.
      at_once: workers that may be opened at the same time.
    """
    # 1. Each waiter gets a worker of its own. One that a client returns, or that is being reset, may
    #    serve the waiter sooner. But that may take long, and the new worker is there for the next task.
    for_waiters = unprovided - opening
    # 2. The pool is kept at its size.
    for_target = target - lasting - opening
    # 3. Neither may exceed the bounds.
    return min(max(for_waiters, for_target), room, at_once - opening)


def starts_at_once(*, max_starting: int, is_failing: bool, is_pausing: bool) -> int:
    """Return how many workers may be opened at the same time."""
    # 1. The pause after a failed start is not over.
    if is_pausing:
        return 0
    # 2. A server that refused is tried by one start at a time. When that succeeds, the others follow.
    if is_failing:
        return 1
    return max_starting


def may_retire(
    *, lasting: int, target: int, waiting: int, open_now: int, total: int, limit: int, is_failing: bool
) -> bool:
    """Say whether an open worker that is to be replaced may go now.

    Args:
      lasting: open workers that are not about to be replaced.
      target: open workers that the pool wants to keep.
      waiting: tasks in the wait queue.
      open_now: open workers.
      total: all workers, those included that are being opened or closed.
      limit: workers that the pool may have.
      is_failing: the last start failed, a moment ago.
    """
    # 1. Its replacement is there, and no task needs the worker itself.
    if lasting >= target and not waiting:
        return True
    # 2. There is no room to open the replacement first, so a worker has to make room for it: one at a
    #    time, and not while the server refuses new ones.
    #    Where tasks wait, the pool is full soon, as it starts workers for them.
    is_full = total >= limit
    is_first = open_now == total  # none is being opened or closed
    return is_full and is_first and not is_failing


class Periods(NamedTuple):
    """How long it takes at least until a worker that changes hands now comes due, in seconds."""

    surplus: float
    lifetime: float
    idle: float
    probe: float
    held: float


def periods(options: Options) -> Periods:
    """Return the periods that the options set; `math.inf` where no worker ever comes due."""
    return Periods(
        surplus=SMALLEST_JITTER * (options.overflow_ttl or math.inf),
        lifetime=SMALLEST_JITTER * options.max_lifetime,
        idle=SMALLEST_JITTER * options.idle_timeout,
        probe=SMALLEST_JITTER * (options.check_interval or math.inf),
        held=SMALLEST_JITTER * options.held_warning,
    )


def next_look(now: float, due: float, pause: float, period: float) -> float:
    """Return when to look again for workers that are due; `due` is when the first is, as things are.

    That is after a `pause` at the earliest. A worker that changes hands now may be due after `period`.
    """
    return min(max(due, now + pause), now + period)


# The following return the entries that are due, and the time at which the first of the others is.


def surplus(
    idle: Iterable[Entry[T]], excess: int, overflow_ttl: float, now: float
) -> tuple[list[Entry[T]], float]:
    """Find up to `excess` workers, the longest idle first, that were idle for `overflow_ttl`."""
    found: list[Entry[T]] = []
    for entry in islice(idle, max(0, excess)):
        due = entry.idle_since + overflow_ttl
        if due > now:
            return found, due
        found.append(entry)
    return found, math.inf


def lifetime_expired(entries: Iterable[Entry[T]], now: float) -> tuple[list[Entry[T]], float]:
    """Find open workers past their `max_lifetime`."""
    staying = [entry for entry in entries if entry.evict_reason is None]
    found = [entry for entry in staying if entry.expires_at <= now and entry.is_open]
    return found, min(
        (entry.expires_at for entry in staying if entry.expires_at > now), default=math.inf
    )


def idle_expired(
    idle: Iterable[Entry[T]], idle_timeout: float, now: float
) -> tuple[list[Entry[T]], float]:
    """Find idle workers that were not used for `idle_timeout`; the longest idle must come first."""
    found: list[Entry[T]] = []
    next_due = math.inf
    for entry in idle:
        # With its jitter, one that comes later may come due earlier, but not before this.
        earliest = entry.idle_since + idle_timeout * SMALLEST_JITTER
        if earliest > next_due:
            break
        if entry.evict_reason is None:
            due = entry.idle_since + idle_timeout * entry.jitter
            if due <= now:
                found.append(entry)
            else:
                next_due = min(next_due, due)
    return found, next_due


def probe_at(entry: Entry[T], check_interval: float, now: float) -> float:
    """Return when a worker will have given no sign of life for `check_interval`, at the earliest.

    While it is not idle, it gives one.
    """
    is_idle = entry.state is State.IDLE
    last_sign = max(entry.idle_since, entry.probed_at) if is_idle else now
    return last_sign + check_interval * entry.jitter


def room_for_probes(idle: int, probing: int) -> int:
    """Return how many idle workers may be probed now, while `probing` workers are; 0 or less: none.

    No more than half of those that no client holds are probed at the same time, so that a probe delays
    no client that another worker could serve.
    """
    return min(max(1, (idle + probing) // 2) - probing, MOST_PROBES)


def suspects(idle: Iterable[Entry[T]], since: float) -> list[Entry[T]]:
    """Find idle workers that can be probed, and have given no sign of life after the time `since`."""
    return [
        entry
        for entry in idle
        if entry.can_be_checked
        and entry.evict_reason is None
        and max(entry.idle_since, entry.probed_at) <= since
    ]


def held_too_long(
    entries: Iterable[Entry[T]], held_warning: float, now: float
) -> tuple[list[Entry[T]], float]:
    """Find workers that a client has had for `held_warning`. They stay due until they come back."""
    found: list[Entry[T]] = []
    next_due = math.inf
    for entry in entries:
        # Without a client, it has been given to a task that has not had its turn since.
        if entry.state is State.IN_USE and entry.client is not None:
            due = entry.in_use_since + held_warning
            if due <= now:
                found.append(entry)
            else:
                next_due = min(next_due, due)
    return found, next_due
