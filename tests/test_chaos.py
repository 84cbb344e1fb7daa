"""The pool survives what the example does to it, and the example reports it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import matplotlib.font_manager  # makes its cache now, or the example would report it  # noqa: F401
from program import rows_of, run

FAULTS = ["3 busy killed", "3 idle killed", "server restarted", "network stalled for 0.5 s"]


def test_chaos(tmp_path: Path) -> None:
    """Nothing is lost, each client gets an answer, and the picture has a mark for each fault."""
    picture = tmp_path / "chaos.svg"
    rows = rows_of(run("chaos.py", str(picture), "--seconds", "6"))
    answers = [int(number) for what, number in rows.items() if what.startswith("requests ")]
    arrived, *answers = answers
    assert sum(answers) == arrived > 0
    assert int(rows["requests served"]) > 0
    assert int(rows["workers that died (lost)"]) >= 6
    assert rows["workers unaccounted for"] == "0"
    assert rows["workers missing from the pool at the end"] == "0"
    assert rows["connections left on the server"] == "0"
    assert [what.partition(":")[0] for what in rows if ":" in what] == FAULTS
    texts = [text.text for text in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert set(FAULTS) <= set(texts)
