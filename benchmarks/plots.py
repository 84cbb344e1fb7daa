"""The figures as plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .look import BLUE, GREEN, GREY, LOOK, ORANGE, TEAL, canvas, label, save
from .peers import (
    ASYNCPG,
    ASYNCPG_BARE,
    ASYNCPG_BARE_UVLOOP,
    ASYNCPG_UVLOOP,
    BARE_QUEUE,
    BLOCKING,
    CHECKPOINT,
    NO_POOL,
    PSYCOPG,
    PSYCOPG_UVLOOP,
    TASK,
    THREADS,
    TRIOPG,
    WHITEPOOL,
)
from .row import Row

STYLES = {
    WHITEPOOL.name: (ORANGE, "-"),
    PSYCOPG.name: (BLUE, "-"),
    PSYCOPG_UVLOOP.name: (BLUE, "--"),
    ASYNCPG.name: (GREEN, "-"),
    ASYNCPG_UVLOOP.name: (GREEN, "--"),
    ASYNCPG_BARE.name: (TEAL, "-"),
    ASYNCPG_BARE_UVLOOP.name: (TEAL, "--"),
    TRIOPG.name: ("#a06cd5", "-"),
    THREADS.name: ("#b0893f", "-"),
    NO_POOL.name: (GREY, ":"),
    BARE_QUEUE.name: (GREY, "--"),
    BLOCKING.name: (GREY, "--"),
    CHECKPOINT.name: (GREY, ":"),
    TASK.name: (GREY, ":"),
}
"""One colour for each library; what runs on uvloop is dashed. Limits are grey."""


def write(folder: Path, rows: list[Row]) -> None:
    """Draw what was measured."""
    plots: dict[str, list[Row]] = {}
    for row in rows:
        plots.setdefault(row.plot, []).append(row)

    with matplotlib.rc_context(LOOK):
        if "checkout" in plots:
            axes = canvas("checkouts a second, on 4 connections", "tasks", "checkouts / s")
            _lines(axes, plots["checkout"])
            axes.set_yscale("log")
            save(axes, folder / "checkout.svg")
        if "query" in plots:
            axes = canvas("SELECT 1 through the pool, 16 connections", "queries / s", "")
            _bars(axes, plots["query"])
            save(axes, folder / "query.svg")
        for name, title, x, y in LINES:
            if name in plots:
                axes = canvas(title, x, y)
                _lines(axes, plots[name])
                axes.set_ylim(bottom=0)
                save(axes, folder / f"{name}.svg")
        if "growth-waiter" in plots:
            figure = Figure(figsize=(8, 3.4), layout="constrained")
            panels = figure.subplots(1, len(PANELS))
            for axes, (name, title) in zip(panels, PANELS, strict=True):
                label(axes, title, "how many", "KiB each" if axes is panels[0] else "")
                _lines(axes, plots[name])
                axes.set_ylim(bottom=0)
                axes.get_legend().remove()
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
            save(panels[0], folder / "growth-memory.svg")


LINES = (
    ("queue", "time a waiter, by the length of the queue", "tasks that wait", "µs / waiter"),
    ("overload", "answers in time, under overload", "load offered ÷ capacity", "% of capacity"),
    ("growth-checkout", "a checkout held for a turn of the loop, on 4 workers", "tasks", "µs"),
    ("growth-query", "SELECT 1: the client's CPU time", "connections", "µs / query"),
)
"""Plots of lines: name, title, and what the axes are."""

PANELS = (
    ("growth-waiter", "a task that waits"),
    ("growth-worker", "an idle worker, with its task"),
    ("growth-pool", "a pool without workers"),
)
"""Those of what takes memory."""


def _lines(axes: Axes, rows: Iterable[Row]) -> None:
    """Draw a line for each peer; on the x axis, each step is a factor."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row.peer, []).append((row.x, row.value))
    for peer, line in points.items():
        colour, dashes = STYLES[peer]
        (drawn,) = axes.plot(*zip(*line, strict=True), dashes, color=colour, marker="o", label=peer)
        if peer == WHITEPOOL.name:
            drawn.set(linewidth=3, zorder=3)
    axes.set_xscale("log")
    axes.set_xticks(sorted({x for line in points.values() for x, _ in line}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _bars(axes: Axes, rows: Iterable[Row]) -> None:
    """Draw a bar for each peer, the first on top."""
    for row in rows:
        bars = axes.barh(row.peer, row.value, color=STYLES[row.peer][0], height=0.6)
        axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
