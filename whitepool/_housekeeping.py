"""Which workers have been here, idle or unheard of, for too long.

Three questions about workers at one moment. Each answers with those it is about, and with the time at
which it wants to be asked again. The supervisor asks, and does what follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from ._options import Options
from ._worker import Place, Worker

AnyWorker = TypeVar("AnyWorker", bound=Worker[Any])

SOON = 0.05
"""Seconds after which a probe is tried again for which it was not the moment."""


def shortest_period(options: Options) -> float:
    """Return the seconds within which no worker can come due that is not idle yet."""
    # A tenth less: the jitter.
    return 0.9 * min(
        options.overflow_ttl or math.inf,
        options.idle_timeout,
        options.max_lifetime,
        options.check_interval,
    )


def surplus(
    idle: Sequence[AnyWorker], beyond_size: int, options: Options, now: float
) -> tuple[list[AnyWorker], float]:
    """Find overflow workers, the longest idle first, that nobody wanted for `overflow_ttl`."""
    found: list[AnyWorker] = []
    for worker in list(idle)[: max(0, beyond_size)]:
        due = worker.idle_since + options.overflow_ttl
        if due > now:
            return found, due
        found.append(worker)
    return found, math.inf


def too_old(workers: Iterable[AnyWorker], now: float) -> tuple[list[AnyWorker], float]:
    """Find workers past their `max_lifetime`."""
    alive = [
        worker
        for worker in workers
        if worker.condemned is None and worker.place in (Place.HOST, Place.OUT)
    ]
    found = [worker for worker in alive if worker.expires <= now]
    return found, min((w.expires for w in alive if w.expires > now), default=math.inf)


def too_idle(idle: Iterable[AnyWorker], options: Options, now: float) -> tuple[list[AnyWorker], float]:
    """Find workers that were not used for `idle_timeout`."""
    found: list[AnyWorker] = []
    due = math.inf
    for worker in idle:
        if worker.condemned is None:
            at = worker.idle_since + options.idle_timeout * worker.jitter
            if at <= now:
                found.append(worker)
            else:
                due = min(due, at)
    return found, due


def to_probe(
    idle: Sequence[AnyWorker], probing: int, options: Options, now: float
) -> tuple[list[AnyWorker], float]:
    """Find workers that have given no sign of life for `check_interval`.

    No more than half of the idle ones are being probed at a time: it should delay nobody whom
    another worker could serve.
    """
    found: list[AnyWorker] = []
    due = math.inf
    room = max(1, (len(idle) + probing) // 2) - probing
    for worker in idle:
        if worker.can_be_checked and worker.condemned is None:
            at = max(worker.idle_since, worker.probed) + options.check_interval * worker.jitter
            if at <= now and len(found) < room:
                found.append(worker)
            else:
                due = min(due, max(at, now + SOON))
    return found, due
