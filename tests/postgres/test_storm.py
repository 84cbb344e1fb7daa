"""Three thousand checkouts that are cancelled at any moment leave five of five connections."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import psycopg
import trio
from workshop import check_books

import whitepool.postgres

STORM = "whitepool-storm"
TASKS, ROUNDS, WORKERS = 100, 30, 5

Connection = whitepool.postgres.TrioConnection[Any]


class Storm:
    """Clients of one pool, each of them cancelled after a random time, and how they ended."""

    def __init__(self, session: whitepool.Session[Connection]) -> None:
        self.ends: Counter[str] = Counter()
        self._session = session
        self._random = random.Random(20261121)

    async def client(self) -> None:
        """Run a query in a transaction, unless cancelled in line, or at work."""
        in_line = self._random.random() < 0.4
        explicit = self._random.random() < 0.5
        done = False
        with trio.CancelScope() as scope:
            if in_line:
                scope.deadline = trio.current_time() + self._random.uniform(0, 0.04)
            if explicit:
                resource = await self._session.block_checkout(timeout=60)
                try:
                    await self._work(resource.get(), scope)
                finally:
                    self._session.checkin(resource)
            else:
                async with self._session.worker(timeout=60) as connection:
                    await self._work(connection, scope)
            await self._must_raise_if_cancelled(scope)
            done = True
        assert done != scope.cancelled_caught
        self.ends["done" if done else "cancelled"] += 1

    async def _work(self, connection: Connection, scope: trio.CancelScope) -> None:
        now = trio.current_time()
        # BEGIN, the query and COMMIT take some 3 ms.
        scope.deadline = min(scope.deadline, now + self._random.uniform(0, 0.006))
        self.ends["at work"] += 1
        async with connection.transaction():
            await connection.execute("SELECT pg_sleep(0.002)")
            await self._must_raise_if_cancelled(scope)
        await self._must_raise_if_cancelled(scope)
        self.ends["committed"] += 1

    async def _must_raise_if_cancelled(self, scope: trio.CancelScope) -> None:
        """The first checkpoint after a cancellation: nothing on the way here may have eaten it."""
        cancelled = scope.cancel_called
        await trio.lowlevel.checkpoint()
        self.ends["swallowed"] += cancelled


async def test_a_storm_of_cancellations(dsn: str) -> None:
    """None of them is lost, no cancellation is swallowed, and no backend is still busy. (Rule 3.)"""
    async with whitepool.postgres.open_pool(
        dsn, pool_size=WORKERS, max_overflow=0, application_name=STORM
    ) as session:
        storm = Storm(session)
        for _ in range(ROUNDS):
            async with trio.open_nursery() as nursery:
                for _ in range(TASKS):
                    nursery.start_soon(storm.client)
            check_books(session)
        with trio.fail_after(5):
            while session.statistics().idle < WORKERS:
                await trio.sleep(0.01)
        now, ends = session.statistics(), storm.ends
        check_books(now)
        print(f"\n{dict(ends)}, {now}")
        assert ends["swallowed"] == 0
        assert ends["cancelled"] + ends["done"] == TASKS * ROUNDS
        assert ends["cancelled"] > 1000
        assert ends["at work"] > 500
        assert (now.idle, now.in_use, now.resetting, now.waiting) == (WORKERS, 0, 0, 0)
        # The server is in good health: no cancellation had to cost a connection.
        assert (now.started, now.lost, now.destroyed, now.leaked) == (WORKERS, 0, 0, 0)
        with psycopg.connect(dsn, autocommit=True) as admin:
            states = admin.execute(
                "SELECT state FROM pg_stat_activity WHERE application_name = %s", (STORM,)
            ).fetchall()
        assert states == [("idle",)] * WORKERS
        for resource in [session.checkout_nowait() for _ in range(WORKERS)]:
            async with resource.get().transaction():
                cursor = await resource.get().execute("SELECT 1")
                assert await cursor.fetchall() == [(1,)]
            session.checkin(resource)
