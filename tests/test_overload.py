"""A line that stands is thinned out early; one that drains, or is only held up, is not. (Rule 11.)"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from workshop import Tool, Workshop, check_books

import whitepool
from whitepool._overload import Look, is_growing

Clock = trio.testing.MockClock
SERVICE, DEADLINE, WORKERS = 0.02, 0.25, 5
CAPACITY = WORKERS / SERVICE


@dataclass
class Outcome:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    refused_after: list[float] = field(default_factory=list)


async def offer(
    load: float,
    seconds: float,
    patience: float = 0.4,
    share_of_others: float = 0,
    others: float = math.inf,
) -> Outcome:
    """Offer requests at `load` times the capacity, at random, each with a deadline: a share of them
    with another one."""
    outcome, rng = Outcome(), random.Random(7)

    async def request(session: whitepool.Session[Tool], deadline: float) -> None:
        began = trio.current_time()
        try:
            async with session.worker(timeout=deadline):
                await trio.sleep(SERVICE)
        except whitepool.PoolOverloaded:
            outcome.counts["overloaded"] += 1
            outcome.refused_after.append(trio.current_time() - began)
        except whitepool.CheckoutTimeout:
            outcome.counts["timeouts"] += 1
        else:
            in_time = trio.current_time() - began <= deadline
            outcome.counts["in time" if in_time else "late"] += 1

    async with whitepool.open_pool(
        Workshop().make, pool_size=WORKERS, max_overflow=0, patience=patience
    ) as session:
        async with trio.open_nursery() as nursery:
            end = trio.current_time() + seconds
            while trio.current_time() < end:
                await trio.sleep(rng.expovariate(load * CAPACITY))
                deadline = others if rng.random() < share_of_others else DEADLINE
                nursery.start_soon(request, session, deadline)
        check_books(session.statistics())
        assert session.statistics().overloads == outcome.counts["overloaded"]
    return outcome


async def test_below_its_capacity_the_pool_serves_everybody(autojump_clock: Clock) -> None:
    """At 0.9 times what it can serve, nothing is shed."""
    outcome = await offer(0.9, seconds=10)
    assert set(outcome.counts) == {"in time"}


@pytest.mark.parametrize("load", [1.5, 3, 10])
async def test_goodput_under_overload(load: float, autojump_clock: Clock) -> None:
    """At least 95 % of the capacity goes into answers that come in time."""
    outcome = await offer(load, seconds=5)
    assert outcome.counts["in time"] >= 0.95 * CAPACITY * 5
    assert outcome.counts["timeouts"] <= 0.02 * outcome.counts["overloaded"]
    # Sent away when a share of 0.4 is used up, but for those in line when it began to stand.
    refused = sorted(outcome.refused_after)
    assert refused[len(refused) // 2] == pytest.approx(0.4 * DEADLINE, abs=0.01)


async def test_without_it_the_pool_collapses(autojump_clock: Clock) -> None:
    """`patience=1` turns shedding off, and shows what it is good for."""
    outcome = await offer(3, seconds=5, patience=1)
    assert outcome.counts["overloaded"] == 0
    assert outcome.counts["in time"] < 0.3 * CAPACITY * 5


@pytest.mark.parametrize("timeout", [math.inf, 45.0])
async def test_a_burst_is_served_whole(timeout: float, autojump_clock: Clock) -> None:
    """Ten thousand tasks at once, which the line can serve in 40 s, are all served, in order."""
    served: list[int] = []

    async def request(session: whitepool.Session[Tool], number: int) -> None:
        async with session.worker(timeout=timeout):
            served.append(number)
            await trio.sleep(SERVICE)

    async with whitepool.open_pool(Workshop().make, pool_size=WORKERS, max_overflow=0) as session:
        async with trio.open_nursery() as nursery:
            resources = [await session.block_checkout() for _ in range(WORKERS)]
            for number in range(10_000):
                nursery.start_soon(request, session, number)
            await trio.testing.wait_all_tasks_blocked()
            order = list(session._queue.waiters)
            for resource in resources:
                session.checkin(resource)
        assert len(served) == len(order) == 10_000
        assert session.statistics().overloads == session.statistics().timeouts == 0


async def test_a_stall_sheds_nobody_early(autojump_clock: Clock) -> None:
    """While nobody is served at all, only those are sent away whose time is up."""
    stalled = trio.Event()
    ends: Counter[str] = Counter()

    async def request(session: whitepool.Session[Tool]) -> None:
        try:
            async with session.worker(timeout=5):
                await stalled.wait()
                await trio.sleep(SERVICE)
            ends["served"] += 1
        except whitepool.CheckoutTimeout as error:
            ends[type(error).__name__] += 1

    async with whitepool.open_pool(Workshop().make, pool_size=WORKERS, max_overflow=0) as session:
        async with trio.open_nursery() as nursery:
            for number in range(1000):
                if number == 450:
                    stalled.set()
                await trio.sleep(1 / (0.9 * CAPACITY))
                nursery.start_soon(request, session)
        assert ends == {"served": 1000}


@pytest.mark.parametrize("phase", range(0, 200, 20))
async def test_a_line_that_drains_after_a_stall_is_left_alone(
    phase: int, autojump_clock: Clock
) -> None:
    """Whenever the stall of two seconds ends, only those are sent away whose time was up in it."""
    begins, ends = 5, 7 + phase / 1000
    outcomes: Counter[str] = Counter()

    async def request(session: whitepool.Session[Tool]) -> None:
        try:
            async with session.worker(timeout=1):
                now = trio.current_time()
                if begins <= now < ends:
                    await trio.sleep(ends - now)
                await trio.sleep(SERVICE)
            outcomes["served"] += 1
        except whitepool.CheckoutTimeout as error:
            outcomes[type(error).__name__] += 1

    async with (
        whitepool.open_pool(Workshop().make, pool_size=WORKERS, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        for number in range(int(10 * CAPACITY / 2)):
            await trio.sleep_until(number / (CAPACITY / 2))
            nursery.start_soon(request, session)
    assert outcomes["PoolOverloaded"] == 0
    assert 0 < outcomes["CheckoutTimeout"] < 1.2 * CAPACITY / 2


async def test_a_task_without_a_timeout_is_never_shed(autojump_clock: Clock) -> None:
    """However long the line stands."""
    served = 0

    async def patient(session: whitepool.Session[Tool]) -> None:
        nonlocal served
        async with session.worker(timeout=math.inf):
            await trio.sleep(SERVICE)
        served += 1

    async def hasty(session: whitepool.Session[Tool]) -> None:
        try:
            async with session.worker(timeout=DEADLINE):
                await trio.sleep(SERVICE)
        except whitepool.CheckoutTimeout:
            pass

    async with whitepool.open_pool(Workshop().make, pool_size=WORKERS, max_overflow=0) as session:
        async with trio.open_nursery() as nursery:
            for number in range(2000):
                await trio.sleep(1 / (3 * CAPACITY))
                nursery.start_soon(hasty if number % 10 else patient, session)
        assert served == 200
        assert session.statistics().overloads > 500


async def test_each_is_looked_at_by_its_own_timeout(autojump_clock: Clock) -> None:
    """Callers that have time do not keep those in a hurry from being told early."""
    outcome = await offer(3, seconds=5, share_of_others=0.2, others=5)
    assert outcome.counts["in time"] >= 0.95 * CAPACITY * 5
    assert outcome.counts["timeouts"] + outcome.counts["late"] <= 0.02 * outcome.counts["overloaded"]


async def test_few_that_are_served_tell_little(autojump_clock: Clock) -> None:
    """Where one worker serves one a second, below its capacity, chance hardly passes for overload."""
    rng, ends = random.Random(3), Counter[str]()

    async def request(session: whitepool.Session[Tool]) -> None:
        try:
            async with session.worker(timeout=5):
                await trio.sleep(1)
            ends["served"] += 1
        except whitepool.CheckoutTimeout as error:
            ends[type(error).__name__] += 1

    async with (
        whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        for _ in range(3000):
            await trio.sleep(rng.expovariate(0.8))
            nursery.start_soon(request, session)
    assert ends["PoolOverloaded"] <= 0.06 * 3000


def test_what_stands() -> None:
    """More joined than were served; and of those there were some."""
    then = Look(joined=100, served=50, served_before=True)
    assert is_growing(then, joined=120, served=60)
    assert not is_growing(then, joined=110, served=70)
    assert not is_growing(then, joined=110, served=60)
    assert not is_growing(then, joined=120, served=50)  # no task was served
    assert not is_growing(then._replace(served_before=False), joined=120, served=60)
