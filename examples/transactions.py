"""Transactions: committed, rolled back, nested, cancelled, and repeated after a conflict.

    python examples/transactions.py

Runs against DATABASE_URL, or a PostgreSQL of its own.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
import trio

import whitepool.postgres

Connection = whitepool.postgres.TrioConnection[Any]
Session = whitepool.postgres.PostgresSession[Any]
T = TypeVar("T")

CONFLICTS = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)


async def transact(
    session: Session, work: Callable[[Connection], Awaitable[T]], attempts: int = 20
) -> T:
    """Run `work` in a serializable transaction, and repeat it after a conflict with another one.

    Between two attempts this task waits, without a connection, and at random up to 10 ms, 20 ms, 40 ms
    and so on to a second. Raises the conflict if the task's deadline would come before the next
    attempt, or after the last one.
    """
    attempt = 1
    while True:
        try:
            async with session.connection() as connection, connection.transaction():
                await connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                return await work(connection)
        except CONFLICTS:
            pause = random.uniform(0, min(1, 0.005 * 2**attempt))
            is_too_late = trio.current_time() + pause >= trio.current_effective_deadline()
            if is_too_late or attempt == attempts:
                raise
        await trio.sleep(pause)
        attempt += 1


async def balance(session: Session) -> int:
    async with session.connection() as connection:
        cursor = await connection.execute("SELECT sum(amount) FROM entry")
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])


async def add(connection: Connection, amount: int) -> None:
    await connection.execute("INSERT INTO entry VALUES (%s)", (amount,))


async def double(connection: Connection) -> None:
    """Double the balance. Of two transactions that do so at the same time, one has to be repeated."""
    await connection.execute("INSERT INTO entry SELECT sum(amount) FROM entry")


async def main(dsn: str) -> None:
    async with whitepool.postgres.open_pool(dsn, pool_size=4) as session:
        async with session.connection() as connection:
            await connection.execute("DROP TABLE IF EXISTS entry")
            await connection.execute("CREATE TABLE entry (amount int)")
            await add(connection, 10)
        print("committed:", await balance(session))

        with suppress(ZeroDivisionError):
            async with session.connection() as connection:
                await add(connection, 100)
                raise ZeroDivisionError
        print("rolled back by an exception:", await balance(session))

        async with session.connection() as connection:
            await add(connection, 1)
            with suppress(psycopg.errors.DivisionByZero):
                async with connection.transaction():  # a savepoint
                    await add(connection, 1000)
                    await connection.execute("SELECT 1 / 0")
        print("only the inner one rolled back:", await balance(session))

        with trio.move_on_after(0.1):
            async with session.connection() as connection:
                await add(connection, 10_000)
                await connection.execute("SELECT pg_sleep(60)")  # cancelled on the server as well
        print("rolled back by a cancellation:", await balance(session))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(transact, session, double)
        print("doubled four times, one after the other:", await balance(session))

        async with session.connection() as connection:
            await connection.execute("DROP TABLE entry")


if __name__ == "__main__":
    from embedded_postgres import database_url

    with database_url() as url:
        trio.run(main, url)
