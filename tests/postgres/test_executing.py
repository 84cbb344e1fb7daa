"""Executing queries, and fetching what they return."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Generator

import psycopg
import pytest
import trio
from connections import (
    BIG,
    SLOW,
    Connection,
    ask,
    backend,
    check_usable,
    check_usable_after_rollback,
    closing,
    ignoring_errors,
    read_all,
    status,
)
from onlooker import Onlooker
from psycopg.pq import TransactionStatus
from psycopg.waiting import Ready, Wait

from whitepool.postgres import _connection, connect


async def test_every_way_to_fetch_finds_the_rows(connection: Connection) -> None:
    """Every way to fetch finds the rows, in order, with Python's types."""
    series = "SELECT i, i::text FROM generate_series(1, 5) i"
    rows = [(i, str(i)) for i in range(1, 6)]
    cursor = await connection.execute(series)
    assert await cursor.fetchone() == rows[0]
    assert await cursor.fetchmany(2) == rows[1:3]
    assert await cursor.fetchall() == rows[3:]
    assert await cursor.fetchone() is None
    assert [row async for row in await connection.execute(series)] == rows
    async with closing(connection.cursor().stream(series)) as stream:
        assert [row async for row in stream] == rows
    async with connection.cursor("named") as named:
        await named.execute(series)
        assert [row async for row in named] == rows


async def test_parameters_reach_the_server_and_come_back(connection: Connection) -> None:
    """Parameters reach the server and come back, also large ones, in both formats."""
    for binary in (False, True):
        cursor = await connection.execute("SELECT %s::text, %b::bytea", ("ä", b"\0"), binary=binary)
        assert await cursor.fetchall() == [("ä", b"\0")]
    assert await ask(connection, "SELECT length(%s)", BIG) == len(BIG)
    assert await ask(connection, "SELECT repeat('x', %s)", len(BIG)) == BIG


async def test_many_statements_at_once_arrive(connection: Connection, notes: Callable[[], int]) -> None:
    """Many statements at once arrive as well as one after the other."""
    await connection.cursor().executemany("INSERT INTO notes VALUES (%s)", [("a",), ("b",)])
    async with connection.pipeline():
        first = await connection.execute("INSERT INTO notes VALUES ('c') RETURNING note")
        second = await connection.execute("SELECT count(*) FROM notes")
        assert await first.fetchall() == [("c",)]
        assert await second.fetchall() == [(3,)]
    await connection.commit()
    assert notes() == 3
    await check_usable(connection)


async def test_copy_works_in_both_directions(connection: Connection, notes: Callable[[], int]) -> None:
    """COPY works in both directions."""
    async with connection.cursor().copy("COPY notes FROM STDIN") as copy:
        for i in range(1000):
            await copy.write_row((f"note {i}",))
    async with connection.cursor().copy("COPY notes TO STDOUT") as copy:
        assert [row async for row in copy.rows()] == [(f"note {i}",) for i in range(1000)]
    await connection.commit()
    assert notes() == 1000


async def test_an_error_of_the_server_leaves_the_connection_usable(connection: Connection) -> None:
    """An error of the server is psycopg's exception for it, and the connection is usable afterwards."""
    with pytest.raises(psycopg.errors.DivisionByZero):
        await connection.execute("SELECT 1/0")
    assert status(connection) is TransactionStatus.INERROR
    await check_usable_after_rollback(connection)


async def test_no_asyncio_is_needed(connection: Connection) -> None:
    """A connection neither needs nor starts an asyncio event loop."""
    assert await ask(connection, "SELECT 1") == 1
    await connection.cancel_safe()
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


async def test_other_tasks_run_during_a_query(connection: Connection, onlooker: Onlooker) -> None:
    """A query holds up only the task that waits for it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ignoring_errors, lambda: connection.execute(SLOW))
        await onlooker.until_active(backend(connection))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["rows", "copied rows", "nothing"])
async def test_operations_that_never_wait_let_other_tasks_run(
    dsn: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Operations that find everything there already let other tasks run, from time to time."""
    monkeypatch.setattr(_connection, "BUSY_TIME", 0)  # each time, that is
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery, await connect(dsn, autocommit=True) as connection:
        cursor = connection.cursor()
        nursery.start_soon(others)
        if what == "rows":
            async with closing(cursor.stream("SELECT generate_series(1, 10000)")) as rows:
                await read_all(rows)
        elif what == "copied rows":
            async with cursor.copy("COPY (SELECT generate_series(1, 10000)) TO STDOUT") as copy:
                await read_all(copy.rows())
        else:
            for _ in range(10000):
                await connection.commit()
        assert turns > 9000
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("busy_time", [0, math.inf])
async def test_what_has_been_done_without_waiting_is_not_cancelled(
    dsn: str, monkeypatch: pytest.MonkeyPatch, busy_time: float
) -> None:
    """An operation that did not have to wait returns its result, also in a task that is cancelled."""
    monkeypatch.setattr(_connection, "BUSY_TIME", busy_time)

    def done() -> Generator[Wait, Ready | int, str]:
        return "done"
        yield

    async with await connect(dsn, autocommit=True) as connection:
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                assert await connection.wait(done()) == "done"
            assert not scope.cancelled_caught
