"""Several tasks that use one connection."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import trio
from connections import (
    Connection,
    ask,
    check_usable,
)
from trio.testing import wait_all_tasks_blocked


async def test_tasks_take_turns(connection: Connection) -> None:
    """Queries of several tasks on one connection run one after the other, first come, first served."""
    finished: list[int] = []
    times: list[tuple[Any, Any]] = []

    async def query(number: int) -> None:
        cursor = await connection.execute("SELECT clock_timestamp(), pg_sleep(0.01), clock_timestamp()")
        begin, _, end = (await cursor.fetchall())[0]
        finished.append(number)
        times.append((begin, end))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(query, number)
            await wait_all_tasks_blocked()
    assert finished == list(range(5))
    assert all(former[1] < latter[0] for former, latter in pairwise(times))


@pytest.mark.parametrize("cancelled", ["the one at work", "the one that waits"])
async def test_a_cancelled_task_does_not_disturb_the_other(
    connection: Connection, cancelled: str
) -> None:
    """Of two tasks on one connection each can be cancelled, and the other gets its result."""
    await connection.set_autocommit(True)
    results: list[Any] = []
    scopes: list[trio.CancelScope] = []

    async def query(seconds: float, result: str) -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            results.append(await ask(connection, "SELECT %s FROM pg_sleep(%s)", result, seconds))

    at_work = cancelled == "the one at work"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(query, 30 if at_work else 0.1, "first")
        await wait_all_tasks_blocked()
        nursery.start_soon(query, 0, "second")
        await wait_all_tasks_blocked()
        scopes[not at_work].cancel()
    assert results == ["second" if at_work else "first"]
    assert [scope.cancelled_caught for scope in scopes] == [at_work, not at_work]
    await connection.set_autocommit(False)
    await check_usable(connection)
