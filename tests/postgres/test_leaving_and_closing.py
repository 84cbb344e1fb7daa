"""The connection as a context manager, and closing it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing

import psycopg
import pytest
import trio
from connections import (
    BIG,
    SLOW,
    Connection,
    backend,
    read_all,
)
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from proxy import open_proxy
from psycopg.conninfo import make_conninfo
from trio.testing import wait_all_tasks_blocked

from whitepool.postgres import connect


async def test_leaving_commits_and_closes(
    dsn: str, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """`async with connection` commits at a normal end, and closes."""
    async with await connect(dsn) as connection:
        mine = backend(connection)
        await connection.execute("INSERT INTO notes VALUES ('a')")
    assert connection.closed
    assert notes() == 1
    await onlooker.until_gone(mine)


async def test_leaving_by_an_exception_rolls_back_and_closes(
    dsn: str, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """`async with connection` rolls back where it is left by an exception, and closes."""
    with pytest.raises(LookupError):
        async with await connect(dsn) as connection:
            mine = backend(connection)
            await connection.execute("INSERT INTO notes VALUES ('a')")
            raise LookupError
    assert connection.closed
    await onlooker.until_gone(mine)
    assert notes() == 0


@pytest.mark.parametrize("where", ["in a query", "elsewhere"])
async def test_leaving_by_a_cancellation_rolls_back_and_closes(
    dsn: str, onlooker: Onlooker, notes: Callable[[], int], where: str
) -> None:
    """`async with connection` rolls back where it is cancelled, and closes."""
    with trio.CancelScope() as scope:
        async with await connect(dsn) as connection:
            mine = backend(connection)
            await connection.execute("INSERT INTO notes VALUES ('a')")
            if where == "in a query":
                scope.deadline = trio.current_time() + 0.05
                await connection.execute(SLOW)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert connection.closed
    await onlooker.until_gone(mine)
    assert notes() == 0


async def test_a_task_that_leaves_normally_in_a_cancelled_scope_has_committed(
    dsn: str, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """A task that gets past its `async with connection` has committed, also where it is cancelled."""
    got_past = False
    with trio.CancelScope() as scope:
        async with await connect(dsn) as connection:
            mine = backend(connection)
            await connection.execute("INSERT INTO notes VALUES ('a')")
            scope.cancel()
        got_past = True
    assert connection.closed
    await onlooker.until_gone(mine)
    assert notes() == got_past


async def test_a_task_never_leaves_normally_where_the_commit_was_given_up(
    server: EmbeddedPostgres,
    onlooker: Onlooker,
    notes: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task never gets past its `async with connection` where the commit had to be given up."""
    got_past = False
    async with open_proxy("127.0.0.1", server.port) as proxy:
        with trio.CancelScope() as scope:
            async with await connect(
                make_conninfo(server.dsn, **proxy.address), cleanup_timeout=0.2
            ) as connection:
                mine = backend(connection)
                await connection.execute("INSERT INTO notes VALUES ('a')")
                proxy.drop()
                scope.cancel()
            got_past = True
    assert connection.closed
    await onlooker.until_gone(mine)
    assert notes() == got_past


@pytest.mark.parametrize("query", ["SELECT pg_sleep(30)", "SELECT length(%s)", "notifications"])
async def test_closing_wakes_the_task_that_waits(connection: Connection, query: str) -> None:
    """A task that waits for a connection that another one closes gets an OperationalError."""
    errors: list[BaseException] = []

    async def wait() -> None:
        try:
            if query == "notifications":
                async with aclosing(connection.notifies()) as notifications:
                    await read_all(notifications)
            else:
                await connection.execute(query, [BIG] if "%s" in query else None)
        except Exception as error:
            errors.append(error)

    async def close() -> None:
        await connection.close()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await connection.set_autocommit(True)
            # One after the other, in the same pass of the scheduler: the query is on its way.
            if "%s" in query:
                nursery.start_soon(_after_first_wait, wait, close)
            else:
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                nursery.start_soon(close)
    assert [type(error) for error in errors] == [psycopg.OperationalError]
    assert connection.closed


async def _after_first_wait(
    first: Callable[[], Awaitable[None]], then: Callable[[], Awaitable[None]]
) -> None:
    """Run `first`, and `then` when `first` has come to its first wait."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(then)
        await first()


async def test_closing_wakes_tasks_that_wait_for_their_turn(connection: Connection) -> None:
    """Tasks that wait for their turn get an OperationalError too."""
    errors: list[type[BaseException]] = []

    async def query() -> None:
        try:
            await connection.execute(SLOW)
        except Exception as error:
            errors.append(type(error))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(query)
            await wait_all_tasks_blocked()
            await connection.close()
    assert errors == [psycopg.OperationalError] * 3


async def test_a_closed_connection_may_be_closed_again(connection: Connection) -> None:
    """A closed connection may be closed again."""
    await connection.close()
    await connection.close()
    assert connection.closed


async def test_a_connection_can_be_closed_in_a_cancelled_scope(dsn: str, onlooker: Onlooker) -> None:
    """A connection is closed also where the task that closes it is being cancelled."""
    connection = await connect(dsn)
    mine = backend(connection)
    with trio.CancelScope() as scope:
        scope.cancel()
        await connection.close()
    assert connection.closed
    await onlooker.until_gone(mine)


async def test_using_a_closed_connection_is_an_error(connection: Connection) -> None:
    """Every operation on a closed connection raises an OperationalError that says so."""
    await connection.close()
    operations: list[Callable[[], Awaitable[object]]] = [
        lambda: connection.execute("SELECT 1"),
        connection.commit,
        connection.rollback,
        lambda: connection.transaction().__aenter__(),
        lambda: connection.pipeline().__aenter__(),
    ]
    for operation in operations:
        with pytest.raises(psycopg.OperationalError, match="closed"):
            await operation()
    await connection.cancel_safe()  # nothing to cancel
    connection.cancel()


async def test_an_error_in_your_own_code_is_the_cause(connection: Connection) -> None:
    """What psycopg takes for an error of the connection says what it was."""

    def rows() -> Iterator[tuple[str]]:
        yield from [("a",)]
        raise FileNotFoundError("of-my-own")

    with pytest.raises(psycopg.OperationalError) as caught:
        await connection.cursor().executemany("SELECT %s", rows())
    assert isinstance(caught.value.__cause__, FileNotFoundError)


async def test_a_query_notices_that_the_server_has_hung_up(
    connection: Connection, onlooker: Onlooker
) -> None:
    """A query on a connection that the server has ended raises an OperationalError."""
    mine = backend(connection)
    onlooker.ask("SELECT pg_terminate_backend(%s)", mine)
    with pytest.raises(psycopg.OperationalError):
        await connection.execute("SELECT 1")
    assert connection.closed
    assert not onlooker.state(mine)
