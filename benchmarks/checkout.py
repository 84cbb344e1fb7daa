"""Checkouts per second, side by side with psycopg_pool: the pools alone, no queries.

    python benchmarks/checkout.py

Both pools hold real connections to one embedded PostgreSQL. The rounds alternate; medians count.
"""

from __future__ import annotations

import asyncio
import math
import platform
import statistics
import sys
from pathlib import Path
from time import perf_counter

import psycopg_pool
import trio
from rich.console import Console
from rich.progress import track
from rich.table import Table

import whitepool.postgres

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from embedded_postgres import EmbeddedPostgres

CHECKOUTS, ROUNDS, WORKERS = 20_000, 7, 4


async def with_whitepool(dsn: str, tasks: int) -> float:
    """Return checkouts per second."""
    async with whitepool.postgres.open_pool(dsn, pool_size=WORKERS, max_overflow=0) as session:

        async def client() -> None:
            for _ in range(CHECKOUTS // tasks):
                resource = await session.block_checkout(math.inf)
                await trio.lowlevel.checkpoint()
                session.checkin(resource)

        began = perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(client)
        return CHECKOUTS / (perf_counter() - began)


async def with_psycopg_pool(dsn: str, tasks: int) -> float:
    """Return checkouts per second."""
    async with psycopg_pool.AsyncConnectionPool(
        dsn, min_size=WORKERS, max_size=WORKERS, timeout=3600, open=False
    ) as pool:
        await pool.wait()

        async def client() -> None:
            for _ in range(CHECKOUTS // tasks):
                connection = await pool.getconn()
                await asyncio.sleep(0)
                await pool.putconn(connection)

        began = perf_counter()
        await asyncio.gather(*(client() for _ in range(tasks)))
        return CHECKOUTS / (perf_counter() - began)


def main() -> None:
    console = Console()
    table = Table(
        title=f"checkouts per second, {WORKERS} workers; Python {platform.python_version()},"
        f" {platform.machine()}, median of {ROUNDS} rounds"
    )
    for column in ("tasks", "whitepool", "psycopg_pool", "ratio"):
        table.add_column(column, justify="right")
    with EmbeddedPostgres() as server:
        for tasks in (1, 4, 64, 1000):
            ours, theirs = [], []
            for _ in track(range(ROUNDS), f"{tasks} tasks", console=console):
                ours.append(trio.run(with_whitepool, server.dsn, tasks))
                theirs.append(asyncio.run(with_psycopg_pool(server.dsn, tasks)))
            our, their = statistics.median(ours), statistics.median(theirs)
            table.add_row(str(tasks), f"{our:,.0f}", f"{their:,.0f}", f"{our / their:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
