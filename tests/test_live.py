"""What a pool looks like in the terminal."""

from __future__ import annotations

import io
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial

import pytest
import trio
from rich.console import Console
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, nothing, raising

import whitepool
from whitepool.live import PoolView, watch

Session = whitepool.Session[Tool]

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Screen(Console):
    """A console whose day passes with Trio's clock, from 10:12:00 on."""

    def __init__(self, *, width: int = 80, encoding: str = "utf-8", terminal: str = "xterm") -> None:
        morning = datetime(2026, 5, 4, 10, 12) - timedelta(seconds=trio.current_time())
        self.output = io.BytesIO()
        super().__init__(
            file=io.TextIOWrapper(self.output, encoding, write_through=True),
            width=width,
            color_system=None,
            legacy_windows=False,
            get_datetime=lambda: morning + timedelta(seconds=trio.current_time()),
            force_terminal=bool(terminal),
            _environ={"TERM": terminal},
        )

    @property
    def written(self) -> str:
        return self.output.getvalue().decode(self.encoding)

    def show(self, view: PoolView) -> list[str]:
        """Draw a view, and return its lines."""
        before = len(self.written)
        self.print(view)
        return self.written[before:].splitlines()


async def use(session: Session, seconds: float, timeout: float = 5) -> None:
    with suppress(whitepool.CheckoutTimeout):
        async with session.worker(timeout):
            await trio.sleep(seconds)


async def test_a_pool_at_rest(autojump_clock: MockClock) -> None:
    """Two lines: how it stands, and its workers, each of them as wide as there is space for."""
    async with whitepool.open_pool(
        Workshop().make, name="shop", pool_size=6, max_overflow=4
    ) as session:
        assert Screen().show(PoolView(session)) == [
            "shop  ready                 0 checkouts/s",
            "░░░░░░░░░░░░░░░░░░············   0 in use   0 resetting   6 idle   0 starting",
        ]


async def test_a_pool_at_work(autojump_clock: MockClock) -> None:
    """How many wait, and for how long; workers in every state; the checkouts of the last second."""
    shop = Workshop()
    manager = Manager(shop)
    manager.before_reset = lambda tool: trio.sleep(1)
    async with (
        whitepool.open_pool(manager, name="shop", pool_size=6, max_overflow=4) as session,
        trio.open_nursery() as nursery,
    ):
        screen, view = Screen(), PoolView(session)
        for _ in range(5):
            nursery.start_soon(use, session, 5)
        await wait_all_tasks_blocked()
        resource = await session.block_checkout()
        manager.dirty.add(resource.get())
        session.checkin(resource)
        shop.before_open = lambda attempt: trio.sleep(2)
        for _ in range(12):
            nursery.start_soon(use, session, 5)
        await trio.sleep(0.5)
        assert screen.show(view) == [
            "shop  full +4              12 checkouts/s, 12 waiting, the first for 0.50 s",
            "███████████████▓▓▓▒▒▒▒▒▒▒▒▒▒▒▒   5 in use   1 resetting   0 idle   4 starting",
        ]
        await trio.sleep(1)
        assert screen.show(view) == [
            "shop  full +4               1 checkouts/s, 11 waiting, the first for 1.50 s",
            "██████████████████▒▒▒▒▒▒▒▒▒▒▒▒   6 in use   0 resetting   0 idle   4 starting",
        ]
        nursery.cancel_scope.cancel()


async def test_waits_that_are_over(autojump_clock: MockClock) -> None:
    """How long they were, on average; and how long a worker is out."""
    async with whitepool.open_pool(
        Workshop().make, name="shop", pool_size=2, max_overflow=0
    ) as session:
        screen, view = Screen(), PoolView(session)
        resource = await session.block_checkout()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(use, session, 0.2)
        assert screen.show(view)[0] == "shop  ready                 7 checkouts/s, waits of 0.30 s"
        await trio.sleep(12)
        assert screen.show(view)[0] == "shop  ready                 0 checkouts/s, one out for 13 s"
        session.checkin(resource)


async def test_what_happens_is_told(autojump_clock: MockClock) -> None:
    """All of one second in one line, with the time; a second in which nothing happens has none."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, name="shop", pool_size=2, max_overflow=0) as session:
        screen, view = Screen(), PoolView(session)
        session.destroyed(await session.block_checkout())
        await wait_all_tasks_blocked()
        assert screen.show(view)[2:] == ["10:12:00  shop  1 started, 1 destroyed"]
        session.destroyed(await session.block_checkout())
        await wait_all_tasks_blocked()
        assert screen.show(view)[2:] == ["10:12:00  shop  2 started, 2 destroyed"]
        await trio.sleep(2.5)
        assert len(screen.show(view)) == 3
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(use, session, 2, 1)
        assert screen.show(view)[2:] == [
            "10:12:00  shop  2 started, 2 destroyed",
            "10:12:04  shop  1 timed out",
        ]


async def test_deaths_and_failing_starts(autojump_clock: MockClock) -> None:
    """They are told as they happen."""
    shop = Workshop()

    async with whitepool.open_pool(shop.with_nursery, name="shop", pool_size=2) as session:
        screen, view = Screen(), PoolView(session)
        shop.before_open = raising(OSError("no more tools"))
        shop.tools[0].crash.set()
        await wait_all_tasks_blocked()
        assert screen.show(view)[2:] == [
            "the last start failed: OSError: no more tools",
            "10:12:00  shop  1 failed to start, 1 lost",
        ]
        shop.before_open = nothing
        await trio.sleep(5)
        assert screen.show(view)[2:] == [
            "10:12:00  shop  1 failed to start, 1 lost",
            "10:12:05  shop  1 started",
        ]


async def test_a_pool_that_is_down(autojump_clock: MockClock) -> None:
    """It says so, and why."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, name="shop", pool_size=1, max_overflow=0) as session:
        shop.before_open = raising(OSError("no more tools"))
        session.destroyed(await session.block_checkout())
        await trio.sleep(0.01)
        lines = Screen().show(PoolView(session))
    assert lines[0].split() == ["shop", "down", "0", "checkouts/s"]
    assert lines[2] == "the last start failed: OSError: no more tools"


async def test_old_events_make_way(autojump_clock: MockClock) -> None:
    """The last few seconds in which something happened are kept."""
    async with whitepool.open_pool(Workshop().make, name="shop", pool_size=1) as session:
        screen, view = Screen(), PoolView(session, events=2)
        for _ in range(4):
            session.destroyed(await session.block_checkout())
            await trio.sleep(1)
            lines = screen.show(view)
        assert [line.split()[0] for line in lines[2:]] == ["10:12:03", "10:12:04"]


async def test_two_pools(autojump_clock: MockClock) -> None:
    """One below the other; where there are more workers than cells, they share them."""
    async with (
        whitepool.open_pool(Workshop().make, name="few", pool_size=1, max_overflow=0) as few,
        whitepool.open_pool(Workshop().make, name="many", pool_size=75, max_overflow=25) as many,
    ):
        screen, view = Screen(), PoolView(few, many)
        for session in (few, many):
            session.destroyed(await session.block_checkout())
        await wait_all_tasks_blocked()
        async with few.worker(), many.worker(), many.worker(), many.worker(), many.worker():
            assert screen.show(view) == [
                "few  full                   0 checkouts/s",
                "█████████████████████████████████████  1 in use  0 resetting  0 idle  0 starting",
                "many  ready                 0 checkouts/s",
                "█░░░░░░░░░░░░░░░░░░░░········    4 in use    0 resetting   71 idle    0 starting",
                "10:12:00  few  1 started, 1 destroyed",
                "10:12:00  many  1 started, 1 destroyed",
            ]


async def test_a_terminal_without_blocks(autojump_clock: MockClock) -> None:
    """What can't be encoded is not used."""
    async with (
        whitepool.open_pool(Workshop().make, name="shop", pool_size=6, max_overflow=4) as session,
        session.worker(),
    ):
        lines = Screen(encoding="ascii").show(PoolView(session))
    assert lines[1] == "###---------------............   1 in use   0 resetting   5 idle   0 starting"


async def test_a_narrow_terminal(autojump_clock: MockClock) -> None:
    """What does not fit is cut off: the picture keeps its height."""
    async with whitepool.open_pool(
        Workshop().make, name="shop", pool_size=6, max_overflow=4
    ) as session:
        assert Screen(width=30).show(PoolView(session)) == [
            "shop  ready                 0…",
            "░░░░░░····   0 in use   0 res…",
        ]


def test_a_view_outlives_the_run() -> None:
    """It shows how the pool ended, also when Trio is no longer running."""

    async def main() -> tuple[Screen, PoolView]:
        async with whitepool.open_pool(Workshop().make, name="shop", pool_size=2) as session:
            return Screen(), PoolView(session)

    screen, view = trio.run(main)
    screen.get_datetime = lambda: datetime(2026, 5, 4)
    lines = screen.show(view)
    assert lines[0].startswith("shop  closed ")
    assert lines[2] == "00:00:00  shop  2 retired"


async def test_watching(autojump_clock: MockClock) -> None:
    """A picture in each period, until it is cancelled; then the cursor is back, below the last one."""
    async with whitepool.open_pool(Workshop().make, name="shop", pool_size=2) as session:
        screen = Screen()
        with trio.move_on_after(0.95):
            await watch(session, console=screen, period=0.1)
    pictures = screen.written.count("shop  ready")
    assert pictures == 11  # ten, and the last
    assert screen.written.startswith(HIDE_CURSOR)
    assert screen.written.endswith(f"starting\n{SHOW_CURSOR}")


async def test_the_last_picture_is_current(autojump_clock: MockClock) -> None:
    """It shows how the pool stands when watching ends, not how it stood a period before."""
    async with whitepool.open_pool(Workshop().make, name="shop", pool_size=2) as session:
        screen = Screen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(watch, session, console=screen, period=60))
            await wait_all_tasks_blocked()
            await session.safe_shutdown()
            nursery.cancel_scope.cancel()
    assert "shop  closed" in screen.written.splitlines()[-4]


async def test_something_above(autojump_clock: MockClock) -> None:
    """What the application has to show goes on top of the pools."""
    async with whitepool.open_pool(Workshop().make, name="shop", pool_size=2) as session:
        screen = Screen(terminal="dumb")
        with trio.move_on_after(1):
            await watch(session, above="transfers: 12", console=screen)
    assert screen.written.splitlines()[0] == "transfers: 12"
    assert screen.written.splitlines()[1].startswith("shop  ready")


@pytest.mark.parametrize("terminal", ["dumb", ""])
async def test_no_terminal(autojump_clock: MockClock, terminal: str) -> None:
    """A file, a pipe or a dumb terminal gets the last picture, once, and no control characters."""
    async with whitepool.open_pool(Workshop().make, name="shop", pool_size=2) as session:
        screen = Screen(terminal=terminal)
        with trio.move_on_after(0.5):
            await watch(session, console=screen)
    assert screen.written.splitlines(keepends=True) == [
        "shop  ready                 0 checkouts/s\n",
        "░░░░····················   0 in use   0 resetting   2 idle   0 starting\n",
    ]


async def test_an_impossible_period(autojump_clock: MockClock) -> None:
    """Without a pause between two pictures there would be no time for anything else."""
    with pytest.raises(ValueError, match="period must be more than 0"):
        await watch(period=0)
