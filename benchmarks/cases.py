"""What is measured, of whom, and what whitepool should reach.

A case measures one peer at a time, in an event loop and a pool of its own, and warms up first. Its
figures are compared as whitepool's divided by the peer's.
"""

from __future__ import annotations

import gc
from functools import partial
from time import perf_counter

from . import growth, idle, overload, queries, queues, rows, shapes, soak
from .case import Bound, Case, Figure, at_least, at_most
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
    counted,
    throughput,
)

# ------------------------------------------------------------------ checkouts


def _checkout_cases() -> list[Case]:
    psycopg = (PSYCOPG, PSYCOPG_UVLOOP)
    bare = (ASYNCPG_BARE, ASYNCPG_BARE_UVLOOP)
    many = {PSYCOPG: at_least(5), PSYCOPG_UVLOOP: at_least(3)} | dict.fromkeys(bare, at_least(3))
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
            (Figure("a checkout and its return, 1 task", "µs", alone, of=min),),
            (*POOLS, CHECKPOINT),
            lambda peer, dsn: (1e6 / _checkouts(peer, dsn, tasks=1, turn=False),),
        ),
        *(
            Case(
                "checkout",
                (
                    Figure(
                        f"a checkout held for a turn, {counted(tasks, 'task')}",
                        "/s",
                        bounds,
                        "checkout",
                        tasks,
                        of=max,
                    ),
                ),
                POOLS,
                partial(_held_checkouts, tasks=tasks),
            )
            for tasks, bounds in held.items()
        ),
    ]


def _held_checkouts(peer: Peer, dsn: str, tasks: int) -> tuple[float, ...]:
    return (_checkouts(peer, dsn, tasks, turn=True),)


def _checkouts(peer: Peer, dsn: str, tasks: int, turn: bool) -> float:
    """Return checkouts a second."""
    rate: float = peer.loop.run(
        throughput, peer, dsn, 4, lambda pool: partial(pool.checkout, turn), tasks
    )[0]
    return rate


# ------------------------------------------------------------------ a queue, and opening

LENGTHS = (100, 1_000, 10_000, 50_000)


def _queue_case() -> Case:
    return Case(
        "queue",
        (
            *(
                Figure(f"time a waiter, a queue of {length:,}", "µs", plot="queue", x=length, of=min)
                for length in LENGTHS
            ),
            Figure(
                "… the slowest of these queues ÷ the fastest", "", {WHITEPOOL: at_most(1.5)}, of=min
            ),
        ),
        (WHITEPOOL, PSYCOPG, ASYNCPG_BARE),
        lambda peer, dsn: peer.loop.run(_time_queues, peer, dsn),
        rounds=2,
    )


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
                Figure("… growth in memory, a million checkouts", "KiB", {WHITEPOOL: at_most(1024)}),
                Figure("… connections lost in a million checkouts", "", {WHITEPOOL: at_most(0)}),
            ),
            (WHITEPOOL,),
            soak.million,
            rounds=1,
        ),
        Case(
            "idle",
            (
                Figure("100 idle connections for a minute", "% of a core", {WHITEPOOL: at_most(0.05)}),
                Figure("… growth in memory, an idle minute", "KiB", {WHITEPOOL: at_most(256)}),
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
                    f"answers in time, {load:g} × the capacity offered",
                    "%",
                    nearly_all if load > 1 else {},
                    "overload",
                    load,
                ),
                Figure(f"… requests that failed, {load:g} ×", "%", none if load < 1 else {}),
                Figure("… they were told after, median", "ms"),
                Figure("… 95th percentile", "ms"),
            ),
            peers,
            partial(overload.goodput, load=load),
            rounds=1,
        )
        for load in overload.LOADS
    ]


MODULES = (queries, rows, queues, growth, idle, shapes)
"""Those that have `CASES` of their own. To add one, name it here."""

CASES = {
    case.title: case
    for case in (
        *_checkout_cases(),
        *(case for module in MODULES for case in module.CASES),
        _queue_case(),
        _opening_case(),
        *_soak_cases(),
        *_overload_cases(),
    )
}
"""All of them, in the order in which they run."""
