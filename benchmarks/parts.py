"""Where the time of one checkout and one query goes: `python -m benchmarks.parts`.

Each part is repeated by itself, in microseconds, the least of many short rounds: what a part costs when
the machine does nothing else. Parts overlap, and do not add up.
"""

from __future__ import annotations

import timeit
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

import psycopg
import trio
from embedded_postgres import EmbeddedPostgres
from rich.console import Console
from rich.table import Table
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

import whitepool.postgres
from whitepool._checks import check_seconds
from whitepool.postgres import TrioConnection, connect

REPEATS, ROUNDS = 500, 40
Connection = TrioConnection[Any]


def least(part: Callable[[], object]) -> float:
    """Return the microseconds that a function takes."""
    return 1e6 * min(timeit.repeat(part, number=REPEATS, repeat=ROUNDS)) / REPEATS


async def least_async(part: Callable[[], Awaitable[object]]) -> float:
    """Return the microseconds that an async function takes."""
    times = []
    for _ in range(ROUNDS):
        began = perf_counter()
        for _ in range(REPEATS):
            await part()
        times.append(perf_counter() - began)
    return 1e6 * min(times) / REPEATS


async def checkout_parts(session: whitepool.Session[Connection]) -> dict[str, float]:
    """Measure a checkout that finds an idle connection, and what it consists of."""
    manager = whitepool.postgres.PostgresManager()

    async def checkout() -> None:
        session.checkin(await session.block_checkout())

    async def lease() -> None:
        async with session.worker():
            pass

    def nowait() -> None:
        session.checkin(session.checkout_nowait())

    async with session.worker() as connection:
        return {
            "a bare checkpoint": await least_async(checkpoint),
            "block_checkout + checkin": await least_async(checkout),
            "async with worker()": await least_async(lease),
            "… of it: validating the timeout": least(lambda: check_seconds("timeout", 5.0)),
            "… cancellation point": await least_async(checkpoint_if_cancelled),
            "… roster, receipt, return (checkout_nowait + checkin)": least(nowait),
            "… in that: is_alive": least(lambda: manager.is_alive(connection)),
            "… in that: needs_reset": least(lambda: manager.needs_reset(connection)),
            "… once a millisecond: letting other tasks run": await least_async(
                cancel_shielded_checkpoint
            ),
        }


async def query_parts(session: whitepool.Session[Connection], dsn: str) -> dict[str, float]:
    """Measure SELECT 1, and what it consists of."""

    async def pooled() -> None:
        async with session.worker() as connection:
            await (await connection.execute("SELECT 1")).fetchall()

    async with await connect(dsn, autocommit=True) as connection:

        async def query() -> None:
            await (await connection.execute("SELECT 1")).fetchall()

        async def lock() -> None:
            async with connection.lock:
                pass

        with psycopg.connect(dsn, autocommit=True) as blocking:
            return {
                "SELECT 1 through the pool": await least_async(pooled),
                "SELECT 1 on a TrioConnection": await least_async(query),
                "SELECT 1 on a psycopg.Connection": least(
                    lambda: blocking.execute("SELECT 1").fetchall()
                ),
                "… of it: making a cursor": least(connection.cursor),
                "… the connection's lock": await least_async(lock),
            }


async def main(dsn: str) -> None:
    table = Table("part", title="µs, the least")
    table.add_column("µs", justify="right")
    async with whitepool.postgres.open_pool(
        dsn, pool_size=4, max_overflow=0, autocommit=True
    ) as session:
        for parts in (await checkout_parts(session), await query_parts(session, dsn)):
            for name, microseconds in parts.items():
                table.add_row(name, f"{microseconds:.{2 if microseconds < 10 else 0}f}")
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    with EmbeddedPostgres() as server:
        trio.run(main, server.dsn)
