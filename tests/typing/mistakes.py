"""What a type checker must object to. Each comment that silences it is an error where it did not."""

from __future__ import annotations

from functools import partial

import trio
from factories import Robot, build, build_for, rent

from whitepool import Hooks, Pool, Resource, Session, open_pool


class Car: ...


async def factories() -> None:
    open_pool(Robot)  # type: ignore[arg-type]  # returns a worker, not an awaitable of one
    open_pool(Robot())  # type: ignore[arg-type]
    open_pool(build())  # type: ignore[arg-type]
    open_pool(rent())  # type: ignore[arg-type]
    open_pool(build_for)  # type: ignore[arg-type]  # for whom?
    open_pool(partial(build_for, customer=1))  # type: ignore[arg-type]
    robots: Pool[Robot] = Pool(build)
    cars: Pool[Car] = robots  # type: ignore[assignment]
    cars = Pool(build)  # type: ignore[arg-type]
    print(cars)


async def services(task_status: trio.TaskStatus[Session[Car]]) -> None:
    await Pool(build).run_service(task_status=task_status)  # type: ignore[arg-type]


def options() -> None:
    open_pool(build, pool_sise=1)  # type: ignore[call-arg]
    open_pool(build, pool_size="1")  # type: ignore[arg-type]
    open_pool(build, strategy="random")  # type: ignore[arg-type]
    open_pool(build, hooks=Hooks(on_destroy="loudly"))  # type: ignore[arg-type]


async def sessions(session: Session[Robot], resource: Resource[Robot], cars: Session[Car]) -> None:
    session.block_checkout()  # type: ignore[unused-coroutine]
    await session.checkout_nowait()  # type: ignore[misc]
    await session.nonblock_checkout(timeout=1)  # type: ignore[call-arg]
    session.checkin(resource.get())  # type: ignore[arg-type]
    cars.checkin(resource)  # type: ignore[arg-type]
    cars.destroyed(resource)  # type: ignore[arg-type]
    await session.checkin(resource)  # type: ignore[misc]
    with session.worker():  # type: ignore[attr-defined]
        pass
    async with session.worker() as robot:
        robot.get()  # type: ignore[attr-defined]  # it is the worker itself
