"""What metrics cost: checkouts from one pool without them and with them, side by side.

    make types && .venv/bin/python -m benchmarks.telemetry

With the API alone whitepool measures, and nothing records it; with the SDK it is as in a service. A
figure is the least of all rounds, because other work on the machine only adds to it.
"""

from __future__ import annotations

from time import perf_counter

import trio
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import whitepool
from whitepool.telemetry import instrument

CHECKOUTS, ROUNDS = 10_000, 15


async def make() -> object:
    return object()


async def client(session: whitepool.Session[object], checkouts: int) -> None:
    for _ in range(checkouts):
        async with session.worker(timeout=60):
            pass


async def microseconds(session: whitepool.Session[object], tasks: int) -> float:
    begun = perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(client, session, CHECKOUTS // tasks)
    return (perf_counter() - begun) / CHECKOUTS * 1e6


async def main() -> None:
    print("| tasks on 4 workers | without | API alone | with the SDK | ratio |\n|---|---|---|---|---|")
    async with whitepool.open_pool(make, pool_size=4, max_overflow=0) as plain:
        api = instrument(plain, meter_provider=NoOpMeterProvider())
        sdk = instrument(plain, meter_provider=MeterProvider([InMemoryMetricReader()]))
        for tasks in (1, 64):
            rounds = [
                [await microseconds(session, tasks) for session in (plain, api, sdk)]
                for _ in range(ROUNDS)
            ]
            least = [min(times) for times in zip(*rounds, strict=True)]
            row = " | ".join(f"{time:.1f} µs" for time in least)
            print(f"| {tasks} | {row} | {least[2] / least[0]:.1f} |")


if __name__ == "__main__":
    trio.run(main)
