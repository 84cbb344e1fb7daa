"""What comes out: one table, the same as JSON, and plots."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import psycopg
from rich.console import Console
from rich.table import Table

import whitepool

from . import pages, plots
from .case import Bound, Case, Figure
from .peers import WHITEPOOL, Peer
from .row import Row, short

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


def compare(case: Case, found: dict[Peer, tuple[float, ...]]) -> list[Row]:
    """Compare what was measured."""
    return [
        _row(case.group, figure, peer, found[peer][number], found[WHITEPOOL][number])
        for number, figure in enumerate(case.figures)
        for peer in case.peers
        if not math.isnan(found[peer][number])
    ]


def _row(group: str, figure: Figure, peer: Peer, value: float, ours: float) -> Row:
    """Compare one figure. There is no ratio to nothing, or of nothing: nan."""
    ratio = None if peer is WHITEPOOL or not value or math.isnan(ours) else ours / value
    bound: Bound | None = figure.bounds.get(peer)
    judged = value if peer is WHITEPOOL else ratio
    met = None if bound is None or judged is None else bound.met(judged)
    target = str(bound or "")
    return Row(
        group, figure.title, figure.unit, peer.name, value, ratio, target, met, figure.plot, figure.x
    )


def print_table(console: Console, group: str, rows: list[Row]) -> None:
    """Print the figures of a group, with the target beside each."""
    table = Table(title=group)
    table.add_column("what")
    table.add_column("who")
    for column in ("figure", "whitepool ÷ it", "target", "met"):
        table.add_column(column, justify="right")
    last = ""
    for row in rows:
        if row.figure != last and not row.figure.startswith("…"):
            table.add_section()
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
        value, ratio = short(row.value, row.unit), short(row.ratio)
        title = row.figure if row.figure != last else ""
        table.add_row(title, row.peer, value, ratio, row.target, met)
        last = row.figure
    console.print(table)


def print_summary(console: Console, rows: list[Row], machine: dict[str, str]) -> None:
    """Print how many targets are met, and each that is not."""
    table = Table("missed", "beside", title=pages.met(rows))
    table.add_column("figure", justify="right")
    table.add_column("target", justify="right")
    for row in pages.missed(rows):
        table.add_row(row.figure, row.beside, row.judged, row.target)
    table.caption = ", ".join(map(" ".join, machine.items()))
    console.print(table)


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


def write(folder: Path, rows: list[Row], machine: dict[str, str]) -> None:
    """Write the figures as JSON, and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "figures": [asdict(row) for row in rows]}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "figures.json").write_text(text + "\n", encoding="utf-8")
    plots.write(folder, rows)
