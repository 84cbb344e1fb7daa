"""The tasks that wait: first come, first served, each for as long as its timeout allows."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from whitepool._wait_queue import AT_ONCE, Waiter, WaitQueue

pytestmark = pytest.mark.usefixtures("no_hanging")


class TimeIsUp(Exception):
    """What a waiter gets when its timeout is over."""


class Shed(Exception):
    """What a waiter gets that leaves early."""


class Refused(Exception):
    """What a test fails a waiter with."""


class Desk:
    """A queue for numbers, the tasks that wait in it, and what became of each of them."""

    def __init__(self, nursery: trio.Nursery, patience: float) -> None:
        self.queue: WaitQueue[int] = WaitQueue(
            patience=patience,
            make_timeout=lambda task, timeout: TimeIsUp(),
            make_overload=Shed,
            on_unserved=self._on_unserved,
            checkouts=lambda: self.checkouts,
        )
        self.checkouts = 0
        """How many have got something, as far as is told; those that did not wait among them."""
        self.unserved = 0
        self.served: list[tuple[str, int]] = []
        """The waiters that got something, in the order in which they resumed, and what."""
        self.ends: dict[str, tuple[str, float]] = {}
        """Of each waiter that got nothing: why, and when."""
        self.waiters: dict[str, Waiter] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self.nursery = nursery

    def _on_unserved(self) -> None:
        self.unserved += 1

    async def join(self, name: str, timeout: float = math.inf, *, nonblocking: bool = False) -> None:
        """Have a new task wait, and return when it does."""
        self.scopes[name] = trio.CancelScope()
        self.nursery.start_soon(self._wait, name, timeout, nonblocking)
        await wait_all_tasks_blocked()

    async def wait(self, timeout: float, name: str = "", nonblocking: bool = False) -> int:
        """Wait in the queue, as a session does."""
        self.waiters[name] = waiter = self.queue.join(timeout, blocking=not nonblocking)
        number: int = await trio.lowlevel.wait_task_rescheduled(waiter.abort)
        return number

    async def _wait(self, name: str, timeout: float, nonblocking: bool) -> None:
        with self.scopes[name]:
            try:
                number = await self.wait(timeout, name, nonblocking)
            except (TimeIsUp, Shed, Refused) as error:
                self.ends[name] = type(error).__name__, trio.current_time()
            else:
                self.served.append((name, number))
        if self.scopes[name].cancelled_caught:
            self.ends[name] = "Cancelled", trio.current_time()

    @property
    def waiting(self) -> list[str]:
        """The waiters, in the order of the queue."""
        names = {waiter: name for name, waiter in self.waiters.items()}
        waiting = [names[waiter] for waiter in self.queue]
        assert len(waiting) == self.queue.waiting
        return waiting

    async def serve(self, number: int = 0) -> None:
        self.queue.serve(number, trio.current_time())
        await wait_all_tasks_blocked()


@pytest.fixture
async def desk(nursery: trio.Nursery) -> AsyncIterator[Desk]:
    """A desk that sheds no waiter: see `impatient_desk`."""
    desk = Desk(nursery, patience=1)
    nursery.start_soon(desk.queue.run_timers)
    yield desk


@pytest.fixture
async def impatient_desk(nursery: trio.Nursery) -> AsyncIterator[Desk]:
    """The first look is after a fifth of the timeout, and so are the others."""
    desk = Desk(nursery, patience=0.4)
    nursery.start_soon(desk.queue.run_timers)
    yield desk


async def let_pass(clock: MockClock, seconds: float) -> None:
    """Let time pass, and let everything happen that falls due."""
    clock.jump(seconds)
    await wait_all_tasks_blocked()


# -- The order -----------------------------------------------------------------------------------------


async def test_first_come_first_served(desk: Desk) -> None:
    """Also where the timeouts differ, and where one of them does not wait for clients."""
    await desk.join("a")
    await desk.join("b", timeout=1)
    await desk.join("c", nonblocking=True)
    await desk.join("d", timeout=0.5)
    assert desk.waiting == ["a", "b", "c", "d"]
    for number in (1, 2, 3, 4):
        await desk.serve(number)
    assert desk.served == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]
    assert desk.waiting == []
    assert desk.unserved == 0


async def test_waiters_are_numbered_as_they_come(desk: Desk) -> None:
    """Those that were served count, too: by that the queue knows how many have joined."""
    for name in "abc":
        await desk.join(name)
    desk.queue.serve(1, 0)
    await desk.join("d")
    assert [desk.waiters[name].number for name in "abcd"] == [1, 2, 3, 4]
    assert [desk.waiters[name].served_before for name in "abcd"] == [0, 0, 0, 1]


async def test_a_waiter_that_is_served_is_out_at_once(desk: Desk) -> None:
    """Before its task has run: the next one to be served is the next waiter."""
    await desk.join("a")
    await desk.join("b")
    desk.queue.serve(1, trio.current_time())
    assert desk.waiting == ["b"]
    desk.queue.serve(2, trio.current_time())
    await wait_all_tasks_blocked()
    assert sorted(desk.served) == [("a", 1), ("b", 2)]


async def test_there_must_be_a_waiter_to_serve(desk: Desk) -> None:
    """An entry would be lost otherwise."""
    with pytest.raises(IndexError):
        desk.queue.serve(1, trio.current_time())
    await desk.join("a")
    desk.scopes["a"].cancel()
    with pytest.raises(IndexError):
        desk.queue.serve(1, trio.current_time())
    assert desk.queue.served == desk.queue.waiting == 0


async def test_the_wait_begins_when_the_task_joins(desk: Desk, mock_clock: MockClock) -> None:
    """However it waits; the queue counts for how long those that are served have waited."""
    await desk.join("a")
    await let_pass(mock_clock, 2)
    await desk.join("b", nonblocking=True)
    await let_pass(mock_clock, 3)
    await desk.serve()
    await desk.serve()
    assert {name: waiter.since for name, waiter in desk.waiters.items()} == {"a": 0, "b": 2}
    assert desk.queue.served == 2
    assert desk.queue.wait_time == 5 + 3


async def test_the_longest_wait_is_the_first_waiters(desk: Desk, mock_clock: MockClock) -> None:
    """And 0 where no task waits."""
    assert desk.queue.longest_wait(7) == 0
    await desk.join("a")
    await let_pass(mock_clock, 2)
    await desk.join("b")
    assert desk.queue.longest_wait(trio.current_time()) == 2
    await let_pass(mock_clock, 3)
    assert desk.queue.longest_wait(trio.current_time()) == 5
    await desk.serve()
    assert desk.queue.longest_wait(trio.current_time()) == 3


async def test_what_was_waited_in_all(desk: Desk, mock_clock: MockClock) -> None:
    """By those that were served, whether they had a timeout or not."""
    assert (desk.queue.served, desk.queue.wait_time) == (0, 0)
    await desk.join("a")
    await let_pass(mock_clock, 2)
    await desk.join("b", timeout=9)
    await desk.join("c", timeout=1)
    await let_pass(mock_clock, 3)
    assert (desk.queue.served, desk.queue.wait_time) == (0, 0)
    await desk.serve()
    assert (desk.queue.served, desk.queue.wait_time) == (1, 5)
    await desk.serve()
    assert (desk.queue.served, desk.queue.wait_time) == (2, 8)


# -- Waiters that get nothing --------------------------------------------------------------------------


async def test_a_timeout(desk: Desk, mock_clock: MockClock) -> None:
    """Each waiter has its own, in whatever order they come; one without a timeout stays."""
    for name, timeout in ("a", 3), ("b", 1), ("c", math.inf), ("d", 2):
        await desk.join(name, timeout)
    for passed, waiting in (0.9, "abcd"), (0.1, "acd"), (0.9, "acd"), (0.1, "ac"), (1, "c"), (9, "c"):
        await let_pass(mock_clock, passed)
        assert desk.waiting == list(waiting)
    assert desk.ends == {"b": ("TimeIsUp", 1), "d": ("TimeIsUp", 2), "a": ("TimeIsUp", 3)}
    assert desk.unserved == 3


async def test_a_timeout_of_zero(desk: Desk, mock_clock: MockClock) -> None:
    """It is over as soon as other tasks have run."""
    await desk.join("a", timeout=0)
    assert desk.ends == {"a": ("TimeIsUp", 0)}


@pytest.mark.parametrize("timeout", [2, 0.25])
async def test_a_shorter_timeout_that_comes_later(
    timeout: float, desk: Desk, mock_clock: MockClock
) -> None:
    """It wakes the one task that keeps the time earlier than planned."""
    await desk.join("a", timeout=10)
    await let_pass(mock_clock, 1)
    await desk.join("b", timeout)
    await let_pass(mock_clock, timeout)
    assert desk.ends == {"b": ("TimeIsUp", 1 + timeout)}


async def test_a_cancelled_waiter_is_out_at_once(desk: Desk) -> None:
    """In the instant in which it is cancelled; the next one is served."""
    await desk.join("a")
    await desk.join("b")
    desk.scopes["a"].cancel()
    assert desk.waiting == ["b"]
    assert desk.unserved == 1
    await desk.serve(1)
    assert desk.served == [("b", 1)]
    assert desk.ends["a"][0] == "Cancelled"


async def test_a_waiter_that_was_served_is_not_cancelled(desk: Desk) -> None:
    """It has what it was given, although the cancellation came before it ran."""
    await desk.join("a")
    desk.queue.serve(1, trio.current_time())
    desk.scopes["a"].cancel()
    await wait_all_tasks_blocked()
    assert desk.served == [("a", 1)]
    assert desk.unserved == 0


async def test_a_waiter_that_fails(desk: Desk, mock_clock: MockClock) -> None:
    """The error is raised in its task; it must be waiting."""
    await desk.join("a")
    await desk.join("b")
    desk.queue.fail(desk.waiters["b"], Refused())
    assert desk.waiting == ["a"]
    assert desk.unserved == 1
    await wait_all_tasks_blocked()
    assert desk.ends == {"b": ("Refused", 0)}
    with pytest.raises(AssertionError):
        desk.queue.fail(desk.waiters["b"], Refused())
    assert desk.unserved == 1


# -- Waiters that do not wait for a client -------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_the_way", "beyond"),
    [(0, ["a", "c", "e"]), (1, ["c", "e"]), (2, ["c", "e"]), (3, ["e"]), (5, []), (6, [])],
)
async def test_those_beyond_what_is_on_the_way(desk: Desk, on_the_way: int, beyond: list[str]) -> None:
    """Of the waiters that get none of the next entries, only the nonblocking ones are found."""
    for name in "abcde":
        await desk.join(name, nonblocking=name in "ace")
    found = desk.queue.nonblocking_beyond(on_the_way)
    assert found == [desk.waiters[name] for name in beyond]


async def test_where_every_task_waits_for_clients(desk: Desk) -> None:
    """None of them is found."""
    await desk.join("a")
    assert desk.queue.nonblocking_beyond(0) == []


async def test_those_that_have_left_are_not_on_the_way(desk: Desk) -> None:
    """They count no more."""
    for name in "abc":
        await desk.join(name, nonblocking=True)
    desk.scopes["b"].cancel()
    assert desk.queue.nonblocking_beyond(1) == [desk.waiters["c"]]


# -- Shedding ------------------------------------------------------------------------------------------


async def serve_two(desk: Desk, clock: MockClock) -> None:
    """Have "a" wait behind two others, which are served: one in each of its first two periods."""
    for name in ("first", "second"):
        await desk.join(name)
    await desk.join("a", timeout=10)
    await desk.serve()
    await let_pass(clock, 2)
    await desk.serve()


async def test_a_waiter_is_shed_while_the_queue_grows(
    impatient_desk: Desk, mock_clock: MockClock
) -> None:
    """At its second look, where tasks were served in each period, and many more joined. (Rule 11.)"""
    desk = impatient_desk
    await serve_two(desk, mock_clock)
    late = [f"late {number}" for number in range(21)]  # 2 are served in 4 s: 20 take 4 timeouts
    for name in late:
        await desk.join(name)
    await let_pass(mock_clock, 1.9)
    assert desk.ends == {}
    await let_pass(mock_clock, 0.1)
    assert desk.ends == {"a": ("Shed", 4)}
    assert desk.unserved == 1
    assert desk.waiting == late


@pytest.mark.parametrize(("checkouts", "ends"), [(3, {"a": ("Shed", 4)}), (4, {})])
async def test_tasks_that_did_not_wait_tell_how_many_can_be_served(
    checkouts: int, ends: dict[str, tuple[str, float]], impatient_desk: Desk, mock_clock: MockClock
) -> None:
    """So many got something in four seconds: in twice its timeout, five times as many may."""
    desk = impatient_desk
    await serve_two(desk, mock_clock)
    desk.checkouts = checkouts
    for number in range(28 - 1):
        await desk.join(f"late {number}")
    await let_pass(mock_clock, 2)
    assert desk.ends == ends


async def test_each_waiter_has_periods_of_its_own(impatient_desk: Desk, mock_clock: MockClock) -> None:
    """They begin when it joins, and not when another one is looked at."""
    desk = impatient_desk
    for name in ("first", "second", "third"):
        await desk.join(name)
    await desk.join("a", timeout=10)
    await desk.serve()
    await let_pass(mock_clock, 1)
    await desk.join("b", timeout=10)
    await let_pass(mock_clock, 1)
    for number in range(40):
        await desk.join(f"late {number}")
    await desk.serve()
    await let_pass(mock_clock, 1)
    for number in range(40):
        await desk.join(f"later {number}")
    await desk.serve()
    await let_pass(mock_clock, 1)
    assert desk.ends == {"a": ("Shed", 4)}
    await let_pass(mock_clock, 1)
    assert desk.ends == {"a": ("Shed", 4), "b": ("Shed", 5)}


async def test_no_waiter_is_shed_at_its_first_look(impatient_desk: Desk, mock_clock: MockClock) -> None:
    """It can't say whether a task was served in the period before. (Rule 11.)"""
    desk = impatient_desk
    await desk.join("first")
    await desk.join("a", timeout=10)
    await desk.serve()
    for name in ("late", "later", "latest"):
        await desk.join(name)
    await let_pass(mock_clock, 2)
    assert desk.ends == {}


@pytest.mark.parametrize(
    ("served_in_first", "served_in_second", "joined_in_second"),
    [
        (1, 1, 1),  # it does not grow
        (1, 2, 1),  # it drains
        (0, 1, 2),  # no task was served in the period before
        (1, 0, 2),  # no task was served in this one
    ],
)
async def test_a_waiter_is_not_shed_otherwise(
    served_in_first: int,
    served_in_second: int,
    joined_in_second: int,
    impatient_desk: Desk,
    mock_clock: MockClock,
) -> None:
    """It waits until its time is up, as nothing changes any more. (Rule 11.)"""
    desk = impatient_desk
    for name in ("earlier", "first", "second", "third"):
        await desk.join(name)
    await desk.serve()
    await desk.join("a", timeout=10)
    for _ in range(served_in_first):
        await desk.serve()
    await let_pass(mock_clock, 2)
    for _ in range(served_in_second):
        await desk.serve()
    for number in range(joined_in_second):
        await desk.join(f"late {number}")
    for _ in range(4):
        await let_pass(mock_clock, 2)
    assert desk.ends == {"a": ("TimeIsUp", 10)}


async def test_patience_1_sheds_no_waiter(desk: Desk, mock_clock: MockClock) -> None:
    """However fast the queue grows."""
    await desk.join("first")
    await desk.join("a", timeout=10)
    for second in range(10):
        assert "a" in desk.waiting
        if second < 1:
            await desk.serve()
        await desk.join(f"late {second}")
        await let_pass(mock_clock, 1)
    assert desk.ends == {"a": ("TimeIsUp", 10)}


# -- Timers --------------------------------------------------------------------------------------------


async def test_a_task_that_waits_again_has_a_timeout_of_its_own(
    desk: Desk, mock_clock: MockClock
) -> None:
    """The time of its first wait does not end the second."""
    ended: list[float] = []

    async def wait_twice() -> None:
        await desk.wait(2)
        with pytest.raises(TimeIsUp):
            await desk.wait(5)
        ended.append(trio.current_time())

    desk.nursery.start_soon(wait_twice)
    await wait_all_tasks_blocked()
    await let_pass(mock_clock, 1)
    await desk.serve()
    for _ in range(5):
        assert ended == []
        await let_pass(mock_clock, 1)
    assert ended == [6]


async def test_the_timer_of_a_waiter_that_has_left_does_nothing(
    impatient_desk: Desk, mock_clock: MockClock
) -> None:
    """A task that waits again is not shed for what was seen in its first wait."""
    desk = impatient_desk
    served: list[int] = []

    async def wait_twice() -> None:
        for _ in range(2):
            served.append(await desk.wait(10))

    await desk.join("first")
    desk.nursery.start_soon(wait_twice)
    await wait_all_tasks_blocked()
    await desk.serve()
    await let_pass(mock_clock, 2)  # to the first look at the first wait
    await let_pass(mock_clock, 1)
    await desk.serve(1)
    for name in ("late", "later"):
        await desk.join(name)
    await let_pass(mock_clock, 1)  # to the second look at the first wait, if it still waited
    await desk.serve(2)
    assert served == [1, 2]


async def test_a_waiter_that_leaves_in_time_gets_no_timer(
    impatient_desk: Desk, mock_clock: MockClock
) -> None:
    """It costs no more than one without a timeout."""
    desk = impatient_desk
    for _ in range(3):
        await desk.join("a", timeout=10)
        await let_pass(mock_clock, 0.5)
        await desk.serve()
    await desk.join("b", timeout=10)
    desk.scopes["b"].cancel()
    await let_pass(mock_clock, 0.5)
    assert not desk.queue._timers
    await desk.join("b", timeout=10)
    await let_pass(mock_clock, 2)
    assert len(desk.queue._timers) == 1


async def test_a_look_at_one_waiter_does_not_change_the_times_of_others(
    desk: Desk, mock_clock: MockClock
) -> None:
    """Also where others have joined since, and with timeouts that end sooner or later."""
    for name, timeout in ("a", 2.0), ("b", 9.0), ("c", 3.0):
        await desk.join(name, timeout)
    await let_pass(mock_clock, 1)
    for name, timeout in ("d", 1.0), ("e", 7.0), ("f", 1.5):
        await desk.join(name, timeout)
    for _ in range(16):
        await let_pass(mock_clock, 0.5)
    times = {"a": 2, "d": 2, "f": 2.5, "c": 3, "e": 8, "b": 9}
    assert desk.ends == {name: ("TimeIsUp", time) for name, time in times.items()}


async def test_many_waiters_get_their_timers_without_a_stall(desk: Desk, mock_clock: MockClock) -> None:
    """Other tasks have a turn meanwhile, may join and may leave; each time is kept."""
    many = 3 * AT_ONCE
    ended: list[float] = []

    async def wait(timeout: float) -> None:
        with pytest.raises(TimeIsUp):
            await desk.wait(timeout)
        ended.append(trio.current_time())

    async def disturb() -> None:
        while not desk.queue._timers:
            await trio.lowlevel.checkpoint()
        assert len(desk.queue._timers) < many
        assert desk.unserved == 1  # the first, which was due before those others have timers
        desk.scopes["leaves"].cancel()
        desk.nursery.start_soon(wait, 0.25)

    await desk.join("first", timeout=1)
    for _ in range(many):
        desk.nursery.start_soon(wait, 2)
    await desk.join("leaves", timeout=2)
    desk.nursery.start_soon(disturb)
    mock_clock.jump(1)
    await wait_all_tasks_blocked()
    assert desk.ends == {"first": ("TimeIsUp", 1), "leaves": ("Cancelled", 1)}
    await let_pass(mock_clock, 0.25)
    assert ended == [1.25]
    await let_pass(mock_clock, 0.5)
    assert desk.queue.waiting == many
    await let_pass(mock_clock, 0.25)
    assert ended == [1.25] + [2] * many


async def test_cancelled_waiters_do_not_pile_up(desk: Desk) -> None:
    """Of a thousand that have left, only some dozens are kept, and those that wait keep their order."""
    await desk.join("a")
    await desk.join("b")
    for _ in range(1000):
        with trio.CancelScope() as scope:
            scope.cancel()
            await desk.wait(10)
        assert desk.waiting == ["a", "b"]
    await desk.join("c")
    assert desk.waiting == ["a", "b", "c"]
    assert len(desk.queue._waiters) <= 64 + 2 * 3


async def test_to_leave_costs_the_same_however_many_wait(desk: Desk, mock_clock: MockClock) -> None:
    """Neither the waiters nor their timers are gone through for one that leaves, or is looked at."""
    for _ in range(200):
        desk.nursery.start_soon(desk.wait, 100)
    await desk.join("a", timeout=1)
    await let_pass(mock_clock, 1)
    waiters, timers = desk.queue._waiters, desk.queue._timers
    assert len(timers) == 200
    await desk.join("b", timeout=1)
    await let_pass(mock_clock, 1)
    assert list(desk.ends) == ["a", "b"]
    assert desk.queue._waiters is waiters
    assert desk.queue._timers is timers
    for _ in range(200):
        await desk.serve()


async def test_stale_timers_do_not_pile_up(desk: Desk, mock_clock: MockClock) -> None:
    """Of those of a thousand tasks that have left, only some hundreds are kept."""
    for name in "abcdefghij":
        await desk.join(name, timeout=1)
        for _ in range(100):
            desk.nursery.start_soon(desk.wait, 100)
        await let_pass(mock_clock, 1)
        assert desk.ends[name] == ("TimeIsUp", trio.current_time())
        for _ in range(100):
            desk.queue.serve(1, trio.current_time())
    assert len(desk.queue._timers) <= 64 + 4 * 101 + 101


async def test_times_are_kept_when_stale_timers_are_dropped(desk: Desk, mock_clock: MockClock) -> None:
    """In whatever order they are."""
    timeouts = [10 + 37 * number % 401 for number in range(400)]
    ended: list[tuple[float, float]] = []

    async def wait(timeout: float) -> None:
        with suppress(TimeIsUp):
            await desk.wait(timeout)
            return
        ended.append((timeout, trio.current_time()))

    for timeout in timeouts:
        desk.nursery.start_soon(wait, timeout)
        await wait_all_tasks_blocked()
    await desk.join("a", timeout=1)
    await let_pass(mock_clock, 1)
    assert len(desk.queue._timers) == 400
    for _ in range(370):
        desk.queue.serve(1, trio.current_time())
    await desk.join("b", timeout=1)
    await let_pass(mock_clock, 1)
    assert len(desk.queue._timers) == 30
    while desk.queue.waiting:
        await let_pass(mock_clock, 1)
    assert ended == [(timeout, timeout) for timeout in sorted(timeouts[370:])]


async def test_a_waiter_without_a_timeout_has_no_timer(desk: Desk, mock_clock: MockClock) -> None:
    """There is nothing to look at."""
    await desk.join("a")
    await desk.join("b", nonblocking=True)
    await desk.join("c", timeout=1)
    await let_pass(mock_clock, 1)
    assert desk.waiting == ["a", "b"]
    assert not desk.queue._timers
