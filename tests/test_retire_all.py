"""Every worker is replaced, and no client notices."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, nothing, open_checked_pool, raising, tool_of

import whitepool

pytestmark = pytest.mark.usefixtures("no_hanging")

Session = whitepool.Session[Tool]

START = 1.0
"""Seconds that a start takes in these tests."""


class Load:
    """Clients that use a pool without a pause, and what they see of it."""

    def __init__(self, session: Session, shop: Workshop, seed: int) -> None:
        self.session = session
        self.random = random.Random(seed)
        self.longest_wait = 0.0
        self.fewest_alive = math.inf
        self.is_over = False
        self.shop = shop
        shop.before_open = lambda _: trio.sleep(START)
        shop.before_close = self._count_the_others

    async def _count_the_others(self, _: Tool) -> None:
        self.fewest_alive = min(self.fewest_alive, len(self.shop.alive) - 1)

    async def client(self) -> None:
        while not self.is_over:
            began = trio.current_time()
            async with self.session.worker(math.inf):
                self.longest_wait = max(self.longest_wait, trio.current_time() - began)
                await trio.sleep(self.random.uniform(0.01, 2 * START))

    async def run(self, clients: int, *, over: float = 0.0) -> set[Tool]:
        """Retire all workers in the middle of it; return those of them that are still alive."""
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(self.client)
            await trio.sleep(10 * START)
            self.longest_wait, self.fewest_alive = 0.0, math.inf
            old = set(self.shop.alive)
            self.session.retire_all(over)
            await trio.sleep(over + 10 * START + 4 * START * len(old))
            left = old & set(self.shop.alive)
            self.is_over = True
        return left


@pytest.mark.parametrize("kind", ["eager", "lazy", "checked first"])
@pytest.mark.parametrize("max_overflow", range(4))
@pytest.mark.parametrize("pool_size", range(1, 6))
async def test_under_full_load(
    pool_size: int, max_overflow: int, kind: str, autojump_clock: MockClock
) -> None:
    """As many clients as workers: no one waits for longer than one start takes. (Rule 5.)

    At most one worker of `pool_size` is missing at any time.
    """
    options: dict[str, Any] = {"pool_size": pool_size, "max_overflow": max_overflow}
    if kind == "lazy":
        options["lazy"] = True
    elif kind == "checked first":
        options["check_interval"] = 0
    for seed in range(3):
        manager = Manager(Workshop())
        async with open_checked_pool(manager, **options) as session:
            load = Load(session, manager.shop, seed)
            assert not await load.run(pool_size + max_overflow)
            assert load.longest_wait <= START + 1e-9
            assert load.fewest_alive >= pool_size - 1
            assert session.statistics().lost == session.statistics().destroyed == 0


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("pool_size", "max_overflow"), [(1, 0), (1, 2), (3, 0), (2, 3), (5, 1)])
async def test_with_a_queue(
    pool_size: int, max_overflow: int, lazy: bool, autojump_clock: MockClock
) -> None:
    """Twice as many clients as workers: they wait for each other, and one worker less serves them."""
    shop = Workshop()
    async with open_checked_pool(
        shop.make, pool_size=pool_size, max_overflow=max_overflow, lazy=lazy
    ) as session:
        load = Load(session, shop, seed=7)
        limit = pool_size + max_overflow
        assert not await load.run(2 * limit)
        assert load.fewest_alive >= limit - 1
        # Each client ahead of it holds a worker for 2 s at most, then one start.
        assert load.longest_wait <= START + 2 * START * math.ceil(2 * limit / max(1, limit - 1))


async def test_idle_workers_go_when_their_replacements_are_there(autojump_clock: MockClock) -> None:
    """Where there is room, a client finds an idle worker at any time."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=3, max_overflow=3) as session:
        load = Load(session, shop, seed=0)
        old = set(shop.alive)
        session.retire_all()
        for _ in range(30):
            await trio.sleep(START / 10)
            session.checkin(session.checkout_nowait())
        assert load.fewest_alive >= 3
        assert not old & set(shop.alive)
        now = session.statistics()
        assert (now.idle, now.retired, now.started) == (3, 3, 6)


async def test_one_at_a_time_where_there_is_no_room(autojump_clock: MockClock) -> None:
    """A pool of three without overflow has two workers at least."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=3, max_overflow=0) as session:
        load = Load(session, shop, seed=0)
        session.retire_all()
        await trio.sleep(2.5 * START)
        assert session.statistics().retired == 3
        assert load.fewest_alive == 2
        assert shop.most_alive == 3


async def test_those_in_use_go_when_they_are_returned(autojump_clock: MockClock) -> None:
    """Their clients keep them until then, and the next one gets another."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=1) as session:
        resource = await session.block_checkout()
        session.retire_all()
        await trio.sleep(100)
        first = resource.get()
        assert not first.closed
        assert not resource.lost.is_set()
        session.checkin(resource)
        await wait_all_tasks_blocked()
        assert first.closed
        async with session.worker() as second:
            assert second is not first


async def test_over_some_time(autojump_clock: MockClock) -> None:
    """One by one, in equal steps."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=4, max_overflow=1) as session:
        session.retire_all(over=40)
        for retired in 1, 2, 3, 4:
            await trio.sleep(5)
            assert session.statistics().retired == retired
            await trio.sleep(5)
        await trio.sleep(1000)
        assert session.statistics().retired == 4


async def test_over_some_time_under_load(autojump_clock: MockClock) -> None:
    """The same holds as where all are retired at once."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=3, max_overflow=0) as session:
        load = Load(session, shop, seed=3)
        assert not await load.run(3, over=20)
        assert load.longest_wait <= START + 1e-9
        assert load.fewest_alive >= 2


async def test_only_those_that_are_open_now(autojump_clock: MockClock) -> None:
    """A replacement is not replaced, and neither is a worker that is being opened."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=2) as session:
        shop.before_open = lambda _: trio.sleep(1)
        held = [await session.block_checkout() for _ in range(3)]  # the third is new
        async with trio.open_nursery() as nursery:

            async def fourth() -> None:
                held.append(await session.block_checkout())

            nursery.start_soon(fourth)
            await wait_all_tasks_blocked()
            session.retire_all(over=5)
        tool = tool_of(held[-1])
        for resource in held:
            session.checkin(resource)
        await trio.sleep(9)
        assert not tool.closed
        assert session.statistics().retired == 3


async def test_twice_is_not_twice_as_much(autojump_clock: MockClock) -> None:
    """A worker that has to leave already is called in no second time."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=3, max_overflow=0) as session:
        shop.before_open = lambda _: trio.sleep(1)
        session.retire_all()
        session.retire_all()
        await trio.sleep(20)
        assert session.statistics().retired == 3


@pytest.mark.parametrize("over", [0, 5])
async def test_a_pool_without_workers_has_none_to_replace(
    over: float, autojump_clock: MockClock
) -> None:
    """It does nothing."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, lazy=True) as session:
        session.retire_all(over)
        await trio.sleep(10)
        async with session.worker():
            pass
        await trio.sleep(10)
        assert (session.statistics().idle, session.statistics().started) == (1, 1)


async def test_what_leaves_anyway_leaves_for_its_own_reason(autojump_clock: MockClock) -> None:
    """A worker that is being closed, and one that is of no use, as its peer has hung up."""
    shop = Workshop()
    shop.before_close = lambda _: trio.sleep(20)
    reasons: list[whitepool.Reason] = []
    hooks = whitepool.Hooks(on_destroy=reasons.append)
    async with open_checked_pool(
        shop.make, pool_size=2, max_overflow=2, hooks=hooks, close_timeout=30
    ) as session:
        destroyed, hung_up = await session.block_checkout(), await session.block_checkout()
        session.retire_all(over=10)
        assert hung_up._entry is not None
        session._supervisor.roster.mark(hung_up._entry, "hung_up")
        session.destroyed(destroyed)
        await trio.sleep(15)
        session.checkin(hung_up)
        await trio.sleep(21)
        assert sorted(reasons) == ["destroyed", "hung_up"]
        shop.before_close = nothing


async def test_while_the_server_refuses_no_worker_goes(autojump_clock: MockClock) -> None:
    """They go when it is back, and are as good as they were until then."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=3, max_overflow=0) as session:
        shop.before_open = raising(OSError("connection refused"))
        session.retire_all()
        await trio.sleep(60)
        assert session.statistics().idle == 2  # the first had to make room
        async with session.worker(0):
            assert session.statistics().state == "ready"
        shop.before_open = nothing
        await trio.sleep(2)
        assert session.statistics().retired == 3
        assert session.statistics().idle == 3


async def test_a_full_pool_keeps_what_it_could_not_replace(autojump_clock: MockClock) -> None:
    """Where the server is known to refuse, no worker makes room for a start that would fail."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=3, max_overflow=1) as session:
        held = [await session.block_checkout() for _ in range(3)]
        shop.before_open = raising(OSError("connection refused"))
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(1)
        session.resize(3, 0)
        for resource in held:
            session.checkin(resource)
        session.retire_all()
        await trio.sleep(4)
        assert session.statistics().idle == 3


async def test_an_old_failure_keeps_no_worker_for_ever(autojump_clock: MockClock) -> None:
    """A pool that was made smaller starts none, and could not learn that the server has room again."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=0) as session:
        old = set(shop.tools)
        shop.before_open = raising(OSError("too many clients"))
        session.resize(3)
        await trio.sleep(1)
        session.resize(2)
        await trio.sleep(60)
        session.retire_all()
        await trio.sleep(60)
        # One has made room, and its replacement is refused: then no other one goes.
        assert session.statistics().idle == 1
        shop.before_open = nothing
        await trio.sleep(10)
        assert session.statistics().idle == len(shop.alive) == 2
        assert not old & set(shop.alive)
        assert session.statistics().last_error is None


@pytest.mark.parametrize("over", [0, 30])
async def test_a_shutdown_does_not_wait_for_it(
    over: float, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """Afterwards it does nothing, and says nothing."""
    caplog.set_level("INFO", "whitepool")
    shop = Workshop()
    began = trio.current_time()
    async with open_checked_pool(shop.make, pool_size=3) as session:
        session.retire_all(over)
    assert trio.current_time() == began
    assert not shop.alive
    session.retire_all(over)
    session.resize(7)
    assert session.statistics().state == "closed"
    events = [record.__dict__["event"] for record in caplog.records]
    assert events == ["pool_opened", "all_retired", "pool_closed"]


@pytest.mark.parametrize(
    ("over", "error"),
    [(-1, ValueError), (math.inf, ValueError), (math.nan, ValueError), ("1", TypeError)],
)
async def test_over_is_checked(over: Any, error: type[Exception]) -> None:
    """It must be a finite number of seconds."""
    async with open_checked_pool(Workshop().make, pool_size=1) as session:
        with pytest.raises(error):
            session.retire_all(over)
        assert session.statistics().retired == 0


async def test_from_another_thread() -> None:
    """The books belong to the thread of the pool."""
    async with open_checked_pool(Workshop().make, pool_size=1) as session:
        for call in session.retire_all, session.resize:
            with pytest.raises(RuntimeError, match="another thread"):
                await trio.to_thread.run_sync(call)
