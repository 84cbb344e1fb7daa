"""Jobs in a table, and a connection of its own that listens for them, and survives its server.

    python examples/listen.py

A job stays in the table until it has been done. A notification only says that it is worth looking, so
no job is lost while there is no connection. Runs against DATABASE_URL, or a PostgreSQL of its own.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import psycopg
import trio
from psycopg import sql

import whitepool.postgres

Session = whitepool.postgres.PostgresSession[Any]

CHECK_EVERY = 30.0
"""Seconds without a notification after which the connection is tested, and the table is looked at."""

ANSWER_WITHIN = 5.0
"""Seconds in which the server has to answer that test."""

TAKE = """
    DELETE FROM job
    WHERE id = (SELECT id FROM job ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING what
"""


async def listen(dsn: str, channel: str, wake_up: Callable[[], None]) -> None:
    """Call `wake_up` after each notification, and whenever one may have been missed."""
    pause = 0.1
    while True:
        try:
            async with await whitepool.postgres.connect(
                dsn, autocommit=True, connect_timeout=10, application_name="listener"
            ) as connection:
                await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
                pause = 0.1
                while True:
                    wake_up()  # the first time, for what came before LISTEN
                    async for _ in connection.notifies(timeout=CHECK_EVERY, stop_after=1):
                        pass
                    with trio.fail_after(ANSWER_WITHIN):
                        await connection.execute("SELECT 1")  # a network that is cut says nothing
        except (psycopg.OperationalError, trio.TooSlowError) as error:
            print(f"not listening: {error!r}")
        await trio.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, 10)


async def work(
    session: Session, calls: trio.MemoryReceiveChannel[None], do: Callable[[str], Awaitable[None]]
) -> None:
    """Do the jobs of the table, each time that this task is called.

    A job is done in the transaction that removes it, so it stays in the table if it fails.
    """
    async for _ in calls:
        is_empty = False
        while not is_empty:
            try:
                async with session.connection() as connection:
                    row = await (await connection.execute(TAKE)).fetchone()
                    if row is not None:
                        await do(row[0])
                is_empty = row is None
            except (psycopg.OperationalError, whitepool.CheckoutTimeout) as error:
                print(f"not working: {error!r}")
                await trio.sleep(1)


async def add(session: Session, what: str) -> None:
    async with session.connection() as connection:
        await connection.execute("INSERT INTO job (what) VALUES (%s)", (what,))
        await connection.execute("NOTIFY jobs")  # sent when the transaction commits


async def end_listener(session: Session) -> None:
    """End the connection that listens, as a restart of the server does."""
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'listener'"
    ended = 0
    while not ended:  # it may not be there yet
        async with session.connection() as connection:
            ended = (await connection.execute(end)).rowcount


async def jobs_left(session: Session) -> int:
    async with session.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM job")).fetchone()
        assert row is not None
        return int(row[0])


async def print_job(what: str) -> None:
    print(what)


async def main(dsn: str) -> None:
    # With room for one call: a task that is going to look anyway need not be called again.
    send, calls = trio.open_memory_channel[None](1)

    def wake_up() -> None:
        with suppress(trio.WouldBlock):
            send.send_nowait(None)

    async with (
        whitepool.postgres.open_pool(dsn, pool_size=2) as session,
        trio.open_nursery() as nursery,
    ):
        async with session.connection() as connection:
            await connection.execute("DROP TABLE IF EXISTS job")
            await connection.execute(
                "CREATE TABLE job (id int GENERATED ALWAYS AS IDENTITY, what text)"
            )
        nursery.start_soon(listen, dsn, "jobs", wake_up)
        nursery.start_soon(work, session, calls, print_job)
        for number in range(6):
            await add(session, f"job {number}")
            if number == 2:
                await end_listener(session)
        while await jobs_left(session):
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
        # Outside the cancelled block, because this waits.
    async with await whitepool.postgres.connect(dsn, autocommit=True) as connection:
        await connection.execute("DROP TABLE job")


if __name__ == "__main__":
    from embedded_postgres import database_url

    with database_url() as url:
        trio.run(main, url)
