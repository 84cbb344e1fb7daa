"""While no worker is alive and none can be started: what the pool says, and how fast."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Tool, Workshop, hang, nothing, open_checked_pool, raising, use

import whitepool

pytestmark = pytest.mark.usefixtures("no_hanging")

Session = whitepool.Session[Tool]
REFUSED = OSError("connection refused")
LONGEST_PAUSE = 0.8
"""Seconds between two attempts, at most."""


class Outage:
    """The server of a shop is away, and all connections to it are lost."""

    def __init__(self, shop: Workshop, session: Session) -> None:
        self.shop = shop
        self.session = session

    def begin(self, error: Exception = REFUSED) -> None:
        self.shop.before_open = raising(error)
        for tool in self.shop.alive:
            tool.crash.set()

    def end(self) -> None:
        self.shop.before_open = nothing


async def ask(session: Session, timeout: float | None = None) -> tuple[str, float]:
    """Be a client; return how it ended, and after how many seconds."""
    began = trio.current_time()
    try:
        await use(session, timeout)
    except whitepool.CheckoutTimeout as error:
        return type(error).__name__, trio.current_time() - began
    return "served", trio.current_time() - began


# -- What the statistics say ---------------------------------------------------------------------------


async def test_the_state(autojump_clock: MockClock) -> None:
    """It is down from the first failed attempt until a worker is alive again."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=2) as session:
        outage = Outage(shop, session)
        assert (session.statistics().state, session.statistics().last_error) == ("ready", None)
        outage.begin()
        await wait_all_tasks_blocked()
        for _ in range(30):
            now = session.statistics()
            assert (now.state, now.last_error) == ("down", "OSError: connection refused")
            await trio.sleep(0.33)
        outage.begin(OSError("another reason"))
        await trio.sleep(1)
        assert session.statistics().last_error == "OSError: another reason"
        outage.end()
        await trio.sleep(LONGEST_PAUSE)
        assert (session.statistics().state, session.statistics().last_error) == ("ready", None)


async def test_a_pool_with_a_worker_is_not_down(autojump_clock: MockClock) -> None:
    """Whoever holds it, and however many starts fail. A task that comes may wait for it."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=2, max_overflow=1) as session:
        async with session.worker() as tool:
            shop.before_open = raising(REFUSED)
            for other in shop.alive:
                if other is not tool:
                    other.crash.set()
            await trio.sleep(100)
            now = session.statistics()
            assert (now.state, now.last_error) == ("overflow", "OSError: connection refused")
            assert await ask(session, 1) == ("CheckoutTimeout", 1)
        async with session.worker(0):
            pass


async def test_a_worker_that_is_being_closed_does_not_count(autojump_clock: MockClock) -> None:
    """It is of no use to a client any more."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1, max_overflow=1, close_timeout=50) as session:
        shop.before_open = raising(REFUSED)
        shop.before_close = hang
        session.destroyed(await session.block_checkout())
        await trio.sleep(10)
        assert session.statistics().state == "down"
        assert (await ask(session, 1))[0] == "PoolUnavailable"


async def test_workers_that_die_at_once_are_no_better(autojump_clock: MockClock) -> None:
    """A server that accepts connections only to drop them: the state says so between two attempts."""
    shop = Workshop()
    states = set()
    async with open_checked_pool(shop.with_nursery, pool_size=1, max_overflow=0) as session:

        async def drop(_: int) -> None:
            for tool in shop.alive:
                tool.crash.set()

        shop.before_open = drop
        for _ in range(200):
            for tool in shop.alive:
                tool.crash.set()
            await wait_all_tasks_blocked()
            states.add(session.statistics().state)
            await trio.sleep(0.05)
        assert "down" in states
        now = session.statistics()
        assert now.last_error is None or "are lost within" in now.last_error


async def test_workers_that_died_early_are_replaced_after_a_pause(autojump_clock: MockClock) -> None:
    """Without a client that asks for one."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1, max_overflow=0) as session:
        for expected in 1, 0:  # the first one may be an accident
            shop.tools[-1].crash.set()
            await wait_all_tasks_blocked()
            assert session.statistics().idle == expected
        await trio.sleep(LONGEST_PAUSE)
        assert session.statistics().idle == 1


@pytest.mark.parametrize("pool_size", [1, 2, 5])
async def test_workers_that_die_before_the_next_is_open_are_not_started_without_a_pause(
    pool_size: int, autojump_clock: MockClock
) -> None:
    """A few starts in a second for each worker that the pool wants."""
    shop = Workshop()
    shop.before_open = lambda _: trio.sleep(0.01)

    async def die() -> None:
        while True:
            await trio.sleep(0.003)
            for tool in shop.alive:
                tool.crash.set()

    async with (
        open_checked_pool(shop.with_nursery, pool_size=pool_size, max_overflow=0),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(die)
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert shop.attempts < 20 * 4 * pool_size


async def test_a_pool_that_shuts_down_says_that(autojump_clock: MockClock) -> None:
    """It is draining, and then closed, whether its server is there or not."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1) as session:
        Outage(shop, session).begin()
        await trio.sleep(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, session, 20)
            await wait_all_tasks_blocked()
            nursery.start_soon(session.safe_shutdown)
            await wait_all_tasks_blocked()
            assert session.statistics().state == "draining"
    assert session.statistics().state == "closed"


# -- What a client gets --------------------------------------------------------------------------------


async def test_a_task_that_comes_late_is_told_so(autojump_clock: MockClock) -> None:
    """The pool has been away for longer than the task would wait, so it gets the reason at once."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=2) as session:
        outage = Outage(shop, session)
        outage.begin()
        await trio.sleep(6)
        for _ in range(100):
            began = trio.current_time()
            with pytest.raises(whitepool.PoolUnavailable, match=r"is down.*refused") as caught:
                await session.block_checkout(5)
            assert caught.value.__cause__ is REFUSED
            assert isinstance(caught.value, whitepool.CheckoutTimeout)
            assert isinstance(caught.value, trio.TooSlowError)
            assert trio.current_time() == began  # the attempts fail at once here
            await trio.sleep(0.07)
        assert session.statistics().timeouts == 100
        outage.end()
        assert await ask(session, 1) in [("PoolUnavailable", 0), ("served", 0)]
        await trio.sleep(LONGEST_PAUSE)
        assert await ask(session, 1) == ("served", 0)


@pytest.mark.parametrize(
    ("away", "timeout", "end"),
    [
        (4.9, 5.0, "CheckoutTimeout"),  # it may be a restart
        (5.1, 5.0, "PoolUnavailable"),
        (5.1, 6.0, "CheckoutTimeout"),
        (0.1, 0.05, "PoolUnavailable"),
        (100.0, 99.0, "PoolUnavailable"),
    ],
)
async def test_the_outage_must_have_lasted_longer_than_its_timeout(
    away: float, timeout: float, end: str, autojump_clock: MockClock
) -> None:
    """Whoever would wait longer than the pool has been down so far keeps its time."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1) as session:
        Outage(shop, session).begin()
        await wait_all_tasks_blocked()
        await trio.sleep(away)
        kind, took = await ask(session, timeout)
        assert kind == end
        if end == "CheckoutTimeout":
            assert took == pytest.approx(timeout)
        else:
            assert took <= LONGEST_PAUSE


async def test_it_is_the_pools_own_timeout_that_counts(autojump_clock: MockClock) -> None:
    """Where a checkout names none."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1, checkout_timeout=2) as session:
        Outage(shop, session).begin()
        await trio.sleep(3)
        assert (await ask(session))[0] == "PoolUnavailable"
        assert (await ask(session, 4))[0] == "CheckoutTimeout"


async def test_those_that_came_before_keep_their_time(autojump_clock: MockClock) -> None:
    """They may be served when the server is back, and no longer than their timeout after it went."""
    shop = Workshop()
    ends: dict[float, tuple[str, float]] = {}
    async with open_checked_pool(shop.with_nursery, pool_size=1, patience=1) as session:
        outage = Outage(shop, session)

        async def client(after: float) -> None:
            await trio.sleep(after)
            ends[after] = await ask(session, 5)

        outage.begin()
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            for after in (0.0, 2.0, 4.0, 4.9):
                nursery.start_soon(client, after)
            await trio.sleep(8)
            outage.end()
        assert ends[0.0] == ("CheckoutTimeout", 5)
        assert ends[2.0] == ("CheckoutTimeout", 5)
        for after in (4.0, 4.9):
            kind, took = ends[after]
            assert kind == "served"
            assert after + took <= 8 + LONGEST_PAUSE


async def test_a_task_without_a_timeout_waits_for_the_server(autojump_clock: MockClock) -> None:
    """However long that takes."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1) as session:
        outage = Outage(shop, session)
        outage.begin()
        await trio.sleep(3600)
        async with trio.open_nursery() as nursery:

            async def patient() -> None:
                kind, took = await ask(session, math.inf)
                assert kind == "served"
                assert 1000 <= took <= 1000 + LONGEST_PAUSE

            nursery.start_soon(patient)
            await trio.sleep(1000)
            outage.end()


async def test_an_outage_begins_when_the_last_worker_goes(autojump_clock: MockClock) -> None:
    """Not when the next attempt fails, if starts have failed before."""
    shop = Workshop()

    async def slowly_refuse(_: int) -> None:
        await trio.sleep(3)
        raise REFUSED

    async with open_checked_pool(shop.with_nursery, pool_size=2, max_overflow=0, patience=1) as session:
        shop.before_open = slowly_refuse
        shop.tools[0].crash.set()
        await trio.sleep(4)  # by now one attempt has failed, and the next is under way
        shop.tools[1].crash.set()
        await trio.sleep(1.5)
        assert (await ask(session, 1.4))[0] == "PoolUnavailable"


async def test_an_attempt_that_is_under_way_is_waited_for(autojump_clock: MockClock) -> None:
    """It may succeed. When it fails, the tasks that came too late for more are told at once."""
    shop = Workshop()

    async def slowly(_: int) -> None:
        await trio.sleep(2)
        if is_away:
            raise REFUSED

    async with open_checked_pool(shop.with_nursery, pool_size=1, max_overflow=0) as session:
        shop.before_open = slowly
        is_away = True
        shop.tools[0].crash.set()
        await trio.sleep(20)
        for _ in range(20):
            kind, took = await ask(session, 4)
            assert kind == "PoolUnavailable"
            assert took <= 2
            assert took == 0 or not session.statistics().starting
            await trio.sleep(0.37)
        while not session.statistics().starting:
            await trio.sleep(0.1)
        is_away = False
        kind, took = await ask(session, 4)
        assert kind == "served"
        assert took <= 2


async def test_an_attempt_that_never_ends_is_no_news(autojump_clock: MockClock) -> None:
    """No task is held for longer than its own timeout, nor refused while the attempt may succeed."""
    shop = Workshop()
    async with open_checked_pool(
        shop.with_nursery, pool_size=1, max_overflow=0, start_timeout=30
    ) as session:
        shop.before_open = hang
        shop.tools[0].crash.set()
        await trio.sleep(20)
        assert await ask(session, 4) == ("CheckoutTimeout", 4)
        await trio.sleep(30)
        assert session.statistics().state == "down"


@pytest.mark.parametrize("options", [{"lazy": True}, {"pool_size": 0, "max_overflow": 2}])
async def test_a_lazy_pool_tries_when_a_task_comes(
    options: dict[str, Any], autojump_clock: MockClock
) -> None:
    """It makes no attempts of its own, so it may have been down for an hour only because none came."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, **options) as session:
        shop.before_open = raising(REFUSED)
        assert (await ask(session, 1)) == ("CheckoutTimeout", 1)
        await trio.sleep(3600)
        before = shop.attempts
        assert session.statistics().state == "down"
        # What was an hour ago says nothing of now: the task keeps its time, and the next one does not.
        assert await ask(session, 5) == ("CheckoutTimeout", 5)
        assert shop.attempts > before + 1
        assert (await ask(session, 1))[0] == "PoolUnavailable"
        # It is back: the task that comes finds out.
        await trio.sleep(3600)
        shop.before_open = nothing
        assert await ask(session, 5) == ("served", 0)
        assert session.statistics().state == "ready"


async def test_a_new_outage_counts_from_its_own_beginning(autojump_clock: MockClock) -> None:
    """What was before the last worker was alive is over."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1, patience=1) as session:
        outage = Outage(shop, session)
        for _ in range(3):
            outage.begin()
            await wait_all_tasks_blocked()
            await trio.sleep(1)
            assert await ask(session, 5) == ("CheckoutTimeout", 5)
            assert (await ask(session, 5))[0] == "PoolUnavailable"
            outage.end()
            await trio.sleep(1)
            assert await ask(session, 5) == ("served", 0)


async def test_nonblock_checkout_hears_of_the_next_attempt(autojump_clock: MockClock) -> None:
    """It has no timeout: it fails with the attempt that was made for it."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1) as session:
        Outage(shop, session).begin()
        await trio.sleep(60)
        began = trio.current_time()
        with pytest.raises(whitepool.PoolStartError, match="refused"):
            await session.nonblock_checkout()
        assert trio.current_time() - began <= LONGEST_PAUSE


async def test_checkout_nowait_is_as_ever(autojump_clock: MockClock) -> None:
    """There is no idle worker, and it does not wait."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1) as session:
        Outage(shop, session).begin()
        await trio.sleep(60)
        with pytest.raises(trio.WouldBlock):
            session.checkout_nowait()


async def test_a_checkout_that_is_refused_can_be_cancelled(autojump_clock: MockClock) -> None:
    """It is a cancellation point, as every checkout is."""
    shop = Workshop()
    async with open_checked_pool(shop.with_nursery, pool_size=1) as session:
        Outage(shop, session).begin()
        await trio.sleep(60)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await session.block_checkout(1)
        assert scope.cancelled_caught
        assert session.statistics().timeouts == 0


async def test_a_stampede_is_refused_in_order(autojump_clock: MockClock) -> None:
    """A thousand tasks that come in the outage leave at the next failed attempt, and none stays."""
    shop = Workshop()

    async def slowly(_: int) -> None:
        await trio.sleep(1)
        raise REFUSED

    kinds: list[str] = []
    async with open_checked_pool(shop.with_nursery, pool_size=2, max_starting=2) as session:
        shop.before_open = slowly
        for tool in shop.alive:
            tool.crash.set()
        await trio.sleep(30)

        async def client(ask: Callable[..., Awaitable[tuple[str, float]]]) -> None:
            kind, took = await ask(session, 5)
            assert took <= 1
            kinds.append(kind)

        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(client, ask)
        assert kinds == ["PoolUnavailable"] * 1000
        assert session.statistics().waiting == 0
