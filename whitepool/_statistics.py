"""How a pool stands and what it has seen, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

COUNTERS = (
    "checkouts",
    "timeouts",
    "overloads",
    "started",
    "start_failures",
    "retired",
    "lost",
    "destroyed",
    "leaked",
    "discarded",
)
"""What is counted from the opening on. `Session` counts the checkouts, `Standing` the timeouts,
overloads and discarded transactions, `Starter` the failed starts. `Roster` counts the workers that were
started, and that left."""

Counters = dict[str, int]
"""One number for each of `COUNTERS`. A plain dictionary: nothing is quicker to count in."""

PoolState = Literal["ready", "overflow", "full", "down", "draining", "closed"]


@dataclass(frozen=True)
class PoolStatistics:
    """A snapshot of one pool, from `Session.statistics`.

    The numbers always add up: the workers are ``idle + in_use + starting + resetting`` (those that are
    being closed are in none of these), and
    ``started`` is ``idle + in_use + resetting + retired + lost + destroyed + leaked``.
    """

    name: str
    """The pool's name."""

    state: PoolState
    """``"ready"``: a worker is idle. ``"overflow"``: none is idle, but one more may be started.
    ``"full"``: none is idle and none may be started. ``"down"``: none is alive, and the last start
    failed. Then ``"draining"`` and ``"closed"``. The first three are poolboy's."""

    pool_size: int
    """The workers that the pool keeps alive."""

    max_overflow: int
    """The workers that it may start beyond those."""

    idle: int
    """Workers that are ready to be checked out."""

    in_use: int
    """Workers that are checked out."""

    overflow: int
    """How many of the workers are beyond `pool_size`."""

    starting: int
    """Workers being opened."""

    resetting: int
    """Workers that their own task resets after a return, or probes."""

    waiting: int
    """Tasks in the wait queue."""

    longest_wait: float
    """Seconds for which the first of them has been waiting; 0 if there is none."""

    longest_use: float
    """Seconds for which the worker has been checked out that was checked out first; 0 if none is."""

    last_error: str | None
    """Why the last start failed. None once a start has succeeded."""

    waited: int
    """Checkouts that had to wait for a worker, and got one, since the pool was opened."""

    wait_time: float
    """Seconds that those have waited, in all."""

    checkouts: int
    """Checkouts that got a worker, since the pool was opened."""

    timeouts: int
    """Checkouts that ended in `CheckoutTimeout`, overloads not counted."""

    overloads: int
    """Checkouts that ended in `PoolOverloaded`."""

    started: int
    """Workers that were opened."""

    start_failures: int
    """Attempts to open a worker that failed."""

    retired: int
    """Workers closed in good health: surplus, idle or old ones, and those of a shutdown."""

    lost: int
    """Workers that died: they crashed, their peer hung up, a probe failed, or `WorkerManager.is_alive`
    said so."""

    destroyed: int
    """Workers that a client called broken, or that could not be made ready for the next."""

    leaked: int
    """Workers whose resource was never returned: it was garbage-collected, or, with `held_warning`, the
    task that had checked it out has ended."""

    discarded: int
    """Returns whose reset threw away what the client had written and not committed. Only a pool of
    connections to PostgreSQL can know that."""

    # A plain dictionary of this snapshot's own, as `dataclasses.asdict` can't copy a read-only proxy.
    # It has no hash, and the rest of the snapshot has.
    last_words: Mapping[str, str] = field(hash=False)
    """For each reason for which workers were lost or destroyed whose peers said why: what the last of
    them said, such as ``{"hung_up": "57P01: terminating connection due to administrator command"}``.
    Only a pool of connections to PostgreSQL can know that."""
