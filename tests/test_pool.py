"""Opening a pool, and what ends what."""

from __future__ import annotations

import math
import sys
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from workshop import Manager, Tool, Workshop, check_books, hang, raising

import whitepool

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def test_a_factory_must_be_callable() -> None:
    """The object itself instead of a factory is the commonest mistake."""
    with pytest.raises(TypeError, match="factory must be callable"):
        whitepool.Pool(object())  # type: ignore[arg-type]


async def test_open_pool_yields_a_full_pool() -> None:
    """All of `pool_size` are open, at most `max_starting` having been opened at once."""
    shop = Workshop()

    async def slowly(_: int) -> None:
        await trio.testing.wait_all_tasks_blocked()

    shop.before_open = slowly
    async with whitepool.open_pool(shop.make, pool_size=7, max_starting=3, name="x") as session:
        now = session.statistics()
        assert (now.idle, now.started, now.state, now.name) == (7, 7, "ready", "x")
        assert shop.most_opening == 3
    assert not shop.alive
    assert session.statistics().state == "closed"
    assert session.statistics().retired == 7


async def test_workers_are_opened_concurrently(autojump_clock: trio.testing.MockClock) -> None:
    """Opening takes as long as the slowest batch, not as long as all one after the other."""
    shop = Workshop()

    async def slowly(_: int) -> None:
        await trio.sleep(1)

    shop.before_open = slowly
    async with whitepool.open_pool(shop.make, pool_size=8, max_starting=4):
        assert trio.current_time() == pytest.approx(2)


async def test_a_lazy_pool_opens_nothing_before_the_first_need() -> None:
    """And then what is needed, which stays."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=3, lazy=True) as session:
        assert shop.attempts == 0
        async with session.worker(), session.worker():
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().idle == shop.attempts == 2


async def test_a_pool_of_nothing_but_overflow() -> None:
    """`pool_size=0` starts workers on demand, and retires them."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=0, max_overflow=1, overflow_ttl=0) as session:
        assert session.statistics().state == "overflow"
        async with session.worker():
            assert session.statistics().state == "full"
        await trio.testing.wait_all_tasks_blocked()
        assert not shop.alive


async def test_failures_at_opening_are_retried(autojump_clock: trio.testing.MockClock) -> None:
    """A server that comes up a little later than the service is no reason to give up. (Rule 5.)"""
    shop = Workshop()

    async def down_at_first(attempt: int) -> None:
        if attempt <= 5:
            raise OSError("connection refused")

    shop.before_open = down_at_first
    async with whitepool.open_pool(shop.make, pool_size=3) as session:
        assert session.statistics().start_failures == 5
        assert len(shop.alive) == 3


async def test_opening_gives_up(autojump_clock: trio.testing.MockClock) -> None:
    """After `start_timeout` it raises PoolStartError, whose cause is the factory's last error."""
    shop = Workshop()
    refusal = OSError("connection refused")

    shop.before_open = raising(refusal)
    with pytest.raises(whitepool.PoolStartError, match="0 of 2 workers") as caught:
        async with whitepool.open_pool(shop.make, pool_size=2, start_timeout=10):
            pytest.fail("it must not open")
    assert caught.value.__cause__ is refusal
    assert trio.current_time() == pytest.approx(10, abs=0.1)


async def test_opening_gives_up_on_a_hanging_factory(autojump_clock: trio.testing.MockClock) -> None:
    """A factory that never returns is cancelled."""
    shop = Workshop()
    shop.before_open = hang
    with pytest.raises(whitepool.PoolStartError):
        async with whitepool.open_pool(shop.make, pool_size=2, start_timeout=10):
            pytest.fail("it must not open")
    assert shop.opening == 0


async def test_opening_gives_up_on_a_factory_that_hears_of_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """No start has failed by then, so the error tells of none."""
    shop = Workshop()

    async def deafly(_: int) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(20)

    shop.before_open = deafly
    with pytest.raises(whitepool.PoolStartError, match=r"0 of 1 workers started within 10 s$"):
        async with whitepool.open_pool(shop.make, pool_size=1, start_timeout=10):
            pytest.fail("it must not open")


async def test_a_final_error_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory's own PoolStartError ends opening at once, whatever pause chance would have made."""
    monkeypatch.setattr("random.uniform", lambda low, _: low)
    shop = Workshop()

    shop.before_open = raising(whitepool.PoolStartError("wrong password"))
    for attempts in range(1, 21):  # which of the tasks that wake up runs first is chance, too
        with pytest.raises(whitepool.PoolStartError, match="wrong password"):
            async with whitepool.open_pool(shop.make, pool_size=1):
                pytest.fail("it must not open")
        assert shop.attempts == attempts


async def test_a_factory_of_the_wrong_kind() -> None:
    """One that returns the worker itself gets an error that says what is expected."""

    def plain() -> Any:
        return 7

    with pytest.raises(whitepool.PoolStartError, match=r"awaitable or an async context.*not int"):
        async with whitepool.open_pool(plain):
            pytest.fail("it must not open")


async def test_opening_can_be_cancelled() -> None:
    """And leaves nothing behind."""
    shop = Workshop()

    async def only_the_first(attempt: int) -> None:
        if attempt > 1:
            await trio.sleep_forever()

    shop.before_open = only_the_first
    with trio.move_on_after(0.01) as scope:
        async with whitepool.open_pool(shop.make, pool_size=2):
            pytest.fail("it must not open")
    assert scope.cancelled_caught
    assert not shop.alive
    assert shop.opening == 0


async def test_an_exception_leaves_the_block_as_it_was_raised() -> None:
    """No group around it, no context, and everything is closed. (Rule 10.)"""
    shop = Workshop()
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with whitepool.open_pool(shop.make, pool_size=2) as session:
            held = await session.block_checkout()
            raise error
    assert caught.value is error
    assert error.__context__ is None
    assert not shop.alive
    assert held.get().closed


async def test_an_exception_group_of_the_user_stays_one() -> None:
    """The pool takes off its own wrapping, and no other."""
    with pytest.raises(BaseExceptionGroup) as caught:
        async with whitepool.open_pool(Workshop().make):
            raise BaseExceptionGroup("mine", [ValueError()])
    assert caught.value.message == "mine"


def test_an_exception_group_of_the_user_stays_one_without_strict_groups() -> None:
    """Whether Trio would take it off or not."""

    async def main() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with whitepool.open_pool(Workshop().make):
                raise BaseExceptionGroup("mine", [ValueError()])
        assert caught.value.message == "mine"

    with pytest.warns(trio.TrioDeprecationWarning):
        trio.run(main, strict_exception_groups=False)


async def test_leaving_by_cancellation_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """Closing is shielded, happens to all workers at once, and ends by `close_timeout`. (Rule 10.)"""
    shop = Workshop()
    closing = 0

    async def hang(_: Tool) -> None:
        nonlocal closing
        closing += 1
        await trio.sleep(1000)

    shop.before_close = hang
    with trio.move_on_after(1) as scope:
        async with whitepool.open_pool(shop.make, pool_size=3, close_timeout=2) as session:
            held = await session.block_checkout()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert closing == 3
    assert held.get() in shop.tools
    assert trio.current_time() == pytest.approx(3)
    assert session.statistics().state == "closed"


async def test_a_normal_exit_waits_for_outstanding_workers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """For at most `shutdown_timeout`. (Rule 10.)"""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=2, shutdown_timeout=3) as session:
        resource = await session.block_checkout()
    assert trio.current_time() == pytest.approx(3)
    assert not shop.alive
    session.checkin(resource)  # late, but in good standing
    check_books(session)


async def test_run_service() -> None:
    """It starts in a nursery of the user's, and ends with safe_shutdown."""
    shop = Workshop()
    async with trio.open_nursery() as nursery:
        pool = whitepool.Pool(Manager(shop), pool_size=2)
        session = await nursery.start(pool.run_service)
        assert session.statistics().idle == 2
        await session.safe_shutdown()
    assert not shop.alive


async def test_a_cancelled_service_lets_its_clients_finish(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Clients that are cancelled beside it may still clean up with the worker they hold."""
    shop = Workshop()
    cleaned_up = []

    async def client(session: whitepool.Session[Tool]) -> None:
        async with session.worker() as tool:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.5)
                cleaned_up.append(not tool.closed)

    async with trio.open_nursery() as nursery:
        session = await nursery.start(whitepool.Pool(shop.make, pool_size=1).run_service)
        nursery.start_soon(client, session)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert cleaned_up == [True]
    assert not shop.alive
    assert trio.current_time() == pytest.approx(0.5)


async def test_a_cancelled_service_does_not_wait_for_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its clients have half of `close_timeout`. Then what they hold is closed under them."""
    shop = Workshop()
    closed_at: list[float] = []

    async def client(session: whitepool.Session[Tool]) -> None:
        async with session.worker():
            with trio.CancelScope(shield=True):
                await trio.sleep(100)

    async def note(_: Tool) -> None:
        closed_at.append(trio.current_time())

    shop.before_close = note
    async with trio.open_nursery() as nursery:
        pool = whitepool.Pool(shop.make, pool_size=1, close_timeout=4)
        session = await nursery.start(pool.run_service)
        nursery.start_soon(client, session)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert closed_at == [2]


async def test_a_service_that_cannot_start_says_so(autojump_clock: trio.testing.MockClock) -> None:
    """`nursery.start` raises what opening raised."""
    shop = Workshop()

    shop.before_open = raising(OSError())
    pool = whitepool.Pool(shop.make, start_timeout=1)
    with pytest.raises(BaseExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run_service)
    assert isinstance(caught.value.exceptions[0], whitepool.PoolStartError)


async def test_ctrl_c_reaches_the_user_and_closes_everything() -> None:
    """A KeyboardInterrupt in the block comes out of it, after everything has been closed."""
    shop = Workshop()
    with pytest.raises(KeyboardInterrupt):
        async with whitepool.open_pool(shop.make):
            raise KeyboardInterrupt
    assert not shop.alive


async def test_a_worker_task_that_raises_no_exception_ends_the_pool() -> None:
    """SystemExit in a factory is not a failed start: it ends the program, in good order."""
    shop = Workshop()

    async def exit_at_the_second(attempt: int) -> None:
        if attempt == 2:
            raise SystemExit(3)

    shop.before_open = exit_at_the_second
    with pytest.raises(BaseExceptionGroup) as caught:
        async with whitepool.open_pool(shop.make, pool_size=1) as session:
            held = await session.block_checkout()
            with pytest.raises(whitepool.PoolClosed):
                await session.block_checkout(timeout=math.inf)
    assert caught.value.split(SystemExit)[1] is None  # nothing else in it
    assert held.get().closed


async def test_two_errors_leave_the_block_as_a_group() -> None:
    """That of the block and that of a worker task: neither hides the other."""
    shop = Workshop()
    error = ValueError("mine")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with whitepool.open_pool(shop.make, pool_size=1) as session:
            shop.before_open = raising(SystemExit(3))
            session.destroyed(await session.block_checkout())
            with pytest.raises(whitepool.PoolClosed):
                await session.block_checkout(timeout=math.inf)
            raise error
    assert error in caught.value.exceptions
    assert caught.value.subgroup(SystemExit) is not None
    assert not shop.alive


async def test_a_context_manager_that_can_be_awaited_too() -> None:
    """It is entered: only the context manager knows how to close what it opened."""
    left = []

    class Both:
        def __await__(self) -> Any:
            raise AssertionError("must not be awaited")
            yield

        async def __aenter__(self) -> str:
            return "worker"

        async def __aexit__(self, *_: object) -> None:
            left.append(True)

    async with whitepool.open_pool(Both, pool_size=1) as session, session.worker() as worker:
        assert worker == "worker"
    assert left == [True]


@asynccontextmanager
async def nothing() -> Any:
    yield None


async def test_none_is_a_worker_too() -> None:
    """The pool knows nothing of what it pools."""
    async with whitepool.open_pool(nothing, pool_size=1) as session:
        resource = await session.block_checkout()
        assert resource.get() is None
        session.checkin(resource)
