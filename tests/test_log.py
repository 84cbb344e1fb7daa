"""The pool is quiet until it is asked."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from whitepool._log import log


def test_an_event_is_a_sentence_and_a_record(caplog: pytest.LogCaptureFixture) -> None:
    """People get a line, machines get the keys as attributes."""
    log.warning("worker_lost", pool="mine", reason="100%")
    (record,) = caplog.records
    assert record.name == "whitepool"
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "worker_lost pool=mine reason=100%"
    assert (record.event, record.pool, record.reason) == (  # type: ignore[attr-defined]
        "worker_lost",
        "mine",
        "100%",
    )


def test_a_level_that_is_off_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The standard logger's level decides."""
    log.debug("nobody_listens")
    assert not caplog.records


def test_silent_by_default() -> None:
    """An application that did not set up logging sees nothing, not even warnings. (Rule 12.)"""
    script = "from whitepool._log import log; log.error('start_failed', error='x')"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("", "")
