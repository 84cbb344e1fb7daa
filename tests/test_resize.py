"""The bounds of a pool change while it is used."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, hang, nothing, open_checked_pool, raising, tool_of

import whitepool
from whitepool._backoff import FAILURE_RESET_AFTER

pytestmark = pytest.mark.usefixtures("no_hanging")

Session = whitepool.Session[Tool]


def bounds(session: Session) -> tuple[int, int]:
    now = session.statistics()
    return now.pool_size, now.max_overflow


# -- Growing -------------------------------------------------------------------------------------------


async def test_a_larger_pool_starts_workers(autojump_clock: MockClock) -> None:
    """At once, and without a client."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=0) as session:
        session.resize(5)
        await wait_all_tasks_blocked()
        assert bounds(session) == (5, 0)
        assert session.statistics().idle == 5
        held = [await session.block_checkout(0) for _ in range(5)]
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(1)
        for resource in held:
            session.checkin(resource)


async def test_a_lazy_pool_grows_when_it_has_to(autojump_clock: MockClock) -> None:
    """It may have more, and starts none before."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=0, lazy=True) as session:
        session.resize(3)
        await wait_all_tasks_blocked()
        assert shop.attempts == 0
        held = [await session.block_checkout(1) for _ in range(3)]
        for resource in held:
            session.checkin(resource)


@pytest.mark.parametrize("bound", ["pool_size", "max_overflow"])
async def test_waiters_are_served_when_there_is_room(bound: str, autojump_clock: MockClock) -> None:
    """Tasks that wait get the workers that may be started now."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=0) as session:
        held = [await session.block_checkout()]

        async def client() -> None:
            held.append(await session.block_checkout())

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(client)
            await wait_all_tasks_blocked()
            assert len(held) == 1
            session.resize(**{bound: 3})
            await wait_all_tasks_blocked()
            assert len(held) == 3
        for resource in held:
            session.checkin(resource)


async def test_the_new_overflow_goes_as_the_old_does(autojump_clock: MockClock) -> None:
    """After `overflow_ttl`, down to the new size."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=0, overflow_ttl=3) as session:
        session.resize(2, 2)
        held = [await session.block_checkout() for _ in range(4)]
        for resource in held:
            session.checkin(resource)
        assert session.statistics().idle == 4
        await trio.sleep(7)
        assert session.statistics().idle == 2


# -- Shrinking -----------------------------------------------------------------------------------------


async def test_idle_workers_go_at_once() -> None:
    """As many as are too many, and none more."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=5, max_overflow=0) as session:
        session.resize(2)
        await wait_all_tasks_blocked()
        assert len(shop.alive) == session.statistics().idle == 2
        assert session.statistics().retired == 3
        assert shop.attempts == 5


async def test_idle_workers_go_at_once_where_overflow_is_allowed() -> None:
    """A smaller `pool_size` is meant at once, though `max_overflow` would leave room for them."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=5, overflow_ttl=math.inf) as session:
        session.resize(2)
        await wait_all_tasks_blocked()
        assert session.statistics().idle == 2


@pytest.mark.parametrize(
    ("idle", "before", "after", "left"),
    [
        pytest.param(5, (5, 0), (2, 3), 2, id="all that are beyond the new size"),
        pytest.param(5, (3, 2), (2, 3), 4, id="not those that were overflow before"),
        pytest.param(5, (1, 4), (2, 3), 5, id="none where the pool grows"),
        pytest.param(2, (5, 0), (3, 0), 2, id="none where there are fewer than may be"),
        pytest.param(5, (1, 4), (1, 1), 2, id="those that are beyond the limit"),
        pytest.param(3, (1, 2), (1, 1), 2, id="the one that is beyond the limit"),
    ],
)
async def test_how_many_idle_workers_go(
    idle: int, before: tuple[int, int], after: tuple[int, int], left: int
) -> None:
    """As many as the size is smaller, of those beyond it, and all that there may not be."""
    shop = Workshop()
    async with open_checked_pool(
        shop.make, pool_size=before[0], max_overflow=before[1], lazy=True, overflow_ttl=math.inf
    ) as session:
        held = [await session.block_checkout() for _ in range(idle)]
        for resource in held:
            session.checkin(resource)
        session.resize(*after)
        assert session.statistics().idle == left
        await wait_all_tasks_blocked()
        assert session.statistics().idle == len(shop.alive) == left


async def test_the_one_that_was_used_last_stays() -> None:
    """Those that were idle the longest go."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=3, max_overflow=0) as session:
        async with session.worker() as used:
            pass
        session.resize(1)
        await wait_all_tasks_blocked()
        assert shop.alive == [used]


async def test_those_in_use_go_when_they_are_returned(autojump_clock: MockClock) -> None:
    """Their clients keep them; as many go as are too many. The rest is used again."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=4, max_overflow=0) as session:
        held = [await session.block_checkout() for _ in range(4)]
        session.resize(2)
        await trio.sleep(100)
        assert session.statistics().in_use == 4
        tools = [tool_of(resource) for resource in held]
        for resource in held:
            assert not resource.lost.is_set()
            session.checkin(resource)
            await wait_all_tasks_blocked()
        assert [tool.closed for tool in tools] == [True, True, False, False]
        assert session.statistics().idle == 2
        assert shop.attempts == 4
        # From now on it is a pool like any other.
        async with session.worker(0):
            pass
        assert session.statistics().retired == 2


async def test_the_one_that_is_too_many_goes_when_it_is_returned(autojump_clock: MockClock) -> None:
    """The other one stays."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=0) as session:
        first, second = await session.block_checkout(), await session.block_checkout()
        session.resize(1)
        session.checkin(first)
        assert (session.statistics().idle, session.statistics().retired) == (0, 1)
        session.checkin(second)
        assert (session.statistics().idle, session.statistics().retired) == (1, 1)


async def test_what_may_stay_lingers_as_overflow(autojump_clock: MockClock) -> None:
    """Only what is beyond the bounds goes at its return, then and later."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=4, max_overflow=0, overflow_ttl=10) as session:
        held = [await session.block_checkout() for _ in range(4)]
        session.resize(1, 1)
        for resource in held:
            session.checkin(resource)
        assert session.statistics().idle == 2
        for _ in range(3):
            await trio.sleep(5)
            held = [await session.block_checkout() for _ in range(2)]
            for resource in held:
                session.checkin(resource)
        assert shop.attempts == 4
        assert not session._supervisor._seeks_surplus  # a checkin is as quick as before
        await trio.sleep(30)
        assert session.statistics().idle == 1


async def test_the_surplus_goes_although_tasks_wait(autojump_clock: MockClock) -> None:
    """The bound comes first; the waiters share what may be there."""
    shop = Workshop()
    served: list[Tool] = []
    async with open_checked_pool(shop.make, pool_size=3, max_overflow=0) as session:
        held = [await session.block_checkout() for _ in range(3)]

        async def client() -> None:
            async with session.worker(math.inf) as tool:
                served.append(tool)
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(client)
            await wait_all_tasks_blocked()
            session.resize(1)
            for resource in held:
                session.checkin(resource)
        assert served == [shop.alive[0]] * 4
        assert shop.attempts == 3


async def test_those_that_are_reset_go_when_they_are_ready(autojump_clock: MockClock) -> None:
    """They may have something to tell their client before."""
    manager = Manager(Workshop())
    async with open_checked_pool(manager, pool_size=3, max_overflow=0) as session:
        manager.before_reset = lambda _: trio.sleep(1)
        held = [await session.block_checkout() for _ in range(3)]
        manager.dirty.update(manager.shop.tools)
        for resource in held:
            session.checkin(resource)
        session.resize(1)
        await trio.sleep(2)
        assert manager.resets == 3
        assert session.statistics().idle == len(manager.shop.alive) == 1


async def test_starts_are_given_up(autojump_clock: MockClock) -> None:
    """Those beyond the new bounds, in the moment of the call."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=0, max_starting=10) as session:
        shop.before_open = lambda _: trio.sleep(1)
        session.resize(8)
        await trio.sleep(0.5)
        assert shop.opening == 7
        session.resize(3)
        await wait_all_tasks_blocked()
        assert shop.opening == 2
        await trio.sleep(1)
        assert len(shop.alive) == 3
        assert session.statistics().started == 3
        assert session.statistics().start_failures == 0


async def test_those_that_began_last_are_given_up(autojump_clock: MockClock) -> None:
    """The others are nearly done."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=0, max_starting=10) as session:
        shop.before_open = lambda _: trio.sleep(1)
        session.resize(3)
        await trio.sleep(0.5)
        session.resize(5)
        await wait_all_tasks_blocked()
        session.resize(3)
        await trio.sleep(0.6)
        assert session.statistics().idle == 3


async def test_starts_are_given_up_before_workers_go(autojump_clock: MockClock) -> None:
    """A worker that is there is worth more than one that may come, or may not."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=0) as session:
        shop.before_open = hang
        session.resize(4)
        await wait_all_tasks_blocked()
        assert shop.opening == 2
        session.resize(2)
        await wait_all_tasks_blocked()
        assert shop.opening == 0
        assert session.statistics().idle == 2


async def test_it_shrinks_while_its_server_is_away(autojump_clock: MockClock) -> None:
    """It keeps the workers that it has, as far as there may be so many."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=0) as session:
        shop.before_open = raising(OSError("connection refused"))
        session.resize(4)
        await trio.sleep(60)
        session.resize(1)
        await trio.sleep(60)
        assert session.statistics().idle == len(shop.alive) == 1


async def test_workers_that_were_called_in_go_first(autojump_clock: MockClock) -> None:
    """Those that are to be replaced anyway are the ones that a smaller pool can spare."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=1) as session:
        held = [await session.block_checkout() for _ in range(2)]
        shop.before_open = lambda _: trio.sleep(1)
        session.retire_all()
        await trio.sleep(1.5)  # there is room for one replacement
        for resource in held:
            session.checkin(resource)
        session.resize(1, 0)
        await wait_all_tasks_blocked()
        assert shop.alive == [shop.tools[2]]
        async with session.worker(0):
            pass


async def test_shrinking_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """The log has one line of it, with the new bounds."""
    caplog.set_level("INFO", "whitepool")
    async with open_checked_pool(Workshop().make, pool_size=4, max_overflow=1) as session:
        held = await session.block_checkout()
        session.resize(1, 0)
        session.checkin(held)
        await wait_all_tasks_blocked()
        assert session.statistics().lost == session.statistics().destroyed == 0
    _, record, _ = caplog.records
    assert record.__dict__["event"] == "pool_resized"
    assert (record.__dict__["pool_size"], record.__dict__["max_overflow"]) == (1, 0)
    assert record.levelname == "INFO"


# -- Both ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(20))
async def test_under_load(seed: int, lazy: bool, autojump_clock: MockClock) -> None:
    """The bounds hold at each step: no start beyond them, no client with an error. (Rule 3.)"""
    chance = random.Random(seed)
    shop = Workshop()
    shop.before_open = lambda _: trio.sleep(chance.uniform(0, 0.5))
    shop.before_close = lambda _: trio.sleep(chance.uniform(0, 0.2))
    is_over = False

    async def client(session: Session) -> None:
        while not is_over:
            async with session.worker(math.inf):
                await trio.sleep(chance.uniform(0, 1))
            await trio.sleep(chance.uniform(0, 0.2))

    async with open_checked_pool(
        shop.make, pool_size=3, max_overflow=1, lazy=lazy, overflow_ttl=2
    ) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(client, session)
            for _ in range(40):
                pool_size, max_overflow = chance.randint(0, 6), chance.randint(1, 3)
                session.resize(pool_size, max_overflow)
                assert bounds(session) == (pool_size, max_overflow)
                await wait_all_tasks_blocked()  # a start may have been under way already
                shop.most_alive = 0
                await trio.sleep(chance.choice([0, 0.1, 1, 5]))
                limit = pool_size + max_overflow
                assert shop.most_alive <= limit
            # Each client returns its worker within a second.
            session.resize(2, 1)
            await trio.sleep(2)
            for _ in range(100):
                await trio.sleep(0.05)
                assert len(shop.alive) + shop.opening <= 3
            is_over = True
        await trio.sleep(10)
        now = session.statistics()
        assert now.idle == len(shop.alive)
        assert now.idle <= 2 if lazy else now.idle == 2
        assert now.lost == now.destroyed == now.timeouts == 0


# -- Arguments -----------------------------------------------------------------------------------------


async def test_what_is_not_given_does_not_change() -> None:
    """Neither bound changes the other: `max_overflow` goes on top of whatever `pool_size` is."""
    async with open_checked_pool(Workshop().make, pool_size=2, max_overflow=3) as session:
        session.resize()
        assert bounds(session) == (2, 3)
        session.resize(max_overflow=0)
        assert bounds(session) == (2, 0)
        session.resize(4)
        assert bounds(session) == (4, 0)
        session.resize(0, 1)
        assert bounds(session) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"pool_size": -1}, ValueError),
        ({"max_overflow": -1}, ValueError),
        ({"pool_size": 0, "max_overflow": 0}, ValueError),
        ({"pool_size": 0}, ValueError),  # there is no overflow
        ({"pool_size": 1.5}, TypeError),
        ({"pool_size": True}, TypeError),
        ({"max_overflow": "1"}, TypeError),
    ],
)
async def test_bounds_that_no_pool_can_have(arguments: dict[str, Any], error: type[Exception]) -> None:
    """They are refused as `Pool` refuses them, and nothing changes."""
    async with open_checked_pool(Workshop().make, pool_size=2, max_overflow=0) as session:
        with pytest.raises(error):
            session.resize(**arguments)
        assert bounds(session) == (2, 0)
        await wait_all_tasks_blocked()
        assert session.statistics().idle == 2


async def test_what_depends_on_the_bounds(autojump_clock: MockClock) -> None:
    """`PoolFull`, `max_waiting` and the state go by the new ones."""
    async with open_checked_pool(
        Workshop().make, pool_size=2, max_overflow=0, max_waiting=0
    ) as session:
        held = [await session.block_checkout(), await session.block_checkout()]
        assert session.statistics().state == "full"
        session.resize(2, 1)
        assert session.statistics().state == "overflow"
        held.append(await session.nonblock_checkout())
        assert session.statistics().state == "full"
        assert session.statistics().overflow == 1
        session.resize(1, 0)
        assert session.statistics().overflow == 2
        for _ in range(2):
            with pytest.raises(whitepool.PoolFull):
                await session.nonblock_checkout()
            with pytest.raises(whitepool.PoolOverloaded):
                await session.block_checkout()
            session.checkin(held.pop())
        session.checkin(held.pop())
        async with session.worker(0):
            assert session.statistics().state == "full"


async def test_a_nonblocking_checkout_does_not_come_to_wait_for_a_client(
    autojump_clock: MockClock,
) -> None:
    """The worker that was being opened for it is given up, and the only other one is in use."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=2) as session:
        shop.before_open = hang
        held = await session.block_checkout()

        async def client() -> None:
            with pytest.raises(whitepool.PoolFull, match="was resized"):
                await session.nonblock_checkout()

        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client)
                await wait_all_tasks_blocked()
                session.resize(1, 1)
                await wait_all_tasks_blocked()
                assert session.statistics().waiting == 1  # there is room for it still
                session.resize(1, 0)
        session.checkin(held)


async def test_a_failure_that_is_forgotten_keeps_no_worker(autojump_clock: MockClock) -> None:
    """The pool has shrunk to what it has, so no start succeeds that would end the failure."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=0) as session:
        resource = await session.block_checkout()
        shop.before_open = raising(OSError("connection refused"))
        session.retire_all()
        session.resize(max_overflow=1)
        await wait_all_tasks_blocked()
        session.resize(max_overflow=0)
        shop.before_open = nothing
        session.checkin(resource)
        await trio.sleep(FAILURE_RESET_AFTER - 0.1)
        assert not shop.tools[0].closed
        await trio.sleep(0.2)
        assert shop.tools[0].closed
        assert session.statistics().idle == 1


async def test_an_early_death_that_is_forgotten_keeps_no_worker(autojump_clock: MockClock) -> None:
    """The pool is smaller since, so that no start follows the deaths, whose success would end them."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=3, max_overflow=0) as session:
        held = [await session.block_checkout() for _ in range(3)]
        session.resize(1, 0)
        session.retire_all()
        for tool in shop.tools[:2]:
            tool.crash.set()
        await wait_all_tasks_blocked()
        for resource in held:
            session.checkin(resource)
        await trio.sleep(FAILURE_RESET_AFTER + 0.1)
        assert shop.tools[2].closed
        assert session.statistics().idle == 1
