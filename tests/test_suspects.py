"""What the peer of a worker said last: where it is told, and that the others are suspected then."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, check_books

import whitepool

WORDS = "57P01: good night"


class Talking(Manager):
    """A manager whose workers can be probed, and whose peers may say something last."""

    def __init__(self) -> None:
        super().__init__(Workshop())
        self.words: dict[Tool, str] = {}
        """What the peers of these say, if they are asked."""
        self.asked: list[Tool] = []
        self.probed: list[tuple[float, Tool]] = []
        self.before_check: Callable[[Tool], Any] | None = None

    async def check(self, worker: Tool) -> None:
        self.probed.append((trio.current_time(), worker))
        if self.before_check is not None:
            await self.before_check(worker)

    def _last_words(self, worker: Tool) -> str:
        self.asked.append(worker)
        return self.words.get(worker, "")


async def refuse(*_: object) -> None:
    raise OSError("no answer")


# Each has the only worker of a pool leave for one reason.


async def find_it_dead(manager: Talking, session: whitepool.Session[Tool]) -> None:
    async with session.worker() as tool:
        manager.dead.add(tool)


async def destroy_it(manager: Talking, session: whitepool.Session[Tool]) -> None:
    session.destroyed(await session.block_checkout())


async def fail_to_reset_it(manager: Talking, session: whitepool.Session[Tool]) -> None:
    manager.before_reset = refuse
    async with session.worker() as tool:
        manager.dirty.add(tool)


async def probe_it_in_vain(manager: Talking, session: whitepool.Session[Tool]) -> None:
    (first,) = manager.shop.tools
    manager.before_check = lambda tool: refuse() if tool is first else trio.lowlevel.checkpoint()
    await trio.sleep(31.6)


async def fail_in_a_hook(manager: Talking, session: whitepool.Session[Tool]) -> None:
    async with session.worker() as tool:
        tool.number = -1


def dislike(tool: Tool) -> None:
    """A hook `on_checkin` that fails for one worker."""
    if tool.number == -1:
        raise ValueError("that one not")


@pytest.mark.parametrize(
    ("have_it_leave", "reason", "event"),
    [
        (find_it_dead, "dead", "worker_lost"),
        (destroy_it, "destroyed", None),
        (fail_to_reset_it, "reset_failed", "reset_failed"),
        (probe_it_in_vain, "check_failed", "worker_lost"),
        (fail_in_a_hook, "hook_failed", "hook_failed"),
    ],
)
async def test_last_words_are_told_everywhere(
    have_it_leave: Callable[..., Any],
    reason: str,
    event: str | None,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the log, in the statistics of the reason, and to the hook. The peer is asked once."""
    manager = Talking()
    told: list[tuple[str, str]] = []
    hooks = whitepool.Hooks(
        on_checkin=dislike, on_destroy=lambda reason, words: told.append((reason, words))
    )
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0, hooks=hooks) as session:
        (first,) = manager.shop.tools
        before = session.statistics()
        manager.words[first] = WORDS
        await have_it_leave(manager, session)
        await wait_all_tasks_blocked()
        after = session.statistics()
        assert (before.last_words, after.last_words) == ({}, {reason: WORDS})
        assert dataclasses.asdict(after)["last_words"] == {reason: WORDS}
        assert hash(after) != hash(before)
        assert told == [(reason, WORDS)]
        assert after.idle == 1
        check_books(session)
    assert manager.asked == [first]
    assert told[1:] == [("shutdown", "")]
    records = [vars(record) for record in caplog.records]
    assert [(r["event"], r["last_words"]) for r in records] == ([(event, WORDS)] if event else [])


async def test_a_crash_is_told_with_its_last_words(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the worker is closed already when its error is known."""

    class Crashing(Talking):
        def lifespan(self) -> Any:
            return self.shop.with_nursery()

    manager = Crashing()
    async with whitepool.open_pool(manager, pool_size=1) as session:
        (first,) = manager.shop.tools
        manager.words[first] = WORDS
        first.crash.set()
        await wait_all_tasks_blocked()
        assert session.statistics().last_words == {"crashed": WORDS}
    (record,) = caplog.records
    assert (vars(record)["reason"], vars(record)["last_words"]) == ("crashed", WORDS)


async def test_a_worker_in_good_health_is_not_asked(autojump_clock: MockClock) -> None:
    """Nor one that was forgotten: its peer has not ended it."""
    manager = Talking()
    async with whitepool.open_pool(manager, pool_size=1, max_lifetime=60) as session:
        await trio.sleep(200)
        with pytest.warns(ResourceWarning):
            await session.block_checkout()
            await wait_all_tasks_blocked()
        assert session.statistics().retired > 2
        assert session.statistics().leaked == 1
    assert manager.asked == []


async def test_last_words_that_raise_lose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The worker leaves all the same, and the client that returns it gets no error."""
    manager = Talking()
    manager._last_words = lambda worker: str(1 // 0)  # type: ignore[method-assign]
    async with whitepool.open_pool(manager, pool_size=1) as session:
        await find_it_dead(manager, session)
        await wait_all_tasks_blocked()
        now = session.statistics()
        assert (now.lost, now.idle, now.last_words) == (1, 1, {})
        assert manager.shop.tools[0].closed
    events = [vars(record)["event"] for record in caplog.records]
    assert events == ["manager_failed", "worker_lost"]


async def test_a_snapshot_does_not_change() -> None:
    """Each has its own copy of the last words."""
    manager = Talking()
    async with whitepool.open_pool(manager, pool_size=2) as session:
        manager.words = dict.fromkeys(manager.shop.tools, "first")
        await destroy_it(manager, session)
        first = session.statistics()
        manager.words = dict.fromkeys(manager.shop.tools, "second")
        await destroy_it(manager, session)
        assert session.statistics().last_words == {"destroyed": "second"}
        assert first.last_words == {"destroyed": "first"}


# -- Which hooks get them ---------------------------------------------------------------------------


def transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    return wrapper


def adding(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return function("added", *arguments)

    return wrapper


class Unreadable:
    """A hook whose signature can't be read."""

    __signature__ = "none"

    def __init__(self, note: Callable[..., Any]) -> None:
        self._note = note

    def __call__(self, *arguments: Any) -> None:
        self._note(*arguments)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda note: lambda reason: note(reason), 1),
        (lambda note: lambda reason, words: note(reason, words), 2),
        (lambda note: lambda reason, last_words="": note(reason, last_words), 2),
        (lambda note: lambda reason, other=None: note(reason), 1),
        (lambda note: lambda *arguments: note(*arguments), 1),
        (lambda note: transparent(lambda reason: note(reason)), 1),
        (lambda note: transparent(lambda reason, last_words: note(reason, last_words)), 2),
        (lambda note: adding(lambda added, reason: note(reason)), 1),
        (Unreadable, 1),
    ],
    ids=[
        *("one", "two", "by-name", "default", "any", "decorated", "decorated-two", "adding"),
        "unreadable",
    ],
)
async def test_which_hooks_get_last_words(make: Callable[..., Any], arguments: int) -> None:
    """Those with a second parameter that can't be for anything else. The others get the reason only."""
    manager = Talking()
    told: list[tuple[str, ...]] = []
    hooks = whitepool.Hooks(on_destroy=make(lambda *given: told.append(given)))
    async with whitepool.open_pool(manager, pool_size=1, hooks=hooks) as session:
        manager.words[manager.shop.tools[0]] = WORDS
        await destroy_it(manager, session)
        await wait_all_tasks_blocked()
    assert told[0] == ("destroyed", WORDS)[:arguments]


@pytest.mark.parametrize("wrong", [lambda: None, lambda reason, last_words, more: None])
def test_a_hook_with_other_arguments(wrong: Callable[..., None]) -> None:
    """It is refused where the hooks are made."""
    with pytest.raises(TypeError, match=r"hooks\.on_destroy is called with \(reason"):
        whitepool.Hooks(on_destroy=wrong)


# -- The others are suspects ------------------------------------------------------------------------


async def test_last_words_of_one_have_all_probed(autojump_clock: MockClock) -> None:
    """At once, before the next checkout: no client gets another worker for which they hold."""
    manager = Talking()
    async with whitepool.open_pool(manager, pool_size=5, max_overflow=0) as session:
        old = set(manager.shop.tools)
        manager.words = dict.fromkeys(old, WORDS)
        manager.before_check = lambda tool: refuse() if tool in old else trio.lowlevel.checkpoint()
        await destroy_it(manager, session)
        assert session.statistics().resetting == 4
        async with session.worker() as tool:
            assert tool not in old
        assert trio.current_time() == 0
        await wait_all_tasks_blocked()
        now = session.statistics()
        assert (now.idle, now.started, now.destroyed, now.lost) == (5, 10, 1, 4)
        assert now.last_words == {"destroyed": WORDS, "check_failed": WORDS}
        assert old - {manager.asked[0]} <= {tool for _, tool in manager.probed}
        # What comes in their place is asked as well, until one has answered.
        assert manager.shop.tools[5] in {tool for _, tool in manager.probed}
        check_books(session)


@pytest.mark.parametrize("check_interval", [30, math.inf])
async def test_what_makes_no_worker_suspect(check_interval: float, autojump_clock: MockClock) -> None:
    """A worker that is destroyed without last words; and no worker is where probes are turned off."""
    manager = Talking()
    async with whitepool.open_pool(manager, pool_size=5, check_interval=check_interval) as session:
        if check_interval == math.inf:
            manager.words = dict.fromkeys(manager.shop.tools, WORDS)
        await destroy_it(manager, session)
        await trio.sleep(5)
        assert not manager.probed


async def test_suspects_are_probed_once_a_second(autojump_clock: MockClock) -> None:
    """What is found too early is remembered, and the workers that have answered since are spared."""
    manager = Talking()
    async with whitepool.open_pool(manager, pool_size=4, max_overflow=0) as session:
        manager.words = dict.fromkeys(manager.shop.tools, WORDS)
        await trio.sleep(1)
        await destroy_it(manager, session)
        await trio.sleep(0.25)
        manager.words = dict.fromkeys(manager.shop.tools, WORDS)
        await destroy_it(manager, session)
        await trio.sleep(0.25)
        async with session.worker() as used:
            pass
        await trio.sleep(3)
        old, first, second, later = manager.probed[:3], *manager.probed[3:5], manager.probed[5:]
        assert [time for time, _ in old] == [1, 1, 1]
        # Each replacement is asked when it has been opened.
        assert [first, second] == list(zip((1, 1.25), manager.shop.tools[4:], strict=True))
        assert [time for time, _ in later] == [2, 2, 2]
        assert used not in [tool for _, tool in later]


async def test_opening_a_pool_waits_for_the_answers_of_suspects(autojump_clock: MockClock) -> None:
    """A worker is not ready while it is probed, because another has left."""

    class Crashing(Talking):
        def lifespan(self) -> Any:
            return self.shop.with_nursery()

    manager = Crashing()
    tools = manager.shop.tools

    async def open_the_third_late(attempt: int) -> None:
        if attempt == 3:
            await trio.sleep(2)

    async def crash_the_first() -> None:
        await trio.sleep(1)
        manager.words[tools[0]] = WORDS
        tools[0].crash.set()

    manager.shop.before_open = open_the_third_late
    manager.before_check = lambda tool: trio.sleep(3 if tool is tools[1] else 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(crash_the_first)
        async with whitepool.open_pool(manager, pool_size=3, max_overflow=0) as session:
            assert trio.current_time() == 4
            assert (session.statistics().idle, session.statistics().lost) == (3, 1)


async def test_a_failed_probe_has_the_others_probed(autojump_clock: MockClock) -> None:
    """Half of the idle workers are probed at a time; once one is found dead, all others are."""
    manager = Talking()
    async with whitepool.open_pool(
        manager, pool_size=20, max_overflow=0, check_interval=30, reset_timeout=5
    ) as session:
        old = set(manager.shop.tools)
        manager.before_check = lambda tool: (
            trio.sleep_forever() if tool in old else trio.lowlevel.checkpoint()
        )
        # No replacement helps: half of those that remain are fewer each time.
        manager.shop.before_open = refuse
        await trio.sleep(30 + 1.5 + 2 * 5)
        assert session.statistics().lost == 20
        assert not manager.shop.alive


@pytest.mark.parametrize(("reset_timeout", "seconds"), [(5, 1), (0.5, 0.5)])
async def test_a_suspect_may_have_less_time_to_answer(
    reset_timeout: float, seconds: float, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No client can get it meanwhile, and it takes the place of a worker that is alive."""
    monkeypatch.setattr(Talking, "_suspect_timeout", 1)
    manager = Talking()
    async with whitepool.open_pool(
        manager, pool_size=3, max_overflow=0, reset_timeout=reset_timeout
    ) as session:
        old = set(manager.shop.tools)
        manager.words = dict.fromkeys(old, WORDS)
        manager.before_check = lambda tool: (
            trio.sleep_forever() if tool in old else trio.lowlevel.checkpoint()
        )
        await destroy_it(manager, session)
        assert session.statistics().resetting == 2
        await trio.sleep(seconds - 0.01)
        assert session.statistics().lost == 0
        await trio.sleep(0.02)
        assert (session.statistics().lost, session.statistics().idle) == (2, 3)
        assert not old & set(manager.shop.alive)


async def test_each_loss_is_logged_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """With its error, and nothing has been suppressed."""
    manager = Talking()
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0) as session:
        await probe_it_in_vain(manager, session)
        await find_it_dead(manager, session)
    lost = [vars(record) for record in caplog.records]
    assert [(record["reason"], record.get("error")) for record in lost] == [
        ("check_failed", "OSError: no answer"),
        ("dead", None),
    ]
    assert not any("suppressed" in record for record in lost)


async def test_a_worker_that_is_no_suspect_has_all_its_time(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary probe is bounded by `reset_timeout` only."""
    monkeypatch.setattr(Talking, "_suspect_timeout", 1)
    manager = Talking()
    manager.before_check = lambda _: trio.sleep(4)
    async with whitepool.open_pool(
        manager, pool_size=1, max_overflow=0, check_interval=30, reset_timeout=5
    ) as session:
        await trio.sleep(40)
        assert len(manager.probed) == 1
        assert session.statistics().lost == 0


async def test_a_hang_up_makes_no_worker_suspect(caplog: pytest.LogCaptureFixture) -> None:
    """The hang-ups of the others are seen without a probe."""
    manager = Talking()
    pairs: dict[Tool, tuple[Any, Any]] = {}

    def fileno(worker: Tool) -> int:
        pairs[worker] = trio.socket.socketpair()
        return int(pairs[worker][0].fileno())

    manager.fileno = fileno  # type: ignore[method-assign]
    async with whitepool.open_pool(manager, pool_size=3, max_overflow=0) as session:
        (first, *_) = manager.shop.tools
        manager.words[first] = WORDS
        pairs[first][1].close()
        while session.statistics().lost == 0:
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()
        assert session.statistics().last_words == {"hung_up": WORDS}
        assert [tool for _, tool in manager.probed] == manager.shop.tools[3:]  # the replacement
    for near, far in pairs.values():
        near.close()
        far.close()
    assert [vars(record)["last_words"] for record in caplog.records] == [WORDS]
