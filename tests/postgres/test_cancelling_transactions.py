"""Cancelling a transaction: it has been rolled back when its task is out of the block."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import trio
from connections import (
    INTRANS,
    SLOW,
    Connection,
    backend,
    cancel_where_it_waits,
    check_usable,
    status,
)
from onlooker import Onlooker, slow_commits
from timing import until
from trio.testing import wait_all_tasks_blocked


async def test_a_transaction_cancelled_in_a_query_is_rolled_back(
    connection: Connection, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """A block that is cancelled in a query has been rolled back when the task is out of it."""

    async def work() -> None:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            await connection.execute(SLOW)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await onlooker.until_active(backend(connection))
        await until(lambda: onlooker.ask(_IN_SLOW, backend(connection)) == 1)
        nursery.cancel_scope.cancel()
    assert onlooker.state(backend(connection)) == "idle"
    await check_usable(connection)
    assert notes() == 0


_IN_SLOW = f"SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND query = '{SLOW}'"


async def test_a_transaction_cancelled_between_queries_is_rolled_back(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A block that is cancelled while no query is running is rolled back."""
    with trio.move_on_after(0.02) as scope:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            await trio.sleep_forever()
    assert scope.cancelled_caught
    await check_usable(connection)
    assert notes() == 0


async def test_a_transaction_cancelled_at_its_start_leaves_none_behind(connection: Connection) -> None:
    """A block that is cancelled while it is being entered leaves no transaction behind."""

    async def enter() -> None:
        async with connection.transaction():
            await trio.sleep_forever()  # where the server was faster than the cancellation

    for _ in range(20):
        await cancel_where_it_waits(enter)
        await check_usable(connection)


async def test_a_savepoint_cancelled_at_its_start_takes_only_itself_along(
    connection: Connection,
) -> None:
    """A savepoint that is cancelled while it is being entered takes nothing but itself along."""

    async def enter() -> None:
        async with connection.transaction():
            await trio.sleep_forever()  # where the server was faster than the cancellation

    for _ in range(10):
        async with connection.transaction():
            await connection.execute("SELECT 1")
            await cancel_where_it_waits(enter)
            raise psycopg.Rollback
        await check_usable(connection)


async def test_a_transaction_cancelled_before_its_end_is_rolled_back_or_committed(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A block that ends normally in a scope that is cancelled already is rolled back, or committed."""
    with trio.CancelScope() as scope:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            scope.cancel()
    await check_usable(connection)
    assert notes() == (0 if scope.cancelled_caught else 1)


async def test_a_transaction_cancelled_while_it_waits_to_commit_is_rolled_back(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A block that is cancelled while it waits for its turn to commit leaves no transaction behind."""

    async def work() -> None:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            nursery.start_soon(connection.execute, "SELECT pg_sleep(0.2)")
            await wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + 0.1
            await work()
        assert scope.cancelled_caught
    await check_usable(connection)
    assert notes() == 0


async def test_a_transaction_cancelled_while_the_server_commits_is_rolled_back(
    connection: Connection, onlooker: Onlooker
) -> None:
    """A block that is cancelled while the server commits has been rolled back."""

    async def work() -> None:
        async with connection.transaction():
            await connection.execute("INSERT INTO slow VALUES (1)")

    with slow_commits(onlooker):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            in_commit = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND query = 'COMMIT'"
            await until(lambda: onlooker.ask(in_commit, backend(connection)) == 1)
            nursery.cancel_scope.cancel()
        await check_usable(connection)
        assert onlooker.ask("SELECT count(*) FROM slow") == 0


async def test_a_cancelled_savepoint_leaves_the_outer_transaction_intact(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A cancellation that stays inside a savepoint leaves the transaction around it intact."""
    async with connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('outer')")
        with trio.move_on_after(0.05) as scope:
            async with connection.transaction():
                await connection.execute("INSERT INTO notes VALUES ('inner')")
                await connection.execute(SLOW)
        assert scope.cancelled_caught
        assert status(connection) is INTRANS
    await check_usable(connection)
    assert notes() == 1
