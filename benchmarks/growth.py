"""How costs grow with the number of tasks and of connections, and what each takes of memory.

The limit is beside each: a bare queue and a turn of the loop, psycopg without a loop, a task of Trio's.
"""

from __future__ import annotations

import gc
import resource
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import trio
from trio.testing import wait_all_tasks_blocked

import whitepool

from .canned_server import canned_server
from .case import Case, Figure, at_most
from .idle import SIZES, pool_of
from .peers import (
    ASYNCPG_BARE,
    BARE_QUEUE,
    BLOCKING,
    CHECKPOINT,
    NO_POOL,
    PSYCOPG,
    TASK,
    TRIO,
    WHITEPOOL,
    Loop,
    Peer,
    counted,
)
from .queries import fetch, on
from .queues import make_object, per_use

TASKS = (1, 10, 100, 1_000, 10_000, 100_000)
CONNECTIONS = (1, 4, 16, 64, 256, 1_000)
POOLS = (10, 100, 1_000)


def _checkout(tasks: int) -> Case:
    return Case(
        "growth",
        (
            Figure(
                f"a checkout of a plain object, held for a turn, {counted(tasks, 'task')}",
                "µs",
                plot="growth-checkout",
                x=tasks,
                of=min,
            ),
        ),
        (WHITEPOOL, BARE_QUEUE, CHECKPOINT),
        partial(per_use, tasks=tasks),
        rounds=5 if tasks < TASKS[-1] else 2,
    )


def _query(size: int) -> Case:
    return Case(
        "growth",
        (
            Figure(f"`SELECT 1` to a model server, {on(size)}", "µs", x=size, of=min),
            Figure(
                f"… the client's CPU to a model server, {on(size)}",
                "µs CPU",
                plot="growth-query",
                x=size,
                of=min,
            ),
        ),
        (WHITEPOOL, NO_POOL, BLOCKING),
        partial(_per_query, size=size),
    )


def _per_query(peer: Peer, _: str, size: int) -> tuple[float, float]:
    """Return the microseconds that a query takes, and those of them that are the client's CPU time."""
    # A thousand connections are more descriptors than a process may have open by default.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with canned_server() as dsn:
        rate, cpu = fetch(peer, dsn, size, "SELECT 1")
    return 1e6 / rate, cpu


# ------------------------------------------------------------------ memory


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


async def _waiters(number: int) -> float:
    """Return what tasks that wait in the queue weigh together."""
    async with whitepool.open_pool(make_object, pool_size=1, max_overflow=0) as session:
        async with session.worker():
            pass

        async def checkout() -> None:
            session.checkin(await session.block_checkout())

        held = await session.block_checkout()
        return await _weigh(TRIO, number, checkout, then=partial(session.checkin, held))


async def _tasks(number: int) -> float:
    event = trio.Event()
    return await _weigh(TRIO, number, event.wait, then=event.set)


async def _workers(number: int) -> float:
    """Return what idle workers weigh together, with the tasks in which they live."""
    async with pool_of(10, check_interval=30):
        pass
    tracemalloc.start()
    try:
        async with pool_of(10, check_interval=30):
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
        async with pool_of(10 + number, check_interval=30):
            gc.collect()
            return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


async def _pools(number: int) -> float:
    """Return what pools that have no worker yet weigh together."""
    tracemalloc.start()
    try:
        async with AsyncExitStack() as stack:
            for _ in range(number):
                await stack.enter_async_context(pool_of(1, lazy=True))
            await wait_all_tasks_blocked()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def _memory(
    name: str,
    plot: str,
    weigh: Callable[[int], Awaitable[float]],
    numbers: tuple[int, ...],
    most: float | None,
) -> Case:
    """Weigh a number of something, beside as many tasks of Trio's that do nothing."""

    def measure(peer: Peer, _: str) -> tuple[float, ...]:
        weighed = _tasks if peer is TASK else weigh
        return tuple(trio.run(weighed, number) / number / 1024 for number in numbers)

    bound = {WHITEPOOL: at_most(most)} if most else {}
    return Case(
        "growth",
        tuple(
            Figure(f"{name}, {number:,}", "KiB", bound if number == numbers[-1] else {}, plot, number)
            for number in numbers
        ),
        (WHITEPOOL, TASK),
        measure,
        rounds=1,
    )


CASES = (
    *map(_checkout, TASKS),
    *map(_query, CONNECTIONS),
    Case(
        "growth",
        (Figure("memory a waiter, beyond its task", "bytes", {WHITEPOOL: at_most(512)}),),
        (WHITEPOOL, PSYCOPG, ASYNCPG_BARE),
        lambda peer, dsn: (peer.loop.run(_weigh_waiter, peer, dsn),),
        rounds=1,
    ),
    _memory("memory a waiter, with its task", "growth-waiter", _waiters, SIZES, None),
    _memory("memory an idle worker, with its task", "growth-worker", _workers, SIZES, 2),
    _memory("memory a pool without workers", "growth-pool", _pools, POOLS, 30),
)
