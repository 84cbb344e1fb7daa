"""Rounds of measurements, side by side.

All peers take part in one round before the next begins, and every other round runs backwards, so that
whatever else the machine does meets all of them.
"""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .case import Case, Figure
from .cases import CASES
from .peers import PEERS, Peer
from .report import compare
from .row import Row
from .soak import own_process

LIMIT = 200
"""Seconds that one measurement may take. None should take half of it."""


def measure_all(chosen: list[Case], dsn: str, rounds: int, console: Console) -> list[Row]:
    """Measure case by case, in so many rounds at most, and show how far it has come."""
    planned = [min(case.rounds, rounds) for case in chosen]
    columns = (TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn())
    # It draws between two measurements: a thread that draws during one would take its time.
    with (
        Progress(*columns, console=console, auto_refresh=False, transient=True) as progress,
        own_process() as other,
    ):
        bar = progress.add_task("", total=sum(planned))
        rows: list[Row] = []
        for case, times in zip(chosen, planned, strict=True):
            progress.update(bar, description=f"{case.group:9}", refresh=True)
            if case.prepare:
                case.prepare(dsn)
            samples: dict[Peer, list[tuple[float, ...]]] = {peer: [] for peer in case.peers}
            for number in range(times):
                order = case.peers if number % 2 == 0 else case.peers[::-1]
                for peer, figures in zip(order, measure(case, order, dsn, other), strict=True):
                    samples[peer].append(figures)
                progress.advance(bar)
                progress.refresh()
            found = {peer: over_rounds(case.figures, taken) for peer, taken in samples.items()}
            rows += compare(case, found)
    return rows


def measure(
    case: Case, order: tuple[Peer, ...], dsn: str, other: ProcessPoolExecutor
) -> list[tuple[float, ...]]:
    """Measure each peer once."""
    if case.at_once:
        with ThreadPoolExecutor() as threads:
            return list(threads.map(lambda peer: case.measure(peer, dsn), order))
    return [
        other.submit(measure_one, case.title, peer.name, dsn).result()
        if peer.apart
        else measure_one(case.title, peer.name, dsn)
        for peer in order
    ]


def measure_one(case: str, peer: str, dsn: str) -> tuple[float, ...]:
    """Measure one peer; named, not given, as the other process has cases and peers of its own."""
    gc.collect()  # what the last one left behind is not for this one to clear away
    with time_limit(f"{peer}: {case}"):
        figures: tuple[float, ...] = CASES[case].measure(PEERS[peer], dsn)
    return figures


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Stop the run where one of its peers hangs: by a signal, as its event loop may be the one."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {LIMIT} seconds: {what}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def over_rounds(figures: tuple[Figure, ...], samples: list[tuple[float, ...]]) -> tuple[float, ...]:
    """Make one of what each figure was in the rounds in which it could be measured."""
    return tuple(
        figure.of([value for value in values if not math.isnan(value)] or [math.nan])
        for figure, values in zip(figures, zip(*samples, strict=True), strict=True)
    )
