"""Every operation is cancelled at each of its checkpoints, one after the other. (Rule 3.)

A test that cancels at a time of its choosing finds what its author thought of. These run an operation
again and again, and cancel it at its first checkpoint, its second, its third, until it comes through.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any, Literal

import pytest
import trio
import trio.testing
from workshop import BookChecker, Manager, Tool, Workshop, check_books, open_checked_pool

import whitepool

Session = whitepool.Session[Tool]
Resources = list[whitepool.Resource[Tool]]
Moment = Literal["asleep", "waking", "meanwhile"]

pytestmark = [
    pytest.mark.parametrize("moment", ["asleep", "waking", "meanwhile"]),
    pytest.mark.usefixtures("no_hanging"),
]


class Cut(trio.abc.Instrument):
    """Cancels an operation at its n-th checkpoint.

    Either when it has gone to sleep there ("asleep"), or when it has been woken up and is about to go
    on ("waking"): what it was waiting for has happened already, and the cancellation comes too late.
    Or else at the n-th checkpoint of any task, while the operation is under way ("meanwhile").
    """

    def __init__(self, at: int, moment: Moment) -> None:
        self.at = at
        self.moment = moment
        self.scope = trio.CancelScope()
        self.fired = False
        self.completed = False
        self._delivered = False
        self._cancelling = False
        self._steps = 0
        self._task: trio.lowlevel.Task | None = None

    async def run(self, operation: Callable[[], Awaitable[None]]) -> None:
        """Run the operation in a task of its own, and cancel it; at 0, before it has begun."""

        async def target() -> None:
            self._task = trio.lowlevel.current_task()
            with self.scope:
                await operation()
                self.completed = True
                self._task = None
                await trio.lowlevel.checkpoint()  # where a cancellation must come out at the latest

        if self.at == 0:
            self._cancel()
        trio.lowlevel.add_instrument(self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(target)
        finally:
            trio.lowlevel.remove_instrument(self)
        assert self.scope.cancelled_caught == self.fired
        assert not (self._delivered and self.completed), "the cancellation was swallowed"

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task and self._steps == self.at and self.moment == "waking":
            self._cancel()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task or (self.moment == "meanwhile" and self._task is not None):
            self._steps += 1
            if self._steps == self.at and self.moment != "waking":
                self._cancel()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        # When cancelling wakes the task, it is because `Cancelled` will be raised in it.
        self._delivered |= task is self._task and self._cancelling

    def _cancel(self) -> None:
        self.fired = True
        self._cancelling = True
        self.scope.cancel()
        self._cancelling = False


async def sweep(moment: Moment, scenario: Callable[[Cut], Awaitable[None]]) -> int:
    """Play the scenario until its operation comes through; return how often it was cancelled."""
    for at in count():
        cut = Cut(at, moment)
        await scenario(cut)
        if not cut.fired:
            assert cut.completed
            return at
    raise AssertionError("it never came through")


async def test_the_technique(moment: Moment) -> None:
    """A sweep of an operation that waits three times cancels it before that, and at each of them."""
    reached: list[int] = []

    async def scenario(cut: Cut) -> None:
        async def wait_three_times() -> None:
            for _ in range(3):
                event = trio.Event()
                trio.lowlevel.current_trio_token().run_sync_soon(event.set)
                await event.wait()
                reached[-1] += 1

        reached.append(0)
        await cut.run(wait_three_times)

    times = await sweep(moment, scenario)
    if moment == "asleep":
        assert (times, reached) == (4, [0, 0, 1, 2, 3])
    elif moment == "waking":  # a wait that is over can't be cancelled any more: the next one is
        assert (times, reached) == (4, [0, 1, 2, 3, 3])
    else:
        assert times > 4
        assert sorted(set(reached)) == [0, 1, 2, 3]


async def test_a_swallowed_cancellation_would_be_noticed(moment: Moment) -> None:
    """The sweep fails for an operation that catches what was delivered, and goes on."""

    async def scenario(cut: Cut) -> None:
        async def swallow() -> None:
            with suppress(trio.Cancelled):
                await trio.sleep(0.001)

        await cut.run(swallow)

    if moment != "waking":  # then nothing is delivered: there is nothing to swallow
        with pytest.raises(AssertionError, match="swallowed"):
            await sweep(moment, scenario)


# -- Operations on a pool ------------------------------------------------------------------------------


async def a_while(*_: object) -> None:
    await trio.sleep(0.1)


class WithoutEnd(BaseException):
    """Workers are started without end. Not an `Exception`: the pool would only try again."""


def new_manager(failures: int = 0) -> Manager:
    """A manager for which everything takes a while, and the first starts fail."""

    async def open_slowly(attempt: int) -> None:
        await a_while()
        if attempt > 50:
            raise WithoutEnd
        if attempt <= failures:
            raise OSError("connection refused")

    shop = Workshop()
    manager = Manager(shop)
    shop.before_open = open_slowly
    shop.before_close = manager.before_reset = a_while
    return manager


@asynccontextmanager
async def pool(manager: Manager, **options: Any) -> AsyncIterator[Session]:
    """Open a pool of two and one, with its books checked at each step.

    When it is left, nothing must be open.
    """
    options = {"pool_size": 2, "max_overflow": 1, **options}
    async with open_checked_pool(manager, **options) as session:
        yield session
    assert session.statistics().state == "closed"
    assert not manager.shop.alive
    assert not manager.shop.opening
    check_books(session)


async def check_accounts(session: Session, held: Resources) -> None:
    """The caller has what it holds, the pool has the rest, and serves as many as it ever did."""
    await trio.sleep(1)  # until everything has come to rest
    now = session.statistics()
    check_books(session)
    assert (now.in_use, now.waiting, now.starting, now.resetting) == (len(held), 0, 0, 0)
    for resource in held:
        session.checkin(resource)
    everything = now.pool_size + now.max_overflow
    resources = [await session.block_checkout() for _ in range(everything)]
    assert len({resource.get() for resource in resources}) == everything
    assert session.statistics().in_use == everything
    for resource in resources:
        session.checkin(resource)
    check_books(session)


Operation = Callable[[Session, Manager, Resources], Awaitable[None]]


async def block_checkout(session: Session, _: Manager, held: Resources) -> None:
    held.append(await session.block_checkout())


async def block_checkout_in_vain(session: Session, _: Manager, held: Resources) -> None:
    with pytest.raises(whitepool.CheckoutTimeout):
        held.append(await session.block_checkout(timeout=0.2))


async def nonblock_checkout(session: Session, _: Manager, held: Resources) -> None:
    held.append(await session.nonblock_checkout())


async def nonblock_checkout_of_a_full_pool(session: Session, _: Manager, held: Resources) -> None:
    with pytest.raises(whitepool.PoolFull):
        held.append(await session.nonblock_checkout())


async def worker_block(session: Session, *_: object) -> None:
    async with session.worker() as tool:
        await trio.lowlevel.checkpoint()
        assert not tool.closed


async def nested_worker_blocks(session: Session, *_: object) -> None:
    async with session.worker() as one, session.worker() as other:
        await trio.lowlevel.checkpoint()
        assert one is not other


async def checkin_of_a_dirty_worker(session: Session, manager: Manager, held: Resources) -> None:
    for _ in range(2):
        async with session.worker() as tool:
            assert tool not in manager.dirty
            manager.dirty.add(tool)
    held.append(await session.block_checkout())
    assert held[-1].get() not in manager.dirty


async def destroyed(session: Session, _: Manager, held: Resources) -> None:
    resource = await session.block_checkout()
    try:
        await trio.lowlevel.checkpoint()
    finally:
        session.destroyed(resource)
    held.append(await session.block_checkout())


hooks = pytest.mark.parametrize(
    "hooks",
    [
        whitepool.Hooks(),
        whitepool.Hooks(
            on_create=a_while,
            before_acquire=a_while,
            on_checkout=a_while,
            on_checkin=a_while,
            after_release=a_while,
            on_destroy=a_while,
        ),
    ],
    ids=["without_hooks", "with_hooks"],
)


@hooks
@pytest.mark.parametrize(
    ("operation", "busy"),
    [
        (block_checkout, 0),  # a worker is idle
        (block_checkout, 2),  # one has to be started
        (block_checkout, 3),  # one has to be returned
        (block_checkout_in_vain, 4),  # none is
        (nonblock_checkout, 0),
        (nonblock_checkout, 2),
        (nonblock_checkout_of_a_full_pool, 4),
        (worker_block, 0),
        (worker_block, 2),
        (worker_block, 3),
        (nested_worker_blocks, 1),
        (checkin_of_a_dirty_worker, 0),
        (checkin_of_a_dirty_worker, 2),
        (destroyed, 0),
        (destroyed, 3),
    ],
)
async def test_no_trace_is_left(
    operation: Operation,
    busy: int,
    hooks: whitepool.Hooks,
    moment: Moment,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Wherever a client is cancelled, each worker is either the client's or the pool's."""

    async def scenario(cut: Cut) -> None:
        manager = new_manager()
        held: Resources = []
        async with pool(manager, hooks=hooks) as session, trio.open_nursery() as nursery:
            others = [await session.block_checkout() for _ in range(min(busy, 3))]

            async def return_one() -> None:
                await trio.sleep(0.25)
                session.checkin(others.pop())

            if busy == 3:
                nursery.start_soon(return_one)
            await cut.run(lambda: operation(session, manager, held))
            await check_accounts_of_those_beside(session, others, held)

    async def check_accounts_of_those_beside(
        session: Session, others: Resources, held: Resources
    ) -> None:
        await trio.sleep(1)
        assert session.statistics().in_use == len(others) + len(held)
        for resource in others:
            session.checkin(resource)
        await check_accounts(session, held)

    assert await sweep(moment, scenario) >= 2


# -- The life of a pool --------------------------------------------------------------------------------


@hooks
@pytest.mark.parametrize("failures", [0, 2])
async def test_open_pool_leaves_nothing_open(
    failures: int, hooks: whitepool.Hooks, moment: Moment, autojump_clock: trio.testing.MockClock
) -> None:
    """Wherever the block is cancelled: while it opens, in its middle, or while it closes."""

    async def scenario(cut: Cut) -> None:
        manager = new_manager(failures)

        async def operation() -> None:
            async with pool(manager, hooks=hooks) as session:
                await nested_worker_blocks(session)

        await cut.run(operation)
        assert not manager.shop.alive
        assert not manager.shop.opening

    assert await sweep(moment, scenario) >= 5


@pytest.mark.parametrize("what", ["everything", "the service"])
async def test_run_service_leaves_nothing_open(
    what: str, moment: Moment, autojump_clock: trio.testing.MockClock
) -> None:
    """Wherever the service is cancelled, together with its clients or beneath them."""

    async def scenario(cut: Cut) -> None:
        manager = new_manager()
        service = whitepool.Pool(manager, pool_size=2, max_overflow=1)

        async def everything() -> None:
            async with trio.open_nursery() as nursery:
                session = await nursery.start(service.run_service)
                books.watch(session)
                await worker_block(session)
                await session.safe_shutdown()

        async def client(session: Session) -> None:
            with pytest.raises(whitepool.PoolClosed):
                for _ in range(3):
                    await worker_block(session)
                await session.safe_shutdown()
                await session.block_checkout()

        async def only_the_service() -> None:
            async with trio.open_nursery() as clients:

                class Status(trio.TaskStatus[Session]):
                    def started(self, session: Session) -> None:
                        books.watch(session)
                        clients.start_soon(client, session)

                await service.run_service(task_status=Status())

        with BookChecker() as books:
            await cut.run(everything if what == "everything" else only_the_service)
        assert not manager.shop.alive
        assert not manager.shop.opening

    assert await sweep(moment, scenario) >= (4 if what == "everything" else 3)


@pytest.mark.parametrize("timeout", [0, 0.5, math.inf])
async def test_a_cancelled_shutdown_goes_on(
    timeout: float, moment: Moment, autojump_clock: trio.testing.MockClock
) -> None:
    """New checkouts are refused, waiters are served if there is time, and in the end all is closed."""

    async def scenario(cut: Cut) -> None:
        manager = new_manager()
        ends: list[str] = []

        async def return_late(resource: whitepool.Resource[Tool]) -> None:
            await trio.sleep(1)
            session.checkin(resource)

        async def wait_for_a_worker() -> None:
            try:
                async with session.worker():
                    ends.append("served")
            except whitepool.PoolClosed:
                ends.append("refused")

        async with pool(manager) as session:
            resources = [await session.block_checkout() for _ in range(3)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for_a_worker)
                await trio.testing.wait_all_tasks_blocked()
                for resource in resources:
                    nursery.start_soon(return_late, resource)
                await cut.run(lambda: session.safe_shutdown(timeout))
                begun = cut.completed or cut.at > 0
                if cut.completed:
                    assert session.statistics().state == "closed"
                    assert not manager.shop.alive
                if begun:
                    with pytest.raises(whitepool.PoolClosed):
                        await session.block_checkout()
            if begun:
                await session.safe_shutdown()
                assert session.statistics().state == "closed"
            if cut.completed:
                assert ends == ["served" if timeout == math.inf else "refused"]
            check_books(session)

    assert await sweep(moment, scenario) >= 2
