"""AnyIO's task groups, scopes, timeouts, limiters and threads, around connections of a pool."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable

import anyio
import anyio.abc
import anyio.from_thread
import anyio.to_thread
import psycopg
import pytest
from connections import Connection, ask, backend, check_usable
from onlooker import Onlooker
from workshop import check_books

import whitepool
from whitepool.postgres import PostgresSession, open_pool

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

SLEEP = "SELECT pg_sleep(30)"


@pytest.fixture
async def session(dsn: str) -> AsyncIterator[PostgresSession]:
    async with open_pool(dsn, pool_size=1, max_overflow=0) as session:
        yield session
        # Whatever happened: the one connection is whole, and it was never replaced.
        async with session.connection() as connection:
            await check_usable(connection)
        assert session.statistics().started == 1
        check_books(session)


async def note(connection: Connection, text: str) -> None:
    await connection.execute("INSERT INTO notes VALUES (%s)", (text,))


async def test_tasks_that_share_a_connection(
    session: PostgresSession, notes: Callable[[], int]
) -> None:
    """The tasks of a group take turns, in one transaction."""
    async with session.connection() as connection:
        async with anyio.create_task_group() as group:
            for text in "abc":
                group.start_soon(note, connection, text)
        assert notes() == 0
    assert notes() == 3


async def test_a_task_that_fails(
    session: PostgresSession, notes: Callable[[], int], onlooker: Onlooker
) -> None:
    """The statement of the other task is cancelled on the server, and nothing is committed."""

    async def fail() -> None:
        await onlooker.until_active(server_process)
        raise ValueError

    with pytest.raises(BaseExceptionGroup) as caught:
        async with session.connection() as connection:
            server_process = backend(connection)
            await note(connection, "a")
            async with anyio.create_task_group() as group:
                group.start_soon(connection.execute, SLEEP)
                group.start_soon(fail)
    assert caught.group_contains(ValueError)
    assert onlooker.state(server_process) != "active"
    assert notes() == 0


@pytest.mark.parametrize("outside", [False, True])
async def test_timeouts(session: PostgresSession, outside: bool, notes: Callable[[], int]) -> None:
    """`fail_after` ends a statement with `TimeoutError`, around the checkout or within it."""
    with anyio.move_on_after(0.1 if outside else 30) as scope, pytest.raises(TimeoutError):
        async with session.connection() as connection:
            await note(connection, "a")
            with anyio.fail_after(0.1 if not outside else 30):
                await connection.execute(SLEEP)
    assert scope.cancelled_caught == outside
    assert notes() == 0


async def test_a_scope_that_is_cancelled(session: PostgresSession, notes: Callable[[], int]) -> None:
    """What is left of the transaction goes on; a shielded statement is not cancelled."""
    async with session.connection() as connection:
        with anyio.move_on_after(0.05) as scope:
            await note(connection, "a")
            async with connection.transaction():
                await note(connection, "b")
                await connection.execute(SLEEP)
        assert scope.cancelled_caught
        with anyio.CancelScope() as cancelled:
            cancelled.cancel()
            with anyio.CancelScope(shield=True):
                await note(connection, "c")
    assert notes() == 2


async def test_a_checkout_that_takes_too_long(session: PostgresSession) -> None:
    """The pool's own timeout is a `CheckoutTimeout`, and no `TimeoutError`, as anyio's is."""
    async with session.worker():
        with anyio.fail_after(30), pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=0.01)
        assert not isinstance(caught.value, TimeoutError)
        with pytest.raises(TimeoutError), anyio.fail_after(0.01):
            await session.block_checkout(timeout=30)


async def test_threads(session: PostgresSession) -> None:
    """A thread may use the connection of the task that waits for it, through that task."""

    def in_thread(connection: Connection) -> int:
        answer: int = anyio.from_thread.run(ask, connection, "SELECT 7")
        return answer

    async with session.connection() as connection:
        assert await anyio.to_thread.run_sync(in_thread, connection) == 7


async def test_limiters_and_streams(session: PostgresSession, notes: Callable[[], int]) -> None:
    """A limiter and a stream between tasks, each of which checks out the connection."""
    limiter = anyio.CapacityLimiter(2)
    send, receive = anyio.create_memory_object_stream[int]()

    async def count(sender: anyio.abc.ObjectSendStream[int]) -> None:
        async with limiter, session.connection() as connection, sender:
            await note(connection, "a")
            await sender.send(await ask(connection, "SELECT count(*) FROM notes"))

    counted = []
    async with anyio.create_task_group() as group, receive:
        async with send:
            for _ in range(5):
                group.start_soon(count, send.clone())
        async for number in receive:
            counted.append(number)
    assert sorted(counted) == [1, 2, 3, 4, 5]


async def test_a_lost_connection_is_an_error(session: PostgresSession, onlooker: Onlooker) -> None:
    """A group around a statement raises psycopg's error, in a group."""
    with pytest.raises(BaseExceptionGroup) as caught:
        async with session.connection() as connection, anyio.create_task_group() as group:
            group.start_soon(connection.execute, "SELECT 1 / 0")
    assert caught.group_contains(psycopg.errors.DivisionByZero)
