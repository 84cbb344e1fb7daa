"""Notifications."""

from __future__ import annotations

import math
import select
from contextlib import aclosing
from typing import Any

import pytest
import trio
from connections import (
    Connection,
    ask,
)
from onlooker import Onlooker
from trio.testing import wait_all_tasks_blocked


@pytest.fixture
async def listening(connection: Connection) -> Connection:
    await connection.set_autocommit(True)
    await connection.execute("LISTEN channel")
    return connection


async def _notifications(connection: Connection, **limits: Any) -> list[tuple[str, str]]:
    async with aclosing(connection.notifies(**limits)) as notifications:
        return [(notify.channel, notify.payload) async for notify in notifications]


async def test_notifications_arrive(listening: Connection, onlooker: Onlooker) -> None:
    """A task that waits for notifications gets them, and stops after as many as it wants."""
    received: list[tuple[str, str]] = []

    async def listen() -> None:
        received.extend(await _notifications(listening, stop_after=2))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await wait_all_tasks_blocked()
            onlooker.do("NOTIFY channel, 'a'")
            await trio.sleep(0.15)  # longer than the interval at which old releases look up
            onlooker.do("NOTIFY channel, 'b'")
    assert received == [("channel", "a"), ("channel", "b")]
    assert await ask(listening, "SELECT 1") == 1


async def test_notifications_end_at_a_timeout(listening: Connection, onlooker: Onlooker) -> None:
    """Waiting for notifications ends after `timeout` seconds, with those that came until then."""
    onlooker.do("NOTIFY channel, 'a'")
    begun = trio.current_time()
    with trio.fail_after(5):
        assert await _notifications(listening, timeout=0.25) == [("channel", "a")]
    assert 0.2 < trio.current_time() - begun < math.inf
    assert await ask(listening, "SELECT 1") == 1


async def test_notifications_that_have_arrived_need_no_waiting(
    listening: Connection, onlooker: Onlooker
) -> None:
    """With a `timeout` of 0 the notifications that have arrived are returned."""
    assert await _notifications(listening, timeout=0) == []
    onlooker.do("NOTIFY channel, 'a'")
    readable, _, _ = select.select([listening.pgconn.socket], [], [], 5)
    assert readable
    assert await _notifications(listening, timeout=0) == [("channel", "a")]
