"""Rows of a stream, and of a COPY TO STDOUT, that are read one by one."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import psycopg
import pytest
import trio
from connections import Connection, check_usable, closing, ignoring_errors, read_all
from onlooker import Onlooker
from psycopg.abc import PQGen
from psycopg.generators import fetch_many
from timing import alarm
from trio.testing import wait_all_tasks_blocked

from whitepool.postgres import _connection, _rows, connect

AT_ONCE = "SELECT generate_series(1, 5)"
"""The server sends all rows in one message."""


@pytest.fixture(params=[False, True], ids=["in turns", "at once"])
def busy_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the event loop is kept throughout, or other tasks have their turn after each row."""
    monkeypatch.setattr(_connection, "BUSY_TIME", math.inf if request.param else -1)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop is kept throughout."""
    monkeypatch.setattr(_connection, "BUSY_TIME", math.inf)


WAYS = pytest.mark.parametrize("way", ["stream", "copy"])


@asynccontextmanager
async def reading(connection: Connection, way: str) -> AsyncIterator[AsyncIterator[object]]:
    """Read the rows that arrive `AT_ONCE`, in one way or the other."""
    cursor = connection.cursor()
    if way == "stream":
        async with closing(cursor.stream(AT_ONCE)) as rows:
            yield rows
    else:
        async with cursor.copy(f"COPY ({AT_ONCE}) TO STDOUT") as copy:
            yield copy.rows()


@WAYS
@pytest.mark.usefixtures("at_once")
async def test_a_row_that_has_arrived_is_a_cancellation_point(dsn: str, way: str) -> None:
    """A task that is cancelled gets no further row, although that would not have to wait."""
    async with await connect(dsn, autocommit=True) as connection:
        with trio.CancelScope() as scope:
            async with reading(connection, way) as rows:
                await cancel_after_three(rows, scope)
        assert scope.cancelled_caught
        await check_usable(connection)


@WAYS
@pytest.mark.usefixtures("at_once")
async def test_rows_whose_reading_was_cancelled_are_over(dsn: str, way: str) -> None:
    """It is cancelled on the server, and the block may be left as if nothing had happened."""
    async with await connect(dsn, autocommit=True) as connection:
        async with reading(connection, way) as rows:
            with trio.CancelScope() as scope:
                await cancel_after_three(rows, scope)
            assert scope.cancelled_caught
        await check_usable(connection)


@pytest.mark.usefixtures("at_once")
async def test_a_request_to_cancel_that_is_refused_between_two_rows(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is repeated, as long as the server works on the rows that are to come."""
    requests = 0
    rows = "SELECT repeat('x', 1000), pg_sleep(x / 20 * 30) FROM generate_series(1, 20) x"
    async with await connect(dsn, autocommit=True) as connection:
        cancel = connection.cancel_safe

        async def refuse_once(*, timeout: float) -> None:
            nonlocal requests
            requests += 1
            if requests == 1:
                raise psycopg.OperationalError("refused")
            await cancel(timeout=timeout)

        monkeypatch.setattr(connection, "cancel_safe", refuse_once)
        with trio.fail_after(4), trio.CancelScope() as scope:
            async with connection.cursor().copy(f"COPY ({rows}) TO STDOUT") as copy:
                await cancel_after_three(copy.rows(), scope)
        assert requests == 2
        await check_usable(connection)


async def cancel_after_three(rows: AsyncIterator[object], scope: trio.CancelScope) -> None:
    """Read rows, of which the server sends all in one message; cancel, and read another."""
    for _ in range(3):
        await anext(rows)
    scope.cancel()
    with pytest.raises(trio.Cancelled) as cancelled:
        await anext(rows)
    raise cancelled.value


@pytest.mark.usefixtures("at_once")
async def test_other_tasks_run_while_a_stream_waits_for_its_next_row(
    dsn: str, onlooker: Onlooker
) -> None:
    """Also if the rows before it have arrived together, and it is not yet time for others."""
    query = """
        SELECT x, repeat('x', 1000), CASE WHEN x = 20 THEN pg_advisory_xact_lock_shared(7) END
        FROM generate_series(1, 20) x
    """
    onlooker.do("SELECT pg_advisory_lock(7)")
    seen: list[int] = []

    async def read() -> None:
        async with closing(connection.cursor().stream(query)) as rows:
            async for number, *_ in rows:
                seen.append(number)

    with alarm(10):
        async with await connect(dsn) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(read)
            while not seen:
                await trio.sleep(0.01)
            await wait_all_tasks_blocked(0.05)
            assert len(seen) < 20
            onlooker.do("SELECT pg_advisory_unlock(7)")
    assert seen == list(range(1, 21))


def refuse_to_cancel(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancel_safe(**_: object) -> None:
        pytest.fail("there was nothing to cancel")

    monkeypatch.setattr(connection, "cancel_safe", cancel_safe)


@pytest.mark.parametrize("query", ["SELECT 1", "SELECT 1 / 0", "SET work_mem TO DEFAULT"])
async def test_a_stream_that_has_ended_is_not_cancelled(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """Its answer has been read to the end, also if that is an error."""

    refuse_to_cancel(connection, monkeypatch)
    async with closing(connection.cursor().stream(query)) as rows:
        await ignoring_errors(partial(read_all, rows))
    await connection.rollback()
    await check_usable(connection)


@WAYS
@pytest.mark.usefixtures("busy_time")
async def test_a_connection_that_is_closed_between_two_rows(dsn: str, way: str) -> None:
    """The rest is missing, so there is an error, and not an end."""
    async with await connect(dsn, autocommit=True) as connection:
        with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
            async with reading(connection, way) as rows:
                await close_after_three(rows, connection)


async def close_after_three(rows: AsyncIterator[object], connection: Connection) -> None:
    for _ in range(3):
        await anext(rows)
    await connection.close()
    await read_all(rows)


@pytest.mark.usefixtures("busy_time")
@pytest.mark.parametrize("leaves_early", [False, True])
async def test_notifications_that_come_with_the_rows(dsn: str, leaves_early: bool) -> None:
    """The server sends them behind the last row, and they are told at once."""
    heard: list[str] = []
    query = "SELECT pg_notify('news', x::text) FROM generate_series(1, 3) x"
    async with await connect(dsn, autocommit=True) as connection:
        connection.add_notify_handler(lambda notify: heard.append(notify.payload))
        await connection.execute("LISTEN news")
        async with closing(connection.cursor().stream(query)) as rows:
            if leaves_early:
                await anext(rows)
            else:
                await read_all(rows)
        assert heard == ["1", "2", "3"]


@pytest.mark.usefixtures("busy_time")
async def test_a_stream_that_is_cancelled_behind_its_last_row(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it has been done, so it ends, and there is nothing to cancel."""
    async with await connect(dsn, autocommit=True) as connection:
        refuse_to_cancel(connection, monkeypatch)
        with trio.CancelScope() as scope:
            async with closing(connection.cursor().stream(AT_ONCE)) as rows:
                async for (number,) in rows:
                    if number == 5:
                        scope.cancel()
        assert not scope.cancelled_caught
        await check_usable(connection)


async def test_a_copy_that_is_streamed_by_mistake(dsn: str) -> None:
    """It is refused without waiting for its rows, and the connection is usable."""
    rows = "SELECT repeat('x', 10000), pg_sleep(x - 1) FROM generate_series(1, 30) x"
    async with await connect(dsn, autocommit=True) as connection:
        with trio.fail_after(5), pytest.raises(psycopg.ProgrammingError, match=r"use copy\(\)"):
            await read_all(connection.cursor().stream(f"COPY ({rows}) TO STDOUT"))
        await check_usable(connection)


@pytest.mark.usefixtures("at_once")
async def test_a_copy_whose_result_is_left_out(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that violates the protocol may do that. It is an error of psycopg's."""

    def fetch_nothing(pgconn: psycopg.pq.abc.PGconn) -> PQGen[list[psycopg.pq.abc.PGresult]]:
        yield from fetch_many(pgconn)
        return []

    monkeypatch.setattr(_rows, "fetch_many", fetch_nothing)
    async with await connect(dsn, autocommit=True) as connection:
        with pytest.raises(psycopg.InterfaceError, match="no result"):
            async with reading(connection, "copy") as rows:
                await read_all(rows)
        await check_usable(connection)
