"""The pool is quiet until it is asked."""

from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Workshop

import whitepool
from whitepool._log import log
from whitepool._manager import on_discarded

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "logs.md"


def test_an_event_is_a_sentence_and_a_record(caplog: pytest.LogCaptureFixture) -> None:
    """People read one line, machines get the keys as attributes."""
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
    log.debug("not_logged")
    assert not caplog.records


def test_silent_by_default() -> None:
    """An application that did not set up logging sees nothing, not even warnings. (Rule 12.)"""
    script = "from whitepool._log import log; log.error('start_failed', error='x')"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("", "")


async def fail(*_: object) -> None:
    raise ValueError("no")


async def use(manager: Manager, **hooks: Any) -> None:
    """Open a pool, return a worker to it that needs a reset, and close it."""
    async with whitepool.open_pool(
        manager, name="mine", pool_size=1, hooks=whitepool.Hooks(**hooks)
    ) as session:
        async with session.worker() as tool:
            manager.dirty.add(tool)
        await wait_all_tasks_blocked()


async def a_worker_dies(shop: Workshop, manager: Manager) -> None:
    manager.is_alive = lambda worker: False  # type: ignore[method-assign]
    await use(manager)


async def a_worker_crashes(shop: Workshop, manager: Manager) -> None:
    async with whitepool.open_pool(shop.with_nursery, name="mine", pool_size=1):
        shop.tools[0].crash.set()
        await wait_all_tasks_blocked()


async def a_start_fails_and_the_next_does_not(shop: Workshop, manager: Manager) -> None:
    shop.before_open = lambda attempt: fail() if attempt == 1 else trio.lowlevel.checkpoint()
    await use(manager)


async def a_reset_fails(shop: Workshop, manager: Manager) -> None:
    manager.before_reset = fail
    await use(manager)


async def writes_are_discarded(shop: Workshop, manager: Manager) -> None:
    async def roll_back(_: object) -> None:
        on_discarded.get()()

    manager.before_reset = roll_back
    await use(manager)


async def a_hook_fails(shop: Workshop, manager: Manager) -> None:
    await use(manager, after_release=fail)


async def a_hook_fails_before_the_reset(shop: Workshop, manager: Manager) -> None:
    await use(manager, on_checkin=fail)


async def closing_fails(shop: Workshop, manager: Manager) -> None:
    shop.before_close = fail
    await use(manager)


async def a_manager_fails(shop: Workshop, manager: Manager) -> None:
    manager.needs_reset = Mock(side_effect=ValueError("no"))  # type: ignore[method-assign]
    await use(manager)


async def a_worker_is_forgotten(shop: Workshop, manager: Manager) -> None:
    async with whitepool.open_pool(manager, name="mine") as session:
        with pytest.warns(ResourceWarning):
            await session.block_checkout()
            gc.collect()
        await wait_all_tasks_blocked()


TROUBLES = (
    a_worker_dies,
    a_worker_crashes,
    a_start_fails_and_the_next_does_not,
    a_reset_fails,
    writes_are_discarded,
    a_hook_fails,
    a_hook_fails_before_the_reset,
    closing_fails,
    a_manager_fails,
    a_worker_is_forgotten,
)


async def test_the_page_on_logs(caplog: pytest.LogCaptureFixture, autojump_clock: MockClock) -> None:
    """Its table has every event that there is, with every key."""
    for make_trouble in TROUBLES:
        shop = Workshop()
        await make_trouble(shop, Manager(shop))
    usual = {*vars(logging.makeLogRecord({})), "message", "event"}
    told: dict[str, set[str]] = {}
    for record in caplog.records:
        assert record.levelno == logging.WARNING
        keys = vars(record).keys() - usual
        told.setdefault(vars(record)["event"], set()).update(keys)
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    assert told == {event: set(re.findall(r"`(\w+)`", keys)) for event, keys in rows}
