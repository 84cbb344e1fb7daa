"""Idle workers are probed; old, unused and surplus ones are retired, and never all at once."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from workshop import Manager, Tool, Workshop, check_books, hang, nothing, raising

import whitepool
from whitepool._maintenance import Duty

Clock = trio.testing.MockClock


LATE = 0.05 * 0.9 * 30 + 0.1
"""Seconds. What is due waits for others, for up to a twentieth of the shortest period."""


class Checked(Manager):
    """A manager whose workers can be probed."""

    def __init__(self, shop: Workshop) -> None:
        super().__init__(shop)
        self.probes: list[tuple[float, Tool]] = []
        self.probing = 0
        self.most_probing = 0
        self.silent: set[Tool] = set()
        self.takes: float = 0

    async def check(self, worker: Tool) -> None:
        self.probes.append((trio.current_time(), worker))
        self.probing += 1
        self.most_probing = max(self.probing, self.most_probing)
        try:
            await trio.sleep(math.inf if worker in self.silent else self.takes)
        finally:
            self.probing -= 1


async def test_idle_workers_are_probed(autojump_clock: Clock) -> None:
    """Each of them every `check_interval`, less up to a tenth by chance, or a little late. (Rule 6.)

    Not more than half at a time: of three that come due together, two wait for their turn.
    """
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=3, overflow_ttl=30, check_interval=30) as session:
        await trio.sleep(305)
        assert session.statistics().idle == 3
        for tool in manager.shop.tools:
            times = [time for time, probed in manager.probes if probed is tool]
            assert all(26.9 < b - a < 30 + 3 * LATE for a, b in pairwise([0, *times]))
            assert times[-1] > 305 - 30 - 3 * LATE


async def test_an_answer_is_a_sign_of_life(autojump_clock: Clock) -> None:
    """From when it comes, and not from when it was asked for."""
    manager = Checked(Workshop())
    manager.takes = 10
    async with whitepool.open_pool(
        manager, pool_size=1, max_overflow=0, check_interval=30, reset_timeout=20
    ):
        await trio.sleep(300)
    times = [time for time, _ in manager.probes]
    assert all(10 + 26.9 < b - a < 10 + 30 + LATE for a, b in pairwise(times))
    assert len(times) >= 7


async def test_what_comes_due_together_is_done_together(autojump_clock: Clock) -> None:
    """However many workers there are, they are not looked at more often."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=60, overflow_ttl=30, check_interval=30):
        await trio.sleep(300)
    looks = {time for time, _ in manager.probes}
    assert len(manager.probes) >= 60 * 9
    assert len(looks) <= 300 / (LATE - 0.1)


async def test_workers_that_get_old_at_about_the_same_time_are_looked_at_together(
    autojump_clock: Clock,
) -> None:
    """Two hundred lives end within a lifetime, but the looks at them are a twentieth of it apart."""
    closed: set[float] = set()
    shop = Workshop()

    async def note(_: Tool) -> None:
        closed.add(trio.current_time())

    shop.before_close = note
    async with whitepool.open_pool(
        shop.make,
        pool_size=200,
        max_lifetime=1000,
        overflow_ttl=math.inf,
        check_interval=math.inf,
    ) as session:
        await trio.sleep(900)
        assert session.statistics().retired > 150
        assert len(closed) <= 900 / (0.05 * 0.9 * 1000) + 1


async def test_the_only_worker_of_a_pool_may_get_old_early(autojump_clock: Clock) -> None:
    """So the pools of many processes that are started together do not replace theirs together."""
    lives: list[float] = []
    for _ in range(30):
        async with whitepool.open_pool(Workshop().make, pool_size=1, max_lifetime=1000) as session:
            (entry,) = session._supervisor.roster.entries
            lives.append(entry.expires_at - entry.opened_at)
    assert 50 <= min(lives) < 500 < max(lives) <= 1000


async def test_few_probes_are_begun_together(autojump_clock: Clock) -> None:
    """Where many are due, the others follow soon, and other tasks have a turn in between."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=500, check_interval=30) as session:
        for entry in session._supervisor.roster.entries:
            entry.jitter = 1
        await trio.sleep(40)
    together = Counter(time for time, _ in manager.probes)
    assert len(manager.probes) == 500
    assert max(together.values()) == 100
    assert max(together) - min(together) < 0.5


async def test_workers_that_have_left_are_not_kept(autojump_clock: Clock) -> None:
    """Not for longer than until a probe of theirs would have been due, and not many of them."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=1, check_interval=1000) as session:
        for _ in range(500):
            session.destroyed(await session.block_checkout())
            await trio.testing.wait_all_tasks_blocked()
        *gone, _ = (weakref.ref(tool) for tool in manager.shop.tools)
        manager.shop.tools.clear()
        gc.collect()
        assert sum(tool() is not None for tool in gone) < 100
        await trio.sleep(1100)
        gc.collect()
        assert [tool() for tool in gone if tool() is not None] == []


async def test_a_new_worker_does_not_have_all_others_gone_through(autojump_clock: Clock) -> None:
    """To forget those that have left costs something, so it is done when there are many of them."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=100) as session:
        coming = session._supervisor._maintenance._coming
        assert len(coming) == 100
        session.destroyed(await session.block_checkout())
        await trio.testing.wait_all_tasks_blocked()
        assert session._supervisor._maintenance._coming is coming
        assert len(coming) == 101


async def test_the_worker_that_is_due_first_stays_the_first(autojump_clock: Clock) -> None:
    """Also when those that have left are forgotten."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=30, check_interval=1000) as session:
        for _ in range(300):
            session.destroyed(await session.block_checkout())
            await trio.sleep(0.5)
            coming = session._supervisor._maintenance._coming
            assert all(coming[(place - 1) // 2] < coming[place] for place in range(1, len(coming)))
        assert len(coming) < 200


async def test_workers_that_have_left_delay_no_probe(autojump_clock: Clock) -> None:
    """However many there were, the one that is there is probed in time."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=1, overflow_ttl=30, check_interval=30) as session:
        for _ in range(40):
            session.destroyed(await session.block_checkout())
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(30 + 3 * LATE)
        assert [tool for _, tool in manager.probes] == manager.shop.alive


async def test_probes_may_be_frequent(autojump_clock: Clock) -> None:
    """Up to several in a second."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=1, check_interval=0.5):
        await trio.sleep(10)
    assert 20 <= len(manager.probes) <= 22


async def test_a_worker_that_has_to_leave_is_not_probed(autojump_clock: Clock) -> None:
    """Also where it stays for a while, because no other can be opened in its place."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=3, check_interval=30) as session:
        manager.shop.before_open = raising(OSError("too many connections"))
        session.retire_all()
        await trio.sleep(100)
        assert session.statistics().idle == 3
        assert not manager.probes


def test_a_duty_is_done_when_it_is_due() -> None:
    """It is not looked at before, however often the other duties are due."""
    looks: list[float] = []

    def look(now: float) -> float:
        looks.append(now)
        return now + 7

    duty = Duty(look, pause=1, period=10)
    for time in range(20):
        duty.do_if_due(time)
    assert looks == [0, 7, 14]


async def test_a_worker_in_use_needs_no_probe(autojump_clock: Clock) -> None:
    """Its use is the probe."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=1, check_interval=30) as session:
        for _ in range(20):
            async with session.worker():
                await trio.sleep(1)
            await trio.sleep(20)
        assert not manager.probes


async def test_a_probe_that_hangs_is_bounded(autojump_clock: Clock) -> None:
    """By `reset_timeout`; the worker is lost, and replaced. (Rule 6.)"""
    shop = Workshop()
    manager = Checked(shop)
    async with whitepool.open_pool(manager, pool_size=1, check_interval=30, reset_timeout=4) as session:
        manager.silent.add(shop.tools[0])
        await trio.sleep(35)
        now = session.statistics()
        assert (now.lost, now.idle, now.started) == (1, 1, 2)
        assert shop.tools[0].closed


async def test_probes_never_take_the_last_idle_workers(autojump_clock: Clock) -> None:
    """A checkout is not delayed while another worker could serve it."""
    shop = Workshop()
    manager = Checked(shop)
    manager.takes = 3
    async with whitepool.open_pool(manager, pool_size=6, max_overflow=0, check_interval=30) as session:
        while trio.current_time() < 120:
            await trio.sleep(0.5)
            before = trio.current_time()
            async with session.worker() as tool:
                assert trio.current_time() == before
                assert tool not in [worker for time, worker in manager.probes if time + 3 > before]
            check_books(session)
        assert len(manager.probes) > 12
        assert manager.most_probing == 3


async def test_a_waiter_gets_the_only_worker_when_it_has_been_probed(autojump_clock: Clock) -> None:
    """Not before, and not later."""
    manager = Checked(Workshop())
    manager.takes = 2
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0, check_interval=30) as session:
        while not manager.probing:
            await trio.sleep(0.1)
        (probed_at, _) = manager.probes[0]
        assert session.statistics().resetting == 1
        async with session.worker():
            assert trio.current_time() == pytest.approx(probed_at + 2)


async def test_a_probe_does_not_make_a_worker_look_used(autojump_clock: Clock) -> None:
    """`idle_timeout` counts from the last use, and the coldest stays the coldest."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(
        manager, pool_size=2, lazy=True, check_interval=10, idle_timeout=60
    ) as session:
        async with session.worker() as warm:
            async with session.worker() as cold:
                pass
            await trio.sleep(1)
        await trio.sleep(24)
        assert len(manager.probes) == 4
        async with session.worker() as again:
            assert again is warm  # it was returned last
        await trio.sleep(37)
        assert (warm.closed, cold.closed) == (False, True)
        await trio.sleep(25)
        assert warm.closed


async def test_a_pool_without_checks_probes_no_worker(autojump_clock: Clock) -> None:
    """A manager that can't check is not asked, and `inf` turns probing off."""
    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=1, check_interval=math.inf):
        await trio.sleep(1000)
    assert not manager.probes
    async with whitepool.open_pool(Workshop().make, pool_size=1, check_interval=1) as session:
        await trio.sleep(1000)
        assert session.statistics().idle == 1


async def test_a_pool_without_overflow_sleeps(autojump_clock: Clock) -> None:
    """Maintenance looks for overflow only where there is some, and finds it also after a resize."""
    steps = Counter[str]()

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            steps[task.name] += 1

    async def steps_in(seconds: float) -> Counter[str]:
        await trio.testing.wait_all_tasks_blocked()
        steps.clear()
        await trio.sleep(seconds)
        return Counter({name: steps[name] for name in steps if "whitepool" in name})

    async with whitepool.open_pool(
        Workshop().make, pool_size=2, max_overflow=1, overflow_ttl=10
    ) as session:
        trio.lowlevel.add_instrument(Steps())
        assert not await steps_in(1000)

        async with session.worker(), session.worker(), session.worker():
            await trio.sleep(100)
        assert await steps_in(10 + LATE)
        assert (session.statistics().idle, session.statistics().retired) == (2, 1)
        assert not await steps_in(1000)

        async with session.worker(), session.worker():
            session.resize(1)
            await trio.sleep(100)
        assert session.statistics().idle == 2
        assert await steps_in(10 + LATE)
        assert (session.statistics().idle, session.statistics().retired) == (1, 2)
        assert not await steps_in(1000)


async def test_a_pool_that_only_probes_is_woken_for_that_only(autojump_clock: Clock) -> None:
    """The maintenance of an idle pool has a turn or two for each probe, and sleeps in between."""
    turns = Counter[str]()

    class Turns(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            turns[task.name] += 1

    manager = Checked(Workshop())
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0, check_interval=30):
        trio.lowlevel.add_instrument(Turns())
        await trio.sleep(3000)
        (turned,) = (turns[name] for name in turns if "Maintenance.run" in name)
        assert 100 <= len(manager.probes) <= turned <= 2 * len(manager.probes) + 2


async def test_a_lazy_pool_that_is_not_used_empties(autojump_clock: Clock) -> None:
    """Workers that were idle for `idle_timeout` are retired, and not replaced."""
    shop = Workshop()
    async with whitepool.open_pool(
        shop.make, pool_size=3, lazy=True, idle_timeout=60, overflow_ttl=math.inf
    ) as session:
        async with session.worker(), session.worker(), session.worker():
            pass
        await trio.sleep(50)
        assert session.statistics().idle == 3
        await trio.sleep(10 + 3)  # what comes due within a twentieth of a period goes together
        now = session.statistics()
        assert (now.idle, now.retired, now.started) == (0, 3, 3)


async def test_an_idle_worker_is_replaced_unless_lazy(autojump_clock: Clock) -> None:
    """The pool has its size at every moment: the new one comes before the old one goes."""
    shop = Workshop()

    async def slowly(_: Any) -> None:
        await trio.sleep(1)

    shop.before_open = slowly
    async with whitepool.open_pool(shop.make, pool_size=2, idle_timeout=60) as session:
        for _ in range(200):
            await trio.sleep(1)
            assert session.statistics().idle >= 2
        assert session.statistics().retired >= 4


async def test_lifetimes_end_one_by_one(autojump_clock: Clock) -> None:
    """Twenty that were opened together don't reconnect together, and are replaced first."""
    shop = Workshop()

    async def slowly(_: Any) -> None:
        await trio.sleep(0.5)

    shop.before_open = slowly
    opened: list[float] = []
    hooks = whitepool.Hooks(on_create=lambda _: opened.append(trio.current_time()))
    async with whitepool.open_pool(
        shop.make, pool_size=20, max_overflow=2, max_lifetime=1000, hooks=hooks
    ) as session:
        del opened[:]
        shop.most_opening = 0
        while trio.current_time() < 1010:
            await trio.sleep(1)
            now = session.statistics()
            assert now.idle >= 20
            check_books(session)
        assert all(tool.closed for tool in shop.tools[:20])
        assert 20 <= session.statistics().retired <= 26  # a successor lives for at least 900 seconds
        assert max(opened) - min(opened) > 500  # spread over up to 950 seconds
        assert shop.most_opening <= 4


async def test_workers_that_were_opened_together_reconnect_apart(autojump_clock: Clock) -> None:
    """Also in the first hour: each lives for between a twentieth and all of `max_lifetime`.

    In no minute more than twice as many are replaced as in the others, also where all have been
    replaced together by hand. Their successors live for nearly all of it.
    """
    shop = Workshop()
    hooks = whitepool.Hooks(on_create=lambda _: opened.append(trio.current_time()))
    opened: list[float] = []
    async with whitepool.open_pool(
        shop.make, pool_size=400, max_overflow=9, max_lifetime=600, hooks=hooks
    ) as session:
        for _ in range(2):
            began = trio.current_time()
            del opened[:]
            await trio.sleep(3600)
            assert min(opened) - began > 0.05 * 600 - 1.1
            assert all(
                trio.current_time() - entry.opened_at < 600 + LATE
                for entry in session._supervisor.roster.entries
                if entry.is_open
            )
            each_minute = Counter(int((time - began) // 60) for time in opened)
            assert max(each_minute.values()) < 2 * len(opened) / 60
            assert 400 * 6 * 1.0 < len(opened) < 400 * 6 * 1.3
            session.retire_all()
            await trio.sleep(1)


async def test_each_successor_of_an_old_worker_lives_long(autojump_clock: Clock) -> None:
    """However many get old together; one that replaces a worker that was lost may get old early."""
    shop = Workshop()

    def lives(session: whitepool.Session[Tool]) -> list[float]:
        return [
            entry.expires_at - entry.opened_at
            for entry in session._supervisor.roster.entries
            if entry.evict_reason is None
        ]

    async with whitepool.open_pool(
        shop.make, pool_size=6, max_overflow=6, max_lifetime=1000
    ) as session:
        for _ in range(3):
            for entry in session._supervisor.roster.entries:
                entry.expires_at = trio.current_time()
            old = set(shop.alive)
            while old & set(shop.alive):
                await trio.sleep(10)
            assert len(lives(session)) == 6
            assert 900 <= min(lives(session)) <= max(lives(session)) <= 1000
        shortest = math.inf
        for _ in range(50):
            session.destroyed(await session.block_checkout())
            await trio.testing.wait_all_tasks_blocked()
            shortest = min(shortest, *lives(session))
        assert shortest < 500


async def test_a_replacement_is_no_overflow(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `overflow_ttl=0`, the new worker stays that was opened before the old one went."""
    monkeypatch.setattr("random.uniform", lambda _, high: high)
    shop = Workshop()
    async with whitepool.open_pool(
        shop.make, pool_size=1, max_overflow=1, overflow_ttl=0, max_lifetime=10
    ) as session:
        await trio.sleep(10.5)
        assert shop.attempts == 2
        assert session.statistics().idle == 1


@pytest.mark.parametrize("max_overflow", [0, 1])
async def test_a_worker_in_use_outlives_its_lifetime(max_overflow: int, autojump_clock: Clock) -> None:
    """It is retired when it comes back."""
    shop = Workshop()
    async with whitepool.open_pool(
        shop.make, pool_size=1, max_overflow=max_overflow, max_lifetime=10
    ) as session:
        async with session.worker() as tool:
            await trio.sleep(15)
            assert not tool.closed
        await trio.testing.wait_all_tasks_blocked()
        assert tool.closed
        assert session.statistics().idle == 1
        assert session.statistics().retired >= 1


async def test_an_old_worker_under_load_is_retired_too(autojump_clock: Clock) -> None:
    """It need not wait until it is idle for a while."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=2, max_overflow=0, max_lifetime=10) as session:

        async def client() -> None:
            while trio.current_time() < 100:
                async with session.worker(timeout=math.inf) as tool:
                    await trio.sleep(0.1)
                    used[tool] = trio.current_time()

        used: dict[Tool, float] = {}
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client)
        assert 18 <= session.statistics().retired <= 24


async def test_an_old_worker_stays_while_the_server_takes_no_new_ones(
    autojump_clock: Clock,
) -> None:
    """Better an old connection than none."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=2, max_overflow=1, max_lifetime=10) as session:
        shop.before_open = raising(OSError("too many connections"))
        await trio.sleep(60)
        assert session.statistics().idle == 2
        async with session.worker():
            pass
        assert session.statistics().retired == 0
        shop.before_open = nothing
        await trio.sleep(2)
        assert session.statistics().retired == 2


async def test_a_server_that_is_down_is_logged_sparingly(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """An event when it is noticed, each at most once a second, and one when it is back. (Rule 12.)"""
    shop = Workshop()
    async with whitepool.open_pool(shop.with_nursery, pool_size=5, name="mine") as session:
        caplog.set_level(logging.INFO, "whitepool")
        shop.before_open = raising(OSError("connection refused"))
        for tool in list(shop.tools):
            tool.crash.set()
        await trio.sleep(60)
        messages = [record.message for record in caplog.records]
        assert messages[0].startswith(
            "worker_lost pool=mine reason=crashed error=RuntimeError: the background"
        )
        assert messages[1].startswith("start_failed pool=mine error=OSError: connection refused")
        assert "suppressed=" in messages[2]
        assert len(messages) <= 61
        caplog.clear()
        shop.before_open = nothing
        await trio.sleep(1)
        assert session.statistics().idle == 5
        (message,) = [record.message for record in caplog.records if "recovered" in record.message]
        assert message.startswith("start_recovered pool=mine failures=")


async def test_a_worker_that_died_while_idle_is_not_handed_out() -> None:
    """One that has been idle for a while is revalidated first. (Rule 6.)"""
    shop = Workshop()
    manager = Manager(shop)
    async with whitepool.open_pool(manager, pool_size=2) as session:
        await trio.sleep(0.002)
        manager.dead.update(shop.tools)
        async with session.worker() as tool:
            assert tool.number == 3
        assert session.statistics().lost == 2


async def test_a_worker_that_was_in_use_a_moment_ago_is_not_asked_again(
    mock_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked at each return, and at a checkout only when it was idle for longer than that."""
    asked: list[float] = []
    manager = Manager(Workshop())

    def is_alive(worker: Tool) -> bool:
        asked.append(trio.current_time())
        return True

    monkeypatch.setattr(manager, "is_alive", is_alive)
    mock_clock.jump(7)
    async with whitepool.open_pool(manager, pool_size=1) as session:
        for idle_for, questions in (0, 1), (0, 1), (0.5, 2), (0, 1):
            mock_clock.jump(idle_for)
            asked.clear()
            session.checkin(session.checkout_nowait())
            assert len(asked) == questions


async def test_a_manager_that_raises_at_the_checkout_costs_the_worker_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client gets another, and not the error, which is logged."""
    shop = Workshop()

    class Broken(Manager):
        def is_alive(self, worker: Tool) -> bool:
            if worker.number == 1:
                raise RuntimeError("a bug")
            return True

    async with whitepool.open_pool(Broken(shop), pool_size=1) as session:
        await trio.sleep(0.002)
        async with session.worker() as tool:
            assert tool.number == 2
        check_books(session)
    assert "manager_failed" in caplog.records[0].message
    assert "RuntimeError: a bug" in caplog.records[0].message


async def test_a_hanging_hook_does_not_hold_up_the_shutdown(autojump_clock: Clock) -> None:
    """A worker that has to leave does so at once, whatever its task is doing."""

    hooks = whitepool.Hooks(after_release=hang)
    async with whitepool.open_pool(Workshop().make, pool_size=1, hooks=hooks) as session:
        async with session.worker():
            pass
        await trio.testing.wait_all_tasks_blocked()
    assert trio.current_time() == 0
