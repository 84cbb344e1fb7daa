"""What is measured, of whom, and what whitepool should reach.

A case measures one peer at a time, in an event loop and a pool of its own, and warms up first. Its
figures are compared as whitepool's divided by the peer's.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from . import overload, soak
from .peers import (
    ASYNCPG,
    ASYNCPG_BARE,
    ASYNCPG_BARE_UVLOOP,
    ASYNCPG_UVLOOP,
    CHECKPOINT,
    NO_POOL,
    POOLS,
    PSYCOPG,
    PSYCOPG_UVLOOP,
    TRIOPG,
    WHITEPOOL,
    Loop,
    Peer,
    Pool,
    repeat,
)

SECONDS, WARM_UP = 0.25, 0.1
"""How long operations are counted, and how long they run before that: psycopg and asyncpg prepare a
statement on each connection once they have seen it a few times."""

SELECT_1000 = "SELECT n, 'row number ' || n FROM generate_series(1, 1000) AS n"


@dataclass(frozen=True)
class Bound:
    """What whitepool's figure should be, divided by a peer's, or by itself."""

    limit: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:,g}"


at_least = partial(Bound, at_least=True)
at_most = partial(Bound, at_least=False)


@dataclass(frozen=True)
class Figure:
    """One of the numbers that a case measures."""

    title: str
    unit: str
    bounds: Mapping[Peer, Bound] = field(default_factory=dict)
    """Of whitepool's figure divided by a peer's; under WHITEPOOL, of the figure as it is."""
    plot: str = ""
    """The plot in which it appears, at `x`; none where that is empty."""
    x: float = 0


@dataclass(frozen=True)
class Case:
    """One measurement of several peers, which gives a number for each figure."""

    group: str
    figures: tuple[Figure, ...]
    peers: tuple[Peer, ...]
    measure: Callable[[Peer, str], tuple[float, ...]]
    rounds: int | None = None
    """How many rounds are enough, where the usual number is more than it takes."""
    at_once: bool = False
    """Whether all peers are measured at the same time: they spend it asleep."""

    @property
    def title(self) -> str:
        return self.figures[0].title


# ------------------------------------------------------------------ checkouts and queries


def _checkout_cases() -> list[Case]:
    psycopg = (PSYCOPG, PSYCOPG_UVLOOP)
    bare = (ASYNCPG_BARE, ASYNCPG_BARE_UVLOOP)
    many = dict.fromkeys(psycopg, at_least(5)) | dict.fromkeys(bare, at_least(3))
    held: dict[int, dict[Peer, Bound]] = {
        1: dict.fromkeys(psycopg, at_least(1)),
        4: dict.fromkeys(psycopg, at_least(1.5)),
        64: many,
        1000: many,
    }
    # Alone, without anything between checkout and checkin. But then a pool that does not give way to
    # other tasks serves one after the other, and no task ever waits: so several hold for a turn.
    alone = dict.fromkeys(psycopg, at_most(1)) | {CHECKPOINT: at_most(1.25)}
    return [
        Case(
            "checkout",
            (Figure("checkout + checkin, 1 task", "µs", alone),),
            (*POOLS, CHECKPOINT),
            partial(_checkout, tasks=1, turn=False, in_unit=microseconds),
        ),
        *(
            Case(
                "checkout",
                (
                    Figure(
                        f"… held for a turn, on 4 workers, tasks: {tasks:,}",
                        "/s",
                        bounds,
                        "checkout",
                        tasks,
                    ),
                ),
                POOLS,
                partial(_checkout, tasks=tasks, turn=True),
            )
            for tasks, bounds in held.items()
        ),
    ]


def _query_cases() -> list[Case]:
    peers = (*POOLS, NO_POOL)
    many = {
        PSYCOPG: at_least(1.8),
        PSYCOPG_UVLOOP: at_least(1.4),
        ASYNCPG: at_least(1.1),
        ASYNCPG_BARE: at_least(1.1),
        TRIOPG: at_least(5),
        NO_POOL: at_least(0.9),
    }
    return [
        Case(
            "query",
            (Figure("SELECT 1, 1 connection", "µs", {PSYCOPG: at_most(1)}),),
            peers,
            partial(_fetch, query="SELECT 1", size=1, in_unit=microseconds),
        ),
        *(
            Case(
                "query",
                (Figure(f"SELECT 1, {size} connections", "/s", many, "query" if size == 16 else ""),),
                peers,
                partial(_fetch, query="SELECT 1", size=size),
            )
            for size in (16, 64)
        ),
        Case(
            "query",
            (Figure("1,000 rows, 16 connections", "/s", {PSYCOPG: at_least(1.2)}),),
            peers,
            partial(_fetch, query=SELECT_1000, size=16),
        ),
    ]


def microseconds(rate: float) -> float:
    """Return how long one takes where there are so many a second."""
    return 1e6 / rate


def _checkout(
    peer: Peer, dsn: str, tasks: int, turn: bool, in_unit: Callable[[float], float] = float
) -> tuple[float, ...]:
    """Return checkouts a second, or what that is in another unit."""

    def operation(pool: Pool) -> Callable[[], Awaitable[None]]:
        return partial(pool.checkout, turn)

    return (in_unit(peer.loop.run(_throughput, peer, dsn, 4, operation, tasks)),)


def _fetch(
    peer: Peer, dsn: str, query: str, size: int, in_unit: Callable[[float], float] = float
) -> tuple[float, ...]:
    """Return queries a second, or what that is in another unit; as many tasks as connections."""

    def operation(pool: Pool) -> Callable[[], Awaitable[None]]:
        return partial(pool.fetch, query)

    return (in_unit(peer.loop.run(_throughput, peer, dsn, size, operation, size)),)


async def _throughput(
    peer: Peer,
    dsn: str,
    size: int,
    operation: Callable[[Pool], Callable[[], Awaitable[None]]],
    tasks: int,
) -> float:
    """Open a pool, and return how many operations a second so many tasks get done."""
    async with peer.open(dsn, size) as pool:
        await repeat(peer.loop, operation(pool), tasks, WARM_UP)
        return await repeat(peer.loop, operation(pool), tasks, SECONDS)


# ------------------------------------------------------------------ a queue, and opening

LENGTHS = (100, 1_000, 10_000, 50_000)


def _queue_cases() -> list[Case]:
    peers = (WHITEPOOL, PSYCOPG, ASYNCPG_BARE)
    return [
        Case(
            "queue",
            (
                *(
                    Figure(f"a queue of {length:,}: time a waiter", "µs", plot="queue", x=length)
                    for length in LENGTHS
                ),
                Figure("… the slowest of these ÷ the fastest", "", {WHITEPOOL: at_most(1.5)}),
            ),
            peers,
            lambda peer, dsn: peer.loop.run(_time_queues, peer, dsn),
            rounds=3,
        ),
        Case(
            "queue",
            (Figure("… memory a waiter, beyond its task", "bytes", {WHITEPOOL: at_most(512)}),),
            peers,
            lambda peer, dsn: (peer.loop.run(_weigh_waiter, peer, dsn),),
            rounds=1,
        ),
    ]


async def _time_queues(peer: Peer, dsn: str) -> tuple[float, ...]:
    """Return microseconds a waiter for each length, and the longest of them by the shortest."""
    async with peer.open(dsn, 4) as pool:
        await _time_queue(peer.loop, pool, 1_000)
        times = []
        for length in LENGTHS:
            repeats = max(1, 5_000 // length)  # a short queue is over before the clock has moved
            took = sum([await _time_queue(peer.loop, pool, length) for _ in range(repeats)])
            times.append(1e6 * took / repeats / length)
        return *times, max(times) / min(times)


async def _time_queue(loop: Loop, pool: Pool, length: int) -> float:
    """Let tasks that are there already wait together; return seconds until all were served."""
    gun = loop.event()

    async def runner() -> None:
        await gun.wait()
        await pool.checkout(True)

    async with loop.tasks() as start:
        for _ in range(length):
            start(runner)
        await loop.sleep(0.01)
        gc.collect()
        began = perf_counter()
        gun.set()
    return perf_counter() - began


async def _weigh_waiter(peer: Peer, dsn: str) -> float:
    """Return the bytes of a task that waits in the queue, less those of one that waits for an event."""
    tasks = 10_000
    async with peer.open(dsn, 1) as pool:
        await pool.checkout(False)
        event = peer.loop.event()
        mere = await _weigh(peer.loop, tasks, event.wait, then=event.set)

        async def hold() -> None:
            await pool.fetch("SELECT pg_sleep(3)")

        async with peer.loop.tasks() as start:
            start(hold)
            await peer.loop.sleep(0.1)
            waiting = await _weigh(peer.loop, tasks, partial(pool.checkout, False), then=int)
    return (waiting - mere) / tasks


async def _weigh(
    loop: Loop, tasks: int, wait: Callable[[], Awaitable[object]], then: Callable[[], object]
) -> int:
    """Start tasks that wait; return what they weigh together, in bytes."""

    async def waiter() -> None:
        await wait()

    tracemalloc.start()
    try:
        async with loop.tasks() as start:
            for _ in range(tasks):
                start(waiter)
            await loop.sleep(0.1)
            weight, _ = tracemalloc.get_traced_memory()
            then()
    finally:
        tracemalloc.stop()
    return weight


def _opening_case() -> Case:
    return Case(
        "opening",
        (Figure("opening 50 connections", "ms", {NO_POOL: at_most(1.5)}),),
        (WHITEPOOL, NO_POOL, PSYCOPG, ASYNCPG, TRIOPG),
        lambda peer, dsn: (peer.loop.run(_open, peer, dsn),),
    )


async def _open(peer: Peer, dsn: str) -> float:
    """Return how long it takes, in milliseconds."""
    began = perf_counter()
    async with peer.open(dsn, 50):
        return (perf_counter() - began) * 1e3


# ------------------------------------------------------------------ what takes longer


def _soak_cases() -> list[Case]:
    return [
        Case(
            "million",
            (
                Figure("a million checkouts, 1 % cancelled, 0.1 % deaths", "µs"),
                Figure("… growth in memory", "KiB", {WHITEPOOL: at_most(1024)}),
                Figure("… connections lost", "", {WHITEPOOL: at_most(0)}),
            ),
            (WHITEPOOL,),
            soak.million,
            rounds=1,
        ),
        Case(
            "idle",
            (
                Figure("100 idle connections for a minute", "% of a core", {WHITEPOOL: at_most(0.1)}),
                Figure("… growth in memory", "KiB", {WHITEPOOL: at_most(256)}),
            ),
            (WHITEPOOL, PSYCOPG, ASYNCPG),
            soak.idle,
            rounds=1,
            at_once=True,
        ),
    ]


def _overload_cases() -> list[Case]:
    peers = (WHITEPOOL, PSYCOPG, PSYCOPG_UVLOOP, ASYNCPG, ASYNCPG_UVLOOP)
    none, nearly_all = {WHITEPOOL: at_most(0)}, {WHITEPOOL: at_least(95)}
    return [
        Case(
            "overload",
            (
                Figure(
                    f"{load:g} × capacity offered: share of it spent in time",
                    "%",
                    nearly_all if load > 1 else {},
                    "overload",
                    load,
                ),
                Figure("… requests that failed", "%", none if load < 1 else {}),
                Figure("… they were told after, median", "ms"),
                Figure("… 95th percentile", "ms"),
            ),
            peers,
            partial(overload.goodput, load=load),
            rounds=2,
        )
        for load in overload.LOADS
    ]


CASES = {
    case.title: case
    for case in (
        *_checkout_cases(),
        *_query_cases(),
        *_queue_cases(),
        _opening_case(),
        *_soak_cases(),
        *_overload_cases(),
    )
}
"""All of them, in the order in which they run."""
