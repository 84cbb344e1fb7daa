"""While the queue grows, waiters are shed early; while it drains, or is held up, none is. (Rule 11.)"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from workshop import Tool, Workshop, check_books

import whitepool
from whitepool import _overload as overload
from whitepool._overload import Excess, Look

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
    counted_from: float = 0,
    gives_up: bool = False,
) -> Outcome:
    """Offer requests at `load` times the capacity, at random, each with a deadline: a share of them
    with another one. Those that come before `counted_from` are not counted. A client may give up its
    work when the deadline has passed."""
    outcome, rng, start = Outcome(), random.Random(7), trio.current_time()

    async def request(session: whitepool.Session[Tool], deadline: float) -> None:
        began = trio.current_time()
        try:
            async with session.worker(timeout=deadline):
                await trio.sleep_until(
                    min(began + deadline if gives_up else math.inf, trio.current_time() + SERVICE)
                )
        except whitepool.PoolOverloaded:
            end = "overloaded"
        except whitepool.CheckoutTimeout:
            end = "timeouts"
        else:
            end = "in time" if trio.current_time() - began < deadline else "late"
        if began >= start + counted_from:
            outcome.counts[end] += 1
            if end == "overloaded":
                outcome.shed_after.append(trio.current_time() - began)

    async with whitepool.open_pool(
        Workshop().make, pool_size=WORKERS, max_overflow=0, patience=patience
    ) as session:
        async with trio.open_nursery() as nursery:
            while trio.current_time() < start + seconds:
                await trio.sleep(rng.expovariate(load * CAPACITY))
                deadline = others if rng.random() < share_of_others else DEADLINE
                nursery.start_soon(request, session, deadline)
        check_books(session)
        if not counted_from:
            assert session.statistics().overloads == outcome.counts["overloaded"]
    return outcome


async def test_below_its_capacity_the_pool_serves_every_task(autojump_clock: Clock) -> None:
    """At 0.9 times what it can serve, nothing is shed."""
    outcome = await offer(0.9, seconds=10)
    assert set(outcome.counts) == {"in time"}


@pytest.mark.parametrize("load", [1.5, 3, 10])
async def test_goodput_under_overload(load: float, autojump_clock: Clock) -> None:
    """At least 95 % of the capacity goes into answers that come in time."""
    outcome = await offer(load, seconds=4.5, counted_from=1.5)
    assert outcome.counts["in time"] >= 0.95 * CAPACITY * 3
    assert outcome.counts["timeouts"] <= 0.02 * outcome.counts["overloaded"]
    # Shed when a share of 0.4 is used up, but for those that waited when the queue began to grow.
    shed_after = sorted(outcome.shed_after)
    assert shed_after[len(shed_after) // 2] == pytest.approx(0.4 * DEADLINE, abs=0.01)


@pytest.mark.parametrize("load", [1.3, 1.5, 2])
async def test_an_overload_that_clients_hide(load: float, autojump_clock: Clock) -> None:
    """Clients whose deadline counts for their work, too, return a worker that comes too late at once.
    So as many are served as come, and the queue does not grow."""
    outcome = await offer(load, seconds=6, counted_from=2, gives_up=True)
    assert outcome.counts["in time"] >= 0.9 * CAPACITY * 4


@pytest.mark.parametrize(("load", "timeouts"), [(1.5, 6), (3, 3), (10, 2)])
async def test_how_soon_an_overload_is_noticed(
    load: float, timeouts: int, autojump_clock: Clock
) -> None:
    """The more there is of it, the sooner: at three times the capacity, within three timeouts."""
    outcome = await offer(load, seconds=timeouts * DEADLINE)
    assert outcome.counts["overloaded"] > 0.2 * CAPACITY * DEADLINE


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


# -- What chance brings --------------------------------------------------------------------------------


@dataclass
class Shape:
    """What requests are like, and how many workers there are for them."""

    workers: int
    mean: float
    """Seconds for which a request needs a worker, on average."""
    service: Callable[[random.Random], float]
    timeout: Callable[[random.Random], float]
    burst: int = 1

    async def unserved(self, load: float, count: int, patience: float) -> list[bool]:
        """Let so many requests come, the same each time; return which of them got no worker."""
        unserved = [False] * count
        rng = random.Random(3)

        async def request(
            session: whitepool.Session[Tool], number: int, service: float, timeout: float
        ) -> None:
            try:
                async with session.worker(timeout=timeout):
                    await trio.sleep(service)
            except whitepool.CheckoutTimeout:
                unserved[number] = True

        async with (
            whitepool.open_pool(
                Workshop().make, pool_size=self.workers, max_overflow=0, patience=patience
            ) as session,
            trio.open_nursery() as nursery,
        ):
            for number in range(count):
                if number % self.burst == 0:
                    rate = load * self.workers / self.mean / self.burst
                    await trio.sleep(rng.expovariate(rate))
                nursery.start_soon(request, session, number, self.service(rng), self.timeout(rng))
        return unserved


def exponential(rng: random.Random) -> float:
    return rng.expovariate(1 / SERVICE)


@pytest.mark.parametrize(
    ("shape", "load"),
    [
        pytest.param(Shape(1, 1, lambda _: 1, lambda _: 5), 0.8, id="1 s, timeout 5 s"),
        pytest.param(Shape(1, SERVICE, exponential, lambda _: DEADLINE), 0.8, id="exponential"),
        pytest.param(Shape(10, SERVICE, lambda _: SERVICE, lambda _: DEADLINE, 20), 0.7, id="bursts"),
        pytest.param(
            Shape(10, 0.031, lambda rng: 1 if rng.random() < 0.03 else 0.001, lambda _: 1),
            0.9,
            id="3 % of 1 s",
        ),
        pytest.param(
            Shape(2, SERVICE, exponential, lambda rng: 0.1 if rng.random() < 0.5 else 2),
            0.9,
            id="timeouts of 0.1 and 2 s",
        ),
    ],
)
async def test_chance_does_not_pass_for_overload(
    shape: Shape, load: float, autojump_clock: Clock
) -> None:
    """Below its capacity, the pool sheds at most 1 % of what a plain queue would serve in time."""
    count = 3000
    ours = await shape.unserved(load, count, patience=0.4)
    plain = await shape.unserved(load, count, patience=1)
    only_there = sum(here and not there for here, there in zip(ours, plain, strict=True))
    assert only_there <= 0.01 * count


async def test_few_that_are_served_show_an_overload_too(autojump_clock: Clock) -> None:
    """One worker that serves one a second, at 1.5 times its capacity, does not go back and forth."""
    in_time = 0

    async def request(session: whitepool.Session[Tool], number: int) -> None:
        nonlocal in_time
        began = trio.current_time()
        with suppress(whitepool.CheckoutTimeout):
            async with session.worker(timeout=5):
                await trio.sleep(1)
            in_time += number >= 300 and trio.current_time() - began <= 5

    rng = random.Random(3)
    async with (
        whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        for number in range(2000):
            await trio.sleep(rng.expovariate(1.5))
            nursery.start_soon(request, session, number)
    assert in_time >= 0.95 * 1700 / 1.5


async def test_an_overload_is_forgotten(autojump_clock: Clock) -> None:
    """However long it has lasted: when fewer tasks come, they are served as if it had not been."""
    rng, ends = random.Random(3), Counter[str]()

    async def request(session: whitepool.Session[Tool], phase: str) -> None:
        try:
            async with session.worker(timeout=DEADLINE):
                await trio.sleep(SERVICE)
        except whitepool.CheckoutTimeout:
            ends[phase] += 1

    async with (
        whitepool.open_pool(Workshop().make, pool_size=WORKERS, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        for phase, load, count in ("over", 3, 6000), ("after", 0.9, 3000):
            for _ in range(count):
                await trio.sleep(rng.expovariate(load * CAPACITY))
                nursery.start_soon(request, session, phase)
    assert ends["over"] > 3500
    assert ends["after"] <= 0.01 * 3000


# -- The decisions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("joined", "served", "expected"),
    [
        pytest.param(20, 10, True, id="more joined than were served"),
        pytest.param(11, 10, True, id="one more"),
        pytest.param(2, 1, True, id="one was served"),
        pytest.param(10, 10, False, id="1. as many were served as joined"),
        pytest.param(10, 20, False, id="1. it drains"),
        pytest.param(0, 1, False, id="1. no task joined"),
        pytest.param(20, 0, False, id="2. no task was served"),
        pytest.param(0, 0, False, id="2. nothing happened"),
    ],
)
def test_whether_the_queue_grows(joined: int, served: int, expected: bool) -> None:
    """Since the last look, so many joined and so many were served."""
    assert overload.is_growing(Look(100, 50), Look(100 + joined, 50 + served)) is expected


def count_one(excess: Excess, joined: int, served: int, timeout: float = 1.0) -> Excess:
    """Have a waiter tell about the second from 10 to 11, in which so many joined and were served."""
    excess.count(11, since=10, timeout=timeout, then=Look(0, 0), look=Look(joined, served))
    return excess


@pytest.mark.parametrize(
    ("joined", "expected"),
    [
        pytest.param(100 + 200 + 8, False, id="as many as can be served in two timeouts, and eight"),
        pytest.param(100 + 200 + 9, True, id="one more"),
        pytest.param(50, False, id="the queue drains"),
    ],
)
def test_whether_the_excess_is_lasting(joined: int, expected: bool) -> None:
    """A hundred are served in a second, and the timeout is one."""
    assert count_one(Excess(0), joined, 100).is_lasting(1) is expected


def test_the_excess_of_half_a_second() -> None:
    """It is judged by what is served in two timeouts, whatever these are."""
    for joined, expected in (100 + 200 + 8, False), (100 + 200 + 9, True):
        excess = Excess(0)
        excess.count(10.5, since=10, timeout=0.5, then=Look(0, 0), look=Look(joined, 100))
        assert excess.is_lasting(0.5) is expected


def test_the_excess_is_judged_by_each_timeout() -> None:
    """What is no chance for a waiter in a hurry may be for one with more time."""
    excess = count_one(Excess(0), 400, 100, timeout=5)
    assert excess.is_lasting(1)
    assert not excess.is_lasting(5)


def test_nothing_is_lasting_at_first() -> None:
    """Before any look."""
    assert not Excess(0).is_lasting(0.001)


def test_the_excess_drains_while_no_task_waits_for_long() -> None:
    """At half the rate at which tasks were served; the next waiter begins with what is left."""
    excess = count_one(Excess(0), 300, 100)
    assert excess.tasks == 200
    excess.count(14, since=13, timeout=1, then=Look(500, 400), look=Look(600, 500))
    assert excess.tasks == 200 - 2 * 50
    excess.count(20, since=19, timeout=1, then=Look(900, 800), look=Look(1000, 900))
    assert excess.tasks == 0


def test_the_excess_drains_at_the_rate_of_all_that_were_served() -> None:
    """In however many seconds that was."""
    excess = Excess(0)
    excess.count(12, since=10, timeout=1, then=Look(0, 0), look=Look(400, 200))
    assert excess.tasks == 200
    excess.count(15, since=14, timeout=1, then=Look(500, 300), look=Look(600, 400))
    assert excess.tasks == 200 - 2 * 50


def test_a_queue_that_drains_gives_no_credit() -> None:
    """Where more were served than joined, the next excess counts from zero."""
    excess = count_one(Excess(0), 50, 100)
    assert excess.tasks == 0
    excess.count(12, since=11, timeout=1, then=Look(50, 100), look=Look(350, 200))
    assert excess.tasks == 200


def test_one_task_too_many_is_an_excess() -> None:
    """Until it has been served."""
    excess = count_one(Excess(0), 101, 100)
    assert excess.tasks == 1
    excess.count(12, since=11, timeout=1, then=Look(101, 100), look=Look(201, 201))
    assert excess.tasks == 0


def test_waiters_at_the_same_time_count_once() -> None:
    """Each look counts what has happened since the last one, at whichever waiter that was."""
    excess = count_one(Excess(0), 300, 100)
    excess.count(11, since=10.2, timeout=1, then=Look(20, 10), look=Look(300, 100))
    assert excess.tasks == 200
    excess.count(11.5, since=10.5, timeout=1, then=Look(150, 50), look=Look(320, 150))
    assert excess.tasks == 170


def test_the_excess_has_a_bound() -> None:
    """Twice what makes it lasting, by the longest timeout since there has been one."""
    excess = count_one(Excess(0), 10_000, 100, timeout=2)
    assert excess.tasks == 2 * (8 + 2 * 2 * 100)
    excess.count(11, since=10.9, timeout=0.1, then=Look(9999, 99), look=Look(10_000, 100))
    assert excess.tasks == 2 * (8 + 2 * 2 * 100)


def test_the_bound_of_short_timeouts() -> None:
    """It is theirs, also where a waiter had more time when there was no excess."""
    excess = count_one(Excess(0), 10_000, 100, timeout=0.5)
    assert excess.tasks == 2 * (8 + 2 * 0.5 * 100)
    excess = count_one(Excess(0), 100, 100, timeout=5)
    excess.count(12, since=11, timeout=1, then=Look(100, 100), look=Look(200, 200))
    excess.count(13, since=12, timeout=1, then=Look(200, 200), look=Look(9000, 300))
    assert excess.tasks == 2 * (8 + 2 * 1 * 100)


@pytest.mark.parametrize("timeout", [1, 2, 0.5])
@pytest.mark.parametrize(("waited", "expected"), [(0.7, 200), (0.75, 0)])
def test_a_stall_makes_no_excess(waited: float, expected: float, timeout: float) -> None:
    """If none was served for three quarters of a timeout, what has joined since counts no more."""
    excess = Excess(0)
    excess.count(10, since=9, timeout=timeout, then=Look(0, 0), look=Look(1000, 1000))
    now = 10 + waited * timeout
    excess.count(now, since=10, timeout=timeout, then=Look(1000, 1000), look=Look(1200, 1000))
    assert excess.tasks == expected


def test_a_short_wait_is_no_stall() -> None:
    """A waiter in a hurry can't tell: it leaves before the next task is served anyway."""
    excess = count_one(Excess(0), 10, 1, timeout=5)
    excess.count(11.1, since=11, timeout=0.1, then=Look(10, 1), look=Look(12, 1))
    assert excess.tasks == 11


def test_how_fast_tasks_are_served_is_learned_anew() -> None:
    """What was served more than some ten timeouts ago counts for less and less."""
    excess, then = Excess(0), Look(0, 0)
    for second in range(1, 60):
        served = then.served + (100 if second < 20 else 10)
        look = Look(served + 40, served)
        excess.count(second, since=second - 1, timeout=1, then=then, look=look)
        then = look
    assert excess.tasks == 40
    assert excess.is_lasting(1)


@pytest.mark.parametrize(("checkouts", "expected"), [(146 * 10, False), (145 * 10, True), (0, True)])
def test_tasks_that_did_not_wait_tell_how_fast_they_are_served(checkouts: int, expected: bool) -> None:
    """Where a few take very long, more of those are served than usual while others wait."""
    excess = Excess(1)
    look = Look(100 + 300, 100, checkouts=checkouts)  # in ten seconds; and 100 in the last one
    excess.count(11, since=10, timeout=1, then=Look(0, 0), look=look)
    assert excess.is_lasting(1) is expected


def test_the_excess_drains_as_fast_as_tasks_are_served() -> None:
    """Those that do not wait among them."""
    excess = Excess(10)
    excess.count(11, since=10, timeout=1, then=Look(0, 0), look=Look(300, 100, checkouts=100))
    excess.count(14, since=13, timeout=1, then=Look(300, 100), look=Look(310, 110, checkouts=500))
    left = 200 - 0.5 * 2 * 500 / 4
    assert excess.tasks == left
    excess.count(16, since=15, timeout=1, then=Look(310, 110), look=Look(320, 120, checkouts=600))
    assert excess.tasks == left - 0.5 * 1 * 600 / 6


@pytest.mark.parametrize("timeout", [1, 4])
def test_how_fast_tasks_were_served_is_forgotten(timeout: int) -> None:
    """What was before the last ten timeouts counts for less and less, and an hour as little."""
    excess, then, now = Excess(0), Look(0, 0, checkouts=360_000), 3600
    excess.count(now, since=now - 1, timeout=timeout, then=Look(0, 0), look=then)
    lasting = []
    for joined in 100 * timeout, *[1] * 60:
        look = Look(then.joined + joined, then.served + 1, 0, then.checkouts + 1)
        excess.count(now + timeout, since=now, timeout=timeout, then=then, look=look)
        lasting.append(excess.is_lasting(timeout))
        then, now = look, now + timeout
    assert not any(lasting[:10])
    assert all(lasting[30:])


def test_a_look_in_the_same_instant() -> None:
    """No time has passed in which tasks could be served: nothing is known of that."""
    excess = Excess(10)
    excess.count(10, since=10, timeout=1, then=Look(0, 0), look=Look(500, 0))
    assert not excess.is_lasting(1)


@pytest.mark.parametrize("timeout", [1, 4])
@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param([100] * 10, 100, id="as many in each"),
        pytest.param([100] * 10 + [10], 1010 / 11, id="ten timeouts count in full"),
        pytest.param([100] * 11, 100, id="as many in each of more"),
        pytest.param([100] * 11 + [10], 560 / 6.5, id="of more, half of all"),
        pytest.param([100] * 11 + [10] * 6, 310 / 6.25, id="and a quarter"),
    ],
)
def test_how_long_the_past_counts(counts: list[int], expected: float, timeout: float) -> None:
    """Of how many are served in a timeout, on average, if so many were in one after the other.

    The bound of the excess shows it.
    """
    excess, then, now = Excess(0), Look(0, 0), 100.0
    for number, count in enumerate(counts, 1):
        many = 10**6 if number == len(counts) else 0
        look = Look(then.joined + count + many, then.served + count)
        excess.count(now + timeout, since=now, timeout=timeout, then=then, look=look)
        now, then = now + timeout, look
    assert excess.tasks == pytest.approx(2 * (8 + 2 * expected))


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


def serve_all(*waits: float, timeout: float = 1) -> Excess:
    """Look twice in each timeout at a waiter, and at a hundred tasks that were served since the last
    look, and had waited for such a share of the timeout."""
    excess, total = Excess(0), 0.0
    for number, wait in enumerate(waits, 1):
        total += 100 * wait * timeout
        now = number * timeout / 2
        look = Look(100 * number, 100 * number, total)
        excess.count(now, since=0, timeout=timeout, then=Look(0, 0), look=look)
    return excess


LATE, GOOD, MIDDLING = 0.75, 0.1, 0.5


@pytest.mark.parametrize("timeout", [1, 2, 0.5])
@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        pytest.param([LATE] * 9, True, id="for four timeouts"),
        pytest.param([LATE] * 8, False, id="for less"),
        pytest.param([LATE] * 8 + [MIDDLING, LATE], False, id="with an interruption"),
        pytest.param([LATE] * 9 + [MIDDLING], True, id="and then not quite in good time"),
        pytest.param([LATE] * 9 + [GOOD], False, id="and then in good time"),
        pytest.param([MIDDLING] * 20, False, id="never"),
    ],
)
def test_whether_tasks_are_served_late(waits: list[float], expected: bool, timeout: float) -> None:
    """As many are served as join, so there is no excess."""
    excess = serve_all(*waits, timeout=timeout)
    assert excess.tasks == 0
    assert excess.is_lasting(timeout) is expected


def test_tasks_in_a_hurry_do_not_say_that_all_are_late() -> None:
    """How late is late goes by the longest timeout since there has been an excess."""
    excess = count_one(Excess(0), 150, 100, timeout=5)
    for number in range(1, 20):
        served, wait_time = 100 + 10 * number, 10 * number * 0.09
        look = Look(50 + served, served, wait_time)
        excess.count(11 + number / 10, since=10.5, timeout=0.1, then=Look(75, 50), look=look)
    assert excess.tasks == 50
    assert not excess.is_lasting(1)


def test_tasks_are_late_for_as_long_as_others_wait() -> None:
    """One that has joined in the moment of the last look has waited ever since."""
    excess = serve_all(*[LATE] * 9)
    excess.count(5, since=4.5, timeout=1, then=Look(900, 900), look=Look(901, 900, 675))
    assert excess.is_lasting(1)


@pytest.mark.parametrize("served", [900, 901])
def test_tasks_are_not_late_after_a_while_without_any(served: int) -> None:
    """Whether or not one has been served since; for how long that had waited is not known."""
    excess = serve_all(*[LATE] * 9)
    excess.count(9, since=8, timeout=1, then=Look(900, 900), look=Look(901, served, 1e6))
    assert not excess.is_lasting(1)
