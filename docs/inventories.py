"""Inventories: what names other projects' pages have, so that ours lead there.

    python docs/inventories.py

fetches them from the addresses in `conf.py`, and keeps of each what our pages may name. The build reads
only these files, so it needs no network, and a page of theirs that moves breaks no build.
"""

from __future__ import annotations

import re
from pathlib import Path

import sphobjinv

PYTHON = r"py:\w+ (\w+|(asyncio|collections|contextlib|contextvars|logging|math|signal|ssl|typing)\..*)"
KEPT = {"python": PYTHON, "trio": r"py:.*", "psycopg": r"py:.*"}


def main() -> None:
    conf = (Path(__file__).parent / "conf.py").read_text()
    for name, address, file in re.findall(r'"(\w+)": \("(https://\S+)", "(inventories/\S+)"\)', conf):
        inventory = sphobjinv.Inventory(url=f"{address}/objects.inv")
        inventory.objects = [
            one
            for one in inventory.objects
            if re.fullmatch(KEPT[name], f"{one.domain}:{one.role} {one.name}")
        ]
        reduced = sphobjinv.compress(inventory.data_file(contract=True))
        sphobjinv.writebytes(Path(__file__).parent / file, reduced)


if __name__ == "__main__":
    main()
