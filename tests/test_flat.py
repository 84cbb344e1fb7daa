"""What a pool does for one worker costs the same however many others are idle.

It is counted in calls of functions, which are the same on each machine. `make bench ARGS='--only idle'`
measures the time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Workshop

import whitepool

Session = whitepool.Session[Any]

FEW, MANY = 20, 400


class Checked(Manager):
    """A manager whose workers can be probed, and have to be reset each time."""

    def needs_reset(self, worker: Any) -> bool:
        return True

    async def check(self, worker: Any) -> None: ...


async def reset_some(session: Session, size: int) -> int:
    for _ in range(20):
        async with session.worker():
            pass
        await wait_all_tasks_blocked()
    return 20


async def replace_some(session: Session, size: int) -> int:
    for _ in range(20):
        session.destroyed(await session.block_checkout())
        await wait_all_tasks_blocked()
    return 20


async def replace_all(session: Session, size: int) -> int:
    session.retire_all()
    await wait_all_tasks_blocked()
    assert session.statistics().retired == size
    return size


async def open_all(session: Session, size: int) -> int:
    session.resize(2 * size)
    await wait_all_tasks_blocked()
    assert session.statistics().started == 2 * size
    return size


async def close_all_but_one(session: Session, size: int) -> int:
    session.resize(1)
    await wait_all_tasks_blocked()
    assert session.statistics().retired == size - 1
    return size - 1


async def probe_all(session: Session, size: int) -> int:
    await trio.sleep(300)
    return 10 * size


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count the calls in the block. Those of C functions count, too."""
    calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize(
    "step", [reset_some, replace_some, replace_all, open_all, close_all_but_one, probe_all]
)
@pytest.mark.parametrize("strategy", ["lifo", "fifo"])
def test_a_cost_does_not_grow_with_the_idle_workers(
    step: Callable[[Session, int], Awaitable[int]], strategy: Any
) -> None:
    """For each worker that is concerned, no more calls among 400 than among 20, but for a tenth."""

    async def calls_each(size: int) -> float:
        async with whitepool.open_pool(
            Checked(Workshop()), pool_size=size, max_overflow=1, strategy=strategy, check_interval=30
        ) as session:
            resources = [await session.block_checkout() for _ in range(size)]
            for resource in resources:
                session.checkin(resource)
                await trio.sleep(0.001)
            await trio.sleep(10)  # Trio clears away the deadlines of the resets
            with counting() as calls:
                concerned = await step(session, size)
            return calls[0] / concerned

    few, many = (
        trio.run(calls_each, size, clock=MockClock(autojump_threshold=0)) for size in (FEW, MANY)
    )
    assert many < 1.1 * few


async def test_a_pool_that_nothing_comes_due_in_sleeps(autojump_clock: MockClock) -> None:
    """No task of it has a turn, however long it is idle."""

    class Turns(trio.abc.Instrument):
        def __init__(self) -> None:
            self.number = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.number += 1

    async with whitepool.open_pool(
        Checked(Workshop()), pool_size=10, overflow_ttl=math.inf, check_interval=math.inf
    ):
        await wait_all_tasks_blocked()
        turns = Turns()
        trio.lowlevel.add_instrument(turns)
        await trio.sleep(1e6)
        trio.lowlevel.remove_instrument(turns)
    assert turns.number == 1  # this task's


async def test_a_reset_leaves_nothing_behind() -> None:
    """What the task of a worker has in its context is only for as long as the reset."""
    async with whitepool.open_pool(Checked(Workshop()), pool_size=1) as session:
        await wait_all_tasks_blocked()
        (entry,) = session._supervisor.roster.entries
        task = entry.task._sleeper
        assert task is not None
        before = len(task.context)
        async with session.worker():
            pass
        await wait_all_tasks_blocked()
        assert len(task.context) == before
