"""`open_pool` and `Pool` know what their workers are, from every kind of factory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio
from typing_extensions import assert_type

from whitepool import Pool, Resource, Session, WorkerManager, open_pool
from whitepool.telemetry import instrument


class Robot:
    async def aclose(self) -> None: ...


async def build() -> Robot:
    return Robot()


async def build_for(customer: str, *, colour: str = "grey") -> Robot:
    return Robot()


def order() -> Awaitable[Robot]:
    return build()


@asynccontextmanager
async def rent() -> AsyncIterator[Robot]:
    yield Robot()


@asynccontextmanager
async def rent_from(owner: str) -> AsyncIterator[Robot]:
    yield Robot()


def lend() -> AbstractAsyncContextManager[Robot]:
    return rent()


class Garage:
    async def build(self) -> Robot:
        return Robot()

    async def __call__(self) -> Robot:
        return Robot()

    @asynccontextmanager
    async def rent(self) -> AsyncIterator[Robot]:
        yield Robot()


class Stable(WorkerManager[Robot]):
    async def create(self) -> Robot:
        return Robot()


async def async_callables() -> None:
    async with open_pool(build) as session:
        assert_type(session, Session[Robot])
    async with open_pool(order) as session:
        assert_type(session, Session[Robot])
    async with open_pool(partial(build_for, "me", colour="red"), pool_size=2) as session:
        assert_type(session, Session[Robot])
    async with open_pool(lambda: build_for("me")) as session:
        assert_type(session, Session[Robot])
    async with open_pool(Garage().build) as session:
        assert_type(session, Session[Robot])
    async with open_pool(Garage()) as session:
        assert_type(session, Session[Robot])
    async with open_pool(lambda: trio.open_tcp_stream("example.org", 80)) as streams:
        assert_type(streams, Session[trio.SocketStream])


async def context_managers() -> None:
    async with open_pool(rent) as session:
        assert_type(session, Session[Robot])
    async with open_pool(lend) as session:
        assert_type(session, Session[Robot])
    async with open_pool(partial(rent_from, "them")) as session:
        assert_type(session, Session[Robot])
    async with open_pool(lambda: rent_from("them")) as session:
        assert_type(session, Session[Robot])
    async with open_pool(Garage().rent) as session:
        assert_type(session, Session[Robot])


async def managers() -> None:
    async with open_pool(Stable()) as session:
        assert_type(session, Session[Robot])


async def services(task_status: trio.TaskStatus[Session[Robot]]) -> None:
    assert_type(Pool(build), Pool[Robot])
    assert_type(Pool(rent), Pool[Robot])
    assert_type(Pool(Stable()), Pool[Robot])
    assert_type(Pool(partial(build_for, "me")), Pool[Robot])
    assert_type(Pool(lambda: rent_from("them")), Pool[Robot])
    # What `nursery.start` returns is anything to Trio, whatever the task reports.
    await Pool(build).run_service(task_status=task_status)


async def checkouts(session: Session[Robot]) -> None:
    assert_type(await session.block_checkout(), Resource[Robot])
    assert_type(await session.nonblock_checkout(), Resource[Robot])
    assert_type(session.checkout_nowait(), Resource[Robot])
    assert_type(session.checkout_nowait().get(), Robot)
    async with session.worker() as robot:
        assert_type(robot, Robot)
    measuring = instrument(session)
    assert_type(measuring, Session[Robot])
    async with measuring.worker(timeout=1) as robot:
        assert_type(robot, Robot)
