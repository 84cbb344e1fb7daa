"""What fleets of pools do to a server that they share: `make fleet`, or `python -m benchmarks.fleet`.

The pools are whitepool's own code, and all of them run in one simulation (`model_server`), each as if
it were a process of its own. Beside each scene is the same without one of the pool's precautions. It
takes some minutes, prints tables, and draws plots.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import matplotlib
from rich.console import Console
from rich.table import Table

from . import ROOT, fleets
from .fleets import Churn, Restart, Spike, per_window, without_backoff, without_jitter
from .look import BLUE, GREEN, GREY, LOOK, ORANGE, canvas, panels, save
from .model_server import simulate

T = TypeVar("T")
AS_IT_IS = "as it is"
COLOURS = (ORANGE, BLUE, GREEN)
MOMENT = 0.01
"""Seconds of a window in which connects are counted."""


def main() -> None:
    """Run all scenes."""
    parser = argparse.ArgumentParser("python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder for plots")
    parser.add_argument("--only", metavar="SCENES", help=f"some of {','.join(SCENES)}")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(SCENES)
    if not set(wanted) <= set(SCENES):
        parser.error(f"--only takes some of {','.join(SCENES)}")
    console = Console()
    if not console.is_terminal:
        console.width = 130  # a file has no width of its own
    options.figures.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        began = perf_counter()
        with matplotlib.rc_context(LOOK):
            console.print(SCENES[name](options.figures))
        console.print(f"{perf_counter() - began:.0f} s\n", style="dim")


Variants = Mapping[str, tuple[AbstractContextManager[None, Any], dict[str, Any]]]
"""For each: what to do without, and the options."""


def each(scene: Callable[..., Any], variants: Variants) -> dict[str, Any]:
    """Simulate a scene in each of its variants."""
    results = {}
    for name, (without, options) in variants.items():
        with without:
            results[name] = simulate(partial(scene, **options))
    return results


# -- A restart -----------------------------------------------------------------------------------------


def restart(figures: Path) -> Table:
    """Restart the server of 10, 100 and 1,000 pools; without jitter and backoff, of 100."""
    table = Table(
        "",
        "attempts/s, each pool",
        "most in 10 ms, down",
        "… after the return",
        "all pools serve",
        "all are whole",
        "the server's floor",
        title="a server away for 5 s: pools of 5 connections, 8 cores, 4 ms of a core for each connect",
    )
    results = {f"{pools:,} pools": simulate(fleets.restart, pools) for pools in (10, 100, 1_000)}
    without = each(
        partial(fleets.restart, 100),
        {
            "100 without jitter": (without_jitter(), {}),
            "100 without backoff": (without_backoff(), {}),
        },
    )
    for name, result in (results | without).items():
        table.add_row(name, *_restart_row(result))
    _plot_restart({AS_IT_IS: results["100 pools"], **without}, figures / "fleet-restart.svg")
    return table


def _restart_row(result: Restart) -> Iterable[str]:
    pools = len(result.whole)
    down = per_window(result.attempts, MOMENT, -5, 0)
    up = per_window(result.attempts, MOMENT, 0, max(result.whole))
    yield f"{sum(down) / 5 / pools:.1f}"
    yield from (f"{max(down):,}", f"{max(up):,}")
    yield from (f"{seconds:.2f} s" for seconds in (max(result.served), max(result.whole), result.floor))


def _plot_restart(results: dict[str, Restart], path: Path) -> None:
    rows = panels(len(results), "connects attempted per 10 ms: 100 pools, a server away for 5 s")
    begin, end = -5.0, 1.5
    for axes, (name, result), colour in zip(rows, results.items(), COLOURS, strict=True):
        counts = per_window(result.attempts, MOMENT, begin, end)
        times = [begin + MOMENT * window for window in range(len(counts))]
        axes.vlines(times, 0, counts, color=colour, linewidth=0.9)
        axes.axvline(0, color=GREY, linestyle=":")
        axes.set_ylabel(name.removeprefix("100 "))
        axes.set_xlim(begin, end)
        axes.set_ylim(bottom=0)
    rows[-1].set_xlabel("seconds from the server's return")
    save(rows[-1], path)


# -- Churn ---------------------------------------------------------------------------------------------


def churn(figures: Path) -> Table:
    """Let a day pass, and let bursts arrive by the clock."""
    table = Table(
        "",
        "overflow_ttl",
        "connections opened, each pool",
        "most in 10 ms, all pools",
        "checkouts without a wait",
        title="pools of 5 connections, and up to 10 more",
    )
    options: dict[str, Any] = {
        "0 s": {"overflow_ttl": 0},
        "10 s, the default": {},
        "90 s": {"overflow_ttl": 90},
    }
    variants = {name: (nullcontext(), ttl) for name, ttl in options.items()}
    days: dict[str, Churn] = each(partial(fleets.day, DAY_POOLS), variants)
    for name, result in days.items():
        table.add_row("10 pools: a day in half an hour", name, *_churn_row(result, DAY_POOLS))
    table.add_section()
    for name, result in each(partial(fleets.bursts, BURST_POOLS), variants).items():
        table.add_row("100 pools: 15 tasks each minute", name, *_churn_row(result, BURST_POOLS))
    _plot_day(days["10 s, the default"], figures / "fleet-day.svg")
    return table


DAY_POOLS, BURST_POOLS = 10, 100


def _churn_row(result: Churn, pools: int) -> Iterable[str]:
    yield f"{len(result.opened) / pools:.0f}"
    yield f"{max(per_window(result.opened, MOMENT, 0, max(result.opened) + 1), default=0)}"
    yield f"{100 * result.hurried / result.requests:.1f} %"


def _plot_day(result: Churn, path: Path) -> None:
    upper, lower = panels(2, "a day in half an hour: connections of each pool of 5, up to 10 more")
    minutes = [10 * (number + 1) / 60 for number in range(len(result.open))]
    upper.plot(minutes, result.open, color=ORANGE, label="open")
    upper.plot(minutes, result.load, color=BLUE, label="in use")
    upper.set_ylim(bottom=0)
    upper.legend(loc="upper left")
    opened = per_window(result.opened, 10, 0, 10 * len(minutes))
    lower.bar(minutes, [6 * number / DAY_POOLS for number in opened], width=0.12, color=ORANGE)
    lower.set_ylabel("opened a minute")
    lower.set_xlabel("minutes")
    save(lower, path)


# -- Lifetimes -----------------------------------------------------------------------------------------


def lifetimes(figures: Path) -> Table:
    """Let connections reach their `max_lifetime`, for an hour."""
    table = Table(
        "",
        "reconnects",
        "most in 10 s ÷ mean, first half hour",
        "… second half hour",
        title="200 pools of 5, opened together, max_lifetime=600: an hour",
    )
    results: dict[str, list[float]] = each(
        partial(fleets.lifetimes, 200),
        {AS_IT_IS: (nullcontext(), {}), "without jitter": (without_jitter(), {})},
    )
    rows = panels(2, "connections replaced per 10 s: 200 pools of 5, max_lifetime=600")
    for axes, (name, times), colour in zip(rows, results.items(), COLOURS, strict=False):
        table.add_row(name, str(len(times)), *(f"{peak:.1f}" for peak in peaks(times)))
        counts = per_window(times, 10, 0, 3600)
        axes.bar([(window + 0.5) / 6 for window in range(len(counts))], counts, 0.16, color=colour)
        axes.set_ylabel(name)
    rows[-1].set_xlabel("minutes from the opening")
    save(rows[-1], figures / "fleet-lifetime.svg")
    return table


def peaks(times: list[float]) -> Iterable[float]:
    """Return for each half hour how many times the mean the fullest window has."""
    counts = per_window(times, 10, 0, 3600)
    mean = sum(counts) / len(counts)
    for half in (counts[:180], counts[180:]):
        yield max(half) / mean


# -- A spike -------------------------------------------------------------------------------------------


def spike(figures: Path) -> Table:
    """Triple the load for ten seconds, with clients who try again."""
    table = Table(
        "",
        "before",
        "in the spike",
        "10 to 20 s after it",
        "30 to 40 s after it",
        title="100 pools, 40 cores, 0.7 of what they can do, and 3 times that for 10 s: % of the "
        "capacity that goes into answers in time",
    )
    results: dict[str, Spike] = each(
        partial(fleets.spike, 100),
        {
            "2 connections each": (nullcontext(), {}),
            "… without shedding": (nullcontext(), {"patience": 1.0}),
            "10 connections each": (nullcontext(), {"size": 10}),
        },
    )
    axes = canvas(
        "100 pools, three times the capacity for 10 s; clients try again", "seconds", "% of capacity"
    )
    for (name, result), colour in zip(results.items(), COLOURS, strict=True):
        begin, end = result.spike
        shares = [
            result.goodput(0, begin),
            result.goodput(begin, end),
            result.goodput(end + 10, end + 20),
            result.goodput(end + 30, end + 40),
        ]
        table.add_row(name, *(f"{100 * share:.0f}" for share in shares))
        seconds = range(int(end) + 40)
        axes.plot(
            [second + 0.5 for second in seconds],
            [100 * result.goodput(second, second + 1) for second in seconds],
            color=colour,
            label=name.replace("… ", "2, "),
        )
        axes.axvspan(begin, end, color=GREY, alpha=0.06)
    axes.set_ylim(0, 105)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(axes, figures / "fleet-spike.svg")
    return table


# -- The simulation itself -----------------------------------------------------------------------------


def speed(_: Path) -> Table:
    """Say how fast the simulation is."""
    table = Table(
        "simulated seconds in a second of the processor",
        "idle, with probes",
        "1 request/s, each pool",
        "target",
    )
    for pools in (10, 100, 1_000):
        speeds = [simulate(fleets.speed, pools, 10_000 / pools, rate) for rate in (0.0, 1.0)]
        target = "20" if pools == 1_000 else ""
        table.add_row(f"{pools:,} pools of 5", *(f"{speed:,.0f}" for speed in speeds), target)
    return table


SCENES: dict[str, Callable[[Path], Table]] = {
    "restart": restart,
    "churn": churn,
    "lifetimes": lifetimes,
    "spike": spike,
    "speed": speed,
}


if __name__ == "__main__":
    main()
