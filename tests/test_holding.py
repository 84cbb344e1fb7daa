"""Checkouts that last for `held_warning` are reported, and what ended tasks hold is reclaimed."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Tool, Workshop, check_books, hang, open_checked_pool

import whitepool
from whitepool import _holding
from whitepool._entry import HANDED_OVER
from whitepool._observing import TrackingSession, observed
from whitepool.postgres import PostgresSession

Session = whitepool.Session[Tool]
Kept = list[whitepool.Resource[Tool]]

# The shortest of the periods of the pools here is 10 seconds, less a tenth.
LATE = 0.05 * 0.9 * 10 + 0.01
"""Seconds. What is due waits for others, for up to a twentieth of the shortest period."""


@pytest.fixture
def shop() -> Workshop:
    return Workshop()


@pytest.fixture
async def session(shop: Workshop) -> AsyncIterator[Session]:
    """A pool of two that reports a checkout after ten seconds. A test has to ask for the clock, too."""
    async with open_checked_pool(
        shop.make, name="shop", pool_size=2, max_overflow=0, held_warning=10, shutdown_timeout=0
    ) as session:
        yield session


class Log:
    """What was logged, by the name of the event."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __call__(self, event: str) -> list[Any]:
        return [record for record in self._caplog.records if vars(record).get("event") == event]

    def one(self, event: str) -> Any:
        (record,) = self(event)
        return record

    @property
    def events(self) -> list[str]:
        return [vars(record)["event"] for record in self._caplog.records]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    return Log(caplog)


def line_of(text: str) -> int:
    """Return the number of the line of this file that contains a text, of which there is one."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if line.endswith(text))
    return number


async def end_with_a_worker(session: Session, kept: Kept) -> None:
    """Be a task that ends without having returned its worker, which another still refers to."""
    kept.append(await session.block_checkout())


async def spawn_and_end(session: Session) -> whitepool.Resource[Tool]:
    """Have a task end with a worker, and return its resource."""
    kept: Kept = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_with_a_worker, session, kept)
    return kept[0]


# -- The report ----------------------------------------------------------------------------------------


async def dawdle(session: Session, seconds: float) -> None:
    async with session.worker(timeout=math.inf):
        await work(seconds)


async def work(seconds: float) -> None:
    await trio.sleep(seconds)  # it works


async def test_a_long_checkout_is_reported_once(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """With the name of its task, and when it is due, or a little later."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dawdle, session, 95, name="the dawdler")
        await trio.sleep(9.99)
        assert not log.events
        await trio.sleep(LATE)
        record = log.one("held_too_long")
        assert record.levelname == "WARNING"
        assert (record.pool, record.task, record.task_ended) == ("shop", "the dawdler", False)
        assert 10 <= record.seconds <= 10 + LATE
        await trio.sleep(80)
        assert log.events == ["held_too_long"]
    assert log.events == ["held_too_long", "returned_late"]


async def test_each_long_checkout_is_reported(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """Also those that come due together, and the second one of the same worker."""
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dawdle, session, 15, name="one")
            nursery.start_soon(dawdle, session, 15, name="two")
    assert sorted(record.task for record in log("held_too_long")) == ["one", "one", "two", "two"]
    assert len(log("returned_late")) == 4


async def test_a_report_says_where_the_task_is(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """Each coroutine with its file and line, on one line; of Trio's own, only what was called."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dawdle, session, 15)
    message = log.one("held_too_long").message
    frames = log.one("held_too_long").frames
    assert "\n" not in message
    first, second, third = frames.split(" > ")
    assert first == f"{__file__}:{line_of('await work(seconds)')} in dawdle"
    assert second == f"{__file__}:{line_of('# it works')} in work"
    place, _, function = third.partition(" in ")
    assert os.path.join("trio", "_timeouts.py") in place
    assert function == "sleep"


async def test_a_report_looks_through_async_generators(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """A task may wait in one; and in an object of its own, where only what is around it is known."""

    async def ticks() -> AsyncIterator[None]:
        await trio.sleep(15)
        yield

    class Custom:
        def __init__(self) -> None:
            self._steps = trio.sleep(15).__await__()

        def __await__(self) -> Any:
            return self

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return next(self._steps)

        def send(self, value: Any) -> Any:
            return self._steps.send(value)

        def __getattr__(self, name: str) -> Any:
            raise ValueError("there is nothing to see")

    async def generating() -> None:
        async with session.worker():
            async for _ in ticks():
                pass

    async def customary() -> None:
        async with session.worker():
            await Custom()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(generating)
        nursery.start_soon(customary)
    frames = [record.frames.split(" > ") for record in log("held_too_long")]
    named = [[frame.rpartition(" in ")[2] for frame in chain] for chain in frames]
    assert sorted(named) == [["customary"], ["generating", "ticks", "sleep"]]


async def test_a_report_is_bounded(session: Session, autojump_clock: MockClock, log: Log) -> None:
    """The innermost frames are told: what is outside of them is mostly a framework."""

    async def deep(level: int) -> None:
        if level:
            await deep(level - 1)
        else:
            await dawdle(session, 15)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(deep, 100)
    frames = log.one("held_too_long").frames.split(" > ")
    assert len(frames) == _holding.MOST_FRAMES
    assert [frame.rpartition(" in ")[2] for frame in frames[-4:]] == ["deep", "dawdle", "work", "sleep"]


async def test_checkouts_that_come_back_in_time_are_not_reported(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """However many there are, however long the tasks go on, and whatever was returned late before."""
    async with trio.open_nursery() as nursery:
        for _ in range(4):

            async def client() -> None:
                for _ in range(5):
                    await dawdle(session, 9.5)
                    await trio.sleep(20)

            nursery.start_soon(client)
    assert not log.events
    await dawdle(session, 15)
    await dawdle(session, 9)
    assert log.events == ["held_too_long", "returned_late"]


async def test_a_worker_that_is_returned_late_is_reported(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """With its task, and for how long it was out, however it is returned."""
    for give_back in (session.checkin, session.destroyed):
        resource = await session.block_checkout()
        await trio.sleep(33)
        give_back(resource)
    await dawdle(session, 20)
    own = trio.lowlevel.current_task().name
    told = [(record.task, record.seconds) for record in log("returned_late")]
    assert told == [(own, 33), (own, 33), (own, 20)]
    assert all(record.levelname == "WARNING" for record in log("returned_late"))


async def test_the_next_client_of_a_late_worker_is_not_reported(
    shop: Workshop, autojump_clock: MockClock, log: Log
) -> None:
    """Also if it gets it in the same instant in which the last one was reported and returned it."""
    async with open_checked_pool(
        shop.make, pool_size=1, max_overflow=0, held_warning=10, check_interval=math.inf
    ) as session:
        resource = await session.block_checkout()
        while not log("held_too_long"):
            await trio.sleep(0.05)
        (entry,) = session._supervisor.roster.entries
        entry.reported_at = trio.current_time()  # as if it had been reported just now
        session.checkin(resource)
        assert len(log("returned_late")) == 1
        resource = await session.block_checkout()
        assert entry.in_use_since == entry.reported_at
        session.checkin(resource)
        assert len(log("returned_late")) == 1
        resource = await session.block_checkout()
        await trio.sleep(11)
        session.checkin(resource)
        assert len(log("held_too_long")) == len(log("returned_late")) == 2


async def test_a_task_that_waited_is_reported_from_when_it_was_served(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """And under its own name: the time in the queue is not its own."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dawdle, session, 9)
        nursery.start_soon(dawdle, session, 9)
        await wait_all_tasks_blocked()
        nursery.start_soon(dawdle, session, 15, name="waited")
    record = log.one("held_too_long")
    assert record.task == "waited"
    assert 10 <= record.seconds <= 10 + LATE


async def test_a_worker_on_its_way_to_its_client_is_not_reported(
    autojump_clock: MockClock, log: Log, shop: Workshop
) -> None:
    """A task that was served, and has not had its turn since, can't be told yet."""
    async with open_checked_pool(shop.make, pool_size=1, held_warning=10) as session:
        resource = await session.block_checkout()
        (entry,) = session._supervisor.roster.entries
        entry.client = None
        await trio.sleep(15)
        assert not log.events
        session.checkin(resource)


async def test_a_task_that_waits_for_its_nursery_is_reported(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """It is at the end of the block of that nursery."""

    async def client() -> None:
        async with session.worker(), trio.open_nursery() as nursery:
            nursery.start_soon(work, 15)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client)
    assert " in client > " in log.one("held_too_long").frames


# -- Ended tasks ---------------------------------------------------------------------------------------


async def test_what_an_ended_task_holds_is_reclaimed(
    session: Session, autojump_clock: MockClock, shop: Workshop, log: Log
) -> None:
    """Its worker is closed and replaced, as a leaked one. What refers to the resource is told."""
    resource = await spawn_and_end(session)
    await trio.sleep(9.9)
    tool = resource.get()
    assert session.statistics().leaked == 0
    await trio.sleep(LATE + 0.1)
    record = log.one("held_too_long")
    assert record.task_ended
    assert record.task.endswith("end_with_a_worker")
    assert record.frames == ""
    assert log.one("worker_leaked").task == record.task
    assert tool.closed
    assert len(shop.alive) == 2
    now = session.statistics()
    assert (now.leaked, now.idle, now.in_use) == (1, 2, 0)
    assert resource.lost.is_set()
    with pytest.raises(whitepool.WorkerLost, match=r"hand_over\(\)"):
        resource.get()
    with pytest.raises(whitepool.WorkerLost):
        resource.get()
    assert log.events == ["held_too_long", "worker_leaked"]


@pytest.mark.parametrize("how", ["checkin", "destroyed"])
async def test_a_reclaimed_worker_may_be_returned(
    session: Session, autojump_clock: MockClock, log: Log, how: str
) -> None:
    """It is no error, and changes nothing: the log has a line of it."""
    resource = await spawn_and_end(session)
    await trio.sleep(15)
    getattr(session, how)(resource)
    now = session.statistics()
    assert (now.leaked, now.destroyed, now.idle, now.in_use) == (1, 0, 2, 0)
    assert log.events == ["held_too_long", "worker_leaked", "returned_late"]
    with pytest.raises(whitepool.NotCheckedOut):
        session.checkin(resource)
    check_books(session)


async def test_a_worker_that_is_closed_for_long_is_reported_no_more(
    shop: Workshop, autojump_clock: MockClock, log: Log
) -> None:
    """Neither one that was reclaimed, nor one that was closed under its client before it was due."""
    shop.before_close = hang
    async with open_checked_pool(
        shop.make, pool_size=2, max_overflow=0, held_warning=10, close_timeout=100
    ) as session:
        resource = await spawn_and_end(session)
        await trio.sleep(50)
        assert log.events == ["held_too_long", "worker_leaked"]
        with pytest.warns(ResourceWarning):
            await session.block_checkout()
            gc.collect()
        await trio.sleep(30)
        assert log.events == ["held_too_long", "worker_leaked", "worker_leaked"]
        assert len(session._supervisor.roster.entries) == 2
        session.checkin(resource)


async def test_a_reclaimed_worker_may_be_forgotten(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """The garbage collector finds no second leak, and Python warns of none."""
    resource = await spawn_and_end(session)
    await trio.sleep(15)
    del resource
    await wait_all_tasks_blocked()
    assert session.statistics().leaked == 1
    assert log.events == ["held_too_long", "worker_leaked"]


async def test_a_task_may_end_after_the_report(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """Then its worker is reclaimed when maintenance looks again: within another `held_warning`."""
    kept: Kept = []

    async def client() -> None:
        await end_with_a_worker(session, kept)
        await trio.sleep(35)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client)
    assert log.events == ["held_too_long"]
    assert session.statistics().leaked == 0
    await trio.sleep(10 + LATE)
    assert log.events == ["held_too_long", "worker_leaked"]
    assert session.statistics().leaked == 1


async def test_what_an_ended_task_held_serves_a_waiter(
    session: Session, autojump_clock: MockClock
) -> None:
    """The worker that replaces it does. Without `held_warning`, the task would wait for ever."""
    kept = [await spawn_and_end(session), await spawn_and_end(session)]
    with trio.fail_after(12):
        async with session.worker(timeout=math.inf):
            pass
    assert len(kept) == 2


async def test_a_cancelled_or_failed_task_has_ended_too(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """However it ended."""
    kept: Kept = []

    async def fail() -> None:
        await end_with_a_worker(session, kept)
        raise ValueError("no")

    async def be_cancelled() -> None:
        await end_with_a_worker(session, kept)
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel, scope)
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()

    async def cancel(scope: trio.CancelScope) -> None:
        scope.cancel()

    with pytest.RaisesGroup(ValueError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_cancelled)
    await trio.sleep(15)
    assert len(log("worker_leaked")) == 2


async def test_a_block_whose_task_has_ended_is_reclaimed(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """An async generator can outlive the task that entered the block in it."""

    async def workers() -> AsyncIterator[Tool]:
        async with session.worker() as tool:
            yield tool

    generator = workers()

    async def first() -> None:
        await anext(generator)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
    await trio.sleep(15)
    assert log.events == ["held_too_long", "worker_leaked"]
    await generator.aclose()  # type: ignore[attr-defined]
    assert log.events == ["held_too_long", "worker_leaked", "returned_late"]
    check_books(session)


# -- Handed over ---------------------------------------------------------------------------------------


async def test_what_was_handed_over_is_not_reclaimed(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """It is reported, once, without a task, and it says when it comes back."""
    kept: Kept = []

    async def client() -> None:
        await end_with_a_worker(session, kept)
        kept[0].hand_over()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client)
    await trio.sleep(60)
    record = log.one("held_too_long")
    assert (record.task, record.task_ended, record.frames) == ("handed over", False, "")
    assert not kept[0].get().closed
    session.checkin(kept[0])
    assert log.events == ["held_too_long", "returned_late"]
    assert session.statistics().leaked == 0


async def test_the_next_checkout_is_not_handed_over(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """It lasts for one checkout."""
    resource = await session.block_checkout()
    resource.hand_over()
    session.checkin(resource)
    kept = await spawn_and_end(session)
    await trio.sleep(15)
    assert log.events == ["held_too_long", "worker_leaked"]
    del kept


async def test_a_returned_resource_cannot_be_handed_over(
    session: Session, autojump_clock: MockClock
) -> None:
    """There is nothing to hand over: it would be the next client's checkout."""
    resource = await session.block_checkout()
    session.checkin(resource)
    with pytest.raises(whitepool.NotCheckedOut):
        resource.hand_over()


async def test_a_pool_that_reports_nothing_may_be_told(autojump_clock: MockClock) -> None:
    """A library can't know whether the pool has `held_warning`."""
    async with whitepool.open_pool(Workshop().make, pool_size=1) as session:
        resource = await session.block_checkout()
        resource.hand_over()
        session.checkin(resource)
        async with session.worker():
            pass


@pytest.mark.parametrize("hands_over", [True, False])
async def test_a_checkout_from_a_thread_of_its_own(shop: Workshop, log: Log, hands_over: bool) -> None:
    """Its task is Trio's, and ends at once, so the thread says that it has the resource."""
    async with whitepool.open_pool(
        shop.make, pool_size=1, held_warning=0.2, check_interval=math.inf
    ) as session:
        token = trio.lowlevel.current_trio_token()
        taken, done = trio.Event(), threading.Event()
        kept: Kept = []

        def thread() -> None:
            kept.append(trio.from_thread.run(session.block_checkout, trio_token=token))
            if hands_over:
                kept[0].hand_over()
            trio.from_thread.run_sync(taken.set, trio_token=token)
            done.wait(60)

        runner = threading.Thread(target=thread)
        runner.start()
        try:
            await taken.wait()
            with trio.fail_after(60):
                while not log.events:
                    await trio.sleep(0.01)
        finally:
            done.set()
            await trio.to_thread.run_sync(runner.join)
        assert len(log("worker_leaked")) == (not hands_over)
        assert shop.tools[0].closed == (not hands_over)
        session.checkin(kept[0])


async def test_a_checkout_outside_of_any_task(
    session: Session, autojump_clock: MockClock, log: Log
) -> None:
    """An instrument, or a host loop, has no task: the resource belongs to none, and is not lost."""
    kept: Kept = []

    class Taker(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            if not kept:
                kept.append(session.checkout_nowait())

    taker = Taker()
    trio.lowlevel.add_instrument(taker)
    await wait_all_tasks_blocked()
    trio.lowlevel.remove_instrument(taker)
    (resource,) = kept
    await trio.sleep(15)
    assert log.one("held_too_long").task == HANDED_OVER
    session.checkin(resource)
    assert session.statistics().idle == 2


# -- Kinds of sessions ---------------------------------------------------------------------------------


class Numbers:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.waited: list[float] = []
        self.used: list[float] = []
        self.on_checkout: Callable[[float], None] = self.waited.append
        self.on_return: Callable[[float], None] = self.used.append

    def on_wait(self, waited: float, error: BaseException | None) -> None:
        pytest.fail("no checkout has to wait")


async def test_with_an_observer(session: Session, autojump_clock: MockClock, log: Log) -> None:
    """Both see each checkout."""
    numbers = Numbers()
    watched = observed(session, numbers)
    assert type(watched).__name__ == "ObservedTrackingSession"
    await dawdle(watched, 15)
    assert (numbers.waited, numbers.used) == ([0], [15])
    assert log.events == ["held_too_long", "returned_late"]
    kept = await spawn_and_end(watched)
    await trio.sleep(15)
    assert log.events[2:] == ["held_too_long", "worker_leaked"]
    watched.checkin(kept)
    resource = await watched.block_checkout()
    await trio.sleep(15)
    session.checkin(resource)  # each takes what the other gave
    assert log.events[4:] == ["returned_late", "held_too_long", "returned_late"]


async def test_without_the_option_nothing_is_noted(autojump_clock: MockClock, log: Log) -> None:
    """The session is the plain one, and no checkout pays for a task to be noted."""
    async with open_checked_pool(Workshop().make, pool_size=1) as session:
        assert type(session) is whitepool.Session
        kept = await spawn_and_end(session)
        (entry,) = session._supervisor.roster.entries
        await trio.sleep(10_000)
        assert entry.client is None
        assert entry.reported_at == -math.inf
        assert not kept.get().closed
        session.checkin(kept)
    assert not log.events


async def test_with_the_option_an_idle_worker_keeps_no_task(
    session: Session, autojump_clock: MockClock
) -> None:
    """A task that has returned its worker may be collected, with all that it had."""
    assert isinstance(session, TrackingSession)
    async with session.worker():
        clients = [entry.client for entry in session._supervisor.roster.entries]
        assert trio.lowlevel.current_task() in clients
    assert not any(entry.client for entry in session._supervisor.roster.entries)


async def test_with_postgres(dsn: str, log: Log) -> None:
    """A session of connections is tracked too; a reclaimed connection is closed."""
    async with whitepool.postgres.open_pool(
        dsn, pool_size=1, max_overflow=0, held_warning=0.3, check_interval=math.inf
    ) as session:
        assert isinstance(session, PostgresSession)
        assert isinstance(session, TrackingSession)
        kept: list[Any] = []

        async def end() -> None:
            kept.append(await session.block_checkout())

        async with trio.open_nursery() as nursery:
            async with session.connection() as connection:
                await connection.execute("SELECT pg_sleep(0.6)")
            nursery.start_soon(end)
        record = log.one("held_too_long")
        assert " in test_with_postgres > " in record.frames
        assert " in wait" in record.frames
        assert len(log("returned_late")) == 1
        with trio.fail_after(60):
            await kept[0].lost.wait()
            async with session.connection(timeout=math.inf) as connection:
                assert not connection.closed
        assert len(log("worker_leaked")) == 1
        session.checkin(kept[0])
        assert session.statistics().leaked == 1


async def test_it_works_at_the_edges_of_a_pools_life(autojump_clock: MockClock, log: Log) -> None:
    """While the pool drains, a checkout is reported, and an ended task is no longer waited for."""
    async with trio.open_nursery() as nursery:
        pool = whitepool.Pool(Workshop().make, pool_size=1, held_warning=10)
        session = await nursery.start(pool.run_service)
        kept = await spawn_and_end(session)
        with trio.fail_after(10 + LATE):
            await session.safe_shutdown()
    assert log.events == ["held_too_long", "worker_leaked"]
    session.checkin(kept)
