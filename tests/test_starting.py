"""Starts: as many as are needed, and what is said of those that failed."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, hang, nothing, open_checked_pool, raising

import whitepool
from whitepool._backoff import FIRST_BOUND

Session = whitepool.Session[Tool]


async def hold_one(session: Session) -> None:
    async with session.worker():
        await trio.sleep(1)


@pytest.mark.parametrize("clients", [2, 4, 5])
async def test_a_lazy_pool_starts_what_its_clients_need(
    clients: int, autojump_clock: MockClock
) -> None:
    """One worker for each, and none more, also where several open at the same time."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, lazy=True, max_overflow=10) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(hold_one, session)
        assert shop.attempts == session.statistics().started == clients


async def test_a_burst_starts_what_it_needs(autojump_clock: MockClock) -> None:
    """Four workers are there; eight clients need four more."""
    shop = Workshop()
    shop.before_open = lambda _: trio.sleep(0.1)
    async with whitepool.open_pool(shop.make, pool_size=4, max_overflow=10) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(hold_one, session)
        assert shop.attempts == 8


async def fail_to_start(session: Session) -> whitepool.CheckoutTimeout:
    """Have the overflow of a pool of one fail, and return what a client is told."""
    async with session.worker():
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=1)
        return caught.value


async def test_an_old_failure_is_not_the_reason(autojump_clock: MockClock) -> None:
    """A timeout says why no worker starts, but not why one did not start an hour ago. (Rule 4.)"""
    shop = Workshop()

    async def only_the_first_opens(attempt: int) -> None:
        if attempt > 1:
            raise OSError("connection refused")

    shop.before_open = only_the_first_opens
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=1) as session:
        error = await fail_to_start(session)
        assert isinstance(error.__cause__, OSError)
        assert "the last start failed: OSError: connection refused" in str(error)
        await trio.sleep(3600)
        shop.before_open = lambda _: trio.sleep_forever()
        async with session.worker():
            with pytest.raises(whitepool.CheckoutTimeout) as caught:
                await session.block_checkout(timeout=0)
        assert caught.value.__cause__ is None
        assert "the last start failed" not in str(caught.value)


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[Any, Any, Any]]:
    """Return what was logged: the event, the reason and the error."""
    return [
        (record.__dict__["event"], record.__dict__.get("reason"), record.__dict__.get("error"))
        for record in caplog.records
    ]


class Silent(whitepool.WorkerManager[Tool]):
    """A manager of tools that do not answer."""

    async def create(self) -> Tool:
        return await Workshop().make()

    async def check(self, worker: Tool) -> None:
        raise OSError("no answer")


async def test_why_a_probe_failed_is_logged(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """With the death of the worker, once. Its successors don't answer either, and are never open."""
    async with whitepool.open_pool(Silent(), pool_size=1, check_interval=10):
        await trio.sleep(10.5)
    first, *others = events(caplog)
    assert first == ("worker_lost", "check_failed", "OSError: no answer")
    assert others
    assert set(others) == {("start_failed", None, "OSError: no answer")}


class CrashesAndHangs(whitepool.WorkerManager[Tool]):
    """A manager of tools whose background task crashes, and which then can't be closed."""

    def __init__(self) -> None:
        self.shop = Workshop()
        self.shop.before_close = lambda _: trio.sleep_forever()

    async def create(self) -> Tool:
        return await self.shop.make()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[Tool]:
        async with super().lifespan() as tool, trio.open_nursery() as nursery:

            async def background() -> None:
                await tool.crash.wait()
                raise RuntimeError("the crash")

            nursery.start_soon(background)
            yield tool
            nursery.cancel_scope.cancel()


async def test_a_close_that_hangs_does_not_hide_the_crash(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """The log says why the worker died."""
    manager = CrashesAndHangs()
    async with whitepool.open_pool(manager, pool_size=1, close_timeout=1):
        manager.shop.tools[0].crash.set()
        await trio.sleep(5)
        assert ("worker_lost", "crashed", "RuntimeError: the crash") in events(caplog)


async def test_nothing_is_started_for_a_worker_that_is_ready(autojump_clock: MockClock) -> None:
    """Workers that become ready together are all given to waiters before more are started."""
    shop = Workshop()
    async with (
        whitepool.open_pool(
            shop.make, pool_size=0, max_overflow=16, overflow_ttl=100, max_starting=8
        ) as session,
        trio.open_nursery() as nursery,
    ):
        for _ in range(8):
            nursery.start_soon(hold_one, session)
        await wait_all_tasks_blocked()
        assert shop.attempts == 8
        session._supervisor.roster.check()


async def test_max_waiting_counts_those_that_wait_for_clients(autojump_clock: MockClock) -> None:
    """A pool that starts its workers at the first need serves the same burst as one that has them."""
    for lazy in (False, True):
        ends: list[str] = []

        async def client(session: Session, ends: list[str]) -> None:
            try:
                await hold_one(session)
            except whitepool.PoolOverloaded:
                ends.append("overloaded")
            else:
                ends.append("served")

        async with (
            whitepool.open_pool(
                Workshop().make, pool_size=10, max_overflow=0, lazy=lazy, max_waiting=5
            ) as session,
            trio.open_nursery() as nursery,
        ):
            for _ in range(17):
                nursery.start_soon(client, session, ends)
        assert (ends.count("served"), ends.count("overloaded")) == (15, 2)


async def test_a_block_is_entered_once() -> None:
    """To enter it again would lose the worker that it has."""
    async with whitepool.open_pool(Workshop().make, pool_size=2) as session:
        block = session.worker()
        async with block:
            with pytest.raises(RuntimeError, match="entered already"):
                await block.__aenter__()
            assert session.statistics().checkouts == 1
        async with block:
            assert session.statistics().in_use == 1
        assert session.statistics().in_use == 0


async def test_two_tasks_that_enter_the_same_block(autojump_clock: MockClock) -> None:
    """The second one gets an error when it gets its worker, which goes back at once."""
    async with open_checked_pool(Workshop().make, pool_size=2, max_overflow=0) as session:
        block = session.worker()
        errors = []

        async def enter() -> None:
            try:
                async with block:
                    await trio.sleep(1)
            except RuntimeError as error:
                errors.append(str(error))

        first, second = await session.block_checkout(), await session.block_checkout()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(enter)
            nursery.start_soon(enter)
            await wait_all_tasks_blocked()
            session.checkin(first)
            session.checkin(second)
            await wait_all_tasks_blocked()
            assert errors == ["this block has been entered already: call worker() for each block"]
            assert session.statistics().in_use == 1
        assert session.statistics().idle == 2


# -- When opening the pool returns ---------------------------------------------------------------------


@pytest.mark.parametrize(("min_ready", "seconds"), [(None, 3), (3, 3), (2, 2), (1, 1), (0, 0)])
async def test_opening_returns_when_enough_are_ready(
    min_ready: int | None, seconds: float, autojump_clock: MockClock
) -> None:
    """The rest follows without a client."""
    shop = Workshop()
    shop.before_open = lambda _: trio.sleep(1)
    async with open_checked_pool(
        shop.make, pool_size=3, max_starting=1, min_ready=min_ready
    ) as session:
        assert trio.current_time() == seconds
        assert session.statistics().idle == seconds
        await trio.sleep(4)
        assert session.statistics().idle == 3
        assert shop.attempts == 3


async def test_a_pool_opens_while_its_server_is_away(autojump_clock: MockClock) -> None:
    """With `min_ready=0`. It fills when the server comes, and says until then that it is down."""
    shop = Workshop()
    shop.before_open = raising(OSError("connection refused"))
    async with open_checked_pool(shop.make, pool_size=3, min_ready=0, start_timeout=5) as session:
        assert trio.current_time() == 0
        await trio.sleep(60)
        assert session.statistics().state == "down"
        shop.before_open = nothing
        await trio.sleep(1)
        now = session.statistics()
        assert (now.state, now.idle, now.last_error) == ("ready", 3, None)


async def test_a_start_that_is_pointless_ends_no_pool_that_is_open(autojump_clock: MockClock) -> None:
    """With `min_ready=0` there is no opening any more that it could end."""
    shop = Workshop()
    shop.before_open = raising(whitepool.PoolStartError("no such role"))
    async with open_checked_pool(shop.make, pool_size=1, min_ready=0) as session:
        await trio.sleep(10)
        assert session.statistics().state == "down"
        with pytest.raises(whitepool.PoolUnavailable, match="no such role"):
            await session.block_checkout(5)
        shop.before_open = nothing
        await trio.sleep(1)
        async with session.worker(1):
            pass


async def test_too_few_are_too_few(autojump_clock: MockClock) -> None:
    """`min_ready` counts workers that are ready, and the error says how many there were."""
    shop = Workshop()

    async def only_two(attempt: int) -> None:
        if attempt > 2:
            raise OSError("connection refused")

    shop.before_open = only_two
    with pytest.raises(whitepool.PoolStartError, match=r"2 of 3 workers started within 4 s.*refused"):
        async with whitepool.open_pool(shop.make, pool_size=5, min_ready=3, start_timeout=4):
            pass
    assert trio.current_time() == 4
    assert not shop.alive


async def test_a_start_that_was_given_up_calls_no_factory() -> None:
    """The pool had decided on it, and shrank before its task began."""
    shop = Workshop()
    async with open_checked_pool(shop.make, pool_size=1) as session:
        shop.before_open = hang
        session.resize(9, 1)
        session._supervisor._start_worker()
        session.resize(1, 0)
        await wait_all_tasks_blocked()
        assert shop.attempts == 1


# -- Workers that can be opened, and are of no use ---------------------------------------------------


class Proxied(Manager):
    """A manager of workers behind a proxy. While its server is down, they end at their first use."""

    def __init__(self, shop: Workshop) -> None:
        super().__init__(shop)
        self.is_down = False
        self.hangs = False
        self.checks = 0

    def is_alive(self, worker: Tool) -> bool:
        return not self.is_down

    async def check(self, worker: Tool) -> None:
        self.checks += 1
        if self.hangs:
            await trio.sleep_forever()
        if self.is_down:
            raise OSError("no server")

    def _last_words(self, worker: Tool) -> str:
        return "08P01: no server"


async def get_a_dead_one(session: Session, manager: Proxied) -> bool:
    """Check out a worker, if there is one; say whether it is of no use."""
    try:
        async with session.worker(timeout=30):
            await trio.sleep(0.01)
            return manager.is_down
    except whitepool.CheckoutTimeout:
        await trio.sleep(0.01)
        return False


async def test_a_proxy_without_a_server_is_not_hammered(autojump_clock: MockClock) -> None:
    """After the first death with last words, a worker that gives no sign of life is a failed start."""
    manager = Proxied(Workshop())
    useless = 0

    async def client(session: Session) -> None:
        nonlocal useless
        while trio.current_time() < 90:
            useless += await get_a_dead_one(session, manager)

    async with whitepool.open_pool(manager, pool_size=4, max_overflow=4) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(client, session)
            await trio.sleep(10)
            before, manager.is_down = manager.shop.attempts, True
            await trio.sleep(60)
            failed = manager.shop.attempts - before
            assert failed <= 3 * 60  # about 2.5 a second
            assert session.statistics().state == "down"
            assert "no server" in str(session.statistics().last_error)
            manager.is_down = False
            await trio.sleep(1)
            assert session.statistics().in_use == 8
        # Those that were in use, and the few that were opened before the first of them had come back.
        assert useless <= 16


async def test_only_then_are_new_workers_asked(autojump_clock: MockClock) -> None:
    """The opening of a pool, and its growth, cost no probe; nor do starts once one has answered."""
    manager = Proxied(Workshop())
    async with whitepool.open_pool(manager, pool_size=2, max_overflow=2, overflow_ttl=60) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(get_a_dead_one, session, manager)
        assert session.statistics().started == 4
        assert manager.checks == 0
        async with session.worker(), session.worker(), session.worker(), session.worker():
            manager.is_down = True
        manager.is_down = False
        await trio.sleep(3)  # the probes of the suspects are over, too
        assert session.statistics().lost == 4
        probed = manager.checks
        session.retire_all()
        await trio.sleep(1)
        assert session.statistics().retired == 2
        assert manager.checks == probed > 0


async def test_a_new_worker_that_hangs_is_a_failed_start(autojump_clock: MockClock) -> None:
    """After `reset_timeout`, as for any other probe; and the error says that it was open."""
    manager = Proxied(Workshop())
    async with whitepool.open_pool(
        manager, pool_size=1, max_overflow=0, reset_timeout=2, start_timeout=60
    ) as session:
        async with session.worker():
            manager.is_down = manager.hangs = True
        await trio.sleep(2.1)
        assert session.statistics().start_failures == 1
        assert str(session.statistics().last_error) == (
            "TooSlowError: opened, but no sign of life within 2 s"
        )
        assert manager.shop.tools[1].closed


async def test_where_probes_are_turned_off_new_workers_are_not_asked(
    autojump_clock: MockClock,
) -> None:
    """Whatever has happened to others."""
    manager = Proxied(Workshop())
    async with whitepool.open_pool(
        manager, pool_size=2, max_overflow=0, check_interval=math.inf
    ) as session:
        async with session.worker():
            manager.is_down = True
        await trio.sleep(1)
        assert session.statistics().started == 3
        assert manager.checks == 0


async def test_how_long_starts_take_is_reported() -> None:
    """Of the workers that are open, and of each that is opened from then on."""
    shop = Workshop()
    seconds: list[float] = []
    async with open_checked_pool(shop.make, pool_size=2, max_overflow=0) as session:
        session._supervisor.starter.observe(seconds.append)
        assert len(seconds) == 2
        session.destroyed(await session.block_checkout())
        await wait_all_tasks_blocked()
        assert len(seconds) == 3
        shop.before_open = hang
        session.resize(3)
        await wait_all_tasks_blocked()
        later: list[float] = []
        session._supervisor.starter.observe(later.append)
        assert len(later) == 2  # and none of the one that is being opened


async def test_a_start_that_was_under_way_ends_no_pause(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two starts one fails, and the other, which began before that, succeeds a little later."""
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    shop = Workshop()
    begun: list[float] = []

    async def fail_or_take_longer(attempt: int) -> None:
        begun.append(trio.current_time())
        await trio.sleep(0.05)
        if attempt == 1:
            raise OSError("connection refused")
        await trio.sleep(0.01)

    shop.before_open = fail_or_take_longer
    async with open_checked_pool(shop.make, pool_size=2):
        assert begun[2] - begun[1] == pytest.approx(0.05 + FIRST_BOUND)
