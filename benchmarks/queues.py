"""Four ways to hand 4 workers to many tasks, beside the pool: what a supervisor on the hot path costs.

`python -m benchmarks.parts` prints them.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import Any, Protocol

import trio
from outcome import Value
from trio.lowlevel import Abort, Task, cancel_shielded_checkpoint, current_task, wait_task_rescheduled

import whitepool

WORKERS = 4
TIMEOUT = 5
"""Seconds. Nothing here ever waits that long."""


class Hands(Protocol):
    """Hands out workers, and takes them back."""

    async def take(self) -> Any: ...
    def give_back(self, worker: Any) -> None: ...


class BareQueue:
    """A deque of workers and one of tasks, without timeouts or cancellation: the floor on Trio."""

    def __init__(self) -> None:
        self.idle: deque[object] = deque(object() for _ in range(WORKERS))
        self.waiting: deque[Task] = deque()

    async def take(self) -> object:
        if self.idle:
            return self.idle.pop()
        self.waiting.append(current_task())
        return await wait_task_rescheduled(lambda _: Abort.FAILED)

    def give_back(self, worker: object) -> None:
        if self.waiting:
            trio.lowlevel.reschedule(self.waiting.popleft(), Value(worker))
        else:
            self.idle.append(worker)


class Channel:
    """One of Trio's memory channels, without timeouts."""

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[object](WORKERS)
        for _ in range(WORKERS):
            self.send.send_nowait(object())

    async def take(self) -> object:
        return await self.receive.receive()

    def give_back(self, worker: object) -> None:
        self.send.send_nowait(worker)


class TimedChannel(Channel):
    """The same, each receipt with a timeout of its own."""

    async def take(self) -> object:
        with trio.fail_after(TIMEOUT):
            return await self.receive.receive()


class Mailbox:
    """A supervisor that is asked for each worker, and told of each return, as poolboy's is."""

    def __init__(self) -> None:
        self.inbox, self.outbox = trio.open_memory_channel[Any](float("inf"))

    async def run(self) -> None:
        idle, waiting = [object() for _ in range(WORKERS)], deque[Any]()
        async for message in self.outbox:
            if isinstance(message, trio.MemorySendChannel):
                waiting.append(message)
            else:
                idle.append(message)
            while idle and waiting:
                waiting.popleft().send_nowait(idle.pop())

    async def take(self) -> object:
        answer, question = trio.open_memory_channel[object](1)
        self.inbox.send_nowait(answer)
        with trio.fail_after(TIMEOUT):
            return await question.receive()

    def give_back(self, worker: object) -> None:
        self.inbox.send_nowait(worker)


class Pooled:
    """The pool."""

    def __init__(self, session: whitepool.Session[object]) -> None:
        self.take = session.block_checkout
        self.give_back = session.checkin


async def per_handover(hands: Hands, tasks: int) -> float:
    """Return the microseconds for which one use of a worker by one of so many tasks keeps the loop."""
    uses = max(1, 20_000 // tasks)

    async def client() -> None:
        for _ in range(uses):
            worker = await hands.take()
            await cancel_shielded_checkpoint()  # hold it for a turn, so that the others have to wait
            hands.give_back(worker)

    async with trio.open_nursery() as nursery:
        began = perf_counter()
        for _ in range(tasks):
            nursery.start_soon(client)
    return 1e6 * (perf_counter() - began) / (tasks * uses)


async def handover_parts(rounds: int = 7) -> dict[str, list[float]]:
    """Measure each way with 64 and 1,000 tasks, in turn; return the least of each."""

    async def make() -> object:
        return object()

    found: dict[str, list[float]] = {}
    async with (
        whitepool.open_pool(make, pool_size=WORKERS, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        mailbox = Mailbox()
        nursery.start_soon(mailbox.run)
        ways: dict[str, Hands] = {
            "a deque of tasks, nothing else": BareQueue(),
            "whitepool": Pooled(session),
            "a memory channel, no timeouts": Channel(),
            "a memory channel and fail_after": TimedChannel(),
            "a mailbox to a supervisor": mailbox,
        }
        for _ in range(rounds):
            for name, hands in ways.items():
                times = [await per_handover(hands, tasks) for tasks in (64, 1000)]
                found[name] = [min(pair) for pair in zip(times, found.get(name, times), strict=True)]
        nursery.cancel_scope.cancel()
    return found
