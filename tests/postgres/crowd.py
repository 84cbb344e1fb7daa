"""A process of a fleet: a pool under a load that it can't serve. It prints what came of it.

Run it with a connection string, `pool_size`, `max_overflow`, the number of clients, and when to stop
(in seconds since the epoch). It counts what it has served since it began.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress

import trio

import whitepool
from whitepool.postgres import open_pool

WORK = "SELECT pg_sleep(0.02)"


async def main(dsn: str, pool_size: int, max_overflow: int, clients: int, stop_at: float) -> None:
    begun = time.time()
    first = None
    served = 0
    now = None

    async def client() -> None:
        nonlocal first, served
        while True:
            with suppress(whitepool.CheckoutTimeout, whitepool.PoolOverloaded):
                async with session.worker(3) as connection:
                    await connection.execute(WORK)
                    served += 1
                    first = first or time.time()

    error = None
    try:
        async with open_pool(
            dsn, pool_size=pool_size, max_overflow=max_overflow, autocommit=True
        ) as session:
            with trio.move_on_after(stop_at - time.time()):
                async with trio.open_nursery() as nursery:
                    for _ in range(clients):
                        nursery.start_soon(client)
            now = session.statistics()
    except whitepool.PoolStartError as its_error:
        error = str(its_error)
    print(
        json.dumps(
            {
                "first": first and first - begun,
                "per_second": served / (stop_at - begun),
                "refused_per_second": now and now.start_failures / (stop_at - begun),
                "started": now and now.started,
                "open": now and now.idle + now.in_use,
                "error": error,
            }
        )
    )


if __name__ == "__main__":
    dsn, pool_size, max_overflow, clients, stop_at = sys.argv[1:]
    trio.run(main, dsn, int(pool_size), int(max_overflow), int(clients), float(stop_at))
