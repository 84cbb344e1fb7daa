"""`check_interval=0`: each idle worker is asked for a sign of life before a client gets it."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, hang, open_checked_pool, use

import whitepool
from whitepool._checking import PROMPT_ANSWER

pytestmark = pytest.mark.usefixtures("no_hanging")

Session = whitepool.Session[Tool]


class Asked(Manager):
    """A manager that notes which workers are asked, and when; what they answer can be assigned."""

    def __init__(self) -> None:
        super().__init__(Workshop())
        self.asked: list[tuple[int, float]] = []
        self.answers: dict[int, Callable[[], Awaitable[object]]] = {}
        """What a worker does when it is asked, by its number. By default it answers at once."""

    async def check(self, worker: Tool) -> None:
        self.asked.append((worker.number, trio.current_time()))
        if worker.number in self.answers:
            await self.answers[worker.number]()

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.asked]


async def fail() -> None:
    raise OSError("no answer")


async def hold(session: Session, seconds: float = 1) -> None:
    async with session.worker():
        await trio.sleep(seconds)


async def test_each_checkout_of_an_idle_worker_asks_it(autojump_clock: MockClock) -> None:
    """Once, and no worker is asked at any other time."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=2, check_interval=0) as session:
        await trio.sleep(1000)
        assert manager.asked == []
        for _ in range(3):
            await use(session)
            await trio.sleep(100)
        last = manager.numbers[0]
        assert manager.asked == [(last, 1000.0), (last, 1100.0), (last, 1200.0)]
        (resource,) = [await session.nonblock_checkout()]
        session.checkin(resource)
        assert manager.numbers == [last] * 4
        now = session.statistics()
        assert (now.checkouts, now.waited, now.wait_time) == (4, 4, 0)


async def test_a_failed_start_refuses_no_task_that_gets_an_idle_worker(
    autojump_clock: MockClock,
) -> None:
    """Nor one that has come in that instant: the worker may be idle yet, and not be asked. (Chance.)"""
    for _ in range(15):
        manager, gate = Asked(), trio.Event()

        async def open_one(attempt: int, gate: trio.Event = gate) -> None:
            if attempt > 1:
                await gate.wait()
                raise OSError("too many connections")

        manager.shop.before_open = open_one
        async with open_checked_pool(manager, pool_size=2, min_ready=1, check_interval=0) as session:
            await wait_all_tasks_blocked()
            assert session.statistics().idle == session.statistics().starting == 1
            gate.set()
            session.checkin(await session.nonblock_checkout())


@pytest.mark.parametrize(("strategy", "expected"), [("lifo", [3, 3, 3]), ("fifo", [1, 2, 3])])
async def test_the_strategy_chooses(
    strategy: str, expected: list[int], autojump_clock: MockClock
) -> None:
    """The worker that would be handed out is the one that is asked."""
    manager = Asked()
    async with open_checked_pool(
        manager, pool_size=3, max_starting=1, check_interval=0, strategy=strategy
    ) as session:
        for _ in range(3):
            await use(session)
        assert manager.numbers == expected


async def test_a_worker_that_changes_hands_is_not_asked(autojump_clock: MockClock) -> None:
    """Its client had it a moment ago. Neither is one that was opened for the task that waits."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=0, max_overflow=1, check_interval=0) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(hold, session)
        assert manager.asked == []
        assert trio.current_time() == 4
        assert session.statistics().waited == 4
        assert session.statistics().wait_time == 1 + 2 + 3


async def test_a_worker_that_does_not_answer_costs_no_error(autojump_clock: MockClock) -> None:
    """The client gets the next one that does, or a new one, and the dead ones are replaced."""
    manager = Asked()
    async with open_checked_pool(
        manager, pool_size=3, max_overflow=0, max_starting=1, check_interval=0
    ) as session:
        manager.answers = {3: fail, 2: fail}
        manager.shop.before_open = lambda _: trio.sleep(1)
        async with session.worker(0.5) as tool:
            assert tool.number == 1
        # One that does not answer has all others probed, in no particular order.
        assert manager.numbers in ([3, 2, 1], [3, 1, 2])
        await trio.sleep(3)
        assert (session.statistics().lost, session.statistics().idle) == (2, 3)


async def test_where_none_answers_one_is_started(autojump_clock: MockClock) -> None:
    """The client waits for that start, and no longer: all connections were lost in the night."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=3, max_overflow=0, check_interval=0) as session:
        manager.answers = dict.fromkeys((1, 2, 3), fail)
        manager.shop.before_open = lambda _: trio.sleep(0.5)
        began = trio.current_time()
        async with session.worker() as tool:
            assert tool.number > 3
            assert trio.current_time() == began + 0.5
        assert session.statistics().lost == 3


async def test_a_worker_known_to_be_dead_is_not_asked(autojump_clock: MockClock) -> None:
    """`is_alive` and the watch for hang-ups come first, as they cost nothing."""
    manager = Asked()
    async with open_checked_pool(
        manager, pool_size=2, max_overflow=0, max_starting=1, check_interval=0
    ) as session:
        manager.dead = {manager.shop.tools[1]}
        async with session.worker() as tool:
            assert tool.number == 1
        assert manager.numbers == [1]


@pytest.mark.parametrize("since", [0.0, 0.01, 0.08, 0.24, 1.91, 1234.567])
async def test_a_slow_answer_is_not_waited_for(since: float, autojump_clock: MockClock) -> None:
    """After `PROMPT_ANSWER` the next worker is asked, and so on; then one is started."""
    await trio.sleep(since)
    began = trio.current_time()
    manager = Asked()
    async with open_checked_pool(
        manager, pool_size=2, max_overflow=1, max_starting=1, check_interval=0, reset_timeout=5
    ) as session:
        manager.answers = {2: hang, 1: hang}
        async with session.worker() as tool:
            assert tool.number == 3
            assert trio.current_time() == pytest.approx(began + 2 * PROMPT_ANSWER)
        assert manager.numbers == [2, 1]
        assert session.statistics().lost == 0
        await trio.sleep(6)
        assert session.statistics().lost == 2


async def test_a_slow_answer_may_still_come_first(autojump_clock: MockClock) -> None:
    """The client takes what it can get, and the worker that was started is there for the next."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=1, max_overflow=1, check_interval=0) as session:
        manager.answers = {1: lambda: trio.sleep(0.3)}
        manager.shop.before_open = lambda _: trio.sleep(10)
        began = trio.current_time()
        async with session.worker() as tool:
            assert tool.number == 1
            assert trio.current_time() == began + 0.3


async def test_in_a_full_pool_a_slow_answer_is_all_there_is(autojump_clock: MockClock) -> None:
    """The client waits for it, at most for its own timeout."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=1, max_overflow=0, check_interval=0) as session:
        manager.answers = {1: lambda: trio.sleep(2)}
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(1)
        async with session.worker(1.5) as tool:
            assert tool.number == 1
        # There is no second probe while the first is under way.
        assert manager.numbers == [1]


async def test_each_waiter_has_a_probe_of_its_own(autojump_clock: MockClock) -> None:
    """Five clients that come together are not asked for one after the other."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=5, max_overflow=5, check_interval=0) as session:
        manager.answers = {number: lambda: trio.sleep(0.05) for number in range(1, 6)}
        began = trio.current_time()

        async def client() -> None:
            async with session.worker():
                assert trio.current_time() == pytest.approx(began + 0.05)
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(client)
        assert sorted(manager.numbers) == [1, 2, 3, 4, 5]
        assert manager.shop.attempts == 5


async def test_slow_answers_one_after_the_other(autojump_clock: MockClock) -> None:
    """Each is given up at its own time, also where they began at different times."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=3, max_overflow=3, check_interval=0) as session:
        manager.answers = dict.fromkeys((1, 2, 3), hang)
        waits: list[float] = []

        async def client(after: float) -> None:
            await trio.sleep(after)
            began = trio.current_time()
            async with session.worker():
                waits.append(trio.current_time() - began)
                await trio.sleep(10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client, 0)
            nursery.start_soon(client, 0.04)
            nursery.start_soon(client, 0.08)
        # Each probe was begun for its client; the client is served by a start, and that comes when the
        # probe is late.
        assert waits == [pytest.approx(PROMPT_ANSWER)] * 3


async def test_a_client_that_has_gone_leaves_the_worker_idle(autojump_clock: MockClock) -> None:
    """The answer comes, and no task waits: nothing is lost, and nothing started."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=1, max_overflow=1, check_interval=0) as session:
        manager.answers = {1: lambda: trio.sleep(0.05)}
        with trio.move_on_after(0.02) as scope:
            await session.block_checkout()
        assert scope.cancelled_caught
        assert session.statistics().resetting == 1
        await trio.sleep(1)
        now = session.statistics()
        assert (now.idle, now.started, now.waiting) == (1, 1, 0)
        assert manager.numbers == [1]


async def test_the_first_come_is_served_first(autojump_clock: MockClock) -> None:
    """Whichever probe answers first. (Rule 2.)"""
    manager = Asked()
    served: list[int] = []
    async with open_checked_pool(
        manager, pool_size=2, max_overflow=0, max_starting=1, check_interval=0
    ) as session:
        manager.answers = {2: lambda: trio.sleep(0.09)}

        async def client(number: int) -> None:
            async with session.worker():
                served.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(client, number)
                await wait_all_tasks_blocked()
        assert served == [0, 1, 2, 3, 4]


async def test_workers_that_cannot_be_asked(autojump_clock: MockClock) -> None:
    """A bare factory has no `check`: then they are handed out as they are."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=0, check_interval=0) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(hold, session)
        assert trio.current_time() == 3
        assert shop.attempts == 2


async def test_checkout_nowait_says_that_it_cannot(autojump_clock: MockClock) -> None:
    """There is no time to ask. It says so at the first call, and not only when no worker is idle."""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=1, check_interval=0) as session:
        with pytest.raises(RuntimeError, match="check_interval"):
            session.checkout_nowait()
        assert session.statistics().idle == 1
        await session.safe_shutdown()
        with pytest.raises(whitepool.PoolClosed):
            session.checkout_nowait()


async def test_a_shutdown_serves_those_whose_worker_is_asked(autojump_clock: MockClock) -> None:
    """They waited before it began. (Rule 9.)"""
    manager = Asked()
    async with open_checked_pool(manager, pool_size=1, check_interval=0) as session:
        manager.answers = {1: lambda: trio.sleep(0.05)}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold, session)
            await wait_all_tasks_blocked()
            nursery.start_soon(session.safe_shutdown)
        assert session.statistics().checkouts == 1


async def test_the_queue_is_bounded_as_ever(autojump_clock: MockClock) -> None:
    """Tasks whose worker is being asked do not count for `max_waiting`: no client has to return one."""
    manager = Asked()
    async with (
        open_checked_pool(
            manager, pool_size=3, max_overflow=0, check_interval=0, max_waiting=0
        ) as session,
        trio.open_nursery() as nursery,
    ):
        for _ in range(3):
            nursery.start_soon(hold, session)
        await wait_all_tasks_blocked()
        with pytest.raises(whitepool.PoolOverloaded):
            await session.block_checkout()


@pytest.mark.parametrize("seed", range(30))
async def test_a_storm(seed: int, autojump_clock: MockClock) -> None:
    """Workers that die, or fall silent, cost clients time, and never an error. (Rule 6.)

    Also while the pool is resized and renewed. A client waits for the probe of each worker that has
    fallen silent, and for a start.
    """
    chance = random.Random(seed)
    manager = Asked()

    async def answer() -> None:
        what = chance.choice(["ok"] * 6 + ["slow", "dead", "silent"])
        if what == "slow":
            await trio.sleep(chance.uniform(0, 0.3))
        elif what == "dead":
            raise OSError("no answer")
        elif what == "silent":
            await trio.sleep_forever()

    asked: set[Tool] = set()

    async def check(worker: Tool) -> None:
        # After a loss, a new one is asked as well; a start that fails would be another story.
        if worker in asked:
            await answer()
        asked.add(worker)

    manager.check = check  # type: ignore[method-assign]
    manager.shop.before_open = lambda _: trio.sleep(0.2)
    longest = 0.0

    async def client(session: Session) -> None:
        nonlocal longest
        for _ in range(30):
            began = trio.current_time()
            async with session.worker(math.inf):
                longest = max(longest, trio.current_time() - began)
                await trio.sleep(chance.uniform(0, 0.5))
            await trio.sleep(chance.uniform(0, 2))

    async with open_checked_pool(
        manager, pool_size=4, max_overflow=8, check_interval=0, reset_timeout=1
    ) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(client, session)
            for _ in range(4):
                await trio.sleep(10)
                session.retire_all()
        assert longest < 2.5
        await trio.sleep(30)
        assert session.statistics().waiting == 0
        assert session.statistics().idle == 4
