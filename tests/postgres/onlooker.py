"""What the tests of the Postgres side share: a look at the server, and a well-aimed cancellation."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import trio
from psycopg import pq

from whitepool.postgres import TrioConnection


class Onlooker:
    """Looks at the server over a connection of its own, which has nothing to do with Trio."""

    def __init__(self, dsn: str) -> None:
        # Whatever a test has left locked is a failure, and not a reason to hang.
        self._connection = psycopg.connect(dsn, autocommit=True, options="-c lock_timeout=5s")

    def ask(self, query: str, *parameters: object) -> Any:
        """Return the first column of the first row, or None."""
        row = self._connection.execute(query, parameters or None).fetchone()
        return None if row is None else row[0]

    def do(self, statement: str) -> None:
        self._connection.execute(statement)

    def state(self, backend: int) -> str | None:
        """What a backend is doing, in the words of pg_stat_activity; None: it is gone."""
        state: str | None = self.ask("SELECT state FROM pg_stat_activity WHERE pid = %s", backend)
        return state

    def backends(self, application: str) -> int:
        count: int = self.ask(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", application
        )
        return count

    def active(self, application: str) -> int:
        count: int = self.ask(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND state = 'active'",
            application,
        )
        return count

    async def until_active(self, backend: int) -> None:
        await until(lambda: self.state(backend) == "active")

    async def until_gone(self, backend: int) -> None:
        await until(lambda: self.state(backend) is None)

    def close(self) -> None:
        self._connection.close()


async def until(condition: Callable[[], bool], within: float = 5.0) -> None:
    """Return when the condition holds; fail when it does not come to that."""
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(0.002)


async def cancel_where_it_waits(operation: Callable[[], Awaitable[object]]) -> None:
    """Run an operation, and cancel it at the first point where it waits for anything."""

    async def cancel() -> None:
        scope.cancel()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            await operation()
            await trio.lowlevel.checkpoint()  # where the answer was faster than the cancellation
    assert scope.cancelled_caught


@contextmanager
def listening_to_ctrl_c() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt, as it may not in a program started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def press_ctrl_c(after: Callable[[], Awaitable[object]]) -> None:
    """Press Ctrl-C in the main task of the running program, after something has happened."""

    async def press() -> None:
        await after()
        signal.raise_signal(signal.SIGINT)

    trio.lowlevel.spawn_system_task(press)  # nobody else's KeyboardInterrupt


def status(connection: TrioConnection[Any]) -> pq.TransactionStatus:
    return pq.TransactionStatus(connection.pgconn.transaction_status)


def backend(connection: TrioConnection[Any]) -> int:
    return connection.pgconn.backend_pid


async def check_usable(connection: TrioConnection[Any]) -> None:
    """Everything that somebody who gets a connection expects of it."""
    assert not connection.closed
    assert status(connection) is pq.TransactionStatus.IDLE
    assert connection.pgconn.pipeline_status == pq.PipelineStatus.OFF
    with trio.fail_after(3):
        async with connection.transaction():
            cursor = await connection.execute("SELECT 1")
            assert await cursor.fetchall() == [(1,)]
        await connection.execute("SELECT 1")
        await connection.rollback()
        await connection.execute("SELECT 1")
        await connection.commit()
    assert status(connection) is pq.TransactionStatus.IDLE


async def check_usable_after_rollback(connection: TrioConnection[Any]) -> None:
    """The same, where a transaction may have been left open."""
    with trio.fail_after(3):
        await connection.rollback()
    await check_usable(connection)
