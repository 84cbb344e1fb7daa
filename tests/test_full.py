"""A server that has no more connections to give: a pool lives with what it has, and shares it."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, nothing, open_checked_pool, raising

import whitepool
from benchmarks.model_server import ModelManager, ModelServer, open_fleet, simulate
from whitepool import _sharing as sharing

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


async def test_without_any_the_opening_fails(autojump_clock: MockClock) -> None:
    """A pool that has no worker is of no use. It tries about once a second."""
    manager = Crowded(places=0)
    with pytest.raises(whitepool.PoolStartError, match=r"0 of 5 workers.*too many clients"):
        async with whitepool.open_pool(manager, pool_size=5, max_starting=1, start_timeout=100):
            pass
    assert 80 <= manager.refused <= 120


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
            age = max(
                trio.current_time() - entry.opened_at for entry in session._supervisor.roster.entries
            )
            assert age < 60 + 3 * sharing.EXCHANGE_PAUSE
            assert len(manager.shop.alive) >= 2
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


@pytest.mark.parametrize("seed", range(3))
def test_a_fleet_that_is_saturated_shares(seed: int) -> None:
    """Eight that want 80 of 37 places: each serves within 5 s, and none thrice what another does."""

    async def client(session: whitepool.Session[Any], served: list[float]) -> None:
        while True:
            async with session.worker(math.inf):
                await trio.sleep(0.1)
            served.append(trio.current_time())

    async def main() -> None:
        server = ModelServer(max_connections=37)
        async with trio.open_nursery() as nursery:

            async def process(number: int) -> None:
                async with whitepool.open_pool(
                    ModelManager(server), pool_size=5, max_overflow=5
                ) as session:
                    sessions.append(session)
                    async with trio.open_nursery() as clients:
                        for _ in range(20):
                            clients.start_soon(client, session, all_served[number])

            sessions: list[whitepool.Session[Any]] = []
            all_served: list[list[float]] = [[] for _ in range(8)]
            for number in range(8):
                nursery.start_soon(process, number)
            await trio.sleep(30)
            assert max(served[0] for served in all_served) < 5
            assert max(map(len, all_served)) < 3 * min(map(len, all_served))
            assert sum(map(len, all_served)) > 0.9 * 37 * 30 / 0.1
            assert max(session.statistics().start_failures for session in sessions) <= 30
            nursery.cancel_scope.cancel()

    simulate(main, seed=seed)
