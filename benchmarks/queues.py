"""Ways to hand 4 workers to many tasks, beside the pool: what a supervisor on the hot path costs."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import repeat
from time import perf_counter
from typing import Any, Protocol

import trio
from outcome import Value
from trio.lowlevel import Abort, Task, cancel_shielded_checkpoint, current_task, wait_task_rescheduled

import whitepool

from .case import Case, Figure, at_most
from .peers import BARE_QUEUE, CHANNEL, CHECKPOINT, MAILBOX, TIMED_CHANNEL, WHITEPOOL, Peer

WORKERS = 4
TIMEOUT = 60.0
"""Seconds. Nothing here waits so long that a pool would look after it."""


class Hands(Protocol):
    """Hands out workers, and takes them back."""

    async def take(self) -> Any: ...
    def give_back(self, worker: Any) -> None: ...


class NoQueue:
    """A worker for each: what is left is a turn of the loop."""

    async def take(self) -> object:
        return None

    def give_back(self, worker: object) -> None: ...


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


SIMPLE: dict[Peer, Callable[[], Hands]] = {
    BARE_QUEUE: BareQueue,
    CHANNEL: Channel,
    TIMED_CHANNEL: TimedChannel,
    CHECKPOINT: NoQueue,
}


async def make_object() -> object:
    return object()


@asynccontextmanager
async def open_hands(peer: Peer) -> AsyncIterator[Hands]:
    """Yield four workers that do nothing, to be handed out in the peer's way."""
    if peer is WHITEPOOL:
        async with whitepool.open_pool(
            make_object, pool_size=WORKERS, max_overflow=0, checkout_timeout=TIMEOUT
        ) as session:
            yield Pooled(session)
    elif peer is MAILBOX:
        async with trio.open_nursery() as nursery:
            mailbox = Mailbox()
            nursery.start_soon(mailbox.run)
            yield mailbox
            nursery.cancel_scope.cancel()
    else:
        yield SIMPLE[peer]()


def per_use(peer: Peer, _: str, tasks: int) -> tuple[float]:
    """Return the microseconds for which one use of a worker by one of so many tasks keeps the loop."""
    return (trio.run(_per_use, peer, tasks),)


async def _per_use(peer: Peer, tasks: int) -> float:
    """The tasks are there, and wait, when the clock starts; when it stops, none has ended yet."""
    uses = max(20_000, tasks // 2)
    began = ended = 0.0

    def tickets() -> Iterator[None]:
        nonlocal ended
        while not began:
            yield
        yield from repeat(None, uses)
        ended = perf_counter()

    ticket = tickets()

    async def client(hands: Hands) -> None:
        for _ in ticket:
            worker = await hands.take()
            await cancel_shielded_checkpoint()  # hold it for a turn, so that the others have to wait
            hands.give_back(worker)

    async with open_hands(peer) as hands, trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(client, hands)
        for _ in range(2):
            await cancel_shielded_checkpoint()
        gc.collect()
        began = perf_counter()
    return 1e6 * (ended - began) / uses


CASES = tuple(
    Case(
        "handover",
        (
            Figure(
                f"a use of one of 4 workers, held for a turn, {tasks:,} tasks",
                "µs",
                {BARE_QUEUE: at_most(1.25)},
                of=min,
            ),
        ),
        (WHITEPOOL, BARE_QUEUE, CHANNEL, TIMED_CHANNEL, MAILBOX),
        partial(per_use, tasks=tasks),
        rounds=5,
    )
    for tasks in (64, 1_000)
)
