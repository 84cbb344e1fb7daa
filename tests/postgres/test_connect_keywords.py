"""The keywords of `connect` that are not part of a connection string."""

from __future__ import annotations

import inspect
from typing import Any

import psycopg
import pytest
from connections import (
    IDLE,
    INTRANS,
    ask,
    status,
)
from psycopg import AsyncCursor, pq
from psycopg.rows import Row, TupleRow, dict_row
from psycopg.types.string import TextLoader

import whitepool
from whitepool._options import Options
from whitepool.postgres import PostgresManager, TrioConnection, connect, open_pool
from whitepool.postgres._keywords import ConnectKeywords, LibpqKeywords, PoolKeywords


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


def test_type_checkers_know_every_keyword_of_libpq() -> None:
    """Those of this libpq. Newer ones may have more, and older ones fewer."""
    of_libpq = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    assert of_libpq <= set(LibpqKeywords.__annotations__)


def test_type_checkers_know_every_keyword_of_connect_and_every_option() -> None:
    own = set(inspect.signature(connect).parameters) - {"conninfo", "row_factory", "kwargs"}
    assert set(ConnectKeywords.__annotations__) - set(LibpqKeywords.__annotations__) == own
    options = {
        name: parameter.annotation for name, parameter in inspect.signature(Options).parameters.items()
    }
    types = {name: PoolKeywords.__annotations__[name].__forward_arg__ for name in options}
    assert types == options
    assert set(PoolKeywords.__annotations__) == set(ConnectKeywords.__annotations__) | set(options)


class Mine(TrioConnection[Row]):
    """A connection class of one's own."""

    async def one(self) -> Row | None:
        return await (await self.execute("SELECT 1 AS one")).fetchone()


async def test_connection_class_makes_the_connections(dsn: str) -> None:
    """Of a pool and of a manager; the class may say what its rows are."""
    async with (
        open_pool(dsn, connection_class=Mine[TupleRow]) as session,
        session.connection() as connection,
    ):
        assert type(connection) is Mine
        assert await connection.one() == (1,)
    async with (
        open_pool(dsn, connection_class=Mine, row_factory=dict_row) as dicts,
        dicts.connection() as connection,
    ):
        assert await connection.one() == {"one": 1}
    manager = PostgresManager(dsn, connection_class=Mine)
    async with whitepool.open_pool(manager) as plain, plain.worker() as connection:
        assert type(connection) is Mine


@pytest.mark.parametrize("wrong", [psycopg.AsyncConnection, dict[str, int], "TrioConnection", None])
def test_connection_class_must_run_on_trio(wrong: Any) -> None:
    """Any other class is refused before anything is opened."""
    with pytest.raises(TypeError, match="connection_class must be a TrioConnection, not"):
        open_pool("", connection_class=wrong)
