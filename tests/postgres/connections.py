"""What tests do with a connection: use it, cancel it, and check that it is as it must be."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, cast

import psycopg
import trio
from psycopg import pq
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from whitepool.postgres import TrioConnection

Connection = TrioConnection[Any]
IDLE, INTRANS = TransactionStatus.IDLE, TransactionStatus.INTRANS

SLOW = "SELECT pg_sleep(30)"
BIG = "x" * 20_000_000
"""More than the buffers between the client and the server take."""


def status(connection: Connection) -> pq.TransactionStatus:
    return pq.TransactionStatus(connection.pgconn.transaction_status)


def backend(connection: Connection) -> int:
    return connection.pgconn.backend_pid


async def ask(connection: Connection, query: str, *parameters: object) -> Any:
    """Return the first column of the first row, also where the connection has another row factory."""
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(query.encode(), parameters or None)
    row = await cursor.fetchone()
    return None if row is None else row[0]


async def read_all(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


def closing(stream: AsyncIterator[Any]) -> aclosing[AsyncGenerator[Any, None]]:
    """Close, where a block ends, what psycopg declares as an iterator, and what is a generator."""
    return aclosing(cast("AsyncGenerator[Any, None]", stream))


async def cancel_where_it_waits(operation: Callable[[], Awaitable[object]]) -> None:
    """Run an operation, and cancel it at the first point where it waits for anything."""

    async def cancel() -> None:
        scope.cancel()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            await operation()
            await trio.lowlevel.checkpoint()  # where the answer was faster than the cancellation
    assert scope.cancelled_caught


async def ignoring_errors(operation: Callable[[], Awaitable[object]]) -> None:
    """Run an operation that may fail in any of psycopg's ways."""
    with suppress(psycopg.Error):
        await operation()


async def check_usable(connection: Connection) -> None:
    """A connection is as it must be when a task gets it."""
    assert not connection.closed
    assert status(connection) is pq.TransactionStatus.IDLE
    assert connection.pgconn.pipeline_status == pq.PipelineStatus.OFF
    with trio.fail_after(3):
        async with connection.transaction():
            cursor = await connection.execute("SELECT 1")
            assert await cursor.fetchall() == [(1,)]
        await connection.execute("SELECT 1")
        await connection.rollback()
        await connection.execute("SELECT 1")
        await connection.commit()
    assert status(connection) is pq.TransactionStatus.IDLE


async def check_usable_after_rollback(connection: Connection) -> None:
    """The same, where a transaction may have been left open."""
    with trio.fail_after(3):
        await connection.rollback()
    await check_usable(connection)
