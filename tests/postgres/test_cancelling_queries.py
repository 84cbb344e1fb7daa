"""Cancelling what a connection is doing: afterwards it can be used, or is closed."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest
import trio
from connections import (
    BIG,
    IDLE,
    SLOW,
    Connection,
    ask,
    backend,
    cancel_where_it_waits,
    check_usable,
    check_usable_after_rollback,
    closing,
    read_all,
    status,
)
from onlooker import Onlooker, slow_commits
from psycopg.pq import TransactionStatus

from whitepool.postgres import connect


async def test_a_cancelled_query_is_cancelled_on_the_server(
    connection: Connection, onlooker: Onlooker
) -> None:
    """When a cancelled query raises, the server has ended it, and the connection is usable."""
    mine = backend(connection)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.execute, SLOW)
        await onlooker.until_active(mine)
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - begun < 2
    assert str(onlooker.state(mine)).startswith("idle")
    assert status(connection) is TransactionStatus.INERROR
    await check_usable_after_rollback(connection)
    assert backend(connection) == mine


async def test_fail_after_limits_the_time_of_a_query(connection: Connection) -> None:
    """`trio.fail_after` is all that a query with a time limit needs."""
    with pytest.raises(trio.TooSlowError):
        with trio.fail_after(0.05):
            await connection.execute(SLOW)
    await check_usable_after_rollback(connection)


async def test_a_query_cancelled_just_after_it_was_sent_ends(connection: Connection) -> None:
    """A request to cancel that overtakes its query is repeated until the query is gone."""
    await connection.set_autocommit(True)
    begun = trio.current_time()
    for _ in range(20):
        await cancel_where_it_waits(lambda: connection.execute(SLOW))
        assert status(connection) is IDLE
    assert trio.current_time() - begun < 10
    await check_usable(connection)


async def test_a_cancellation_does_not_hit_the_next_query(connection: Connection) -> None:
    """The query after a cancelled one is left alone."""
    await connection.set_autocommit(True)
    for i in range(50):
        await cancel_where_it_waits(lambda: connection.execute("SELECT pg_sleep(0.001)"))
        assert await ask(connection, "SELECT %s::int FROM pg_sleep(0.001)", i) == i


async def test_an_already_cancelled_scope_sends_nothing(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """In a scope that is cancelled already nothing is sent to the server."""
    await connection.set_autocommit(True)
    operations: list[Callable[[], Awaitable[object]]] = [
        lambda: connection.execute("INSERT INTO notes VALUES ('a')"),
        lambda: connection.cursor().executemany("INSERT INTO notes VALUES (%s)", [("b",)]),
        lambda: connection.transaction().__aenter__(),
        lambda: connection.set_autocommit(False),
        connection.commit,
        connection.rollback,
    ]
    for operation in operations:
        with trio.CancelScope() as scope:
            scope.cancel()
            await operation()
        assert scope.cancelled_caught
        assert status(connection) is IDLE
    assert connection.autocommit
    await connection.set_autocommit(False)
    await check_usable(connection)
    assert notes() == 0


async def test_a_cancelled_query_that_fills_the_socket_leaves_the_connection_usable(
    connection: Connection,
) -> None:
    """A query that is cancelled while half of it is on its way leaves a usable connection."""
    await cancel_where_it_waits(lambda: connection.execute("SELECT length(%s)", [BIG]))
    await check_usable_after_rollback(connection)


async def test_a_cancelled_commit_is_a_rollback(connection: Connection, onlooker: Onlooker) -> None:
    """A commit that is cancelled while the server works on it is a rollback."""
    with slow_commits(onlooker):
        await connection.execute("INSERT INTO slow VALUES (1)")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.commit)
            await onlooker.until_active(backend(connection))
            nursery.cancel_scope.cancel()
        await connection.rollback()
        await check_usable(connection)
        assert onlooker.ask("SELECT count(*) FROM slow") == 0


async def test_a_cancelled_wait_for_notifications_just_ends(connection: Connection) -> None:
    """Waiting for notifications is no query: a cancelled wait just ends, and nothing is lost."""
    await connection.set_autocommit(True)
    await connection.execute("LISTEN channel")

    async def listen() -> None:
        async with aclosing(connection.notifies()) as notifications:
            async for _ in notifications:
                raise AssertionError("there was none")

    with trio.move_on_after(0.05) as scope:
        await listen()
    assert scope.cancelled_caught
    assert status(connection) is IDLE
    await connection.set_autocommit(False)
    await check_usable(connection)


async def _stream(connection: Connection) -> None:
    query = "SELECT i, pg_sleep(0.01) FROM generate_series(1, 10000) i"
    async with closing(connection.cursor().stream(query)) as stream:
        await read_all(stream)


async def _stream_elsewhere(connection: Connection) -> None:
    query = "SELECT repeat('x', 10000) FROM generate_series(1, 1000000)"
    async with closing(connection.cursor().stream(query)) as stream:
        async for _ in stream:
            await trio.sleep_forever()


async def _copy_out(connection: Connection) -> None:
    query = "COPY (SELECT i, pg_sleep(0.01) FROM generate_series(1, 10000) i) TO STDOUT"
    async with connection.cursor().copy(query) as copy:
        await read_all(copy.rows())


async def _copy_out_elsewhere(connection: Connection) -> None:
    query = "COPY (SELECT repeat('x', 10000) FROM generate_series(1, 1000000)) TO STDOUT"
    async with connection.cursor().copy(query) as copy:
        await copy.read()
        await trio.sleep_forever()


async def _copy_in_elsewhere(connection: Connection) -> None:
    async with connection.cursor().copy("COPY notes FROM STDIN") as copy:
        await copy.write(b"a\n")
        await trio.sleep_forever()


async def _pipeline(connection: Connection) -> None:
    async with connection.pipeline():
        cursor = await connection.execute(SLOW)
        await cursor.fetchall()


async def _pipeline_elsewhere(connection: Connection) -> None:
    async with connection.pipeline():
        await connection.execute("SELECT 1")
        await trio.sleep_forever()


async def _pipeline_end(connection: Connection) -> None:
    async with connection.pipeline():
        await connection.execute(SLOW)


async def _pipeline_transaction(connection: Connection) -> None:
    async with connection.pipeline(), connection.transaction():
        cursor = await connection.execute(SLOW)
        await cursor.fetchall()


async def _executemany(connection: Connection) -> None:
    await connection.cursor().executemany("SELECT pg_sleep(%s)", [(0.01,)] * 10000)


async def _named_cursor(connection: Connection) -> None:
    async with connection.cursor("named") as cursor:
        await cursor.execute("SELECT i, pg_sleep(0.001) FROM generate_series(1, 10000) i")
        await read_all(cursor)


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize(
    "operation",
    [
        _stream,
        _stream_elsewhere,
        _copy_out,
        _copy_out_elsewhere,
        _copy_in_elsewhere,
        _pipeline,
        _pipeline_elsewhere,
        _pipeline_end,
        _pipeline_transaction,
        _executemany,
        _named_cursor,
    ],
)
async def test_after_a_cancellation_it_is_usable_or_closed(
    connection: Connection,
    notes: Callable[[], int],
    operation: Callable[[Connection], Awaitable[None]],
    autocommit: bool,
) -> None:
    """After a cancellation, in the middle of anything, a connection can be used, or is closed."""
    if operation is _named_cursor and autocommit:
        return  # the server has no such thing
    await connection.set_autocommit(autocommit)
    with trio.move_on_after(0.1) as scope:
        await operation(connection)
    assert scope.cancelled_caught
    if not connection.closed:
        await check_usable_after_rollback(connection)
    assert notes() == 0


@pytest.mark.parametrize(("size", "times"), [(100, 10_000), (1_000_000, 50)])
async def test_writing_to_a_copy_can_be_cancelled(
    connection: Connection, notes: Callable[[], int], size: int, times: int
) -> None:
    """A task that keeps writing to a COPY notices that it is cancelled."""
    written = 0
    with trio.CancelScope() as scope:
        async with connection.cursor().copy("COPY notes FROM STDIN") as copy:
            scope.cancel()
            while written < times:
                written += 1
                await copy.write(b"x" * (size - 1) + b"\n")
    assert scope.cancelled_caught
    assert written < times
    if not connection.closed:
        await check_usable_after_rollback(connection)
    assert notes() == 0


async def test_a_pipeline_left_normally_in_a_cancelled_scope_is_cancelled(
    connection: Connection,
) -> None:
    """What a cancelled task still has in its pipeline is cancelled, and seen as a cancellation."""
    begun = trio.current_time()
    with trio.CancelScope() as scope:
        async with connection.pipeline():
            await connection.execute(SLOW)
            scope.cancel()
    assert scope.cancelled_caught
    assert trio.current_time() - begun < 3
    if not connection.closed:
        await check_usable_after_rollback(connection)


async def test_a_cancellation_that_overtakes_its_query_is_repeated(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ignores a request to cancel what it has not begun, so one request is not enough."""
    requests = 0
    ask = connection.cancel_safe

    async def ignored_at_first(*, timeout: float) -> None:
        nonlocal requests
        requests += 1
        if requests > 2:
            await ask(timeout=timeout)

    monkeypatch.setattr(connection, "cancel_safe", ignored_at_first)
    with trio.fail_after(4), trio.CancelScope() as scope:
        async with connection.pipeline():
            await connection.execute(SLOW)
            scope.cancel()
    assert scope.cancelled_caught
    assert requests == 3
    await check_usable_after_rollback(connection)


async def _many_short_statements(connection: Connection) -> None:
    await connection.cursor().executemany("SELECT pg_sleep(%s)", [(0.001,)] * 20)


async def _pipeline_of_short_statements(connection: Connection) -> None:
    async with connection.pipeline():
        for _ in range(20):
            await connection.execute("SELECT pg_sleep(0.001)")


async def _pipelined_transaction(connection: Connection) -> None:
    async with connection.pipeline(), connection.transaction():
        for _ in range(20):
            await connection.execute("SELECT pg_sleep(0.001)")


async def _short_stream(connection: Connection) -> None:
    query = "SELECT pg_sleep(0.001) FROM generate_series(1, 20)"
    async with closing(connection.cursor().stream(query)) as stream:
        await read_all(stream)


async def _short_copies(connection: Connection) -> None:
    query = "COPY (SELECT pg_sleep(0.001) FROM generate_series(1, 10)) TO STDOUT"
    async with connection.cursor().copy(query) as copy_out:
        await read_all(copy_out.rows())
    async with connection.cursor().copy("COPY notes FROM STDIN") as copy_in:
        for _ in range(10):
            await copy_in.write(b"x" * 200_000 + b"\n")
    await connection.rollback()


async def _short_transactions(connection: Connection) -> None:
    for _ in range(3):
        async with connection.transaction():
            await connection.execute("SELECT pg_sleep(0.002)")
            async with connection.transaction():
                await connection.execute("SELECT pg_sleep(0.002)")


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize(
    "operation",
    [
        _many_short_statements,
        _pipeline_of_short_statements,
        _pipelined_transaction,
        _short_stream,
        _short_copies,
        _short_transactions,
    ],
)
async def test_cancelled_at_any_moment_it_is_usable_or_closed(
    dsn: str,
    notes: Callable[[], int],
    operation: Callable[[Connection], Awaitable[None]],
    autocommit: bool,
) -> None:
    """A cancellation at any moment raises Cancelled, or comes too late, leaving nothing half-done."""
    if operation is _short_copies and autocommit:
        return  # it rolls back what it has written
    moments = random.Random(20)
    for _ in range(25):
        async with await connect(dsn, autocommit=autocommit) as connection:
            finished = False
            with trio.move_on_after(moments.uniform(0, 0.03)) as scope:
                await operation(connection)
                finished = True
            assert finished != scope.cancelled_caught
            if not connection.closed:
                await check_usable_after_rollback(connection)
    assert notes() == 0
