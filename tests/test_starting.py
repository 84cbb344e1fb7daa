"""Starts: as many as are needed, and what is said of those that failed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Tool, Workshop

import whitepool

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
        await trio.sleep(3600)
        shop.before_open = lambda _: trio.sleep_forever()
        async with session.worker():
            with pytest.raises(whitepool.CheckoutTimeout) as caught:
                await session.block_checkout(timeout=0)
        assert caught.value.__cause__ is None


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
    """With the death of the worker, once."""
    async with whitepool.open_pool(Silent(), pool_size=1, check_interval=10):
        await trio.sleep(10.5)
    assert events(caplog) == [("worker_lost", "check_failed", "OSError: no answer")]


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
            shop.make, pool_size=0, max_overflow=8, overflow_ttl=100, max_starting=8
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
        async with block:
            assert session.statistics().in_use == 1
        assert session.statistics().in_use == 0
