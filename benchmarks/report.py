"""What comes out: one table, the same as JSON, and plots."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

import whitepool

from . import plots
from .cases import Bound, Case, Figure
from .peers import WHITEPOOL, Peer
from .plots import Row

PACKAGES = (
    "whitepool",
    "trio",
    "psycopg",
    "psycopg_pool",
    "asyncpg",
    "uvloop",
    "triopg",
    "trio_asyncio",
)


def compare(case: Case, medians: dict[Peer, tuple[float, ...]]) -> list[Row]:
    """Compare what was measured."""
    return [
        _row(figure, peer, medians[peer][number], medians[WHITEPOOL][number])
        for number, figure in enumerate(case.figures)
        for peer in case.peers
        if not math.isnan(medians[peer][number])
    ]


def _row(figure: Figure, peer: Peer, value: float, ours: float) -> Row:
    """Compare one figure. There is no ratio to nothing, or of nothing: nan."""
    ratio = None if peer is WHITEPOOL or not value or math.isnan(ours) else ours / value
    bound: Bound | None = figure.bounds.get(peer)
    judged = value if peer is WHITEPOOL else ratio
    met = None if bound is None or judged is None else bound.met(judged)
    target = str(bound or "")
    return Row(figure.title, figure.unit, peer.name, value, ratio, target, met, figure.plot, figure.x)


def print_table(console: Console, rows: list[Row], machine: dict[str, str]) -> None:
    """Print everything, with the target beside each figure."""
    table = Table(title="whitepool and its peers", caption=", ".join(map(" ".join, machine.items())))
    table.add_column("what")
    table.add_column("who")
    for column in ("figure", "whitepool ÷ it", "target", "met"):
        table.add_column(column, justify="right")
    last = ""
    for row in rows:
        if row.figure != last and not row.figure.startswith("…"):
            table.add_section()
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
        value, ratio = _short(row.value, row.unit), _short(row.ratio, "")
        title = row.figure if row.figure != last else ""
        table.add_row(title, row.peer, value, ratio, row.target, met)
        last = row.figure
    console.print(table)
    judged = [row.met for row in rows if row.met is not None]
    console.print(f"{sum(judged)} of {len(judged)} targets met")


def _short(value: float | None, unit: str) -> str:
    """Write a number with three digits, or with all that it has before the point."""
    if value is None:
        return "–"
    digits = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def machine(dsn: str) -> dict[str, str]:
    """Say what this ran on: nothing that tells one machine from another of its kind."""
    with psycopg.connect(dsn) as connection:
        server = connection.info.server_version
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": str(cores),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PostgreSQL": f"{server // 10000}.{server % 10000}",
        "whitepool": whitepool.__version__,
        **{package: version(package) for package in PACKAGES},
    }


def write(folder: Path, rows: list[Row], machine: dict[str, str], settings: dict[str, Any]) -> None:
    """Write the figures as JSON, and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "settings": settings, "figures": [asdict(row) for row in rows]}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "figures.json").write_text(text + "\n", encoding="utf-8")
    plots.write(folder, rows)
