"""Many rows, in each of the ways in which psycopg moves them.

psycopg without a loop has one connection, also where the others have several: its CPU time is the least
that its protocol costs, and its time includes the server's.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg

from .case import Bound, Case, Figure, at_most
from .peers import BLOCKING, NO_POOL, PSYCOPG, PSYCOPG_UVLOOP, WHITEPOOL, Peer, counted, repeat

SECONDS, WARM_UP = 0.25, 0.1

ROWS, MANY = 10_000, 50_000
SELECT = "SELECT id, name FROM many_items WHERE id <= {}"
COPY_OUT = f"COPY ({SELECT.format(MANY)}) TO STDOUT"
COPY_IN = "COPY sink FROM STDIN"
SINK = "CREATE TEMP TABLE IF NOT EXISTS sink (id int, name text) ON COMMIT DELETE ROWS"

Async = psycopg.AsyncConnection[Any]
Blocking = psycopg.Connection[Any]


@dataclass(frozen=True)
class Way:
    """One way to move rows, on a connection of an event loop and on one that blocks."""

    run: Callable[[Async], Awaitable[None]]
    block: Callable[[Blocking], None]


def fetch(rows: int, binary: bool) -> Way:
    """Have all rows in one result."""
    query = SELECT.format(rows)

    async def run(connection: Async) -> None:
        await (await connection.execute(query, binary=binary)).fetchall()

    def block(connection: Blocking) -> None:
        connection.execute(query, binary=binary).fetchall()

    return Way(run, block)


async def copy_out(connection: Async) -> None:
    async with connection.cursor() as cursor, cursor.copy(COPY_OUT) as copy:
        async for _ in copy:
            pass


def copy_out_blocking(connection: Blocking) -> None:
    with connection.cursor() as cursor, cursor.copy(COPY_OUT) as copy:
        for _ in copy:
            pass


async def copy_in(connection: Async) -> None:
    await connection.execute(SINK)
    async with connection.cursor() as cursor, cursor.copy(COPY_IN) as copy:
        for number in range(MANY):
            await copy.write_row((number, "a name"))


def copy_in_blocking(connection: Blocking) -> None:
    connection.execute(SINK)
    with connection.cursor() as cursor, cursor.copy(COPY_IN) as copy:
        for number in range(MANY):
            copy.write_row((number, "a name"))


async def stream(connection: Async) -> None:
    async with connection.cursor() as cursor:
        async for _ in cursor.stream(SELECT.format(ROWS)):
            pass


def stream_blocking(connection: Blocking) -> None:
    with connection.cursor() as cursor:
        for _ in cursor.stream(SELECT.format(ROWS)):
            pass


async def server_cursor(connection: Async) -> None:
    async with connection.transaction(), connection.cursor("of_rows") as cursor:
        await cursor.execute(SELECT.format(ROWS))
        async for _ in cursor:
            pass


def server_cursor_blocking(connection: Blocking) -> None:
    with connection.transaction(), connection.cursor("of_rows") as cursor:
        cursor.execute(SELECT.format(ROWS))
        for _ in cursor:
            pass


async def measure(peer: Peer, dsn: str, size: int, way: Way) -> tuple[float, float]:
    """Return the milliseconds that it takes, and those of them that are the client's CPU time."""
    async with peer.open(dsn, size) as pool:

        async def operation() -> None:
            async with pool.connection() as connection:
                await way.run(connection)

        await repeat(peer.loop, operation, size, WARM_UP)
        cpu, began = time.process_time(), time.perf_counter()
        rate = await repeat(peer.loop, operation, size, SECONDS)
        share = (time.process_time() - cpu) / (time.perf_counter() - began)
        return 1e3 / rate, 1e3 / rate * share


def measure_blocking(dsn: str, way: Way) -> tuple[float, float]:
    """Return the same for a connection that blocks."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for seconds in (WARM_UP, SECONDS):
            cpu, began, done = time.process_time(), time.perf_counter(), 0
            while time.perf_counter() < began + seconds:
                way.block(connection)
                done += 1
        return (time.perf_counter() - began) / done * 1e3, (time.process_time() - cpu) / done * 1e3


def create_many_items(dsn: str) -> None:
    """Make the table from which they are read."""
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS many_items (id int PRIMARY KEY, name text)")
        connection.execute(
            f"INSERT INTO many_items SELECT n, 'item ' || n FROM generate_series(1, {MANY}) n"
            " ON CONFLICT DO NOTHING"
        )


def _case(title: str, way: Way, bounds: Mapping[Peer, Bound], size: int = 1) -> Case:
    title = f"{title}, {counted(size, 'connection')}"

    def measured(peer: Peer, dsn: str) -> tuple[float, ...]:
        if peer is BLOCKING:
            return measure_blocking(dsn, way)
        figures: tuple[float, float] = peer.loop.run(measure, peer, dsn, size, way)
        return figures

    return Case(
        "rows",
        (
            Figure(title, "ms", bounds, of=min),
            Figure(f"… the client's CPU for {title}", "ms CPU", of=min),
        ),
        (WHITEPOOL, NO_POOL, PSYCOPG, PSYCOPG_UVLOOP, BLOCKING),
        measured,
        rounds=4,
        prepare=create_many_items,
    )


OF_QUERIES = {NO_POOL: at_most(1.03), PSYCOPG: at_most(round(1 / 1.2, 2))}
NONE_SLOWER = dict.fromkeys((PSYCOPG, PSYCOPG_UVLOOP), at_most(1))
CASES = (
    _case("1,000 rows of a table as text", fetch(1_000, False), OF_QUERIES, 16),
    _case("1,000 rows of a table in binary", fetch(1_000, True), OF_QUERIES, 16),
    _case(f"{MANY:,} rows in binary", fetch(MANY, True), NONE_SLOWER),
    _case(f"COPY out, {MANY:,} rows", Way(copy_out, copy_out_blocking), NONE_SLOWER),
    _case(f"COPY in, {MANY:,} rows", Way(copy_in, copy_in_blocking), NONE_SLOWER),
    _case(f"`stream()`, {ROWS:,} rows", Way(stream, stream_blocking), NONE_SLOWER),
    _case(
        f"server-side cursor, {ROWS:,} rows", Way(server_cursor, server_cursor_blocking), NONE_SLOWER
    ),
)
