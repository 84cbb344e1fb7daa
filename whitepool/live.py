"""Pools in the terminal, as they work. Needs the extra ``live``::

    async with trio.open_nursery() as nursery:
        nursery.start_soon(whitepool.live.watch, session)

It reads `Session.statistics` for each picture. A pool that is not watched pays nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import trio

try:
    from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
    from rich.live import Live
    from rich.text import Text
except ImportError as error:
    raise ImportError(f"whitepool.live needs rich: pip install 'whitepool[live]' ({error})") from error

from ._checks import check_seconds
from ._session import Session
from ._statistics import PoolStatistics

__all__ = ["PoolView", "watch"]

STATES = {"ready": "green", "overflow": "yellow", "full": "bold red", "down": "bold red"}

WORKERS = {"in use": "yellow", "resetting": "cyan", "idle": "green", "starting": "magenta", "": "dim"}
"""The colours of the bar, from left to right; at last that of the room for more."""

BLOCKS, ASCII = "█▓░▒·", "#r-s."

LONGEST_BAR = 40

LONG_USE = 10
"""Seconds. The longest use is shown from then on: shorter ones would only flicker."""

EVENTS = {
    "started": ("started", "green"),
    "start_failures": ("failed to start", "red"),
    "retired": ("retired", "dim"),
    "lost": ("lost", "red"),
    "destroyed": ("destroyed", "red"),
    "leaked": ("leaked", "red"),
    "timeouts": ("timed out", "yellow"),
    "overloads": ("overloaded", "yellow"),
}
"""The words and the colour for each counter that has grown."""


class PoolView:
    """A picture of one or more pools, for rich: print it, or put it into a `rich.live.Live`.

    For each pool it has the state, with the workers beyond `pool_size` as ``+2``; the checkouts per
    second, of the last second; the wait queue, or how long those of that second have waited on average
    that had to; the longest use that goes on; the workers as a bar; and why the last start failed, if
    it did. Below are the last `events`
    seconds in which something happened, as far as the counters tell, since the view was made.

    Each time it is drawn it looks at the pools, so that has to be in Trio's thread: a `rich.live.Live`
    needs ``auto_refresh=False``.
    """

    def __init__(self, *sessions: Session[Any], events: int = 5) -> None:
        self._pools = [_History(session) for session in sessions]
        self._most_events = events
        # By the second and the pool, the oldest first: a storm of events is one line, not hundreds.
        self._events: dict[tuple[str, str], Counter[str]] = {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        second = f"{console.get_datetime():%H:%M:%S}"
        for pool in self._pools:
            news = pool.look()
            if news:
                self._events.setdefault((second, pool.now.name), Counter()).update(news)
            yield _summary(pool)
            yield _workers(pool.now, options)
            if pool.now.last_error is not None:
                yield _one_line().append(f"the last start failed: {pool.now.last_error}", "red")
        while len(self._events) > self._most_events:
            del self._events[next(iter(self._events))]
        for (second, name), counts in self._events.items():
            yield _event(second, name, counts)


class _History:
    """One pool, as it was when it was looked at."""

    def __init__(self, session: Session[Any]) -> None:
        self._session = session
        self._time = trio.lowlevel.current_clock().current_time  # works after the run, too
        self.now = session.statistics()
        self._past = deque([(self._time(), self.now)])

    def look(self) -> Counter[str]:
        """Look again, and return what has happened meanwhile."""
        time, before, self.now = self._time(), self.now, self._session.statistics()
        self._past.append((time, self.now))
        while self._past[1][0] <= time - 1:  # keep one that is a second old
            self._past.popleft()
        return +Counter({name: getattr(self.now, name) - getattr(before, name) for name in EVENTS})

    @property
    def checkouts_per_second(self) -> float:
        (begin, first), (end, last) = self._past[0], self._past[-1]
        return (last.checkouts - first.checkouts) / (end - begin) if end > begin else 0

    @property
    def average_wait(self) -> float:
        """Seconds for which those waited that had to wait, and that were served in the last second."""
        first, last = self._past[0][1], self._past[-1][1]
        waited = last.waited - first.waited
        return (last.wait_time - first.wait_time) / waited if waited else 0


def _one_line() -> Text:
    return Text(no_wrap=True, overflow="ellipsis")


def _summary(pool: _History) -> Text:
    """``shop  full +4          812 checkouts/s, 38 waiting, the first for 0.42 s``."""
    now = pool.now
    text = (
        _one_line()
        .append(now.name, "bold")
        .append("  ")
        .append(now.state, STATES.get(now.state, "dim"))
    )
    if now.overflow:
        text.append(f" +{now.overflow}")
    text.pad_right(max(1, 24 - len(text)))
    text.append(f"{pool.checkouts_per_second:5.0f} checkouts/s")
    if now.waiting:
        text.append(f", {now.waiting} waiting, the first for {now.longest_wait:.2f} s", "yellow")
    elif pool.average_wait:
        text.append(f", waits of {pool.average_wait:.2f} s")
    if now.longest_use >= LONG_USE:
        text.append(f", one out for {now.longest_use:.0f} s", "yellow")
    return text


def _workers(now: PoolStatistics, options: ConsoleOptions) -> Text:
    """``████████████▓▓░░░░▒▒····   6 in use   1 resetting   2 idle   1 starting``."""
    limit = max(1, now.pool_size + now.max_overflow)
    numbers = [now.in_use, now.resetting, now.idle, now.starting]
    legend = Text()
    for number, (state, colour) in zip(numbers, WORKERS.items(), strict=False):
        legend.append(f"  {number:{len(str(limit))}} {state}", colour if number else "dim")
    # Each worker has as many cells as there is space for; if there is too little, they share.
    width = max(10, min(LONGEST_BAR, options.max_width - len(legend)))
    width -= width % limit if limit < width else 0
    bar = _one_line()
    seen = 0
    blocks = ASCII if options.ascii_only else BLOCKS
    for number, block, colour in zip([*numbers, limit], blocks, WORKERS.values(), strict=True):
        seen = min(seen + number, limit)
        bar.append(block * (seen * width // limit - len(bar)), colour)
    return bar.append_text(legend)


def _event(second: str, pool: str, counts: Counter[str]) -> Text:
    """``10:12:04  shop  3 started, 3 lost``."""
    told = [
        Text(f"{counts[name]} {what}", colour)
        for name, (what, colour) in EVENTS.items()
        if counts[name]
    ]
    return Text.assemble((f"{second}  ", "dim"), f"{pool}  ", Text(", ").join(told))


async def watch(
    *sessions: Session[Any],
    above: RenderableType | None = None,
    console: Console | None = None,
    period: float = 0.1,
) -> None:
    """Show pools in the terminal until cancelled; the last picture stays.

    It draws a `PoolView` every `period` seconds, below what is given as `above`: a
    `rich.progress.Progress`, for example. What is printed meanwhile goes on top of them. Where the
    console is no terminal, it prints the last picture only.
    """
    check_seconds("period", period, more_than_zero=True)
    view: RenderableType = PoolView(*sessions)
    if above is not None:
        view = Group(above, view)
    live = Live(view, console=console, auto_refresh=False)
    try:
        with live:
            while True:
                await trio.sleep(period)
                live.refresh()
    finally:
        if not live.console.is_terminal:
            live.console.line()  # rich ends the last one on a terminal only
