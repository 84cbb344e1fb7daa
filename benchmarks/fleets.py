"""What befalls a fleet of pools, and what it does then: scenes for `benchmarks.fleet` and the tests.

Each scene is a function for `simulate`, and returns what was measured. Times are in seconds, those of a
result from the moment that it names.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import process_time
from typing import Any
from unittest import mock

import trio

import whitepool

from .model_server import Fleet, ModelConnection, ModelServer, open_fleet, sleep

Session = whitepool.Session[ModelConnection]

# -- What the pool's precautions are worth: the same without them --------------------------------------


class _NoChance:
    """Takes the place of the module `random`: what it draws is always the largest."""

    def __getattr__(self, name: str) -> Any:
        return getattr(random, name)

    def uniform(self, a: float, b: float) -> float:
        return b

    def random(self) -> float:
        return 1.0


@contextmanager
def without_jitter() -> Iterator[None]:
    """Let no pool draw anything by chance: neither its pauses, nor the periods of its workers."""
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("whitepool.") and vars(module).get("random") is random
    ]
    assert modules
    patches = [mock.patch.object(module, "random", _NoChance()) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def without_backoff() -> Iterator[None]:
    """Let the pauses between failed starts not grow: each is like the first."""
    first = whitepool._backoff.longest_pause(1)
    with mock.patch("whitepool._backoff.longest_pause", lambda *_: first):
        yield


# -- Load ----------------------------------------------------------------------------------------------


async def offer(
    fleet: Fleet,
    nursery: trio.Nursery,
    rate: Callable[[float], float],
    request: Callable[[Session], Any],
    rng: random.Random,
) -> None:
    """Have requests arrive at random, each at one of the pools.

    Args:
      rate: how many a second arrive at the whole fleet, so many seconds after the beginning.
    """
    began = trio.current_time()
    while True:
        now_rate = rate(trio.current_time() - began)
        if now_rate <= 0:
            await sleep(0.1)
            continue
        await sleep(rng.expovariate(now_rate))
        nursery.start_soon(request, rng.choice(fleet.sessions))


def per_window(times: list[float], window: float, begin: float, end: float) -> list[int]:
    """Count how many of the times are in each window from `begin` to `end`."""
    counts = [0] * math.ceil((end - begin) / window)
    for time in times:
        if begin <= time < end:
            counts[int((time - begin) / window)] += 1
    return counts


# -- A restart -----------------------------------------------------------------------------------------


@dataclass
class Restart:
    """What a fleet did while its server was away, and after its return, which is time 0."""

    attempts: list[float]
    """When connections were attempted."""
    served: list[float]
    """When each pool had its first connection."""
    whole: list[float]
    """When each pool had all of them."""
    floor: float
    """When all could have had theirs, as fast as the server opens connections."""
    refused: int
    """Attempts that were refused."""


async def restart(pools: int, *, size: int = 5, down_for: float = 5.0, cores: float = 8) -> Restart:
    """Restart the server of a fleet, under a light load."""
    server = ModelServer(cores=cores)
    rng = random.Random(1)

    async def request(session: Session) -> None:
        try:
            async with session.worker(timeout=1) as connection:
                await connection.query(0.001, elsewhere=0.01)
        except (trio.TooSlowError, ConnectionError):
            pass

    options: dict[str, Any] = {"pool_size": size, "max_overflow": 2, "start_timeout": 120}
    async with open_fleet(server, pools, over=1, **options) as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(offer, fleet, nursery, lambda _: float(pools), request, rng)
        await sleep(20)
        await server.restart(down_for)
        back = trio.current_time()
        await sleep(10 + pools * size * server.connect_work / cores * 2)
        nursery.cancel_scope.cancel()
    after = [sorted(t - back for t in manager.opened if t > back) for manager in fleet.managers]
    return Restart(
        attempts=[t - back for t in server.attempts if t > back - down_for],
        served=[opened[0] for opened in after if opened],
        whole=[opened[size - 1] for opened in after if len(opened) >= size],
        floor=pools * size * server.connect_work / cores,
        refused=len([t for t in server.refused if t > back - down_for]),
    )


# -- Churn ---------------------------------------------------------------------------------------------


@dataclass
class Churn:
    """Connections that were opened under a load that varies, after the pools were."""

    opened: list[float]
    open: list[float]
    """How many connections each pool had, on average, each 10 s."""
    load: list[float]
    """How many queries were being worked on for each pool, on average, each 10 s."""
    requests: int
    hurried: int
    """Requests that did not wait for a connection."""
    took: float


async def day(
    pools: int, *, length: float = 1800.0, busy: float = 4.0, held: float = 1.0, **options: Any
) -> Churn:
    """Let a day pass in `length` seconds: its load varies as a sine, between a tenth and nearly twice.

    Args:
      busy: connections that each pool needs, on average.
      held: seconds for which each request has its connection, on average.
    """

    def rate(time: float) -> float:
        return pools * busy / held * (1 - 0.9 * math.cos(2 * math.pi * time / length))

    return await _churn(pools, length, rate, held, options)


async def bursts(
    pools: int, *, length: float = 600.0, every: float = 60.0, burst: int = 15, **options: Any
) -> Churn:
    """Have so many requests arrive at each pool at once, `every` minute, as jobs by the clock do."""
    return await _churn(pools, length, lambda _: pools * 0.5, 0.5, options, burst=burst, every=every)


async def _churn(
    pools: int,
    length: float,
    rate: Callable[[float], float],
    held: float,
    options: dict[str, Any],
    *,
    burst: int = 0,
    every: float = math.inf,
) -> Churn:
    server, rng, working = ModelServer(cores=pools), random.Random(2), 0
    counts = Counter[str]()
    seen: list[tuple[float, float]] = []

    async def request(session: Session) -> None:
        nonlocal working
        counts["requests"] += 1
        began = trio.current_time()
        working += 1
        async with session.worker(timeout=math.inf) as connection:
            counts["hurried"] += trio.current_time() == began
            await connection.query(0.001, elsewhere=rng.expovariate(1 / held))
        working -= 1

    async def burst_all() -> None:
        while True:
            await sleep(every)
            for session in fleet.sessions:
                for _ in range(burst):
                    nursery.start_soon(request, session)

    options = {"pool_size": 5, "max_overflow": 10, **options}
    async with open_fleet(server, pools, **options) as fleet, trio.open_nursery() as nursery:
        began, spent = trio.current_time(), process_time()
        nursery.start_soon(offer, fleet, nursery, rate, request, rng)
        if burst:
            nursery.start_soon(burst_all)
        while trio.current_time() < began + length:
            await sleep(10)
            seen.append((len(server.sessions) / pools, working / pools))
        spent = process_time() - spent
        nursery.cancel_scope.cancel()
    return Churn(
        opened=[t - began for t in server.opened if t > began],
        open=[now[0] for now in seen],
        load=[now[1] for now in seen],
        requests=counts["requests"],
        hurried=counts["hurried"],
        took=spent,
    )


# -- Lifetimes -----------------------------------------------------------------------------------------


async def lifetimes(
    pools: int, *, size: int = 5, max_lifetime: float = 600.0, length: float = 3600.0
) -> list[float]:
    """Return when connections were opened in the place of those that were too old.

    All pools are opened together, and idle.
    """
    server = ModelServer()
    options: dict[str, Any] = {"pool_size": size, "max_overflow": 2, "check_interval": math.inf}
    async with open_fleet(server, pools, max_lifetime=max_lifetime, **options):
        began = trio.current_time()
        await sleep(length)
    return [time - began for time in server.opened if time > began]


# -- A spike -------------------------------------------------------------------------------------------


@dataclass
class Spike:
    """What became of requests around a spike of load."""

    capacity: float
    """Requests that the server can answer, a second."""
    answered: list[float] = field(default_factory=list)
    """When those were answered that were, by their deadline."""
    by_pool: list[Counter[str]] = field(default_factory=list)
    """For each pool: the requests that were answered before, in and after the spike."""
    failed: list[float] = field(default_factory=list)
    """When the last attempts of the others failed."""
    spike: tuple[float, float] = (0.0, 0.0)
    took: float = 0.0

    def goodput(self, begin: float, end: float) -> float:
        """Return the share of the capacity that went into answers in time."""
        answered = sum(begin <= time < end for time in self.answered)
        return answered / (end - begin) / self.capacity


async def spike(
    pools: int,
    *,
    size: int = 2,
    cores: float = 40,
    work: float = 0.1,
    deadline: float = 2.0,
    tries: int = 4,
    usual: float = 0.7,
    peak: float = 3.0,
    spike: tuple[float, float] = (10.0, 20.0),
    length: float = 60.0,
    patience: float = 0.4,
    cancels: bool = True,
) -> Spike:
    """Triple the load of a fleet for ten seconds. Clients that get no answer in time try again.

    Args:
      work: seconds of a core for each request.
      deadline: seconds for each attempt, the wait for a connection included.
      tries: attempts of a request, with a pause of up to a second in between.
      usual: the load before and after the spike, as a share of what the server can do; `peak`: in it.
    """
    server, rng = ModelServer(cores=cores, cancels=cancels), random.Random(3)
    outcome = Spike(capacity=cores / work, spike=spike)
    outcome.by_pool = [Counter() for _ in range(pools)]

    def rate(time: float) -> float:
        return outcome.capacity * (peak if spike[0] <= time < spike[1] else usual)

    async def request(session: Session) -> None:
        for attempt in range(tries):
            if attempt:
                await sleep(rng.uniform(0, 1))
            try:
                with trio.fail_after(deadline):
                    async with session.worker(timeout=deadline) as connection:
                        await connection.query(work)
            except (trio.TooSlowError, ConnectionError):
                continue
            now = trio.current_time() - began
            outcome.answered.append(now)
            when = "before" if now < spike[0] else "during" if now < spike[1] else "after"
            outcome.by_pool[numbers[session]][when] += 1
            return
        outcome.failed.append(trio.current_time() - began)

    options: dict[str, Any] = {"pool_size": size, "max_overflow": 0, "patience": patience}
    async with open_fleet(server, pools, **options) as fleet, trio.open_nursery() as nursery:
        began, spent = trio.current_time(), process_time()
        numbers = {session: number for number, session in enumerate(fleet.sessions)}
        nursery.start_soon(offer, fleet, nursery, rate, request, rng)
        await sleep(length)
        outcome.took = process_time() - spent
        nursery.cancel_scope.cancel()
    return outcome


# -- The simulation itself -----------------------------------------------------------------------------


async def speed(pools: int, seconds: float, per_second: float = 1.0) -> float:
    """Return the seconds that a fleet lives in a second of the processor.

    Each pool has five connections, probes them, and has so many requests a second.
    """
    server, rng = ModelServer(cores=pools), random.Random(4)

    async def request(session: Session) -> None:
        async with session.worker() as connection:
            await connection.query(0.005)

    options: dict[str, Any] = {"pool_size": 5, "max_overflow": 2, "start_timeout": 120}
    async with open_fleet(server, pools, **options) as fleet, trio.open_nursery() as nursery:
        if per_second:
            nursery.start_soon(offer, fleet, nursery, lambda _: pools * per_second, request, rng)
        await sleep(10)
        spent = process_time()
        await sleep(seconds)
        spent = process_time() - spent
        nursery.cancel_scope.cancel()
    return seconds / spent
