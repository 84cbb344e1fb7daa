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


async def test_a_storm_of_cancellations(dsn: str) -> None:
    """None of them is lost, no cancellation is swallowed, and no backend is still busy. (Rule 3.)"""
    rng = random.Random(20261121)
    ends: Counter[str] = Counter()

    async def client(
        session: whitepool.Session[whitepool.postgres.TrioConnection[Any]],
        seconds: float,
        explicit: bool,
    ) -> None:
        with trio.CancelScope(deadline=trio.current_time() + seconds) as scope:
            if explicit:
                resource = await session.block_checkout(timeout=60)
                try:
                    async with resource.get().transaction():
                        await resource.get().execute("SELECT pg_sleep(0.002)")
                finally:
                    session.checkin(resource)
            else:
                async with session.worker(timeout=60) as connection:
                    await connection.execute("SELECT pg_sleep(0.002)")
            # A cancellation that came while the client was inside must be raised here at the latest.
            if scope.cancel_called:
                await trio.lowlevel.checkpoint()
                ends["swallowed"] += 1
        ends["cancelled" if scope.cancelled_caught else "done"] += 1

    async with whitepool.postgres.open_pool(
        dsn, pool_size=WORKERS, max_overflow=0, application_name=STORM
    ) as session:
        for _ in range(ROUNDS):
            async with trio.open_nursery() as nursery:
                for _ in range(TASKS):
                    nursery.start_soon(client, session, rng.uniform(0, 0.04), rng.random() < 0.5)
        with trio.fail_after(5):
            while session.statistics().idle < WORKERS:
                await trio.sleep(0.01)
        now = session.statistics()
        check_books(now)
        print(f"\n{dict(ends)}, {now}")
        assert ends["swallowed"] == 0
        assert ends["cancelled"] + ends["done"] == TASKS * ROUNDS
        assert ends["cancelled"] > 1000
        assert (now.idle, now.in_use, now.waiting) == (WORKERS, 0, 0)
        with psycopg.connect(dsn, autocommit=True) as admin:
            states = admin.execute(
                "SELECT state FROM pg_stat_activity WHERE application_name = %s", (STORM,)
            ).fetchall()
        assert states == [("idle",)] * WORKERS
