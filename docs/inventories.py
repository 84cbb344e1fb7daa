"""Inventories: what names other projects' pages have, so that ours lead there.

    python docs/inventories.py

fetches them from the addresses in `conf.py`, and keeps of each what our pages may name. The build reads
only these files, so it needs no network, and a page of theirs that moves breaks no build.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from urllib.request import urlopen

PYTHON = r"py:\w+ (\w+|(asyncio|collections|contextlib|contextvars|logging|math|signal|ssl|typing)\..*)"
KEPT = {"python": PYTHON, "trio": r"py:.*", "psycopg": r"py:.*"}


def read(inventory: bytes) -> tuple[bytes, list[str]]:
    """Split an inventory into its four lines of comment, and its lines ``name domain:role …``."""
    *comment, compressed = inventory.split(b"\n", 4)
    return b"\n".join(comment), zlib.decompress(compressed).decode().splitlines()


def reduce(inventory: bytes, kept: str) -> bytes:
    """Keep the names whose role and name match."""
    comment, lines = read(inventory)
    found = []
    for line in lines:
        parts = re.fullmatch(r"(.+?) (\S+:\S+) (-?\d+) (\S*) (.*)", line)
        if parts and re.fullmatch(kept, f"{parts[2]} {parts[1]}"):
            found.append(line)
    return comment + b"\n" + zlib.compress("\n".join([*sorted(found), ""]).encode(), 9)


def main() -> None:
    conf = (Path(__file__).parent / "conf.py").read_text()
    for name, address, file in re.findall(r'"(\w+)": \("(https://\S+)", "(inventories/\S+)"\)', conf):
        with urlopen(f"{address}/objects.inv", timeout=30) as answer:
            reduced = reduce(answer.read(), KEPT[name])
        (Path(__file__).parent / file).write_bytes(reduced)


if __name__ == "__main__":
    main()
