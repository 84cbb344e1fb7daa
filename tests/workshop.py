"""Factories and workers that a test can look into, and can make fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

import whitepool


class Tool:
    """A worker that does nothing but to know what happened to it."""

    def __init__(self, shop: Workshop, number: int) -> None:
        self.shop = shop
        self.number = number
        self.closed = False
        self.crash = trio.Event()
        """Set it to crash a background task of the worker (of `Workshop.with_nursery`)."""

    async def aclose(self) -> None:
        await self.shop.before_close(self)
        self.closed = True

    def __repr__(self) -> str:
        return f"<Tool {self.number}>"


async def _nothing(*_: object) -> None:
    pass


class Workshop:
    """Makes tools, and counts them."""

    def __init__(self) -> None:
        self.tools: list[Tool] = []
        self.attempts = 0
        self.opening = 0
        self.most_opening = 0
        self.most_alive = 0
        self.before_open: Callable[[int], Awaitable[None]] = _nothing
        """Called with the number of the attempt; may sleep, and may raise."""
        self.before_close: Callable[[Tool], Awaitable[None]] = _nothing

    @property
    def alive(self) -> list[Tool]:
        return [tool for tool in self.tools if not tool.closed]

    async def make(self) -> Tool:
        """A factory: an async callable."""
        self.attempts += 1
        self.opening += 1
        self.most_opening = max(self.opening, self.most_opening)
        self.most_alive = max(self.most_alive, len(self.alive) + self.opening)
        try:
            await self.before_open(self.attempts)
        finally:
            self.opening -= 1
        tool = Tool(self, len(self.tools) + 1)
        self.tools.append(tool)
        return tool

    @asynccontextmanager
    async def with_nursery(self) -> AsyncIterator[Tool]:
        """A factory: a context manager whose tool has a background task, which may crash."""

        async def background() -> None:
            await tool.crash.wait()
            raise RuntimeError("the background task crashed")

        async with trio.open_nursery() as nursery:
            tool = await self.make()
            try:
                nursery.start_soon(background)
                yield tool
                nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await tool.aclose()


class Manager(whitepool.WorkerManager[Tool]):
    """A manager of which everything can be changed by assignment."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.dead: set[Tool] = set()
        self.dirty: set[Tool] = set()
        self.before_reset: Callable[[Tool], Awaitable[None]] = _nothing
        self.resets = 0

    async def create(self) -> Tool:
        return await self.shop.make()

    def is_alive(self, worker: Tool) -> bool:
        return worker not in self.dead

    def needs_reset(self, worker: Tool) -> bool:
        return worker in self.dirty

    async def reset(self, worker: Tool) -> None:
        self.resets += 1
        await self.before_reset(worker)
        self.dirty.discard(worker)


def check_books(statistics: whitepool.PoolStatistics) -> None:
    """The statistics add up."""
    now = statistics
    alive = now.idle + now.in_use + now.resetting
    assert now.started == alive + now.retired + now.lost + now.destroyed + now.leaked, now
    assert alive + now.starting <= now.pool_size + now.max_overflow, now
    assert min(now.idle, now.in_use, now.starting, now.resetting, now.waiting, now.overflow) >= 0, now
    assert not (now.idle and now.waiting), now
