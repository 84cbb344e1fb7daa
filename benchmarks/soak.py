"""What shows only after a while: pools that do nothing, and a million checkouts.

Each runs in a process of its own, so that its memory and its processor time are its own.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from time import perf_counter, process_time
from typing import Any

import psutil
import psycopg
import trio

import whitepool.postgres

from .peers import PEERS, Peer, repeat

MINUTE, CHECKOUTS = 60.0, 1_000_000
DIE = "SELECT pg_terminate_backend(pg_backend_pid())"


def million(_: Peer, dsn: str) -> tuple[float, ...]:
    """Return microseconds a checkout, growth in KiB, and how many connections are missing."""
    return _in_own_process(_million, dsn)


def idle(peer: Peer, dsn: str) -> tuple[float, ...]:
    """Return how much of a core a hundred idle connections take, in per cent, and growth in KiB."""
    return _in_own_process(_idle, peer.name, dsn)


def own_process() -> ProcessPoolExecutor:
    """Return a process that has nothing of this one's memory, as a fork would."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _in_own_process(function: Callable[..., tuple[float, ...]], *arguments: Any) -> tuple[float, ...]:
    with own_process() as process:
        return process.submit(function, *arguments).result()


def _memory() -> float:
    """Return what this process has in memory, in KiB."""
    gc.collect()
    rss: int = psutil.Process().memory_info().rss
    return rss / 1024


def _idle(name: str, dsn: str) -> tuple[float, ...]:
    peer = PEERS[name]

    async def do_nothing() -> tuple[float, ...]:
        async with peer.open(dsn, 100) as pool:
            # libpq takes memory for the first answer on each connection, also to a probe.
            await repeat(peer.loop, partial(pool.fetch, "SELECT 1"), 100, 1)
            memory, spent, began = _memory(), process_time(), perf_counter()
            await peer.loop.sleep(MINUTE)
            share = (process_time() - spent) / (perf_counter() - began)
            return 100 * share, _memory() - memory

    figures: tuple[float, ...] = peer.loop.run(do_nothing)
    return figures


def _million(dsn: str) -> tuple[float, ...]:
    return trio.run(_check_out_a_million, dsn)


async def _check_out_a_million(dsn: str) -> tuple[float, ...]:
    """Sixteen connections, four times as many tasks. The first third warms up the memory: by then, each
    connection has been replaced some twenty times."""
    size, numbers, rng = 16, count(), random.Random(7)
    memory = 0.0

    async def client(session: whitepool.Session[whitepool.postgres.TrioConnection[Any]]) -> None:
        nonlocal memory
        while (number := next(numbers)) < CHECKOUTS:
            if number == CHECKOUTS // 3:
                memory = _memory()
            cancelled, dies = number % 100 == 1, number % 1000 == 2
            with trio.move_on_after(rng.uniform(0, 0.001) if cancelled else math.inf):
                async with session.worker() as connection:
                    if cancelled:  # while it waits, if not here
                        await trio.sleep_forever()
                    if dies:
                        with suppress(psycopg.OperationalError):
                            await connection.execute(DIE)
                    await trio.lowlevel.checkpoint()

    async with whitepool.postgres.open_pool(dsn, pool_size=size, max_overflow=0) as session:
        began = perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(4 * size):
                nursery.start_soon(client, session)
        took = perf_counter() - began
        growth = _memory() - memory
        await trio.sleep(2)  # for the last of the dead to be replaced
        now = session.statistics()
        known = now.started - now.retired - now.lost - now.destroyed - now.leaked
        lost = abs(size - now.idle) + abs(size - known) + now.leaked
        return 1e6 * took / CHECKOUTS, growth, lost
