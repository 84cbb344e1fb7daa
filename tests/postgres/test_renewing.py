"""`retire_all` and `resize` on a real server, under load."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from connections import ask, backend
from onlooker import Onlooker
from timing import until
from workshop import check_books

from whitepool.postgres import PostgresSession, open_pool

Session = PostgresSession[tuple[int]]

APPLICATION = "whitepool-renewing"


class Load:
    """Clients that run statements without a pause, and the backends that have served them."""

    def __init__(self) -> None:
        self.served = 0
        self.backends: set[int] = set()

    @asynccontextmanager
    async def on(self, session: Session, clients: int) -> AsyncIterator[None]:
        """Run so many clients until the end of a block. An error of theirs is one of the block."""
        async with trio.open_nursery() as nursery:
            is_over = False

            async def client() -> None:
                while not is_over:
                    async with session.connection() as connection:
                        pid = await ask(connection, "SELECT pg_backend_pid()")
                        assert pid == backend(connection)
                        await connection.execute("SELECT pg_sleep(0.002)")
                    self.backends.add(pid)
                    self.served += 1

            for _ in range(clients):
                nursery.start_soon(client)
            yield
            is_over = True

    async def until_served(self, more: int) -> None:
        before = self.served
        await until(lambda: self.served >= before + more)


async def until_backends(onlooker: Onlooker, count: int) -> None:
    """Return when the server has so many connections of the pool's."""
    await until(lambda: onlooker.backends(APPLICATION) == count)


@pytest.mark.parametrize(("pool_size", "max_overflow"), [(4, 0), (2, 2)])
async def test_retire_all_under_load(
    pool_size: int, max_overflow: int, dsn: str, onlooker: Onlooker
) -> None:
    """Every connection is replaced, by others on the server; no client gets an error."""
    load = Load()
    async with open_pool(
        dsn, pool_size=pool_size, max_overflow=max_overflow, application_name=APPLICATION
    ) as session:
        async with load.on(session, clients=6):
            await load.until_served(100)
            old, load.backends = set(load.backends), set()
            fewest = most = 4

            def all_are_gone() -> bool:
                nonlocal fewest, most
                count = onlooker.backends(APPLICATION)
                fewest, most = min(fewest, count), max(most, count)
                return not any(onlooker.state(pid) for pid in old)

            assert len(old) == 4
            session.retire_all()
            await until(all_are_gone)
            load.backends.clear()
            await load.until_served(100)
            assert len(load.backends) == 4
            assert not old & load.backends
            # The one that leaves and the one that comes may both be missing from the list.
            assert fewest >= 3
            assert most <= 4
        now = session.statistics()
        assert (now.retired, now.lost, now.destroyed, now.timeouts) == (4, 0, 0, 0)
        check_books(session)


async def test_resize_under_load(dsn: str, onlooker: Onlooker) -> None:
    """The server sees the new bounds; no client gets an error."""
    load = Load()
    async with open_pool(dsn, pool_size=2, max_overflow=0, application_name=APPLICATION) as session:
        async with load.on(session, clients=10):
            for pool_size, max_overflow in [(6, 0), (1, 0), (2, 3), (1, 1), (8, 0), (3, 0)]:
                session.resize(pool_size, max_overflow)
                limit = pool_size + max_overflow
                await until_backends(onlooker, limit)
                for _ in range(5):
                    await load.until_served(5)
                    assert onlooker.backends(APPLICATION) <= limit
        await until_backends(onlooker, 3)
        now = session.statistics()
        assert (now.lost, now.destroyed, now.timeouts, now.start_failures) == (0, 0, 0, 0)
        check_books(session)
