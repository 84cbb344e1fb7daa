"""What idle workers cost, and whether a cost grows with their number.

The workers do nothing, so all of it is the pool's, and Trio's. Times are of the processor. Idle pools
are watched for two minutes of a clock that jumps to whatever is next. Each figure is the least of some
rounds.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Awaitable, Callable
from functools import partial
from time import process_time
from typing import Any

import attrs
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import whitepool

from .case import Case, Figure, at_most
from .peers import WHITEPOOL

SIZES = (10, 100, 1_000, 10_000)
ROUNDS = 3
CHECK_INTERVAL = 30.0
AVERAGE_INTERVAL = CHECK_INTERVAL * (0.9 + 1) / 2
"""Seconds from one probe of a worker to the next, with the chance that the pool takes off."""

Session = whitepool.Session[Any]


class Trivial(whitepool.WorkerManager[object]):
    """Workers that can be reset and probed, at no cost."""

    async def create(self) -> object:
        return object()

    def needs_reset(self, worker: object) -> bool:
        return True

    async def reset(self, worker: object) -> None: ...
    async def check(self, worker: object) -> None: ...


def pool_of(size: int, **options: Any) -> Any:
    options = {"check_interval": math.inf, "start_timeout": 600, **options}
    return whitepool.open_pool(Trivial(), pool_size=size, max_overflow=1, **options)


async def opening(size: int) -> float:
    """Return the microseconds of opening a worker, where so many are opened at once."""
    async with pool_of(1) as session:
        times = []
        for _ in range(max(2, 1_000 // size)):
            await wait_all_tasks_blocked()
            began = process_time()
            session.resize(1 + size)
            await wait_all_tasks_blocked()
            times.append(process_time() - began)
            session.resize(1)
        return min(times) / size * 1e6


async def replacing(size: int) -> float:
    """Return the microseconds in which one worker is destroyed, and another opened in its place."""
    async with pool_of(size) as session:
        await use_each(session, size)
        return await least(partial(replace_one, session), 50)


async def replace_one(session: Session) -> None:
    session.destroyed(await session.block_checkout())
    await wait_all_tasks_blocked()


async def replacing_all(size: int) -> float:
    """Return the microseconds in which each worker is replaced, by `retire_all`."""
    async with pool_of(size) as session:
        await use_each(session, size)
        began = process_time()
        session.retire_all()
        await wait_all_tasks_blocked()
        return (process_time() - began) / size * 1e6


async def resetting(size: int) -> float:
    """Return the microseconds of a checkout, and a checkin with a reset."""
    async with pool_of(size) as session:
        await use_each(session, size)
        return await least(partial(reset_one, session), 50)


async def reset_one(session: Session) -> None:
    session.checkin(await session.block_checkout())
    await wait_all_tasks_blocked()


async def least(step: Callable[[], Awaitable[None]], steps: int) -> float:
    times = []
    for _ in range(20):
        began = process_time()
        for _ in range(steps):
            await step()
        times.append(process_time() - began)
    return min(times) / steps * 1e6


async def idling(size: int, check_interval: float = CHECK_INTERVAL, seconds: float = 120) -> float:
    """Return the share of a core that an idle pool takes, in per cent."""
    async with pool_of(size, check_interval=check_interval) as session:
        await use_each(session, size)
        await trio.sleep(60)
        return await share_of_a_core(seconds)


async def use_each(session: Session, size: int) -> None:
    """Use each worker, and return them one after the other, in no order."""
    resources = [await session.block_checkout() for _ in range(size)]
    random.Random(1).shuffle(resources)
    for resource in resources:
        session.checkin(resource)
        await trio.sleep(0.001)


async def share_of_a_core(seconds: float) -> float:
    gc.collect()
    began = process_time()
    await trio.sleep(seconds)
    return (process_time() - began) / seconds * 100


async def registered(size: int) -> float:
    """Return how many descriptors Trio waits for, because of pools whose workers are no connections."""

    def waited_for() -> int:
        io: Any = trio.lowlevel.current_statistics().io_statistics  # each system has counts of its own
        return sum(count for count in attrs.asdict(io).values() if isinstance(count, int))

    before = waited_for()
    async with pool_of(size) as session:
        await use_each(session, size)
        return waited_for() - before


def run(measure: Callable[..., Awaitable[float]], *arguments: Any) -> float:
    """Return the least of some rounds. Each has a clock that stands still while anything happens."""
    return min(
        trio.run(measure, *arguments, clock=MockClock(autojump_threshold=0)) for _ in range(ROUNDS)
    )


def costs(measure: Callable[[int], Awaitable[float]]) -> tuple[float, ...]:
    """Return the cost with each number of workers, and the last of them by the first."""
    found = [run(measure, size) for size in SIZES]
    return *found, found[-1] / found[0]


def grows(title: str) -> Figure:
    return Figure(f"… {title}: the last ÷ the first", "", {WHITEPOOL: at_most(1.5)})


def flat(title: str, measure: Callable[[int], Awaitable[float]]) -> Case:
    """Make a case of a cost that should not grow with the number of workers that are idle."""
    return Case(
        "idle",
        (
            *(Figure(f"{title}, {size:,} workers", "µs", x=size) for size in SIZES),
            grows(title),
        ),
        (WHITEPOOL,),
        lambda peer, dsn: costs(measure),
        rounds=1,
    )


def probes() -> tuple[float, ...]:
    """Return the share of a core that probes take, the microseconds of each, and how those grow."""
    shares = [run(idling, size) for size in SIZES]
    each = [
        share / 100 * AVERAGE_INTERVAL / size * 1e6 for share, size in zip(shares, SIZES, strict=True)
    ]
    return *shares, *each, each[-1] / each[0]


CASES = (
    flat("opening a worker", opening),
    flat("replacing one", replacing),
    flat("replacing each, with `retire_all`", replacing_all),
    flat("a checkout, and a checkin with a reset", resetting),
    Case(
        "idle",
        (
            *(
                Figure(
                    f"idle, with probes, {size:,} workers",
                    "% of a core",
                    {WHITEPOOL: at_most(1)},
                    x=size,
                )
                for size in SIZES
            ),
            *(Figure(f"one probe, {size:,} workers", "µs", x=size) for size in SIZES),
            grows("one probe"),
        ),
        (WHITEPOOL,),
        lambda peer, dsn: probes(),
        rounds=1,
    ),
    Case(
        "idle",
        (
            Figure(
                f"idle, without probes, {SIZES[-1]:,} workers", "% of a core", {WHITEPOOL: at_most(1)}
            ),
        ),
        (WHITEPOOL,),
        lambda peer, dsn: (run(idling, SIZES[-1], math.inf, 1200),),
        rounds=1,
    ),
    Case(
        "idle",
        (Figure("descriptors that Trio waits for, for idle workers", "", {WHITEPOOL: at_most(0)}),),
        (WHITEPOOL,),
        lambda peer, dsn: (run(registered, 100),),
        rounds=1,
    ),
)
