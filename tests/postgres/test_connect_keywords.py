"""The keywords of `connect` that are not part of a connection string."""

from __future__ import annotations

from typing import Any

import pytest
from connections import (
    IDLE,
    INTRANS,
    ask,
    status,
)
from psycopg import AsyncCursor
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader

from whitepool.postgres import TrioConnection, connect


async def test_with_autocommit_a_statement_starts_no_transaction(dsn: str) -> None:
    """With `autocommit` a statement starts no transaction, and without it does."""
    async with await connect(dsn) as connection:
        assert not connection.autocommit
        await connection.execute("SELECT 1")
        assert status(connection) is INTRANS
    async with await connect(dsn, autocommit=True) as connection:
        assert connection.autocommit
        await connection.execute("SELECT 1")
        assert status(connection) is IDLE


async def test_row_factory_makes_the_rows(dsn: str) -> None:
    """`row_factory` makes the rows; without it they are tuples."""
    async with await connect(dsn, row_factory=dict_row) as connection:
        cursor = await connection.execute("SELECT 1 AS a")
        assert await cursor.fetchall() == [{"a": 1}]
    async with await connect(dsn) as plain:
        assert await (await plain.execute("SELECT 1 AS a")).fetchall() == [(1,)]


async def test_cursor_factory_makes_the_cursors(dsn: str) -> None:
    """`cursor_factory` makes the cursors."""

    class Mine(AsyncCursor[Any]):
        pass

    async with await connect(dsn, cursor_factory=Mine) as connection:
        assert type(connection.cursor()) is Mine
        assert type(await connection.execute("SELECT 1")) is Mine


@pytest.mark.parametrize(("threshold", "prepared"), [(0, 1), (1, 1), (None, 0)])
async def test_prepare_threshold_says_when_a_query_is_prepared(
    dsn: str, threshold: int | None, prepared: int
) -> None:
    """`prepare_threshold` says how often a query must come before it is prepared; None: never."""
    async with await connect(dsn, prepare_threshold=threshold) as connection:
        for _ in range(2):
            await connection.execute("SELECT 1")
        count = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 1'"
        assert await ask(connection, count) == prepared


async def test_a_context_passes_on_its_adapters(dsn: str) -> None:
    """A connection adapts values like the connection that it got as `context`."""
    async with await connect(dsn) as model:
        model.adapters.register_loader("int4", TextLoader)
        async with await connect(dsn, context=model) as connection:
            assert await ask(connection, "SELECT 1") == "1"
    async with await connect(dsn) as connection:
        assert await ask(connection, "SELECT 1") == 1


async def test_a_subclass_connects_itself(dsn: str) -> None:
    """`connect` of a subclass makes one of its own."""

    class Mine(TrioConnection[Any]):
        pass

    async with await Mine.connect(dsn) as connection:
        assert type(connection) is Mine
