"""A server that has no more connections to give: a pool lives with what it has, and shares it."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, nothing, open_checked_pool, raising

import whitepool
from benchmarks.model_server import ModelManager, ModelServer, open_fleet, simulate
from whitepool import _sharing as sharing
from whitepool._entry import Entry, State
from whitepool._options import Options
from whitepool._roster import Roster
from whitepool._statistics import COUNTERS

Session = whitepool.Session[Tool]


class Crowded(Manager):
    """A manager of tools of which a server has only so many. Several pools may share it."""

    def __init__(self, places: int) -> None:
        super().__init__(Workshop())
        self.places = places
        self.refused = 0
        self.shop.before_open = self._take_a_place

    async def _take_a_place(self, _: int) -> None:
        await trio.sleep(0.01)
        if len(self.shop.alive) >= self.places:
            self.refused += 1
            raise OSError("too many clients")

    def _is_full(self, error: Exception) -> bool:
        return "too many" in str(error)


def full_events(caplog: pytest.LogCaptureFixture) -> list[Any]:
    events = [record.__dict__["event"] for record in caplog.records]
    return [event for event in events if event not in ("pool_opened", "pool_closed")]


async def keep_busy(
    session: Session, clients: int, served: dict[int, float] | None = None, *, seconds: float = 0.1
) -> None:
    """Keep so many clients at work, each for so many seconds at a time. It never ends."""

    async def client(number: int) -> None:
        while True:
            async with session.worker(math.inf):
                await trio.sleep(seconds)
            if served is not None:
                served.setdefault(number, trio.current_time())

    async with trio.open_nursery() as nursery:
        for number in range(clients):
            nursery.start_soon(client, number)


# -- A pool that is refused ----------------------------------------------------------------------------


async def test_it_does_not_fail_the_opening(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """The pool is content with what it gets, and grows when there is room; it is told twice in all."""
    caplog.set_level("INFO", "whitepool")
    manager = Crowded(places=2)
    async with open_checked_pool(manager, pool_size=5, start_timeout=5) as session:
        assert trio.current_time() < 1
        await wait_all_tasks_blocked()
        assert session.statistics().idle == 2
        await trio.sleep(600)
        assert session.statistics().state == "ready"
        assert full_events(caplog) == ["server_full"]
        (told,) = [record for record in caplog.records if record.__dict__["event"] == "server_full"]
        assert (told.__dict__["open"], told.levelname) == (2, "WARNING")
        manager.places = 9
        await trio.sleep(1.3 * sharing.FULL_FOR)
        assert session.statistics().idle == 5
        assert full_events(caplog) == ["server_full", "start_recovered"]
        assert session.statistics().last_error is None
        session.destroyed(await session.block_checkout())
        await trio.sleep(1)
        assert full_events(caplog) == ["server_full", "start_recovered"]


async def test_without_any_the_opening_fails(autojump_clock: MockClock) -> None:
    """A pool that has no worker is of no use. It tries twice a second at first, and then once."""
    manager = Crowded(places=0)
    with pytest.raises(whitepool.PoolStartError, match=r"0 of 5 workers.*too many clients"):
        async with whitepool.open_pool(manager, pool_size=5, max_starting=1, start_timeout=100):
            pass
    assert 85 <= manager.refused <= 125


async def test_an_opening_takes_the_first_place(autojump_clock: MockClock) -> None:
    """It waits for one worker, and tries often enough to get it soon."""
    manager = Crowded(places=0)

    async def make_room() -> None:
        await trio.sleep(3)
        manager.places = 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_room)
        async with open_checked_pool(manager, pool_size=5) as session:
            assert trio.current_time() <= 3 + sharing.GAP + 0.02
            assert session.statistics().idle == 1


@pytest.mark.parametrize("options", [{"pool_size": 2}, {"pool_size": 2, "lazy": True}])
async def test_overflow_that_is_refused(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """It is told once, however long tasks wait; attempts are few, but a place is found in seconds."""
    caplog.set_level("INFO", "whitepool")
    manager = Crowded(places=2)
    async with open_checked_pool(manager, max_overflow=3, **options) as session:
        held = [await session.block_checkout() for _ in range(2)]
        with pytest.raises(whitepool.CheckoutTimeout, match="too many clients"):
            await session.block_checkout(60)
        assert 10 <= session.statistics().start_failures <= 31
        assert full_events(caplog) == ["server_full"]
        manager.places = 3
        held.append(await session.block_checkout(4.1))  # two seconds for each worker that it has
        await trio.sleep(60)
        assert full_events(caplog) == ["server_full", "start_recovered"]
        for resource in held:
            session.checkin(resource)


async def test_a_worker_that_was_waited_for_is_not_called_in(autojump_clock: MockClock) -> None:
    """A saturated pool that has at last got a place serves with it, before it leaves one to others."""
    for _ in range(100):
        manager = Crowded(places=2)
        async with open_checked_pool(manager, pool_size=2, max_overflow=3) as session:
            held = [await session.block_checkout() for _ in range(2)]
            with pytest.raises(whitepool.CheckoutTimeout):
                await session.block_checkout(20)
            manager.places = 3
            held.append(await session.block_checkout(3.2))
            for resource in held:
                session.checkin(resource)


async def test_workers_may_bring_the_manager_that_knows(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """A bare factory does not know what a refusal means. The class of its workers may."""
    manager = Crowded(places=1)

    class Seat(Tool):
        __worker_manager__ = manager

    async def make() -> Seat:
        await manager._take_a_place(0)
        seat = Seat(manager.shop, 1)
        manager.shop.tools.append(seat)
        return seat

    async with open_checked_pool(make, pool_size=2, min_ready=1, max_starting=1) as session:
        await trio.sleep(1)
        assert session.statistics().idle == 1
    assert full_events(caplog) == ["server_full"]


async def test_another_failure_is_told_although_the_server_was_full(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """What is quiet is only the want of places. A server that is down is tried as often as ever."""
    caplog.set_level("INFO", "whitepool")
    manager = Crowded(places=1)
    async with open_checked_pool(manager, pool_size=2) as session:
        await trio.sleep(60)
        manager.shop.before_open = raising(OSError("connection refused"))
        before = session.statistics().start_failures
        await trio.sleep(100)
        assert full_events(caplog)[:2] == ["server_full", "start_failed"]
        assert session.statistics().start_failures > before + 50
        manager.shop.before_open = nothing
        await trio.sleep(1)
        assert full_events(caplog)[-1] == "start_recovered"
        assert full_events(caplog).count("start_recovered") == 1
        assert session.statistics().idle == 2


async def test_a_full_server_is_asked_for_one_at_a_time(autojump_clock: MockClock) -> None:
    """Also when it has places again: other pools want them, too."""
    manager = Crowded(places=2)
    async with (
        open_checked_pool(manager, pool_size=2, max_overflow=4) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(keep_busy, session, 20)
        await trio.sleep(10)
        before = len(manager.shop.alive)
        manager.shop.most_opening = 0
        manager.places = 20
        while len(manager.shop.alive) < 6:
            await trio.sleep(0.1)
            assert len(manager.shop.alive) <= before + 1
            before = max(before, len(manager.shop.alive))
        assert manager.shop.most_opening == 1
        nursery.cancel_scope.cancel()


async def test_a_pool_that_gets_a_place_pauses(autojump_clock: MockClock) -> None:
    """Until each pool that has none has tried, too: the next place is theirs."""
    manager = Crowded(places=2)
    opened: list[float] = []
    hooks = whitepool.Hooks(on_create=lambda _: opened.append(trio.current_time()))
    async with (
        open_checked_pool(manager, pool_size=5, hooks=hooks) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(partial(keep_busy, session, 5, seconds=math.inf))
        await trio.sleep(1)
        manager.places = 5
        with trio.fail_after(3 + 2 * sharing.GAP + 0.1):
            while len(opened) < 5:
                await trio.sleep(0.01)
        for before, after in pairwise(opened[2:]):
            assert after - before - 0.01 == pytest.approx(sharing.GAP)
        nursery.cancel_scope.cancel()


async def test_a_task_that_waits_is_not_forgotten_for_a_start_that_is_given_up(
    evenly: None, autojump_clock: MockClock
) -> None:
    """A worker is opened, and the next start has to wait, while another one hangs: a resize ends it."""
    manager = Crowded(places=2)
    slow = {3: 0.01, 4: 2.0, 5: math.inf}

    async def open_slowly(attempt: int) -> None:
        await trio.sleep(slow.get(attempt, 0.01))
        if attempt == 3:
            raise OSError("too many clients")

    manager.shop.before_open = open_slowly
    async with (
        open_checked_pool(manager, pool_size=2, max_overflow=3) as session,
        trio.open_nursery() as nursery,
    ):
        first, _ = await session.block_checkout(), await session.block_checkout()
        nursery.start_soon(partial(keep_busy, session, 3, seconds=math.inf))
        await trio.sleep(2.1)
        assert (session.statistics().in_use, session.statistics().starting) == (3, 1)
        session.resize(2, 1)
        session.destroyed(first)
        await trio.sleep(sharing.GAP)
        assert session.statistics().in_use == 3
        nursery.cancel_scope.cancel()


async def test_a_place_that_was_left_is_asked_for_when_its_time_is_over(
    autojump_clock: MockClock,
) -> None:
    """However long the pause after the last refusal is: with it, the pool would lose more than that."""
    manager = Crowded(places=5)
    asked: list[float] = []
    left: list[float] = []

    async def note_and_open(attempt: int) -> None:
        asked.append(trio.current_time())
        await manager._take_a_place(attempt)

    async def note(_: Tool) -> None:
        left.append(trio.current_time())

    manager.shop.before_open = note_and_open
    manager.shop.before_close = note
    async with (
        open_checked_pool(manager, pool_size=5, max_overflow=1) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(keep_busy, session, 20)
        await trio.sleep(60)
        assert manager.refused
        over = [time + sharing.GAP for time in left if time + sharing.GAP < trio.current_time()]
        assert len(over) > 3
        for time in over:
            assert any(time - 0.01 <= attempt <= time + 0.01 for attempt in asked)
        nursery.cancel_scope.cancel()


# -- What it gives up ----------------------------------------------------------------------------------


async def test_workers_that_are_not_needed_go_one_by_one(autojump_clock: MockClock) -> None:
    """On a full server only, down to those in use, and one in any case. They come back later."""
    manager = Crowded(places=5)
    async with open_checked_pool(manager, pool_size=5, max_overflow=1, overflow_ttl=999) as session:
        await trio.sleep(100)
        assert session.statistics().idle == 5
        held = [await session.block_checkout() for _ in range(5)]
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(0.5)
        for resource in held[2:]:
            session.checkin(resource)
        begun = trio.current_time()
        for expected in (4, 3, 2):
            with trio.fail_after(5):
                while session.statistics().retired < 5 - expected:
                    await trio.sleep(0.05)
            assert len(manager.shop.alive) == expected
        assert sharing.BUSY_FOR + 1.5 * sharing.PACE < trio.current_time() - begun < 6
        await trio.sleep(5)
        assert session.statistics().in_use == 2
        for resource in held[:2]:
            session.checkin(resource)
        await trio.sleep(5)
        assert session.statistics().idle == 1
        assert session.statistics().state == "ready"
        await trio.sleep(1.3 * sharing.FULL_FOR)
        assert session.statistics().idle == 5


@pytest.mark.parametrize("how", ["max_lifetime", "retire_all", "idle_timeout"])
async def test_what_is_to_be_replaced_goes_without_a_replacement(
    how: str, autojump_clock: MockClock
) -> None:
    """One at a time: a full server gives no other first. (`max_lifetime` holds there, too.)"""
    manager = Crowded(places=5)
    options: dict[str, Any] = {} if how == "retire_all" else {how: 60}
    fewest = 5
    async with open_checked_pool(manager, pool_size=5, max_overflow=5, **options) as session:
        first = list(manager.shop.tools)
        if how == "retire_all":
            session.retire_all()
        for _ in range(3000):
            await trio.sleep(0.05)
            fewest_now = len(manager.shop.alive)
            assert fewest_now >= fewest - 1  # one at a time
            fewest = fewest_now
        assert not set(first) & set(manager.shop.alive)
        assert session.statistics().idle >= 1


async def test_what_is_in_use_and_to_be_replaced_gets_no_replacement_before(
    autojump_clock: MockClock,
) -> None:
    """It would not be needed for a second, be closed, and be opened again, without end."""
    manager = Crowded(places=2)
    async with open_checked_pool(manager, pool_size=5) as session:
        first, second = await session.block_checkout(), await session.block_checkout()
        session.retire_all()
        session.checkin(second)
        await trio.sleep(600)
        # The other place is taken when the server may have places again, and given up when it has none.
        assert len(manager.shop.tools) <= 3 + 600 / (0.75 * sharing.FULL_FOR)
        session.checkin(first)
        await trio.sleep(10)
        assert all(tool.closed for tool in manager.shop.tools[:2])
        assert session.statistics().idle == 1


async def test_under_load_too(autojump_clock: MockClock) -> None:
    """Its place is taken again at once, so the pool loses nothing."""
    manager = Crowded(places=3)
    async with (
        open_checked_pool(manager, pool_size=3, max_overflow=3, max_lifetime=60) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(partial(keep_busy, session, 12, seconds=0.5))
        for _ in range(20):
            await trio.sleep(15)
            entries = session._supervisor.roster.entries
            oldest = min(entry.opened_at for entry in entries if entry.is_open)
            assert trio.current_time() - oldest < 60 + 3 * sharing.EXCHANGE_PAUSE
            assert len(manager.shop.alive) >= 2
        nursery.cancel_scope.cancel()


async def test_the_place_of_one_that_went_is_taken_at_once(autojump_clock: MockClock) -> None:
    """However long the pause after the last refusal is: its place is free in that moment."""
    manager = Crowded(places=2)
    asked: list[float] = []
    left: list[float] = []

    async def note_and_open(attempt: int) -> None:
        asked.append(trio.current_time())
        await manager._take_a_place(attempt)

    async def note(_: Tool) -> None:
        left.append(trio.current_time())

    manager.shop.before_open = note_and_open
    async with (
        open_checked_pool(manager, pool_size=2, max_overflow=2) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(keep_busy, session, 4)
        await trio.sleep(5)
        manager.shop.before_close = note
        session.retire_all()
        while len(left) < 2:
            await trio.sleep(0.1)
        for time in left:
            assert any(time <= attempt < time + 0.01 for attempt in asked)
        nursery.cancel_scope.cancel()


async def test_the_last_worker_stays_while_tasks_wait(autojump_clock: MockClock) -> None:
    """However old it is."""
    manager = Crowded(places=1)
    async with (
        open_checked_pool(manager, pool_size=1, max_overflow=1) as session,
        trio.open_nursery() as n,
    ):
        n.start_soon(keep_busy, session, 3)
        await trio.sleep(1)
        session.retire_all()
        await trio.sleep(60)
        assert session.statistics().retired == 0
        n.cancel_scope.cancel()


# -- A pool that has all it may have -------------------------------------------------------------------


@pytest.mark.parametrize("clients", [4, 12])
async def test_overflow_is_a_loan(clients: int, autojump_clock: MockClock) -> None:
    """A saturated pool leaves a place to others, and takes it again if none has come, ever less often.

    One in which no task waits keeps all of them.
    """
    manager = Crowded(places=99)
    async with (
        open_checked_pool(manager, pool_size=2, max_overflow=2) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(partial(keep_busy, session, clients, seconds=0.3))
        await trio.sleep(1)
        missing, fewest = 0.0, 4
        for _ in range(4000):
            await trio.sleep(0.3)
            fewest = min(fewest, session.statistics().in_use)
            missing += 0.3 * (4 - session.statistics().in_use)
        if clients == 4:
            assert session.statistics().retired == 0
        else:
            assert fewest == 3  # one at a time
            assert 10 < session.statistics().retired < 32
            assert missing < 0.01 * 4 * 1200
        assert manager.refused == 0
        nursery.cancel_scope.cancel()


async def test_a_pool_without_overflow_keeps_its_size(autojump_clock: MockClock) -> None:
    """`pool_size` workers are kept, as long as the pool has not learnt that the server is full."""
    manager = Crowded(places=3)
    async with (
        open_checked_pool(manager, pool_size=3, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(partial(keep_busy, session, 12, seconds=0.5))
        await trio.sleep(300)
        assert session.statistics().retired == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("pool_size", "places"), [(5, 10), (2, 7), (0, 10)])
async def test_a_late_pool_gets_its_share(
    pool_size: int, places: int, autojump_clock: MockClock
) -> None:
    """Of one that has taken every place, and is saturated: the first soon, and then more."""
    random.seed(7)
    manager = Crowded(places)
    options: dict[str, Any] = {"pool_size": pool_size, "max_overflow": 10 - pool_size, "min_ready": 0}
    async with whitepool.open_pool(manager, **options) as first, trio.open_nursery() as nursery:
        nursery.start_soon(keep_busy, first, 20)
        await trio.sleep(30)
        assert len(manager.shop.alive) >= places - 1
        begun = trio.current_time()
        async with whitepool.open_pool(manager, **options) as late:
            served: dict[int, float] = {}
            nursery.start_soon(keep_busy, late, 20, served)
            await trio.sleep(60)
            assert min(served.values()) - begun < 1.25 * sharing.GAP / sharing.PRICE / places + 5
            at_work = [0, 0]
            # Where all is overflow, up to 12 % of the places were idle in a minute, and 7 % in four.
            for _ in range(2400):
                await trio.sleep(0.1)
                at_work[0] += first.statistics().in_use
                at_work[1] += late.statistics().in_use
            assert sum(at_work) > 0.9 * 2400 * places
            # Two alone share less evenly than many: a place is seldom wanted in the moment it is left.
            assert max(at_work) < 9 * min(at_work)
            nursery.cancel_scope.cancel()


async def test_a_crash_is_repaired_while_a_place_is_left(autojump_clock: MockClock) -> None:
    """What the pool leaves to others is one place, and not two."""
    manager = Crowded(places=99)
    async with (
        open_checked_pool(manager, pool_size=2, max_overflow=2) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(keep_busy, session, 12)
        while not session.statistics().retired:
            await trio.sleep(0.01)
        assert len(manager.shop.alive) == 3
        manager.dead.add(manager.shop.alive[0])
        await trio.sleep(0.3)
        assert session.statistics().lost == 1
        assert len(manager.shop.alive) == 3
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def called_in(
    pool_size: int, max_overflow: int, *, waiting: int = 1
) -> AsyncIterator[tuple[Crowded, Session, list[whitepool.Resource[Tool]]]]:
    """Open a pool whose workers are all held, while tasks wait, until one is called in."""
    manager = Crowded(places=99)
    async with (
        open_checked_pool(manager, pool_size=pool_size, max_overflow=max_overflow) as session,
        trio.open_nursery() as nursery,
    ):
        held = [await session.block_checkout() for _ in range(pool_size + max_overflow)]
        for _ in range(waiting):
            nursery.start_soon(hold, session)
        await trio.sleep(2)
        assert session._supervisor.sharing.wants_worker
        yield manager, session, held


async def test_a_pool_that_starts_a_worker_lets_none_go(autojump_clock: MockClock) -> None:
    """To close one for others, and open another at the same time, would be pointless."""
    async with called_in(1, 1) as (manager, session, (first, second)):
        manager.shop.before_open = lambda _: trio.sleep(1)
        session.resize(1, 2)
        await wait_all_tasks_blocked()
        session.checkin(first)
        session.checkin(second)
        assert (session.statistics().retired, session.statistics().in_use) == (0, 1)


async def test_a_worker_stays_called_in_until_one_comes_back(autojump_clock: MockClock) -> None:
    """Although the pool looks, meanwhile, at what is missing: it misses none."""
    async with called_in(1, 1) as (_, session, (first, second)):
        session.resize(1, 1)
        await wait_all_tasks_blocked()
        session.checkin(first)
        assert session.statistics().retired == 1
        session.checkin(second)


async def test_a_task_that_waits_is_not_forgotten_for_a_place_that_is_left(
    autojump_clock: MockClock,
) -> None:
    """Two are to be replaced, one of which was called in for others, and both come back at once."""
    async with called_in(0, 2) as (_, session, (first, second)):
        session.retire_all()
        session.checkin(first)
        session.checkin(second)
        await trio.sleep(0.1)
        assert session.statistics().waiting == 0


async def test_what_a_resize_makes_overflow_is_lent(autojump_clock: MockClock) -> None:
    """Also if no worker is opened after it."""
    manager = Crowded(places=4)
    async with (
        open_checked_pool(manager, pool_size=4, max_overflow=0) as session,
        open_checked_pool(manager, pool_size=1, lazy=True) as other,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(keep_busy, session, 20)
        await trio.sleep(1)
        session.resize(1, 3)
        await trio.sleep(1)
        async with other.worker(10):
            nursery.cancel_scope.cancel()


async def test_a_pool_lends_again_after_a_trial_that_a_resize_has_ended(
    autojump_clock: MockClock,
) -> None:
    """The place that it had left is not asked for any more, so it does not learn who has it."""
    manager = Crowded(places=4)
    async with (
        open_checked_pool(manager, pool_size=1, max_overflow=3) as session,
        open_checked_pool(manager, pool_size=1, lazy=True) as other,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(keep_busy, session, 20)
        while not session.statistics().retired:
            await trio.sleep(0.01)
        manager.places = 3
        session.resize(1, 2)
        async with other.worker(10):
            nursery.cancel_scope.cancel()


async def test_a_worker_is_called_off_with_the_last_of_the_overflow(autojump_clock: MockClock) -> None:
    """Nothing is lent any more. Else its place would be left, and nobody would ask for it again."""
    async with called_in(1, 2, waiting=2) as (_, session, held):
        session.resize(3, 0)
        await trio.sleep(1)
        assert not session._supervisor.sharing.wants_worker
        for resource in held:
            session.checkin(resource)
        assert session.statistics().in_use == 2
        assert session.statistics().retired == 0


async def test_the_last_of_the_overflow_goes_alone(autojump_clock: MockClock) -> None:
    """One was called in, and a resize takes the overflow away: what is left is not lent."""
    async with called_in(2, 1) as (_, session, held):
        session.resize(2, 0)
        session.checkin(held.pop())
        session.checkin(held.pop())
        assert (session.statistics().retired, session.statistics().in_use) == (1, 2)
        session.checkin(held.pop())


async def test_a_shutdown_takes_no_notice(autojump_clock: MockClock) -> None:
    """Tasks that wait are served by all workers, and none is closed for others."""
    manager = Crowded(places=4)
    async with open_checked_pool(manager, pool_size=1, max_overflow=5) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(hold, session)
            await trio.sleep(3)
            nursery.start_soon(session.safe_shutdown)
        assert session.statistics().checkouts == 40


async def hold(session: Session) -> None:
    async with session.worker(math.inf):
        await trio.sleep(1)


# -- The decisions -------------------------------------------------------------------------------------


@pytest.fixture
def evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chance takes the middle of what it may take."""
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)


class Places:
    """What a pool decides about its places, with workers that are only counted."""

    def __init__(self, *, pool_size: int = 2, max_overflow: int = 2, in_use: int = 0) -> None:
        options = Options(pool_size=pool_size, max_overflow=max_overflow)
        self.roster: Roster[Tool] = Roster(dict.fromkeys(COUNTERS, 0), options)
        self.waiting = self.woken = self.called_in = 0
        self.evicted: list[Entry[Tool]] = []
        self.sharing = sharing.Sharing(
            self.roster,
            waiting=lambda: self.waiting,
            evict=lambda entry, _: self.evicted.append(entry),
            call_in=lambda: setattr(self, "called_in", self.called_in + 1),
            wake=lambda: setattr(self, "woken", self.woken + 1),
        )
        self.add(State.IN_USE, in_use)

    def add(self, state: State, count: int = 1, idle_since: float = 0) -> list[Entry[Tool]]:
        """Enter so many workers, and lead them to a state."""
        entries: list[Entry[Tool]] = [Entry() for _ in range(count)]
        for entry in entries:
            entry.idle_since = idle_since
            self.roster.add(entry)
            for step in (State.SERVICING, state) if state is not State.OPENING else ():
                if step is not entry.state:
                    self.roster.move(entry, step)
        return entries

    def leave(self, entry: Entry[Tool]) -> None:
        """Have a worker closed."""
        self.roster.mark(entry, "overflow")
        self.roster.move(entry, State.CLOSING)
        self.roster.remove(entry)

    def next_to_go(self, since: float, within: float = 100) -> float | None:
        """Look 16 times a second; return when a worker is called in or let go. None: it is not."""
        for number in range(int(within * 16)):
            now = since + number / 16
            self.sharing.look(now)
            if self.evicted or self.sharing.wants_worker:
                return now
        return None

    def leave_one(self, since: float) -> float:
        """Have the next worker that is called in closed, at its return; return when that was."""
        now = self.next_to_go(since)
        assert now is not None
        assert self.sharing.takes(now)
        self.leave(next(entry for entry in self.roster.entries if entry.state is State.IN_USE))
        return now

    def win(self, trials: int, since: float = 0) -> float:
        """Leave a place so many times, take it again each time, and return when that was last."""
        for _ in range(trials):
            since = self.leave_one(since) + sharing.GAP
            self.add(State.IN_USE)
            self.sharing.on_opened(since)
        return since


def test_how_long_a_server_counts_as_full() -> None:
    """From a refusal on for half a minute, up to a quarter more or less."""
    for _ in range(300):
        found = Places().sharing
        assert not found.is_full(100)
        found.on_refused(100)
        assert found.is_full(100)
        assert found.is_full(100 + 0.75 * sharing.FULL_FOR - 0.01)
        assert not found.is_full(100 + 1.25 * sharing.FULL_FOR)


@pytest.mark.parametrize(
    ("in_use", "servicing", "is_full", "expected"),
    [
        pytest.param(2, 1, False, 5, id="as many as ever, while nothing is known"),
        pytest.param(0, 0, True, 1, id="one in any case"),
        pytest.param(2, 0, True, 2, id="those in use"),
        pytest.param(2, 1, True, 3, id="those that are reset, too"),
        pytest.param(7, 2, True, 5, id="no more than ever"),
    ],
)
def test_how_many_a_pool_wants_of_a_full_server(
    in_use: int, servicing: int, is_full: bool, expected: int
) -> None:
    """Those that it needs: it does not keep the others' places."""
    places = Places(in_use=in_use)
    places.add(State.SERVICING, servicing)
    if is_full:
        places.sharing.on_refused(0)
    assert places.sharing.target(5, 1) == expected


def test_a_place_that_is_left_stays_free_for_a_while() -> None:
    """For `GAP`, and it is one place: what is lost meanwhile may be replaced."""
    places = Places(in_use=4)
    (first, second, *_) = places.roster.entries
    assert not places.sharing.takes(9)  # none was called in
    places.sharing.wants_worker = True
    assert places.sharing.takes(10)
    assert not places.sharing.takes(10)
    places.leave(first)
    assert places.sharing.room(10 + sharing.GAP - 0.01) == 0
    assert places.sharing.room(10 + sharing.GAP) == 1
    places.leave(second)
    assert places.sharing.room(11) == 1
    places.add(State.OPENING)
    assert places.sharing.room(11) == 0
    assert places.sharing.room(12) == 1


@pytest.mark.parametrize(
    ("open_now", "opening", "waiting", "expected"),
    [
        pytest.param(3, 0, 0, True, id="one of three"),
        pytest.param(2, 0, 5, True, id="one of two, although tasks wait"),
        pytest.param(1, 0, 0, True, id="the last, while no task waits"),
        pytest.param(1, 0, 1, False, id="the last, while a task waits"),
        pytest.param(3, 1, 0, False, id="a replacement is on its way"),
    ],
)
def test_whether_a_worker_goes_without_a_replacement(
    open_now: int, opening: int, waiting: int, expected: bool
) -> None:
    """On a full server only, where no replacement could be opened first."""
    places = Places(in_use=open_now)
    places.add(State.OPENING, opening)
    assert not places.sharing.may_exchange(waiting=waiting, now=1)
    places.sharing.on_refused(1)
    assert places.sharing.may_exchange(waiting=waiting, now=1) is expected


def test_those_that_go_without_a_replacement_go_one_by_one() -> None:
    """The next goes when there is one in the place of the last, or after `EXCHANGE_PAUSE`."""
    places = Places(in_use=3)
    places.sharing.on_refused(0)
    places.sharing.on_exchange(1)
    assert not places.sharing.may_exchange(waiting=0, now=1 + sharing.EXCHANGE_PAUSE - 0.01)
    assert places.sharing.may_exchange(waiting=0, now=1 + sharing.EXCHANGE_PAUSE)
    places.sharing.on_opened(2)
    assert places.sharing.may_exchange(waiting=0, now=2)


def test_a_full_server_has_those_looked_at_that_are_to_be_replaced() -> None:
    """One of them may be due, and nothing else would wake the pool."""
    places = Places(in_use=2)
    places.sharing.on_refused(0)
    places.sharing.look(1)
    assert places.woken == 0
    places.roster.mark(next(iter(places.roster.entries)), "lifetime")
    places.sharing.look(2)
    assert places.woken == 1


def test_when_a_pool_is_looked_at(evenly: None) -> None:
    """Not at all, unless it may have to leave a place; at the latest when something is over.

    Then the pool is woken, once, as it may start what it has put off.
    """
    places = Places(in_use=2)
    assert places.sharing.look(0) == math.inf
    places.sharing.on_refused(0)
    assert not places.sharing.is_full(sharing.FULL_FOR)
    assert places.sharing.look(1) == 1 + sharing.LOOK
    places.sharing.wants_worker = True
    assert places.sharing.takes(28.4)
    assert places.sharing.look(28.4) == 28.4 + sharing.LOOK
    assert places.sharing.look(29.8) == 28.4 + sharing.GAP
    assert places.woken == 0
    assert places.sharing.look(28.4 + sharing.GAP) == sharing.FULL_FOR
    assert places.woken == 1
    places.sharing.on_opened(29.95)
    assert places.sharing.look(sharing.FULL_FOR) == math.inf
    assert places.woken == 2
    assert not places.sharing.is_full(sharing.FULL_FOR)
    assert places.sharing.room(sharing.FULL_FOR) == 2
    assert places.sharing.look(31) == math.inf
    assert places.woken == 2
    places.add(State.IN_USE)
    assert places.sharing.look(32) == 32 + sharing.LOOK


def test_a_place_that_the_pool_needs_no_more_costs_no_looks() -> None:
    """It was overflow, and the load is gone: no worker may be opened for hours."""
    places = Places(in_use=3)
    places.waiting = 9
    left_at = places.leave_one(0)
    places.waiting = 0
    assert places.sharing.look(left_at + 1.4) == left_at + sharing.GAP
    assert places.sharing.look(left_at + sharing.GAP) == math.inf


@pytest.mark.parametrize(
    ("idle_since", "in_use", "expected"),
    [
        pytest.param([5, 8], 0, 6, id="when it was idle for a second"),
        pytest.param([-9, -8], 0, 1, id="a second after the refusal"),
        pytest.param([5], 1, 6, id="one of two"),
        pytest.param([5], 0, None, id="the last one stays"),
        pytest.param([], 2, None, id="none is idle"),
    ],
)
def test_whether_an_idle_worker_goes(
    idle_since: list[float], in_use: int, expected: float | None, evenly: None
) -> None:
    """On a full server, the one that was idle for the longest, and the next a second later."""
    places = Places(pool_size=9, in_use=in_use)
    entries = [places.add(State.IDLE, idle_since=since)[0] for since in idle_since]
    assert places.next_to_go(-9, within=9) is None
    places.sharing.on_refused(0)
    assert places.next_to_go(0, within=10) == expected
    if expected is not None:
        assert places.evicted == entries[:1]
        places.evicted.clear()
        assert places.next_to_go(expected + 0.01, within=5) == expected + 0.01 + sharing.PACE


@pytest.mark.parametrize(
    ("workers", "waiting", "is_full", "expected"),
    [
        pytest.param({State.IN_USE: 4}, 1, False, True, id="a task waits"),
        pytest.param({State.IN_USE: 4}, 0, False, False, id="no task waits"),
        pytest.param({State.IN_USE: 4}, 0, True, True, id="no task waits, but others want places"),
        pytest.param({State.IN_USE: 3, State.SERVICING: 1}, 1, False, False, id="it is served soon"),
        pytest.param({State.IN_USE: 3, State.SERVICING: 1}, 2, False, True, id="one of two is"),
        pytest.param({State.IN_USE: 3, State.IDLE: 1}, 1, False, False, id="one is idle"),
        pytest.param({State.IN_USE: 3, State.OPENING: 1}, 1, False, False, id="one is being opened"),
        pytest.param({State.IN_USE: 2}, 1, False, True, id="two"),
        pytest.param({State.IN_USE: 1}, 1, False, False, id="the last one stays"),
    ],
)
def test_whether_a_worker_is_called_in(
    workers: dict[State, int], waiting: int, is_full: bool, expected: bool
) -> None:
    """Where a pool with overflow has been short of workers for `BUSY_FOR`."""
    places = Places(pool_size=0, max_overflow=9)
    for state, count in workers.items():
        places.add(state, count, idle_since=99)
    places.waiting = waiting
    if is_full:
        places.sharing.on_refused(-9)
    assert places.next_to_go(0, within=5) == (sharing.BUSY_FOR if expected else None)
    assert places.called_in == expected


def test_a_pool_that_has_its_size_keeps_it() -> None:
    """However long tasks wait. It has lent nothing."""
    places = Places(pool_size=4, in_use=4)
    places.waiting = 9
    assert places.next_to_go(0) is None


def test_a_worker_that_is_called_in_may_be_called_off() -> None:
    """When one is idle, the pool can spare that; and it has to be short for a second anew."""
    places = Places(in_use=3)
    places.waiting = 9
    assert places.next_to_go(0) == sharing.BUSY_FOR
    (idle,) = places.add(State.IDLE, idle_since=99)
    places.sharing.look(2)
    assert not places.sharing.wants_worker
    assert not places.sharing.takes(2)
    places.roster.move(idle, State.IN_USE)
    assert places.next_to_go(3) == 3 + sharing.BUSY_FOR


def test_the_last_one_stays_although_it_is_called_in() -> None:
    """Others may have gone in the meantime."""
    places = Places(pool_size=0, in_use=2)
    places.waiting = 9
    assert places.next_to_go(0) == sharing.BUSY_FOR
    places.leave(next(iter(places.roster.entries)))
    assert not places.sharing.takes(1)


def test_how_often_a_saturated_pool_leaves_a_place(evenly: None) -> None:
    """While no other wants it, half as often each time, until that costs no more than `PRICE`."""
    places = Places(in_use=4)
    places.waiting = 9
    places.sharing.on_opened(0)  # it has left no place yet
    now, pauses = 0.0, []
    for _ in range(10):
        left_at = places.leave_one(now)
        pauses.append(left_at - now)
        places.add(State.IN_USE)
        places.sharing.on_opened(left_at + 0.5)  # one was lost, and replaced, in that time
        assert places.next_to_go(left_at + 0.5, within=50) is None  # one at a time
        now = left_at + sharing.GAP
        places.sharing.on_opened(now)
    *first, last, again = pauses
    assert first == [sharing.BUSY_FOR, 0.75, 1.5, 3, 6, 12, 24, 48]
    assert last == again == pytest.approx(sharing.GAP / sharing.PRICE / 4, abs=0.07)


def test_pools_do_not_leave_places_in_step() -> None:
    """The pauses between them are up to a quarter longer or shorter, by chance."""
    pauses = []
    for _ in range(100):
        places = Places(in_use=4)
        places.waiting = 9
        now = places.win(5)
        pauses.append(places.leave_one(now) - now)
    assert 0.75 * 12 <= min(pauses) < 10 < 14 < max(pauses) <= 1.25 * 12 + 0.07


@pytest.mark.parametrize(("won", "is_trial"), [(0, True), (5, True), (5, False)])
def test_where_other_pools_want_its_places(won: int, is_trial: bool, evenly: None) -> None:
    """A saturated pool that is refused leaves one after the other, more slowly without overflow.

    What it knew before, it knows no more. The more workers it has, the shorter are the pauses.
    """
    places = Places(pool_size=18, max_overflow=2, in_use=20)
    places.waiting = 9
    now = places.win(won)
    if is_trial:
        now = places.leave_one(now)
    else:
        now += 1
        places.sharing.on_refused(now)
    places.sharing.on_refused(now + 0.125)
    for _ in range(3):
        workers = places.roster.open
        share = sharing.SHARE_OVERFLOW if workers > 18 else sharing.SHARE
        left_at = places.leave_one(now)
        assert left_at - now == pytest.approx(share / workers, abs=0.07)
        now = left_at


def test_when_a_pool_leaves_the_first_place_of_a_full_server(evenly: None) -> None:
    """The more workers it has, the sooner."""
    for workers in 2, 4, 8:
        places = Places(pool_size=8, in_use=workers)
        places.sharing.on_refused(0)
        assert places.next_to_go(0) == pytest.approx(sharing.SHARE / workers, abs=0.07)


def test_a_trial_that_was_refused_is_over(evenly: None) -> None:
    """The next one comes when the server counts as full no more."""
    places = Places(in_use=4)
    places.waiting = 9
    now = places.leave_one(0) + sharing.GAP
    places.sharing.on_refused(now)
    assert places.next_to_go(now + sharing.FULL_FOR, within=1) is not None


# -- Fleets --------------------------------------------------------------------------------------------


def test_a_fleet_that_is_idle_shares() -> None:
    """Pools that want twice what the server takes, and need little: all of them open within 5 s."""

    async def main() -> None:
        server = ModelServer(max_connections=100)
        async with open_fleet(server, pools=40, pool_size=5, max_overflow=5, waits=False) as fleet:
            await trio.sleep(5)
            assert (len(fleet.sessions), fleet.failed) == (40, [])
            await trio.sleep(15)
            assert all(session.statistics().idle for session in fleet.sessions)
            assert fleet.alive < 90  # there is room for those that come to need it
            assert max(session.statistics().start_failures for session in fleet.sessions) <= 20

    simulate(main)


class Saturated:
    """Eight processes that could each use ten of the places of one server."""

    def __init__(self, places: int) -> None:
        self.server = ModelServer(max_connections=places)
        self.sessions: list[whitepool.Session[Any]] = []
        self.served: list[list[float]] = [[] for _ in range(8)]
        """For each process, how long after its start it has served each client."""

    async def run(self, seconds: float, *, apart: float = 0) -> None:
        """Start them one after the other; end them so many seconds after the last start."""
        async with trio.open_nursery() as nursery:
            for served in self.served:
                nursery.start_soon(self._process, served)
                await trio.sleep(apart)
            await trio.sleep(seconds)
            nursery.cancel_scope.cancel()

    async def _process(self, served: list[float]) -> None:
        begun = trio.current_time()

        async def client() -> None:
            while True:
                async with session.worker(math.inf):
                    await trio.sleep(0.1)
                served.append(trio.current_time() - begun)

        manager = ModelManager(self.server)
        async with whitepool.open_pool(manager, pool_size=5, max_overflow=5) as session:
            self.sessions.append(session)
            async with trio.open_nursery() as clients:
                for _ in range(20):
                    clients.start_soon(client)


@pytest.mark.parametrize("seed", range(3))
def test_a_fleet_that_is_saturated_shares(seed: int) -> None:
    """Each serves within 5 s, and none thrice what another does."""

    async def main() -> None:
        fleet = Saturated(places=37)
        await fleet.run(30)
        answers = [len(served) for served in fleet.served]
        assert max(served[0] for served in fleet.served) < 5
        assert max(answers) < 3 * min(answers)
        assert sum(answers) > 0.9 * 37 * 30 / 0.1
        assert max(session.statistics().start_failures for session in fleet.sessions) <= 30

    simulate(main, seed=seed)


@pytest.mark.parametrize("seed", range(20))
def test_processes_that_come_later_serve_as_soon(seed: int) -> None:
    """When the first ones have taken all places. What those give up goes to pools that have none."""

    async def main() -> None:
        fleet = Saturated(places=30)
        await fleet.run(5, apart=0.2)
        assert all(served and served[0] < 5 for served in fleet.served)

    simulate(main, seed=seed)
