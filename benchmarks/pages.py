"""Puts the figures of a run into the tables of a page.

A table stands between two comments, of which the first says what is in it: `times` (how many times as
much whitepool does in the same time), `values`, or `numbers` (a column for each number of tasks, of
workers and so on), and of which groups, or of which plots. `missed` are the targets that are missed.
What there are no figures for stays as it is.

    <!-- times: group checkout -->
    …
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .peers import WHITEPOOL
from .row import Row, short

PLACE = re.compile(
    r"(<!-- (times|values|numbers|missed|machine): (.+?) -->\n).*?(?=<!-- end -->)", re.DOTALL
)


def write(page: Path, rows: list[Row], machine: dict[str, str]) -> None:
    """Replace what stands between the comments."""

    def fill(found: re.Match[str]) -> str:
        start, kind, which = found.groups()
        if kind == "machine":
            return f"{start}\n{_machine(machine)}\n\n"
        field, _, names = which.partition(" ")
        chosen = [row for row in rows if which == "all" or getattr(row, field) in names.split(" + ")]
        return f"{start}\n{KINDS[kind](chosen)}\n" if chosen else found[0]

    page.write_text(PLACE.sub(fill, page.read_text("utf-8")), "utf-8")


def _machine(machine: dict[str, str]) -> str:
    words = [f"{name} {value}" for name, value in machine.items() if name not in ("cores", "system")]
    return f"The tables are from {machine['cores']} cores, {machine['system']}: {', '.join(words)}."


def missed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.met is False]


def met(rows: list[Row]) -> str:
    judged = [row.met for row in rows if row.met is not None]
    return f"{sum(judged)} of {len(judged)} targets are met."


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def _grid(rows: list[Row], cell: Callable[[Row], str]) -> str:
    """Make a line of each figure, and a column of each peer. Empty cells make neither."""
    cells = {(row.figure, row.peer): cell(row) for row in rows if cell(row)}
    peers = list(dict.fromkeys(peer for _, peer in cells))
    figures = dict.fromkeys(figure for figure, _ in cells)
    return _table(
        ["", *peers],
        ([figure, *(cells.get((figure, peer), "") for peer in peers)] for figure in figures),
    )


def _times(rows: list[Row]) -> str:
    return _grid(rows, lambda row: row.times)


def _values(rows: list[Row]) -> str:
    return _grid(rows, lambda row: short(row.value, row.unit))


def _numbers(rows: list[Row]) -> str:
    """Make a line of each figure and peer. A figure's title ends with its number, after a comma."""
    rows = [row for row in rows if row.x]
    numbers = sorted({row.x for row in rows})
    lines: dict[str, dict[float, str]] = {}
    for row in rows:
        figure = row.figure.removeprefix("… ").rpartition(", ")[0]
        who = "" if row.peer == WHITEPOOL.name else f": {row.peer}"
        lines.setdefault(f"{figure}, {row.unit}{who}", {})[row.x] = short(row.value)
    return _table(
        ["", *(f"{number:,g}" for number in numbers)],
        ([name, *(line.get(number, "") for number in numbers)] for name, line in lines.items()),
    )


def _missed(rows: list[Row]) -> str:
    return f"{met(rows)} These are not:\n\n" + _table(
        ["", "beside", "whitepool’s figure, or that divided by the other’s", "target"],
        ([row.figure, row.beside, row.judged, row.target] for row in missed(rows)),
    )


KINDS = {"times": _times, "values": _values, "numbers": _numbers, "missed": _missed}
