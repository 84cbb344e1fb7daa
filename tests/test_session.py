"""Checking out, checking in, and what may go wrong with it."""

from __future__ import annotations

import gc
import math
import threading
import tracemalloc
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import Mock

import pytest
import trio
import trio.testing
from workshop import Manager, Tool, Workshop, check_books, hang, nothing, raising, use

import whitepool
from whitepool._manager import on_discarded
from whitepool._observing import observed

Session = whitepool.Session[Tool]


@asynccontextmanager
async def pool(shop: Workshop | None = None, **options: Any) -> AsyncIterator[Session]:
    """Open a pool of two, without overflow unless the test wants it; and look at its books."""
    options = {"pool_size": 2, "max_overflow": 0, "shutdown_timeout": 0, **options}
    async with whitepool.open_pool((shop or Workshop()).make, **options) as session:
        yield session
        check_books(session)
    check_books(session)


async def test_checkout_and_checkin() -> None:
    """The resource gives the worker until it is returned."""
    async with pool() as session:
        resource = await session.block_checkout()
        assert isinstance(resource.get(), Tool)
        assert "checked out" in repr(resource)
        assert session.statistics().in_use == 1
        session.checkin(resource)
        assert "returned" in repr(resource)
        assert session.statistics().in_use == 0
        with pytest.raises(whitepool.NotCheckedOut):
            resource.get()


async def test_lifo_keeps_few_warm() -> None:
    """The worker that was in use last goes first."""
    async with pool(strategy="lifo") as session:
        used = set()
        for _ in range(5):
            async with session.worker() as tool:
                used.add(tool)
        assert len(used) == 1


async def test_fifo_spreads_the_use() -> None:
    """The worker that has been idle the longest goes first."""
    async with pool(strategy="fifo") as session:
        used = []
        for _ in range(4):
            async with session.worker() as tool:
                used.append(tool.number)
        assert used[:2] == used[2:]
        assert len(set(used)) == 2


async def test_no_newcomer_overtakes_a_waiter() -> None:
    """Returned workers go to the waiters, in the order in which they came. (Rule 2.)"""
    async with pool(pool_size=1) as session:
        served = []

        async def client(number: int) -> None:
            resource = await session.block_checkout()
            served.append(number)
            await trio.lowlevel.checkpoint()
            session.checkin(resource)

        async with trio.open_nursery() as nursery:
            resource = await session.block_checkout()
            for number in range(20):
                nursery.start_soon(client, number)
                await trio.testing.wait_all_tasks_blocked()
            session.checkin(resource)
            with pytest.raises(trio.WouldBlock):
                session.checkout_nowait()  # no task has run yet, but the worker is a waiter's already
            with pytest.raises(whitepool.PoolFull):
                await session.nonblock_checkout()
        assert served == list(range(20))


async def test_a_new_worker_goes_to_the_longest_waiting() -> None:
    """Not to the task whose arrival had it started. (Rule 2.)"""
    shop = Workshop()
    gate = trio.Event()
    async with pool(shop, pool_size=0, max_overflow=1) as session:

        async def wait_at_the_gate(_: int) -> None:
            await gate.wait()

        shop.before_open = wait_at_the_gate
        served = []

        async def client(number: int) -> None:
            async with session.worker():
                served.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(client, number)
                await trio.testing.wait_all_tasks_blocked()
            gate.set()
        assert served == [0, 1, 2]


async def test_a_timeout_tells_how_the_pool_stood(autojump_clock: trio.testing.MockClock) -> None:
    """After as many seconds as the caller gave, and it is a trio.TooSlowError. (Rule 4.)"""
    async with pool(name="mine") as session:
        resources = [await session.block_checkout(), await session.block_checkout()]
        began = trio.current_time()
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=3)
        assert trio.current_time() - began == pytest.approx(3)
        message = str(caught.value)
        assert "mine" in message
        assert "2 in use, 0 starting, 0 resetting, 1 waiting" in message
        assert caught.value.__cause__ is None
        assert isinstance(caught.value, trio.TooSlowError)
        assert isinstance(caught.value, whitepool.PoolError)
        assert session.statistics().timeouts == 1
        for resource in resources:
            session.checkin(resource)


async def test_a_timeout_tells_why_no_worker_starts(autojump_clock: trio.testing.MockClock) -> None:
    """When workers cannot be started, the cause is the factory's last error. (Rule 4.)"""
    shop = Workshop()
    refusal = OSError("connection refused")
    async with pool(shop, pool_size=0, max_overflow=1) as session:
        shop.before_open = raising(refusal)
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=3)
        assert caught.value.__cause__ is refusal


async def test_the_default_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """Five seconds, as in poolboy."""
    async with pool() as session:
        async with session.worker(), session.worker():
            with pytest.raises(whitepool.CheckoutTimeout):
                await session.block_checkout()
        assert trio.current_time() == pytest.approx(5)


@pytest.mark.parametrize("by", ["block_checkout", "worker"])
async def test_the_timeout_of_the_pool(by: str, autojump_clock: trio.testing.MockClock) -> None:
    """The option `checkout_timeout` holds where a call names no timeout, or None."""

    async def seconds(*timeout: float | None) -> float:
        began = trio.current_time()
        with pytest.raises(whitepool.CheckoutTimeout):
            if by == "worker":
                await session.worker(*timeout).__aenter__()
            else:
                await session.block_checkout(*timeout)
        return trio.current_time() - began

    async with pool(checkout_timeout=2) as session, session.worker(), session.worker():
        assert await seconds() == pytest.approx(2)
        assert await seconds(None) == pytest.approx(2)
        assert await seconds(3) == pytest.approx(3)
        assert await seconds(0) == 0


async def test_a_pool_may_have_no_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """With `math.inf` a checkout waits until it is served."""
    async with pool(pool_size=1, checkout_timeout=math.inf) as session:
        resource = await session.block_checkout()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, session)
            await trio.sleep(1e6)
            assert session.statistics().waiting == 1
            session.checkin(resource)


async def test_the_shortest_timeout_there_is(autojump_clock: trio.testing.MockClock) -> None:
    """One tick of the clock, of which there is no shorter share."""
    async with pool(pool_size=1) as session, session.worker():
        await trio.sleep(1e4)
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(timeout=math.ulp(trio.current_time()))


async def test_many_timeouts(autojump_clock: trio.testing.MockClock) -> None:
    """Every waiter has its own deadline, in whatever order they come; one is served in between."""
    async with pool(pool_size=1) as session:
        resource = await session.block_checkout()
        ended: list[tuple[float, float]] = []

        async def client(timeout: float) -> None:
            with pytest.raises(whitepool.CheckoutTimeout):
                await session.block_checkout(timeout)
            ended.append((timeout, trio.current_time()))

        async with trio.open_nursery() as nursery:
            for timeout in (7, 3, 5, 3, 1, 9):
                nursery.start_soon(client, timeout)
            await trio.testing.wait_all_tasks_blocked()
        assert [timeout for timeout, _ in sorted(ended, key=lambda pair: pair[1])] == [1, 3, 3, 5, 7, 9]
        assert all(now == pytest.approx(timeout) for timeout, now in ended)
        session.checkin(resource)


@pytest.mark.parametrize(
    ("timeout", "error"),
    [(-1, ValueError), (math.nan, ValueError), ("5", TypeError), (True, TypeError)],
)
async def test_a_bad_timeout_is_refused(timeout: Any, error: type[Exception]) -> None:
    """By name, and nothing is lost."""
    async with pool() as session:
        with pytest.raises(error, match="timeout"):
            await session.block_checkout(timeout)
        with pytest.raises(error, match="timeout"):
            async with session.worker(timeout):
                pytest.fail("it must not be entered")
        with pytest.raises(error, match="timeout"):
            await session.safe_shutdown(timeout)
        assert session.statistics().idle == 2
        assert session.statistics().state == "ready"


async def test_nonblock_checkout_starts_overflow_and_never_queues() -> None:
    """It waits for a worker to open, not for one to be returned."""
    shop = Workshop()
    async with pool(shop, pool_size=1, max_overflow=1) as session:
        first = await session.nonblock_checkout()
        second = await session.nonblock_checkout()
        assert session.statistics().state == "full"
        with pytest.raises(whitepool.PoolFull):
            await session.nonblock_checkout()
        session.checkin(first)
        session.checkin(second)


async def test_nonblock_checkout_does_not_wait_for_a_server_that_is_down(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A failed start is its end: PoolStartError, with the factory's error as the cause."""
    shop = Workshop()
    refusal = OSError("connection refused")
    async with pool(shop, pool_size=0, max_overflow=2) as session:

        async def down(_: int) -> None:
            await trio.sleep(0.25)
            raise refusal

        shop.before_open = down
        with pytest.raises(whitepool.PoolStartError, match="connection refused") as caught:
            await session.nonblock_checkout()
        assert caught.value.__cause__ is refusal
        assert trio.current_time() == pytest.approx(0.25)


async def test_nonblock_checkout_waits_for_what_the_pool_itself_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A checkout is not refused where a worker is being reset or replaced, and no client has it."""
    manager = Manager(Workshop())
    manager.before_reset = manager.shop.before_close = lambda _: trio.sleep(1)
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0, max_waiting=0) as session:
        resource = await session.nonblock_checkout()
        with pytest.raises(whitepool.PoolFull):
            await session.nonblock_checkout()
        with pytest.raises(whitepool.PoolOverloaded):
            await session.block_checkout()
        manager.dirty.add(resource.get())
        session.checkin(resource)
        resource = await session.nonblock_checkout()
        assert trio.current_time() == 1
        session.destroyed(resource)
        resource = await session.block_checkout()
        assert trio.current_time() == 2
        session.checkin(resource)


async def test_a_failed_start_refuses_only_the_task_that_waited_for_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Of two that wait for a start each, one is told of a failure, the other gets its worker."""
    shop = Workshop()
    outcomes: list[str] = []

    async def open_one(attempt: int) -> None:
        await trio.sleep(attempt)
        if attempt == 1:
            raise OSError

    shop.before_open = open_one

    async def client() -> None:
        try:
            session.checkin(await session.nonblock_checkout())
            outcomes.append(f"served at {trio.current_time()}")
        except whitepool.PoolStartError:
            outcomes.append(f"refused at {trio.current_time()}")

    async with (
        whitepool.open_pool(shop.make, pool_size=2, lazy=True) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(client)
        nursery.start_soon(client)
    assert outcomes == ["refused at 1.0", "served at 2.0"]


async def test_a_failed_start_refuses_no_task_that_gets_a_worker_from_a_reset(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The first of two waits for the worker that is being reset, and the second for the start."""
    manager = Manager(Workshop())
    manager.before_reset = lambda _: trio.sleep(2)
    outcomes: list[str] = []

    async def open_one(attempt: int) -> None:
        if attempt > 1:
            await trio.sleep(1)
            raise OSError("too many connections")

    manager.shop.before_open = open_one

    async def client() -> None:
        try:
            session.checkin(await session.nonblock_checkout())
            outcomes.append(f"served at {trio.current_time():g}")
        except whitepool.PoolStartError:
            outcomes.append(f"refused at {trio.current_time():g}")

    async with whitepool.open_pool(manager, pool_size=1, max_overflow=1) as session:
        async with session.worker() as tool:
            manager.dirty.add(tool)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            nursery.start_soon(client)
    assert outcomes == ["refused at 1", "served at 2"]


@pytest.mark.parametrize("pool_size", [0, 1])
async def test_max_waiting_counts_the_tasks_that_wait_for_clients(pool_size: int) -> None:
    """Where no task may wait for a client, one may still wait for a new worker within the overflow."""
    async with whitepool.open_pool(
        Workshop().make, pool_size=pool_size, max_overflow=2, lazy=True, max_waiting=0
    ) as session:
        resources = [await session.block_checkout() for _ in range(pool_size + 2)]
        with pytest.raises(whitepool.PoolOverloaded):
            await session.block_checkout()
        for resource in resources:
            session.checkin(resource)


async def test_checkout_nowait() -> None:
    """An idle worker now, or WouldBlock; it starts nothing."""
    shop = Workshop()
    async with pool(shop, pool_size=1, max_overflow=1) as session:
        resource = session.checkout_nowait()
        with pytest.raises(trio.WouldBlock):
            session.checkout_nowait()
        session.checkin(resource)
        assert shop.attempts == 1


async def test_max_waiting(autojump_clock: trio.testing.MockClock) -> None:
    """One task more than may wait gets PoolOverloaded at once, which is a CheckoutTimeout."""
    async with pool(pool_size=1, max_waiting=1) as session:
        resource = await session.block_checkout()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, session)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(whitepool.PoolOverloaded) as caught:
                await session.block_checkout()
            assert isinstance(caught.value, whitepool.CheckoutTimeout)
            assert "1 in use, 0 starting, 0 resetting, 1 waiting" in str(caught.value)
            assert trio.current_time() == 0
            session.checkin(resource)
        assert session.statistics().overloads == 1
        assert session.statistics().timeouts == 0


async def test_an_overload_tells_why_no_worker_starts(autojump_clock: trio.testing.MockClock) -> None:
    """That may be why tasks wait."""
    shop = Workshop()
    refusal = OSError("connection refused")
    async with pool(shop, pool_size=1, max_overflow=1, max_waiting=0) as session:
        shop.before_open = raising(refusal)
        async with session.worker(), trio.open_nursery() as nursery:
            nursery.start_soon(use, session)
            await trio.sleep(1)
            with pytest.raises(whitepool.PoolOverloaded, match="connection refused") as caught:
                await session.block_checkout()
            assert caught.value.__cause__ is refusal
            shop.before_open = nothing


async def test_a_cancelled_waiter_leaves_no_trace() -> None:
    """It is out of the queue, and the next waiter is served. (Rule 3.)"""
    async with pool(pool_size=1) as session:
        resource = await session.block_checkout()
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def cancelled() -> None:
                with scope:
                    await session.block_checkout()

            nursery.start_soon(cancelled)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(use, session)
            await trio.testing.wait_all_tasks_blocked()
            assert session.statistics().waiting == 2
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert scope.cancelled_caught
            assert session.statistics().waiting == 1
            session.checkin(resource)
        assert session.statistics().idle == 1


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_cancelled_in_the_moment_of_being_served(cancel_first: bool) -> None:
    """Either the caller has the resource, or the pool has the worker. (Rule 3.)"""
    async with pool(pool_size=1) as session:
        resource = await session.block_checkout()
        scope = trio.CancelScope()
        got: list[whitepool.Resource[Tool]] = []

        async def client() -> None:
            with scope:
                got.append(await session.block_checkout())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            await trio.testing.wait_all_tasks_blocked()
            if cancel_first:
                scope.cancel()
                session.checkin(resource)
            else:
                session.checkin(resource)
                scope.cancel()
        now = session.statistics()
        if got:
            assert (now.in_use, now.idle) == (1, 0)
            session.checkin(got[0])
        else:
            assert scope.cancelled_caught
            assert (now.in_use, now.idle) == (0, 1)


async def test_a_checkout_in_a_cancelled_scope_takes_nothing() -> None:
    """Not even an idle worker; and the cancellation is not swallowed. (Rule 3.)"""
    async with pool() as session:
        for checkout in (session.block_checkout, session.nonblock_checkout):
            with trio.CancelScope() as scope:
                scope.cancel()
                await checkout()
            assert scope.cancelled_caught
            assert session.statistics().idle == 2
        assert session.statistics().checkouts == 0


@pytest.mark.parametrize("refused", ["not at all", "overloaded", "closed", "down"])
async def test_a_cancelled_checkout_is_not_refused(
    refused: str, autojump_clock: trio.testing.MockClock
) -> None:
    """A task that is cancelled is not told why it would get no worker. (Rule 3.)"""
    shop = Workshop()
    max_waiting = 0 if refused == "overloaded" else math.inf
    async with pool(shop, pool_size=1, max_waiting=max_waiting) as session:
        resource = await session.block_checkout()
        if refused == "closed":
            await session.safe_shutdown(timeout=0)
        elif refused == "down":
            shop.before_open = raising(OSError("no more tools"))
            session.destroyed(resource)
            await trio.sleep(9)
        with trio.CancelScope() as scope:
            scope.cancel()
            await session.block_checkout(1)
        assert scope.cancelled_caught
        now = session.statistics()
        assert now.checkouts == 1
        assert now.waiting == now.waited == now.overloads == now.timeouts == 0


async def test_every_checkout_is_a_checkpoint() -> None:
    """Also one that fails; but those that find an idle worker let others run only now and then."""
    async with pool(pool_size=1) as session:
        resource = await session.block_checkout()
        with trio.testing.assert_checkpoints(), pytest.raises(whitepool.PoolFull):
            await session.nonblock_checkout()
        session.checkin(resource)
        for checkout in (session.nonblock_checkout, session.block_checkout):
            session._time_slice.ends = math.inf
            with pytest.raises(AssertionError), trio.testing.assert_checkpoints():
                session.checkin(await checkout())
            session._time_slice.ends = 0
            with trio.testing.assert_checkpoints():
                session.checkin(await checkout())
            assert trio.current_time() < session._time_slice.ends < trio.current_time() + 0.0011


async def test_tasks_that_take_turns_are_not_held_up() -> None:
    """A task that was woken since the last checkout lets none go first, however long others took."""
    async with pool(pool_size=1) as session, trio.open_nursery() as nursery:

        async def check_out() -> None:
            with pytest.raises(AssertionError), trio.testing.assert_checkpoints():
                session.checkin(await session.block_checkout())

        session._time_slice.ends = 0
        for _ in range(3):
            nursery.start_soon(check_out)
            await trio.testing.wait_all_tasks_blocked()
            await check_out()
        with trio.testing.assert_checkpoints():
            session.checkin(await session.block_checkout())


async def test_by_a_clock_that_stands_still(mock_clock: trio.testing.MockClock) -> None:
    """Every checkout lets others run: a slice of time would never end."""
    async with pool(pool_size=1) as session:
        for _ in range(3):
            with trio.testing.assert_checkpoints():
                session.checkin(await session.block_checkout())


async def test_no_task_keeps_the_loop_to_itself() -> None:
    """Tasks that always find an idle worker, and do nothing with it, let others run all the same."""
    async with pool(pool_size=2) as session, trio.open_nursery() as nursery:
        turns = 0

        async def greedy() -> None:
            for _ in range(1_000_000):
                async with session.worker():
                    if turns == 10:
                        return
            pytest.fail("no other task could run")

        nursery.start_soon(greedy)
        nursery.start_soon(greedy)
        while turns < 10:
            await trio.lowlevel.checkpoint()
            turns += 1


async def test_a_returned_resource_cannot_be_returned_again() -> None:
    """Whichever way it was returned; and the pool is not harmed. (Rule 9.)"""
    async with pool() as session:
        for give_back in (session.checkin, session.destroyed):
            resource = await session.block_checkout()
            give_back(resource)
            for again in (session.checkin, session.destroyed):
                with pytest.raises(whitepool.NotCheckedOut):
                    again(resource)
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().idle == 2


async def test_a_resource_of_another_pool_is_refused() -> None:
    """And stays good in its own. (Rule 9.)"""
    async with pool(name="one") as one, pool(name="other") as other:
        resource = await one.block_checkout()
        with pytest.raises(whitepool.NotCheckedOut, match="of one, not of other"):
            other.checkin(resource)
        with pytest.raises(whitepool.NotCheckedOut):
            other.destroyed(resource)
        assert resource.get()
        one.checkin(resource)
        assert one.statistics().idle == other.statistics().idle == 2


async def test_a_destroyed_worker_is_closed_and_replaced() -> None:
    """And counted."""
    shop = Workshop()
    async with pool(shop) as session:
        resource = await session.block_checkout()
        tool = resource.get()
        session.destroyed(resource)
        await trio.testing.wait_all_tasks_blocked()
        assert tool.closed
        assert session.statistics().destroyed == 1
        assert session.statistics().idle == 2


@pytest.mark.parametrize("error", [None, ValueError("mine"), KeyboardInterrupt()])
async def test_the_context_manager_returns_the_worker(error: BaseException | None) -> None:
    """Whatever happens."""
    async with pool() as session:
        try:
            async with session.worker() as tool:
                assert isinstance(tool, Tool)
                assert session.statistics().in_use == 1
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt) as caught:
            assert caught is error
        assert session.statistics().idle == 2


async def test_a_dirty_worker_is_reset_after_checkin_has_returned() -> None:
    """In its own task, and no client gets it before. (Rule 7.)"""
    shop = Workshop()
    manager = Manager(shop)
    gate = trio.Event()
    manager.before_reset = lambda _: gate.wait()
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0) as session:
        resource = await session.block_checkout()
        tool = resource.get()
        manager.dirty.add(tool)
        session.checkin(resource)
        assert session.statistics().resetting == 1
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(timeout=0)
        gate.set()
        async with session.worker() as again:
            assert again is tool
        assert manager.resets == 1


@pytest.mark.parametrize("how", ["raises", "hangs"])
async def test_a_worker_that_cannot_be_reset_is_destroyed(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Whether its reset fails or takes longer than `reset_timeout`. (Rule 7.)"""
    shop = Workshop()
    manager = Manager(shop)

    async def reset(_: Tool) -> None:
        if how == "raises":
            raise OSError("connection lost")
        await trio.sleep_forever()

    manager.before_reset = reset
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0, reset_timeout=2) as session:
        async with session.worker() as tool:
            manager.dirty.add(tool)
        async with session.worker(timeout=10) as other:
            assert other is not tool
        assert tool.closed
        assert session.statistics().destroyed == 1
        assert trio.current_time() == pytest.approx(0 if how == "raises" else 2)


async def test_writes_that_a_reset_has_discarded_are_counted() -> None:
    """Each reset that tells of some."""
    manager = Manager(Workshop())

    async def roll_back(_: Tool) -> None:
        on_discarded.get()()

    manager.before_reset = roll_back
    async with whitepool.open_pool(manager, pool_size=1) as session:
        for discarded in 0, 1, 2:
            assert session.statistics().discarded == discarded
            async with session.worker() as tool:
                manager.dirty.add(tool)
            await trio.testing.wait_all_tasks_blocked()


async def test_a_worker_that_is_dead_at_checkin_is_discarded() -> None:
    """And counted as lost. (Rule 6.)"""
    shop = Workshop()
    manager = Manager(shop)
    async with whitepool.open_pool(manager, pool_size=1) as session:
        async with session.worker() as tool:
            manager.dead.add(tool)
        await trio.testing.wait_all_tasks_blocked()
        assert tool.closed
        now = session.statistics()
        assert (now.lost, now.idle, now.started) == (1, 1, 2)


@pytest.mark.parametrize("question", ["is_alive", "needs_reset"])
async def test_a_manager_that_raises_costs_the_worker_only(question: str) -> None:
    """Checkin raises nothing for a resource in good standing, and the pool is whole again."""
    shop = Workshop()
    manager = Manager(shop)

    class Broken(Manager):
        pass

    def fail(self: Manager, worker: Tool) -> bool:
        raise RuntimeError("a bug")

    setattr(Broken, question, fail)
    manager = Broken(shop)
    async with whitepool.open_pool(manager, pool_size=1) as session:
        async with session.worker() as tool:
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert tool.closed
        assert session.statistics().idle == 1
        check_books(session)


async def test_a_forgotten_resource_is_reclaimed() -> None:
    """Its worker is destroyed and replaced, with a warning, as soon as it is collected. (Rule 8.)"""
    async with pool(pool_size=1) as session:
        with pytest.warns(ResourceWarning):
            tool = (await session.block_checkout()).get()
            gc.collect()
        await trio.testing.wait_all_tasks_blocked()
        assert tool.closed
        now = session.statistics()
        assert (now.leaked, now.idle, now.in_use) == (1, 1, 0)


async def test_a_forgotten_resource_is_warned_about() -> None:
    """A ResourceWarning names the pool. (Rule 8.)"""
    async with pool(name="mine") as session:
        with pytest.warns(ResourceWarning, match=r"mine.*never returned"):
            await session.block_checkout()
            gc.collect()


async def test_a_forgotten_resource_serves_a_waiter() -> None:
    """A task that waits does so no longer than until the leak is noticed. (Rule 8.)"""
    async with pool(pool_size=1) as session:
        forgotten: list[Any] = [await session.block_checkout()]
        async with trio.open_nursery() as nursery:

            async def client() -> None:
                with trio.fail_after(10):
                    async with session.worker(timeout=math.inf):
                        pass

            nursery.start_soon(client)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.warns(ResourceWarning):
                forgotten.clear()
                gc.collect()


async def test_the_garbage_collector_may_run_in_a_thread() -> None:
    """The pool's own thread does the rest. (Rule 8.)"""
    async with pool(pool_size=1) as session:
        forgotten: list[Any] = [await session.block_checkout()]

        def collect() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                forgotten.clear()
                gc.collect()

        await trio.to_thread.run_sync(collect)
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().leaked == 1


async def test_tracing_tells_where_the_resource_was_checked_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With tracemalloc on, the log names file and line of the client. (Rule 8.)"""
    tracemalloc.start(10)
    try:
        async with pool(pool_size=1) as session:
            with pytest.warns(ResourceWarning):
                await session.block_checkout()
                gc.collect()
            await trio.testing.wait_all_tasks_blocked()
    finally:
        tracemalloc.stop()
    (record,) = [r for r in caplog.records if r.message.startswith("worker_leaked")]
    assert f"{__file__}:" in record.message


@pytest.mark.parametrize("what", ["clean", "dead", "closed by the pool"])
async def test_it_is_not_asked_in_vain_where_a_resource_was_checked_out(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A return costs nothing for it, unless a reset follows that may have something to tell."""
    asked = Mock()
    monkeypatch.setattr(tracemalloc, "get_object_traceback", asked)
    manager = Manager(Workshop())
    async with whitepool.open_pool(manager, pool_size=1, shutdown_timeout=0) as session:
        resource = await session.block_checkout()
        if what == "dead":
            manager.dead.add(resource.get())
        elif what == "closed by the pool":
            await session.safe_shutdown(timeout=0)
        session.checkin(resource)
    asked.assert_not_called()


async def test_a_worker_that_is_closed_meanwhile_has_not_leaked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The garbage collector has found its resource, and the pool closes it before it hears of that."""
    async with pool(pool_size=1) as session:
        with pytest.warns(ResourceWarning):
            await session.block_checkout()
            gc.collect()
        session._supervisor.close_now()
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().state == "closed"
    assert session.statistics().leaked == 0
    assert not caplog.records


async def test_a_resource_that_outlives_the_pool_is_no_leak() -> None:
    """The pool has closed its worker, so there is nothing to warn about. (Rule 8.)"""
    async with pool() as session:
        resource = await session.block_checkout()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del resource
        gc.collect()
    assert session.statistics().leaked == 0


async def test_a_forgotten_resource_of_a_run_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Trio has ended, no task could reclaim its worker: there is no warning. (Rule 8.)"""
    async with pool() as session:
        forgotten = [await session.block_checkout()]
        run_sync_soon = Mock(side_effect=trio.RunFinishedError)
        monkeypatch.setattr(session, "_trio_token", Mock(run_sync_soon=run_sync_soon))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            forgotten.clear()
            gc.collect()
        run_sync_soon.assert_called_once()


def test_a_resource_that_outlives_the_run_is_no_trouble() -> None:
    """Collected after Trio has ended, in no Trio at all. (Rule 8.)"""
    kept: list[Any] = []

    async def main() -> None:
        async with pool(shutdown_timeout=0) as session:
            kept.append(await session.block_checkout())

    trio.run(main)
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()


async def test_shutdown_refuses_new_checkouts_and_serves_the_waiters() -> None:
    """And returns when everything is closed. (Rule 10.)"""
    shop = Workshop()
    async with pool(shop, pool_size=1) as session:
        resource = await session.block_checkout()
        served = []

        async def client(number: int) -> None:
            async with session.worker(timeout=math.inf):
                served.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(client, number)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(session.safe_shutdown)
            await trio.testing.wait_all_tasks_blocked()
            assert session.statistics().state == "draining"
            for checkout in (session.block_checkout, session.nonblock_checkout):
                with pytest.raises(whitepool.PoolClosed):
                    await checkout()
            with pytest.raises(whitepool.PoolClosed):
                session.checkout_nowait()
            session.checkin(resource)
        assert served == [0, 1, 2]
        assert session.statistics().state == "closed"
        assert not shop.alive


async def test_shutdown_replaces_a_worker_that_a_waiter_still_needs() -> None:
    """A worker that dies while the pool drains is no reason not to serve the waiters. (Rule 10.)"""
    async with pool(pool_size=1) as session:
        resource = await session.block_checkout()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, session)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(session.safe_shutdown)
            await trio.testing.wait_all_tasks_blocked()
            session.destroyed(resource)
        assert session.statistics().started == 2


async def test_shutdown_lets_starts_finish_that_tasks_wait_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """They are not given up and begun again, which would take longer. (Rule 10.)"""
    shop = Workshop()
    async with pool(shop, pool_size=0, max_overflow=2) as session:
        shop.before_open = lambda _: trio.sleep(2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, session)
            nursery.start_soon(use, session)
            await trio.sleep(1)
            nursery.start_soon(session.safe_shutdown)
        assert trio.current_time() == 2
        assert shop.attempts == session.statistics().checkouts == 2


async def test_shutdown_closes_what_clients_hold_when_its_time_is_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """And the tasks that still wait get PoolClosed. (Rule 10.)"""
    shop = Workshop()
    async with pool(shop, pool_size=1) as session:
        resource = await session.block_checkout()
        async with trio.open_nursery() as nursery:

            async def client() -> None:
                with pytest.raises(whitepool.PoolClosed):
                    await session.block_checkout(timeout=math.inf)

            nursery.start_soon(client)
            await trio.testing.wait_all_tasks_blocked()
            await session.safe_shutdown(timeout=4)
            assert trio.current_time() == pytest.approx(4)
            assert not shop.alive
        session.checkin(resource)
        assert session.statistics().idle == 0
        await session.safe_shutdown()  # it is idempotent


async def test_a_worker_that_was_closed_under_its_client_is_not_asked() -> None:
    """When it comes back late: not whether it is alive, nor whether it has to be reset. (Rule 10.)"""
    asked: list[str] = []

    class Asked(Manager):
        def is_alive(self, worker: Tool) -> bool:
            asked.append("is_alive")
            return True

        def needs_reset(self, worker: Tool) -> bool:
            asked.append("needs_reset")
            return True

    async with whitepool.open_pool(Asked(Workshop()), pool_size=1) as session:
        resource = await session.block_checkout()
        await session.safe_shutdown(timeout=0)
        asked.clear()
        session.checkin(resource)
        assert asked == []
        assert session.statistics().retired == 1


async def test_two_shutdowns_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Both return when everything is closed, and the shorter timeout counts. (Rule 10.)"""
    async with pool(pool_size=1) as session:
        resource = await session.block_checkout()
        ended = []

        async def shut_down(timeout: float) -> None:
            await session.safe_shutdown(timeout)
            ended.append((timeout, trio.current_time()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(shut_down, 10)
            nursery.start_soon(shut_down, 2)
        assert {time for _, time in ended} == {2}
        del resource


async def test_a_cancelled_shutdown_goes_on_draining() -> None:
    """The pool refuses new checkouts, and closes when the last worker is back. (Rule 10.)"""
    async with pool(pool_size=1) as session:
        resource = await session.block_checkout()
        with trio.move_on_after(0.01) as scope:
            await session.safe_shutdown()
        assert scope.cancelled_caught
        assert session.statistics().state == "draining"
        session.checkin(resource)
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().state == "closed"


async def test_shutdown_gives_up_what_is_being_started() -> None:
    """A worker that no task waits for any more need not be opened first. (Rule 10.)"""
    shop = Workshop()
    async with pool(shop, pool_size=1) as session:
        shop.before_open = hang
        resource = await session.block_checkout()
        session.destroyed(resource)
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().starting == 1
        await session.safe_shutdown()
        assert session.statistics().starting == 0
        assert session.statistics().start_failures == 0


@pytest.mark.parametrize("how", ["times out", "is cancelled"])
async def test_shutdown_notices_that_the_last_waiter_has_given_up(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Where no worker can be started for it, nothing else would wake the pool. (Rule 10.)"""
    shop = Workshop()

    async with whitepool.open_pool(
        shop.make, pool_size=0, max_overflow=1, shutdown_timeout=math.inf
    ) as session:
        shop.before_open = raising(OSError("connection refused"))
        async with trio.open_nursery() as nursery:

            async def client() -> None:
                with trio.move_on_after(3), suppress(whitepool.CheckoutTimeout):
                    await session.block_checkout(timeout=3 if how == "times out" else math.inf)

            nursery.start_soon(client)
            await trio.testing.wait_all_tasks_blocked()
            await session.safe_shutdown()
        assert trio.current_time() == pytest.approx(3)


async def test_repr_tells_how_the_pool_stands() -> None:
    """For a person at a prompt."""
    async with pool(name="mine") as session:
        assert repr(session) == "<whitepool.Session of mine: ready, 0 in use>"
        assert session.name == "mine"


async def test_the_longest_wait(autojump_clock: trio.testing.MockClock) -> None:
    """The statistics tell since when the first task waits, whatever its timeout."""
    async with pool(pool_size=1) as session, trio.open_nursery() as nursery:
        assert session.statistics().longest_wait == 0
        held = await session.block_checkout()
        assert session.statistics().longest_wait == 0
        nursery.start_soon(use, session, math.inf)
        await trio.sleep(2)
        nursery.start_soon(use, session, 10)
        await trio.sleep(1)
        assert session.statistics().longest_wait == pytest.approx(3)
        session.checkin(held)
        assert session.statistics().longest_wait == pytest.approx(1)


async def test_the_longest_use(autojump_clock: trio.testing.MockClock) -> None:
    """For how long the client has its worker that has had one the longest; 0 where none has."""
    async with pool(pool_size=2) as session:
        await trio.sleep(5)
        assert session.statistics().longest_use == 0
        first = await session.block_checkout()
        await trio.sleep(2)
        second = await session.block_checkout()
        await trio.sleep(1)
        assert session.statistics().longest_use == pytest.approx(3)
        session.checkin(first)
        assert session.statistics().longest_use == pytest.approx(1)
        session.checkin(second)
        assert session.statistics().longest_use == 0


async def test_what_a_worker_was_used_for_counts_from_its_own_checkout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Also where it only changes hands."""
    async with pool(pool_size=1) as session, trio.open_nursery() as nursery:
        held = await session.block_checkout()

        async def hold() -> None:
            async with session.worker():
                await trio.sleep(4)

        nursery.start_soon(hold)
        await trio.sleep(3)
        session.checkin(held)
        await trio.sleep(1)
        assert session.statistics().longest_use == pytest.approx(1)


async def test_what_was_waited_in_all(autojump_clock: trio.testing.MockClock) -> None:
    """How many checkouts had to wait, and for how many seconds. Those that got nothing don't count."""
    async with pool(pool_size=1) as session:
        await use(session)
        assert (session.statistics().waited, session.statistics().wait_time) == (0, 0)
        held = await session.block_checkout()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, session, math.inf)
            await trio.sleep(2)
            nursery.start_soon(use, session, 10)
            with pytest.raises(whitepool.CheckoutTimeout):
                await session.block_checkout(0.5)
            await trio.sleep(0.5)
            assert session.statistics().waited == 0
            session.checkin(held)
        now = session.statistics()
        assert now.waited == 2
        assert now.wait_time == pytest.approx(3 + 1)
        assert now.checkouts == 4


async def test_a_checkout_that_starts_a_worker_waits(autojump_clock: trio.testing.MockClock) -> None:
    """For that start."""
    shop = Workshop()
    shop.before_open = lambda _: trio.sleep(1)
    async with pool(shop, lazy=True) as session:
        await use(session)
        session.checkin(await session.nonblock_checkout())
        assert (session.statistics().waited, session.statistics().wait_time) == (1, 1)


async def test_the_last_error(autojump_clock: trio.testing.MockClock) -> None:
    """Why no worker starts, while that is so."""
    shop = Workshop()
    async with pool(shop, max_overflow=1) as session:
        assert session.statistics().last_error is None
        shop.before_open = raising(OSError("connection refused"))
        async with session.worker(), session.worker():
            with pytest.raises(whitepool.CheckoutTimeout):
                await session.block_checkout(1)
        assert session.statistics().last_error == "OSError: connection refused"
        shop.before_open = nothing
        async with session.worker(), session.worker(), session.worker():
            assert session.statistics().last_error is None


# -- Observers -----------------------------------------------------------------------------------------


class Notes:
    """An observer that writes down what it hears."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def on_wait(self, waited: float, error: BaseException | None) -> None:
        self.lines.append(("waited", waited, type(error)))

    def on_checkout(self, waited: float) -> None:
        self.lines.append(("checked out", waited))

    def on_return(self, used: float) -> None:
        self.lines.append(("returned", used))


async def test_an_observer_hears_of_each_wait(autojump_clock: trio.testing.MockClock) -> None:
    """Whatever becomes of it; and of each checkout, whether it had to wait or not."""
    notes = Notes()
    await trio.sleep(5)
    async with pool(pool_size=1) as session:
        watched = observed(session, notes)
        assert isinstance(watched, whitepool.Session)
        async with watched.worker():
            await trio.sleep(4)
        assert notes.lines == [("checked out", 0), ("returned", 4)]
        notes.lines.clear()
        held = await session.block_checkout()  # of this one, it hears nothing
        async with trio.open_nursery() as nursery:

            async def client() -> None:
                async with watched.worker():
                    await trio.sleep(3)

            with pytest.raises(whitepool.CheckoutTimeout):
                await watched.block_checkout(0.5)
            with trio.move_on_after(0.25):
                await watched.block_checkout()
            nursery.start_soon(client)
            await trio.sleep(2)
            watched.checkin(held)
        assert notes.lines == [
            ("waited", 0.5, whitepool.CheckoutTimeout),
            ("waited", 0.25, trio.Cancelled),
            ("waited", 2, type(None)),
            ("checked out", 2),
            ("returned", 3),
        ]


async def test_an_observer_of_an_observed_session(autojump_clock: trio.testing.MockClock) -> None:
    """It takes the place of the first one, and the session is of the same kind."""
    first, second = Notes(), Notes()
    async with pool(pool_size=1) as session:
        watched = observed(session, first)
        again = observed(watched, second)
        assert type(again) is type(watched)
        async with again.worker():
            pass
    assert (first.lines, second.lines) == ([], [("checked out", 0), ("returned", 0)])
