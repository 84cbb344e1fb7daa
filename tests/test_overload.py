"""While the queue grows, waiters are shed early; while it drains, or is held up, none is. (Rule 11.)"""

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
from whitepool import _overload as overload
from whitepool._overload import Look

Clock = trio.testing.MockClock
SERVICE, DEADLINE, WORKERS = 0.02, 0.25, 5
CAPACITY = WORKERS / SERVICE


@dataclass
class Outcome:
    """What became of the requests, and after how long those were shed that were."""

    counts: Counter[str] = field(default_factory=Counter)
    shed_after: list[float] = field(default_factory=list)


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
            outcome.shed_after.append(trio.current_time() - began)
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
        check_books(session)
        assert session.statistics().overloads == outcome.counts["overloaded"]
    return outcome


async def test_below_its_capacity_the_pool_serves_every_task(autojump_clock: Clock) -> None:
    """At 0.9 times what it can serve, nothing is shed."""
    outcome = await offer(0.9, seconds=10)
    assert set(outcome.counts) == {"in time"}


@pytest.mark.parametrize("load", [1.5, 3, 10])
async def test_goodput_under_overload(load: float, autojump_clock: Clock) -> None:
    """At least 95 % of the capacity goes into answers that come in time."""
    outcome = await offer(load, seconds=5)
    assert outcome.counts["in time"] >= 0.95 * CAPACITY * 5
    assert outcome.counts["timeouts"] <= 0.02 * outcome.counts["overloaded"]
    # Shed when a share of 0.4 is used up, but for those that waited when the queue began to grow.
    shed_after = sorted(outcome.shed_after)
    assert shed_after[len(shed_after) // 2] == pytest.approx(0.4 * DEADLINE, abs=0.01)


async def test_without_it_the_pool_collapses(autojump_clock: Clock) -> None:
    """`patience=1` turns shedding off, and shows what it is good for."""
    outcome = await offer(3, seconds=5, patience=1)
    assert outcome.counts["overloaded"] == 0
    assert outcome.counts["in time"] < 0.3 * CAPACITY * 5


@pytest.mark.parametrize("timeout", [math.inf, 45.0])
async def test_a_burst_is_served_whole(timeout: float, autojump_clock: Clock) -> None:
    """Ten thousand tasks at once, which the pool can serve in 40 s, are all served."""
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
            assert session.statistics().waiting == 10_000
            for resource in resources:
                session.checkin(resource)
        assert len(served) == 10_000
        assert session.statistics().overloads == session.statistics().timeouts == 0


async def test_a_stall_sheds_no_waiter(autojump_clock: Clock) -> None:
    """While no task is served at all, none leaves before its time is up."""
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
async def test_a_queue_that_drains_after_a_stall_is_left_alone(
    phase: int, autojump_clock: Clock
) -> None:
    """Whenever the stall of two seconds ends, only those leave whose time was up in it."""
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
    """However long the queue grows."""
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


async def test_each_waiter_is_looked_at_by_its_own_timeout(autojump_clock: Clock) -> None:
    """Waiters that have time do not keep those in a hurry from being shed early."""
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


# -- The decisions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("joined", "served", "served_before", "expected"),
    [
        pytest.param(20, 10, True, True, id="more joined than were served"),
        pytest.param(11, 10, True, True, id="one more"),
        pytest.param(2, 1, True, True, id="one was served"),
        pytest.param(10, 10, True, False, id="1. as many were served as joined"),
        pytest.param(10, 20, True, False, id="1. it drains"),
        pytest.param(0, 1, True, False, id="1. no task joined"),
        pytest.param(20, 0, True, False, id="2. no task was served"),
        pytest.param(0, 0, True, False, id="2. nothing happened"),
        pytest.param(20, 10, False, False, id="3. no task was served in the period before"),
    ],
)
def test_whether_the_queue_grows(joined: int, served: int, served_before: bool, expected: bool) -> None:
    """Since the last look, so many joined and so many were served."""
    then = Look(joined=100, served=50, served_before=served_before)
    assert overload.is_growing(then, 100 + joined, 50 + served) is expected


@pytest.mark.parametrize(
    ("patience", "expected"),
    [
        pytest.param(0.4, 0.2, id="two periods make the share"),
        pytest.param(0.999, 0.4995, id="just below 1"),
        pytest.param(1, 1, id="1 turns shedding off"),
        pytest.param(1.0, 1, id="1.0 does, too"),
    ],
)
def test_the_period(patience: float, expected: float) -> None:
    """With 1, the first look is when the waiter's time is up."""
    assert overload.period(patience) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("now", "ends", "seconds", "expected"),
    [
        pytest.param(100, 110, 2, 102, id="after a period"),
        pytest.param(100, 110, 9.5, 109.5, id="just before the end"),
        pytest.param(100, 110, 10, 110, id="at the end"),
        pytest.param(100, 110, 11, 110, id="not after the end"),
        pytest.param(100, 110, 0, 110, id="a period of no time"),
        pytest.param(1e9, 1e9 + 1, 1e-9, 1e9 + 1, id="a period that the clock can't tell"),
    ],
)
def test_the_next_look(now: float, ends: float, seconds: float, expected: float) -> None:
    """It is always later than now, or the waiter would be looked at without end."""
    assert overload.next_look(now, ends, seconds) == expected > now


@pytest.mark.parametrize(
    ("waiting", "max_waiting", "obtainable", "expected"),
    [
        pytest.param(4, 5, 0, False, id="one more may wait"),
        pytest.param(5, 5, 0, True, id="as many wait as may"),
        pytest.param(6, 5, 0, True, id="more wait than may, as workers were lost"),
        pytest.param(0, 0, 0, True, id="none may wait"),
        pytest.param(0, 0, 1, False, id="a worker is on its way to it"),
        pytest.param(1, 0, 1, True, id="the only worker on its way is another waiter's"),
        pytest.param(5, 5, 6, False, id="more are on their way than may wait"),
        pytest.param(10, 5, 6, False, id="those with a worker on its way do not count"),
        pytest.param(11, 5, 6, True, id="five more wait for clients"),
        pytest.param(10**6, math.inf, 0, False, id="without a limit"),
    ],
)
def test_whether_the_queue_is_full(
    waiting: int, max_waiting: float, obtainable: int, expected: bool
) -> None:
    """For `max_waiting`, only the tasks count that need a client to return a worker."""
    assert overload.is_queue_full(waiting, max_waiting, obtainable) is expected
