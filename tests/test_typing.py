"""Type checkers infer what a pool holds, and object to mistakes: see the files in `tests/typing`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILES = Path(__file__).parent / "typing"

MYPY = ["mypy", "--strict", "--warn-unreachable", "--config-file=", "--cache-dir={cache}", "."]
PYRIGHT = ["pyright", "--outputjson", "--pythonpath", sys.executable, "--project", "."]
"""Strict as well, by the configuration that lies beside the files. As JSON it looks for no news."""


@pytest.mark.parametrize("checker", [MYPY, PYRIGHT], ids=["mypy", "pyright"])
def test_types(checker: list[str], tmp_path: Path) -> None:
    """Every assertion holds, and every line that is marked as a mistake is one."""
    command = [sys.executable, "-m", *(part.format(cache=tmp_path) for part in checker)]
    result = subprocess.run(command, cwd=FILES, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(len(list(FILES.glob("*.py")))) in result.stdout  # as many files were looked at
