"""More requests than can be served, each with a deadline: how much of the work is of use?

Five connections, queries of 20 milliseconds, and clients that arrive at random, whether or not those
before them have been served. A client has 250 milliseconds for everything, and then gives up.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import numpy
import psycopg_pool
import trio

from .peers import NO_POOL, Loop, Peer, Pool, repeat

LOADS = (0.9, 1.5, 3.0, 10.0)
CONNECTIONS, DEADLINE = 5, 0.25
QUERY = "SELECT pg_sleep(0.02)"
WARM_UP, SECONDS = 1.5, 2.0

# asyncio tells of every connection that asyncpg gives up on while it cancels a query.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

TOO_LATE = (trio.TooSlowError, asyncio.TimeoutError, psycopg_pool.PoolTimeout)


@dataclass
class Outcome:
    """What became of those who arrived after the warm-up, or were answered after it."""

    arrived: int = 0
    answered: int = 0
    failed_after: list[float] = field(default_factory=list)


def goodput(peer: Peer, dsn: str, load: float) -> tuple[float, ...]:
    """Offer `load` times what can be served.

    Returns the share of the capacity that went into answers in time, and the share of requests that
    failed, in per cent; and after how many milliseconds those knew, the median and the 95th percentile.
    """
    # Next to each measurement, as the machine may have other things to do from time to time.
    per_second = trio.run(capacity, dsn)
    outcome: Outcome = peer.loop.run(_offer, peer, dsn, load * per_second)
    told = outcome.failed_after
    median, late = numpy.percentile([1e3 * after for after in told] or [math.nan], [50, 95])
    return (
        100 * outcome.answered / SECONDS / per_second,
        100 * len(told) / outcome.arrived,
        float(median),
        float(late),
    )


async def capacity(dsn: str) -> float:
    """Return how many queries a second the connections serve when they never rest."""
    async with NO_POOL.open(dsn, CONNECTIONS) as pool:
        return await repeat(NO_POOL.loop, partial(pool.fetch, QUERY), CONNECTIONS, 0.5)


async def _offer(peer: Peer, dsn: str, rate: float) -> Outcome:
    """Let clients arrive at random, so many a second."""
    outcome, rng = Outcome(), random.Random(7)
    async with peer.open(dsn, CONNECTIONS) as pool:
        await repeat(peer.loop, partial(pool.fetch, "SELECT 1"), CONNECTIONS, 0.1)
        began = arrival = perf_counter()
        counted = (began + WARM_UP, began + WARM_UP + SECONDS)
        async with peer.loop.tasks() as start:
            while arrival < counted[1]:
                await _sleep_until(peer.loop, arrival)
                start(_client, pool, outcome, counted)
                arrival += rng.expovariate(rate)
    return outcome


async def _sleep_until(loop: Loop, when: float) -> None:
    """Sleep, unless it is that late already: those who are due together arrive together."""
    remaining = when - perf_counter()
    if remaining > 0:
        await loop.sleep(remaining)


async def _client(pool: Pool, outcome: Outcome, counted: tuple[float, float]) -> None:
    """Make one request. An answer counts when it arrives, a failure for the time of the request."""
    began = perf_counter()
    begins_in_time = counted[0] <= began < counted[1]
    outcome.arrived += begins_in_time
    try:
        await pool.fetch_within(DEADLINE, QUERY)
    except TOO_LATE:
        if begins_in_time:
            outcome.failed_after.append(perf_counter() - began)
    else:
        outcome.answered += counted[0] <= perf_counter() < counted[1]
