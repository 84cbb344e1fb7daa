"""Load rows with COPY: see how far it is, cancel it, and go on with the same connection.

    python examples/bulk.py

Runs against DATABASE_URL, or a PostgreSQL of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import trio

import whitepool.postgres

Session = whitepool.postgres.PostgresSession[Any]

ROWS = 200_000


class Load:
    """A load of rows into the table ``reading``, which another task may watch and cancel."""

    def __init__(self) -> None:
        self.sent = 0
        self.scope = trio.CancelScope()

    async def run(self, session: Session, rows: Iterable[tuple[int, float]]) -> None:
        """Load all of the rows, or none: if this fails or is cancelled, the server keeps nothing."""
        with self.scope:
            async with (
                session.connection() as connection,
                connection.cursor().copy("COPY reading FROM STDIN") as copy,
            ):
                for row in rows:
                    await copy.write_row(row)
                    self.sent += 1


async def print_progress(load: Load, total: int) -> None:
    while True:
        await trio.sleep(0.1)
        print(f"{load.sent / total:.0%} sent")


async def load_with_progress(session: Session) -> None:
    load = Load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(print_progress, load, ROWS)
        await load.run(session, ((number, number / 7) for number in range(ROWS)))
        nursery.cancel_scope.cancel()


async def cancel_halfway(session: Session) -> None:
    load = Load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run, session, ((number, 0.0) for number in range(ROWS)))
        while load.sent < ROWS / 2:
            await trio.lowlevel.checkpoint()
        load.scope.cancel()  # as a timeout or a client that has gone would


async def count(session: Session) -> int:
    async with session.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM reading")).fetchone()
        assert row is not None
        return int(row[0])


async def main(dsn: str) -> None:
    async with whitepool.postgres.open_pool(dsn, pool_size=1, max_overflow=0) as session:
        async with session.connection() as connection:
            await connection.execute("DROP TABLE IF EXISTS reading")
            await connection.execute("CREATE TABLE reading (sensor int, value float)")
        await load_with_progress(session)
        print("loaded:", await count(session))
        await cancel_halfway(session)
        print("after a load that was cancelled:", await count(session))
        print("connections lost:", session.statistics().lost)
        async with session.connection() as connection:
            await connection.execute("DROP TABLE reading")


if __name__ == "__main__":
    from embedded_postgres import database_url

    with database_url() as url:
        trio.run(main, url)
