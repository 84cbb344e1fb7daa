"""Workers are started within bounds, replaced when they die, and retired when they are too many."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from workshop import Manager, Tool, Workshop, check_books, hang, nothing, raising, use

import whitepool

Session = whitepool.Session[Tool]


async def hold(session: Session, seconds: float, done: list[float] | None = None) -> None:
    async with session.worker(timeout=math.inf):
        await trio.sleep(seconds)
    if done is not None:
        done.append(trio.current_time())


async def test_the_bounds_hold(autojump_clock: trio.testing.MockClock) -> None:
    """Workers alive, starting or closing never exceed pool_size + max_overflow. (Rule 1.)"""
    shop = Workshop()

    async def slowly(_: Any) -> None:
        await trio.sleep(0.5)

    shop.before_open = shop.before_close = slowly
    async with whitepool.open_pool(shop.make, pool_size=3, max_overflow=4, overflow_ttl=0) as session:

        async def client(number: int) -> None:
            for turn in range(10):
                resource = await session.block_checkout(timeout=math.inf)
                check_books(session)
                await trio.sleep(0.1 * ((number + turn) % 4))
                (session.destroyed if (number + turn) % 3 == 0 else session.checkin)(resource)
                check_books(session)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(client, number)
        assert shop.most_alive == 7
        await trio.sleep(60)
        assert session.statistics().idle == 3


async def test_overflow_lingers_and_is_retired(autojump_clock: trio.testing.MockClock) -> None:
    """An overflow worker that no client needs is retired after `overflow_ttl`."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=2, overflow_ttl=10) as session:
        async with session.worker(), session.worker(), session.worker():
            assert session.statistics().overflow == 2
            assert session.statistics().state == "full"
        await trio.sleep(9.9)
        assert session.statistics().idle == 3
        await trio.sleep(0.2)
        now = session.statistics()
        assert (now.idle, now.overflow, now.retired) == (1, 0, 2)


async def test_overflow_in_use_stays(autojump_clock: trio.testing.MockClock) -> None:
    """The ttl counts from the last use."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=0, max_overflow=1, overflow_ttl=10) as session:
        for _ in range(5):
            async with session.worker():
                await trio.sleep(20)
            await trio.sleep(9)
        assert shop.attempts == 1


async def test_overflow_that_leaves_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """With `overflow_ttl=0` it is retired when it is returned, as in poolboy."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=1, overflow_ttl=0) as session:
        async with session.worker(), session.worker():
            pass
        now = session.statistics()
        assert (now.idle, now.retired) == (1, 1)


async def test_overflow_that_never_leaves(autojump_clock: trio.testing.MockClock) -> None:
    """With `overflow_ttl=inf` it stays."""
    async with whitepool.open_pool(
        Workshop().make, pool_size=0, max_overflow=1, overflow_ttl=math.inf
    ) as session:
        async with session.worker():
            pass
        await trio.sleep(10_000)
        assert session.statistics().idle == 1


async def test_a_hanging_start_blocks_no_waiter(autojump_clock: trio.testing.MockClock) -> None:
    """A waiter is served by a returned worker while another is still being opened. (Rule 5.)"""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=1) as session:
        shop.before_open = hang
        done: list[float] = []
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(hold, session, 1, done)
        assert done == pytest.approx([1, 2, 3])


async def test_a_start_that_hangs_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    """After `start_timeout`, and tried again. (Rule 5.)"""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=0, max_overflow=1, start_timeout=3) as session:

        async def hang_once(attempt: int) -> None:
            if attempt == 1:
                await trio.sleep_forever()

        shop.before_open = hang_once
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=2)
        assert caught.value.__cause__ is None  # it has not failed yet
        async with session.worker(timeout=10):
            pass
        assert session.statistics().start_failures == 1
        assert 3 <= trio.current_time() < 3.1


async def test_a_start_that_hears_of_nothing_has_no_more_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One that was not open within `start_timeout` has failed, even if it opens later. (Rule 5.)"""
    shop = Workshop()

    async def deafly(attempt: int) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(5 if attempt == 1 else 0)

    shop.before_open = deafly
    async with whitepool.open_pool(
        shop.make, pool_size=1, max_overflow=0, lazy=True, start_timeout=3
    ) as session:
        async with session.worker(timeout=10) as tool:
            assert tool.number == 2
        assert shop.tools[0].closed
        now = session.statistics()
        assert (now.started, now.start_failures, now.lost) == (1, 1, 0)


async def test_a_server_that_is_down_is_not_hammered(autojump_clock: trio.testing.MockClock) -> None:
    """One start at a time, with pauses; and the pool survives. (Rule 5.)"""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=5, max_overflow=5) as session:
        up = False

        async def down(_: int) -> None:
            await trio.sleep(0.001)
            if not up:
                raise OSError("connection refused")

        shop.before_open = down
        for resource in [await session.block_checkout() for _ in range(5)]:
            session.destroyed(resource)
        await trio.sleep(1)
        shop.attempts = shop.most_opening = 0
        await trio.sleep(59)
        # The pauses are drawn from between 0 and 0.8 s: 150 attempts are expected.
        assert 100 < shop.attempts < 200
        assert shop.most_opening == 1
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout()
        assert isinstance(caught.value.__cause__, OSError)
        up = True
        await trio.sleep(1)
        assert session.statistics().idle == 5
        assert shop.most_opening == 4  # once one succeeded, all followed


async def test_a_worker_that_crashes_while_idle_is_replaced() -> None:
    """Before a client is given it. (Rule 6.)"""
    shop = Workshop()
    async with whitepool.open_pool(shop.with_nursery, pool_size=2, max_overflow=0) as session:
        first = shop.tools[0]
        first.crash.set()
        await trio.testing.wait_all_tasks_blocked()
        now = session.statistics()
        assert (now.idle, now.lost, now.started) == (2, 1, 3)
        assert first.closed
        async with session.worker() as one, session.worker() as other:
            assert first not in (one, other)


async def test_a_worker_that_crashes_while_it_is_out_is_replaced() -> None:
    """At once; its client may still return it. (Rule 6.)"""
    shop = Workshop()
    async with whitepool.open_pool(shop.with_nursery, pool_size=1, max_overflow=0) as session:
        resource = await session.block_checkout()
        resource.get().crash.set()
        await trio.testing.wait_all_tasks_blocked()
        now = session.statistics()
        assert (now.idle, now.in_use, now.lost) == (1, 0, 1)
        session.checkin(resource)
        check_books(session)
        assert session.statistics().lost == 1


async def test_a_crash_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    """For the person on call."""
    shop = Workshop()
    async with whitepool.open_pool(shop.with_nursery, pool_size=1, name="mine"):
        shop.tools[0].crash.set()
        await trio.testing.wait_all_tasks_blocked()
    (record,) = caplog.records
    assert record.name == "whitepool"
    assert record.message.startswith("worker_lost pool=mine reason=crashed")


class Fragile(Manager):
    """Makes workers that end when the scope around them is cancelled."""

    def __init__(self, shop: Workshop) -> None:
        super().__init__(shop)
        self.scopes: list[trio.CancelScope] = []

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[Tool]:
        async with trio.open_nursery() as nursery, super().lifespan() as tool:
            self.scopes.append(nursery.cancel_scope)
            yield tool


async def test_a_worker_that_ends_by_itself_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    """Although there is no error to tell."""
    shop = Workshop()
    manager = Fragile(shop)
    async with whitepool.open_pool(manager, pool_size=1, name="mine") as session:
        await trio.testing.wait_all_tasks_blocked()
        manager.scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().idle == session.statistics().lost == 1
    (record,) = caplog.records
    assert record.message == ("worker_lost pool=mine reason=crashed error=its lifespan ended by itself")


async def test_a_worker_that_has_left_is_freed_at_once() -> None:
    """It does not wait for the garbage collector."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1) as session:
        await trio.testing.wait_all_tasks_blocked()
        (tool,) = (weakref.ref(tool) for tool in shop.tools)
        shop.tools.clear()
        gc.disable()
        try:
            session.destroyed(await session.block_checkout())
            await trio.testing.wait_all_tasks_blocked()
            assert tool() is None
        finally:
            gc.enable()


async def test_a_worker_with_a_nursery_lives_and_leaves_in_one_task() -> None:
    """Its context manager is entered and left in the worker task."""
    tasks = []

    class Noting:
        async def __aenter__(self) -> int:
            tasks.append(trio.lowlevel.current_task())
            return 7

        async def __aexit__(self, *_: object) -> None:
            tasks.append(trio.lowlevel.current_task())

    async with whitepool.open_pool(Noting, pool_size=1) as session, session.worker():
        tasks.append(trio.lowlevel.current_task())
    entered, client, left = tasks
    assert entered is left
    assert entered is not client


async def test_a_worker_that_hangs_in_closing_is_abandoned(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """After `close_timeout`; it is logged, and its place is taken by another."""
    shop = Workshop()
    shop.before_close = lambda _: trio.sleep(1000)
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=0, close_timeout=2) as session:
        session.destroyed(await session.block_checkout())
        async with session.worker():
            assert trio.current_time() == pytest.approx(2)
        shop.before_close = nothing
    assert any(record.message.startswith("close_failed") for record in caplog.records)


async def test_a_lifespan_that_hangs_at_its_end_is_abandoned(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """As a worker that hangs in closing, and the log says so."""

    class Hanging(Manager):
        @asynccontextmanager
        async def lifespan(self) -> AsyncIterator[Tool]:
            async with super().lifespan() as tool:
                yield tool
            if tool.number == 1:
                await trio.sleep_forever()

    async with whitepool.open_pool(
        Hanging(Workshop()), pool_size=1, max_overflow=0, close_timeout=2, name="mine"
    ) as session:
        session.destroyed(await session.block_checkout())
        async with session.worker():
            assert trio.current_time() == 2
    (record,) = caplog.records
    assert record.message == "close_failed pool=mine error=TooSlowError: not closed within 2 s"


async def test_closing_what_did_not_open_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A worker that on_create refuses, and that hangs in closing, costs `close_timeout`."""
    shop = Workshop()
    shop.before_close = hang
    refused = ValueError("not this one")

    def refuse(tool: Tool) -> None:
        raise refused

    hooks = whitepool.Hooks(on_create=refuse)
    async with whitepool.open_pool(
        shop.make, pool_size=1, max_overflow=0, lazy=True, hooks=hooks, close_timeout=2
    ) as session:
        with pytest.raises(whitepool.PoolStartError) as caught:
            await session.nonblock_checkout()
        assert trio.current_time() == 2
        assert caught.value.__cause__ is refused


@pytest.mark.parametrize("close_timeout", [0.5, 20])
async def test_closing_what_was_given_up_is_bounded(
    close_timeout: float, autojump_clock: trio.testing.MockClock
) -> None:
    """A worker that is given up while a hook has it has as long as any other to close."""
    shop = Workshop()
    shop.before_close = hang
    hooks = whitepool.Hooks(on_create=hang)
    with pytest.raises(LookupError):
        async with whitepool.open_pool(
            shop.make, pool_size=1, lazy=True, hooks=hooks, close_timeout=close_timeout
        ) as session:
            with trio.move_on_after(1):
                await session.block_checkout()
            raise LookupError
    assert trio.current_time() == 1 + close_timeout


async def test_closing_what_has_crashed_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A worker whose nursery has crashed has as long as any other to close."""
    shop = Workshop()
    shop.before_close = hang

    class Crashing(Manager):
        @asynccontextmanager
        async def lifespan(self) -> AsyncIterator[Tool]:
            async def background() -> None:
                await tool.crash.wait()
                raise RuntimeError

            async with trio.open_nursery() as nursery, super().lifespan() as tool:
                nursery.start_soon(background)
                yield tool
                nursery.cancel_scope.cancel()

    async with whitepool.open_pool(
        Crashing(shop), pool_size=1, max_overflow=0, close_timeout=0.5
    ) as session:
        shop.tools[0].crash.set()
        await trio.testing.wait_all_tasks_blocked()
        async with session.worker():
            assert trio.current_time() == 0.5
        assert session.statistics().lost == 1


async def test_a_worker_that_crashes_and_is_evicted_at_once() -> None:
    """Its task is woken by the crash, and not again by the pool before it has had its turn."""
    shop = Workshop()
    manager = Fragile(shop)
    async with whitepool.open_pool(manager, pool_size=1) as session:
        await trio.testing.wait_all_tasks_blocked()
        manager.scopes[0].cancel()
        session.resize(0, 1)
        await trio.testing.wait_all_tasks_blocked()
        check_books(session)
        assert session.statistics().retired == 1
    assert not shop.alive


async def test_a_start_that_was_given_up_too_late_to_notice(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that hears of nothing while it opens is closed when it has opened, and never counted."""
    shop = Workshop()

    class Deaf(Manager):
        @asynccontextmanager
        async def lifespan(self) -> AsyncIterator[Tool]:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
                async with super().lifespan() as tool:
                    yield tool

    async with whitepool.open_pool(Deaf(shop), pool_size=1, lazy=True) as session:
        with trio.move_on_after(0.5):
            await session.block_checkout()
        session._supervisor.drain()
        await trio.sleep(0.5)
        await trio.testing.wait_all_tasks_blocked()
        check_books(session)
        assert session.statistics().started == 0
    assert not shop.alive
    assert not caplog.records


async def test_a_worker_that_fails_in_closing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It is gone all the same."""
    shop = Workshop()

    shop.before_close = raising(OSError("already closed"))
    async with whitepool.open_pool(shop.make, pool_size=1, name="mine"):
        pass
    (record,) = caplog.records
    assert record.message == "close_failed pool=mine error=OSError: already closed"


async def test_where_there_is_room_no_replacement_waits_for_a_close(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """However long that takes."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=1) as session:
        shop.before_close = lambda _: trio.sleep(3)
        session.destroyed(await session.block_checkout())
        await trio.testing.wait_all_tasks_blocked()
        assert not shop.tools[0].closed
        assert session.statistics().idle == 1


async def test_room_taken_by_a_worker_being_closed_is_taken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A connection that is still being closed is a connection to the server. (Rule 1.)"""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=0) as session:
        shop.before_close = lambda _: trio.sleep(1)
        session.destroyed(await session.block_checkout())
        async with session.worker():
            assert trio.current_time() == pytest.approx(1)
    assert shop.most_alive == 1


async def test_the_supervisor_is_woken_once() -> None:
    """However many calls, before it has had its turn: what it has to look at does not pile up."""
    async with whitepool.open_pool(Workshop().make, pool_size=9) as session:
        await trio.testing.wait_all_tasks_blocked()
        resources = [await session.block_checkout() for _ in range(9)]
        for resource in resources:
            session.destroyed(resource)
        assert session._supervisor._receive_ready.statistics().current_buffer_used <= 1
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().idle == 9


async def test_the_pool_is_off_the_path_of_a_clean_return() -> None:
    """Checkouts that find an idle worker wake no other task."""

    class Counter(trio.abc.Instrument):
        steps = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            Counter.steps += 1

    async with whitepool.open_pool(Workshop().make, pool_size=1) as session:
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(Counter())
        for _ in range(100):
            session.checkin(await session.block_checkout())
        assert Counter.steps <= 101


async def test_a_worker_that_dies_while_it_waits_for_its_reset(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It is not handed to the next waiter. (Rule 6.)"""
    manager = Manager(Workshop())
    hooks = whitepool.Hooks(after_release=lambda: trio.sleep(0.3))
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0, hooks=hooks) as session:
        session.checkin(await session.block_checkout())
        resource = await session.block_checkout()  # the hook still runs in the worker's task
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def client() -> None:
                async with session.worker() as tool:
                    assert tool not in manager.dead

            await trio.testing.wait_all_tasks_blocked()
            session.checkin(resource)  # it is alive now, and its reset waits for the hook's end
            await trio.sleep(0.1)
            manager.dead.update(manager.shop.tools)


async def test_overflow_counts_from_the_moment_that_it_is_started(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A worker that is being opened beyond `pool_size` is overflow already."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=2) as session:
        shop.before_open = lambda _: trio.sleep(1)
        async with session.worker(), trio.open_nursery() as nursery:
            nursery.start_soon(use, session)
            await trio.testing.wait_all_tasks_blocked()
            now = session.statistics()
            assert (now.starting, now.overflow) == (1, 1)
