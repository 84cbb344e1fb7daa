"""A pool for tests: what is committed is there until the end of the test, and nothing after it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest
import trio
from rollback_isolation import open_isolated_pool

import whitepool
from whitepool.postgres import PostgresSession, open_pool

Session = PostgresSession[Any]


@pytest.fixture(params=["isolated", "plain"])
async def session(
    request: pytest.FixtureRequest, dsn: str, notes: Callable[[], int], autocommit: bool
) -> AsyncIterator[Session]:
    """A pool that is isolated; or a plain one of one connection: both must do the same."""
    if request.param == "isolated":
        async with open_isolated_pool(dsn, autocommit=autocommit) as session:
            yield session
            assert notes() == 0
        assert notes() == 0
    else:
        async with open_pool(dsn, pool_size=1, max_overflow=0, autocommit=autocommit) as session:
            yield session


both = pytest.mark.parametrize("autocommit", [False, True])


async def write(connection: Any, note: str) -> None:
    await connection.execute("INSERT INTO notes VALUES (%s)", (note,))


async def read(session: Session) -> str:
    async with session.connection() as connection:
        cursor = await connection.execute("SELECT coalesce(string_agg(note, ''), '') FROM notes")
        row = await cursor.fetchone()
        assert row is not None
        return str(row[0])


@both
async def test_a_block_commits(session: Session, autocommit: bool) -> None:
    """What a block has written is there for the next, and what is not committed is not."""
    async with session.connection() as connection:
        await write(connection, "a")
    async with session.worker() as connection:
        await write(connection, "b")
    assert await read(session) == ("ab" if autocommit else "a")


@both
async def test_a_block_that_raises(session: Session, autocommit: bool) -> None:
    """It is rolled back to what was committed in it; with autocommit that is each statement."""
    with suppress(ZeroDivisionError):
        async with session.connection() as connection:
            await write(connection, "a")
            await connection.commit()
            await write(connection, "b")
            await connection.rollback()
            await write(connection, "c")
            raise ZeroDivisionError
    assert await read(session) == ("abc" if autocommit else "a")


@both
async def test_transactions(session: Session, autocommit: bool) -> None:
    """The outermost block commits; one inside it, or after a statement without autocommit, does not."""
    with suppress(ZeroDivisionError):
        async with session.connection() as connection:
            async with connection.transaction():
                await write(connection, "a")
                async with connection.transaction(force_rollback=True):
                    await write(connection, "b")
                with suppress(psycopg.errors.UndefinedTable):
                    async with connection.transaction():
                        await write(connection, "c")
                        await connection.execute("SELECT FROM nowhere")
                await write(connection, "d")
            await write(connection, "e")
            async with connection.transaction():
                await write(connection, "f")
            raise ZeroDivisionError
    assert await read(session) == ("adef" if autocommit else "ad")


@both
async def test_a_statement_that_fails(session: Session, autocommit: bool) -> None:
    """It ends the transaction; with autocommit there is none."""
    error: type[Exception] | None = None
    try:
        async with session.connection() as connection:
            await write(connection, "a")
            with suppress(psycopg.errors.UndefinedTable):
                await connection.cursor().execute("SELECT FROM nowhere")
            await write(connection, "b")
    except psycopg.Error as its_error:
        error = type(its_error)
    assert error is (None if autocommit else psycopg.errors.InFailedSqlTransaction)
    assert await read(session) == ("ab" if autocommit else "")


@both
async def test_many(session: Session, autocommit: bool) -> None:
    """`executemany` is one statement."""
    with suppress(ZeroDivisionError):
        async with session.connection() as connection:
            await connection.cursor().executemany("INSERT INTO notes VALUES (%s)", [("a",), ("b",)])
            raise ZeroDivisionError
    assert await read(session) == ("ab" if autocommit else "")


@both
async def test_copy(session: Session, autocommit: bool) -> None:
    """`copy` is a statement, too."""
    with suppress(ZeroDivisionError):
        async with session.connection() as connection:
            async with connection.cursor().copy("COPY notes FROM STDIN") as copy:
                await copy.write_row(("a",))
            raise ZeroDivisionError
    assert await read(session) == ("a" if autocommit else "")


@both
async def test_a_cancelled_query(session: Session, autocommit: bool) -> None:
    """The connection lives on, and what was committed before is there."""
    with trio.move_on_after(0.1):
        async with session.connection() as connection:
            await write(connection, "a")
            await connection.execute("SELECT pg_sleep(30)")
    assert await read(session) == ("a" if autocommit else "")


@both
async def test_a_lost_connection_is_not_replaced(
    dsn: str, notes: Callable[[], int], autocommit: bool
) -> None:
    """A second connection would commit."""
    async with open_isolated_pool(dsn, autocommit=autocommit) as session:
        async with session.connection() as connection:
            await connection.close()
        with pytest.raises(whitepool.CheckoutTimeout, match="the connection of this test was lost"):
            async with session.connection(timeout=0.1) as connection:
                await write(connection, "a")
    assert notes() == 0
