"""Transactions that nothing cancels."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from connections import (
    IDLE,
    INTRANS,
    Connection,
    check_usable,
    status,
)
from onlooker import Onlooker


async def test_a_transaction_is_committed(connection: Connection, notes: Callable[[], int]) -> None:
    """A block that ends normally has been committed."""
    async with connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('a')")
        assert status(connection) is INTRANS
        assert notes() == 0
    assert status(connection) is IDLE
    assert notes() == 1


async def test_a_transaction_is_rolled_back(connection: Connection, notes: Callable[[], int]) -> None:
    """A block that ends with an exception has been rolled back, and the exception goes on."""
    with pytest.raises(LookupError):
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            raise LookupError
    await check_usable(connection)
    assert notes() == 0


async def test_the_rollback_exception_ends_the_block_that_it_names(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """psycopg.Rollback rolls a block back, up to the block that it names, and goes no further."""
    async with connection.transaction() as outer:
        await connection.execute("INSERT INTO notes VALUES ('a')")
        async with connection.transaction():
            raise psycopg.Rollback(outer)
    async with connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('b')")
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('c')")
            raise psycopg.Rollback
    await check_usable(connection)
    assert notes() == 1


async def test_force_rollback_rolls_back_a_block_that_ends_normally(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A block with `force_rollback` is rolled back although it ends normally."""
    async with connection.transaction(force_rollback=True):
        await connection.execute("INSERT INTO notes VALUES ('a')")
    await check_usable(connection)
    assert notes() == 0


async def test_nested_blocks_are_savepoints(
    connection: Connection, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """Nested blocks are savepoints: each is rolled back, or kept, on its own."""
    async with connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('outer')")
        async with connection.transaction("named") as named:
            assert named.savepoint_name == "named"
            await connection.execute("INSERT INTO notes VALUES ('kept')")
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with connection.transaction():
                await connection.execute("INSERT INTO notes VALUES ('dropped')")
                async with connection.transaction():
                    await connection.execute("SELECT 1/0")
        async with connection.transaction(force_rollback=True):
            await connection.execute("INSERT INTO notes VALUES ('forced')")
        assert status(connection) is INTRANS
    await check_usable(connection)
    assert onlooker.ask("SELECT array_agg(note) FROM notes") == ["outer", "kept"]


async def test_a_transaction_in_a_pipeline_is_like_any_other(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A transaction inside a pipeline is committed, or rolled back, like any other."""
    async with connection.pipeline(), connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('a')")
    with pytest.raises(psycopg.errors.DivisionByZero):
        async with connection.pipeline(), connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('b')")
            await connection.execute("SELECT 1/0")
    await check_usable(connection)
    assert notes() == 1


async def test_commit_keeps_and_rollback_drops_what_was_done(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """commit() keeps what was done since the last one, rollback() does not."""
    await connection.execute("INSERT INTO notes VALUES ('a')")
    await connection.commit()
    await connection.execute("INSERT INTO notes VALUES ('b')")
    await connection.rollback()
    await check_usable(connection)
    assert notes() == 1
