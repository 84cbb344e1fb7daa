"""Overload in many shapes. `python -m benchmarks.shapes` prints each load by itself.

Below their capacity, the workers could serve nearly all requests: how many does the pool shed that a
plain queue (`patience=1`) would have served? Above it: what share of the capacity goes into answers
that meet their deadline? Each is simulated: the pool is real, the clock jumps to whatever is next, and
the same requests come to both. Then some shapes in real time, with queries, beside other pools.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple

import trio
from rich.console import Console
from rich.table import Table

import whitepool

from . import overload
from .case import Case, Figure, at_least, at_most
from .model_server import JumpingClock
from .peers import ASYNCPG, PSYCOPG, WHITEPOOL, Peer, Pool, counted

Draw = Callable[[random.Random], float]

BELOW = (0.7, 0.8, 0.9)
ABOVE = (1.0, 1.2, 1.5, 3.0, 10.0)
REQUESTS = 10_000
"""Below the capacity, so many come. With fewer, it is chance how many are shed: of twelve runs of 3,000
requests that take 1 s on average, one shed 1.2 %, and all together shed 0.3 %."""
LASTING = 1.5
"""From this load on, much of the capacity should go into answers in time."""
FEW_FALSE = {WHITEPOOL: at_most(1)}
"""Per cent of all requests."""
MUCH_OF_USE = {WHITEPOOL: at_least(95)}
"""Per cent of the capacity, where nearly no request takes longer than its timeout."""


def constant(seconds: float) -> Draw:
    return lambda rng: seconds


def exponential(mean: float) -> Draw:
    return lambda rng: rng.expovariate(1 / mean)


def pareto(mean: float, shape: float = 1.5, ratio: float = 100) -> Draw:
    """Return a heavy-tailed distribution: the longest is so many times as long as the shortest."""
    low = mean * (shape - 1) / shape * (1 - ratio**-shape) / (1 - ratio ** (1 - shape))
    return lambda rng: low * (1 - rng.random() * (1 - ratio**-shape)) ** (-1 / shape)


_QUARTER = constant(0.25)


def either(share: float, one: float, other: float) -> Draw:
    return lambda rng: one if rng.random() < share else other


@dataclass(frozen=True)
class Shape:
    """What requests are like, and how many workers there are for them."""

    name: str
    workers: int
    mean: float
    """Seconds for which a request needs a worker, on average."""
    service: Draw
    timeout: Draw = _QUARTER
    burst: int = 1
    """How many requests come at once."""
    lasts: float = 8
    """Seconds for which the load is above the capacity; 0 leaves that out. The second half counts."""
    is_easy: bool = True
    """Whether nearly all requests need less than their timeout, so that there is a target."""

    def __str__(self) -> str:
        return f"{self.name}, {counted(self.workers, 'worker')}"


def _shapes() -> Iterator[Shape]:
    for workers in (1, 5):
        yield Shape("20 ms", workers, 0.02, constant(0.02), lasts=40 / workers)
    for workers in (1, 2, 5, 10, 50):
        lasts = {1: 32, 2: 16, 10: 0, 50: 4}.get(workers, 8)
        yield Shape("exponential", workers, 0.02, exponential(0.02), lasts=lasts)
    for workers in (1, 5):
        yield Shape("heavy-tailed", workers, 0.02, pareto(0.02), is_easy=False)
    for workers in (1, 2, 5, 10):
        timeout, lasts = either(0.5, 0.1, 2), 12 if workers < 10 else 0
        yield Shape(
            "exp., timeouts 0.1 and 2 s", workers, 0.02, exponential(0.02), timeout, 1, lasts, False
        )
    yield Shape("1 s, timeout 5 s", 1, 1, constant(1), constant(5), lasts=800)
    yield Shape("exp. 1 s, timeout 5 s", 1, 1, exponential(1), constant(5), 1, 800, False)
    yield Shape("bursts of 20", 10, 0.02, constant(0.02), burst=20)
    yield Shape("3 % 1 s, others 1 ms", 10, 0.03097, either(0.03, 1, 0.001), constant(1), lasts=0)
    yield Shape("1 % 10 s, others 5 ms", 10, 0.10495, either(0.01, 10, 0.005), constant(5), lasts=0)


SHAPES = tuple(_shapes())
OVERLOADED = tuple(shape for shape in SHAPES if shape.lasts)


class Request(NamedTuple):
    arrives: float
    service: float
    timeout: float


def requests(shape: Shape, load: float, count: int, seed: int) -> list[Request]:
    """Return requests that arrive at random."""
    rng, arrival, made = random.Random(seed), 0.0, list[Request]()
    while len(made) < count:
        arrival += rng.expovariate(load * shape.workers / shape.mean / shape.burst)
        made += [Request(arrival, shape.service(rng), shape.timeout(rng)) for _ in range(shape.burst)]
    return made


def simulate(coming: list[Request], workers: int, patience: float) -> list[float]:
    """Return for how long each of them has waited for a worker; `inf` if it has got none."""
    waited = [math.inf] * len(coming)

    async def make() -> object:
        return object()

    async def client(session: whitepool.Session[object], number: int, request: Request) -> None:
        try:
            async with session.worker(timeout=request.timeout):
                waited[number] = trio.current_time() - request.arrives
                await trio.sleep(request.service)
        except whitepool.CheckoutTimeout:
            pass

    async def main() -> None:
        async with (
            whitepool.open_pool(make, pool_size=workers, max_overflow=0, patience=patience) as session,
            trio.open_nursery() as nursery,
        ):
            for number, request in enumerate(coming):
                await trio.sleep_until(request.arrives)
                nursery.start_soon(client, session, number, request)

    trio.run(main, clock=JumpingClock())
    return waited


def false_sheds(number: int, load: float, seed: int = 7) -> tuple[float, float]:
    """Return the per cent of requests that only a plain queue serves; and that not even it does.

    The shape is given by its number, as it goes to another process.
    """
    shape = SHAPES[number]
    coming = requests(shape, load, REQUESTS, seed)
    ours, plain = (simulate(coming, shape.workers, patience) for patience in (0.4, 1))
    only_there = sum(a == math.inf != b for a, b in zip(ours, plain, strict=True))
    return 100 * only_there / len(coming), 100 * plain.count(math.inf) / len(coming)


def goodputs(number: int, load: float, seed: int = 7) -> tuple[float, float]:
    """Return the per cent of the capacity that goes into answers in time, here and in a plain queue.

    Where a request needs more time than its timeout, no pool can answer it in time: not counted.
    """
    shape = SHAPES[number]
    count = int(load * shape.lasts * shape.workers / shape.mean)
    coming = requests(shape, load, count, seed)
    begins, ends = shape.lasts / 2, coming[-1].arrives
    able = [r.service for r in coming if begins <= r.arrives < ends and r.service <= r.timeout]
    capacity = sum(able) / load

    def spent(patience: float) -> float:
        waited = simulate(coming, shape.workers, patience)
        return sum(
            request.service
            for request, wait in zip(coming, waited, strict=True)
            if wait + request.service <= request.timeout and begins <= request.arrives + wait < ends
        )

    return 100 * spent(0.4) / capacity, 100 * spent(1) / capacity


def measure(
    function: Callable[[int, float], tuple[float, float]],
    shapes: Sequence[Shape],
    loads: Sequence[float],
) -> list[list[tuple[float, float]]]:
    """Call a function for each shape and load, on as many processors as there are."""
    with ProcessPoolExecutor() as processes:
        calls = [
            [processes.submit(function, SHAPES.index(shape), load) for load in loads]
            for shape in shapes
        ]
        return [[call.result() for call in of_shape] for of_shape in calls]


# -- In real time --------------------------------------------------------------------------------------

CONNECTIONS, WARM_UP, SECONDS = 5, 1.5, 2.0
REAL = (
    (Shape("exponential", CONNECTIONS, 0.02, exponential(0.02)), 0.8),
    (Shape("exponential", CONNECTIONS, 0.02, exponential(0.02)), 3.0),
    (Shape("bursts of 20", CONNECTIONS, 0.02, constant(0.02), burst=20), 0.7),
    (
        Shape("timeouts 0.1 and 2 s", CONNECTIONS, 0.02, exponential(0.02), either(0.5, 0.1, 2)),
        1.5,
    ),
)


async def offer(peer: Peer, dsn: str, coming: list[Request], ends: float) -> tuple[float, float]:
    """Let requests come; return the share that is answered in time, and the seconds spent on those.

    Only those count that come after the warm-up.
    """
    answered: list[Request] = []
    counted = [request for request in coming if WARM_UP <= request.arrives < ends]

    async def client(pool: Pool, request: Request) -> None:
        with suppress(*overload.TOO_LATE):
            await pool.fetch_within(request.timeout, f"SELECT pg_sleep({request.service})")
            if WARM_UP <= request.arrives < ends:
                answered.append(request)

    async with peer.open(dsn, CONNECTIONS) as pool:
        began = perf_counter()
        async with peer.loop.tasks() as start:
            for request in coming:
                remaining = began + request.arrives - perf_counter()
                if remaining > 0:
                    await peer.loop.sleep(remaining)
                start(client, pool, request)
    return len(answered) / len(counted), sum(request.service for request in answered)


def in_real_time(peer: Peer, dsn: str, shape: Shape, load: float) -> tuple[float, float]:
    """Return the per cent of the requests, and of the capacity; with queries that sleep."""
    # A query takes longer than it sleeps: the load is of what the connections can do.
    pace = trio.run(overload.capacity, dsn) * shape.mean / CONNECTIONS
    ends = WARM_UP + SECONDS
    count = int(load * pace * CONNECTIONS / shape.mean * ends)
    coming = requests(shape, load * pace, count, seed=7)
    share, seconds = peer.loop.run(offer, peer, dsn, coming, ends)
    return 100 * share, 100 * seconds / pace / CONNECTIONS / SECONDS


# ------------------------------------------------------------------ as cases of the benchmarks


def worst_false_sheds(_peer: Peer, _dsn: str) -> tuple[float, ...]:
    return tuple(max(only for only, _ in found) for found in measure(false_sheds, SHAPES, BELOW))


def worst_goodputs(_peer: Peer, _dsn: str) -> tuple[float, ...]:
    lasting = [load for load in ABOVE if load >= LASTING]
    return tuple(min(ours for ours, _ in found) for found in measure(goodputs, OVERLOADED, lasting))


def _cases() -> Iterator[Case]:
    yield Case(
        "shapes",
        tuple(
            Figure(f"{shape}: shed, and served by a plain queue, at most", "%", FEW_FALSE)
            for shape in SHAPES
        ),
        (WHITEPOOL,),
        worst_false_sheds,
        rounds=1,
    )
    yield Case(
        "shapes",
        tuple(
            Figure(
                f"{shape}: capacity spent in time, at least", "%", MUCH_OF_USE if shape.is_easy else {}
            )
            for shape in OVERLOADED
        ),
        (WHITEPOOL,),
        worst_goodputs,
        rounds=1,
    )
    for shape, load in REAL:
        yield Case(
            "shapes",
            (
                Figure(f"{shape}, {load:g} ×, in real time: requests answered in time", "%"),
                Figure(f"{shape}, {load:g} ×, in real time: capacity spent in time", "%"),
            ),
            (WHITEPOOL, PSYCOPG, ASYNCPG),
            partial(in_real_time, shape=shape, load=load),
            rounds=1,
        )


CASES = tuple(_cases())


def main() -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a file has no width of its own
    table = Table(title="requests that only a plain queue serves, that not even it does; %")
    _add_rows(table, SHAPES, BELOW, measure(false_sheds, SHAPES, BELOW), "{:.1f}, {:.1f}")
    console.print(table)
    table = Table(title="% of the capacity spent in time: whitepool, a plain queue")
    _add_rows(table, OVERLOADED, ABOVE, measure(goodputs, OVERLOADED, ABOVE), "{:.0f}, {:.0f}")
    console.print(table)


def _add_rows(
    table: Table,
    shapes: Sequence[Shape],
    loads: Sequence[float],
    found: list[list[tuple[float, float]]],
    how: str,
) -> None:
    for column in ("each request", *(f"{load:g} ×" for load in loads)):
        table.add_column(column)
    for shape, pairs in zip(shapes, found, strict=True):
        table.add_row(str(shape), *(how.format(*pair) for pair in pairs))


if __name__ == "__main__":
    main()
