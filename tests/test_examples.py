"""The examples do what they say."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.font_manager  # makes its cache now, or an example would report it  # noqa: F401
import pytest
from embedded_postgres import EmbeddedPostgres
from program import EXAMPLES, rows_of, run

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("own_server", [True, False])
def test_quickstart(own_server: bool, server: EmbeddedPostgres) -> None:
    """Equal money, everything accounted for, nothing alarming, nothing left behind."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        environment = {"TMPDIR": folder}
        if not own_server:
            environment["DATABASE_URL"] = server.dsn
        output = run("quickstart.py", "600", **environment)
        assert list(Path(folder).iterdir()) == []
    rows = rows_of(output)
    assert rows["money before"] == rows["money after"] == "20000"
    assert rows["workers unaccounted for"] == "0"
    assert int(rows["workers killed on the server"]) >= 2 + 8
    assert int(rows["transfers cancelled"]) > 0
    assert "The books balance" in output
    assert int(rows["transfers done"]) + int(rows["transfers cancelled"]) == 600


def test_the_recording(server: EmbeddedPostgres, tmp_path: Path) -> None:
    """It has what the demo tells, from the first line to the last; and so has the one in the README."""
    new = tmp_path / "demo.svg"
    run("../docs/recording.py", str(new), "600", DATABASE_URL=server.dsn)
    for recording in (new, PICTURES / "demo.svg"):
        tree = ElementTree.parse(recording)
        lines = {g.get("id"): "".join(g.itertext()) for g in tree.iter(SVG + "g") if g.get("id")}
        pictures = [
            [lines[use.get("href", "#")[1:]] for use in picture.iter(SVG + "use")]
            for picture in tree.iter(SVG + "g")
            if picture.get("transform")
        ]
        assert len(pictures) > 3
        assert "clients move money" in pictures[1][0]
        assert "The books balance: not a cent is missing." in pictures[-1][-1]
        assert re.fullmatch(
            r"transfers ━+ ?(\d+)/\1", next(s for s in pictures[-1] if "transfers ━" in s)
        )


def test_generic() -> None:
    """Ten questions, ten echoes, three streams at the most."""
    output = run("generic.py").splitlines()
    assert sorted(output[:10]) == [f"question {number}" for number in range(10)]
    assert "idle=3" in output[10]
    assert len((EXAMPLES / "generic.py").read_text().splitlines()) < 60


def test_actors() -> None:
    """The client of an actor that dies gets an error, and the next one an answer."""
    assert run("actors.py").splitlines() == [
        "6 * 7 = 42",
        "exit(): WorkerLost",
        "2 ** 10 = 1024",
        "1 actor was lost",
    ]


def test_listen(server: EmbeddedPostgres) -> None:
    """Six jobs, in order, though the connection that listens is lost once."""
    lines = run("listen.py", DATABASE_URL=server.dsn).splitlines()
    lost = [line for line in lines if line.startswith("not listening: OperationalError")]
    assert len(lost) == 1
    assert [line for line in lines if line not in lost] == [f"job {number}" for number in range(6)]


def test_bulk(server: EmbeddedPostgres) -> None:
    """The load shows how far it is; of one that is cancelled nothing is left, nor is anything lost."""
    lines = run("bulk.py", DATABASE_URL=server.dsn).splitlines()
    *progress, loaded, cancelled, lost = lines
    shares = [int(line.removesuffix("% sent")) for line in progress]
    assert shares
    assert shares == sorted(shares)
    assert loaded == "loaded: 200000"
    assert cancelled == "after a load that was cancelled: 200000"
    assert lost == "connections lost: 0"


def test_transactions(server: EmbeddedPostgres) -> None:
    """What was committed counts, what was rolled back does not."""
    output = run("transactions.py", DATABASE_URL=server.dsn)
    assert [int(line.rsplit(maxsplit=1)[1]) for line in output.splitlines()] == [10, 10, 11, 11, 176]


@pytest.mark.parametrize("own_server", [True, False])
def test_traces(own_server: bool, server: EmbeddedPostgres, tmp_path: Path) -> None:
    """The second request waits for the first one, and the picture has a bar for each span."""
    environment = {} if own_server else {"DATABASE_URL": server.dsn}
    picture = tmp_path / "trace.svg"
    lines = run("traces.py", str(picture), **environment).splitlines()
    names = [line.split(" ms  ")[2] for line in lines]
    queries = ["  SELECT count(*) FROM stock WHERE item = %s", "  SELECT pg_sleep(0.02)"]
    queries.append("  INSERT INTO stock VALUES (%s)")
    second = ["POST /orders/milk", "  pool.wait", *queries]
    assert [name.rstrip() for name in names] == ["POST /orders/tea", *queries, *second]
    for drawn in (picture, PICTURES / "a-trace.svg"):
        tree = ElementTree.parse(drawn)
        texts = [text.text for text in tree.iter(SVG + "text")]
        assert texts[: len(names)] == [name.strip() for name in names]
        assert [bool(re.fullmatch(r"\d+\.\d ms", took or "")) for took in texts[len(names) :]] == [
            True for _ in names
        ]
