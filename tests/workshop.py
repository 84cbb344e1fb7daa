"""Factories and workers that a test can look into, and make fail; and their books."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, final

import trio

import whitepool


class Tool:
    """A worker that does nothing but note what happens to it."""

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


async def nothing(*_: object) -> None:
    """Do nothing, which is what happens before each step unless a test assigns something else."""


async def hang(*_: object) -> None:
    """Never return."""
    await trio.sleep_forever()


def raising(error: BaseException) -> Callable[..., Awaitable[None]]:
    """Make an async function that raises the error, whatever it is called with."""

    async def fail(*_: object) -> None:
        raise error

    return fail


class Workshop:
    """Makes tools, and counts them."""

    def __init__(self) -> None:
        self.tools: list[Tool] = []
        self.attempts = 0
        self.opening = 0
        self.most_opening = 0
        self.most_alive = 0
        self.before_open: Callable[[int], Awaitable[None]] = nothing
        """Called with the number of the attempt; may sleep, and may raise."""
        self.before_close: Callable[[Tool], Awaitable[None]] = nothing

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
        self.before_reset: Callable[[Tool], Awaitable[None]] = nothing
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


async def use(session: whitepool.Session[Any], timeout: float | None = None) -> None:
    """Be a client: check a worker out, waiting where need be, and return it at once."""
    async with session.worker(timeout):
        pass


def tool_of(resource: whitepool.Resource[Tool]) -> Tool:
    """Return the worker of a resource, even if it has crashed."""
    assert resource._entry is not None
    return resource._entry.worker


def check_books(pool: whitepool.Session[Any] | whitepool.PoolStatistics) -> None:
    """Raise AssertionError unless a pool's books add up: its statistics, and its roster.

    Statistics that were taken earlier will do, but then only they are checked.
    """
    may_be_probed_first = False
    if isinstance(pool, whitepool.PoolStatistics):
        now = pool
    else:
        pool._supervisor.roster.check()
        may_be_probed_first = pool._supervisor.probes_first
        now = pool._supervisor.statistics()  # also from outside of Trio's thread
    alive = now.idle + now.in_use + now.resetting
    assert now.started == alive + now.retired + now.lost + now.destroyed + now.leaked, now
    assert min(now.idle, now.in_use, now.starting, now.resetting, now.waiting, now.overflow) >= 0, now
    assert may_be_probed_first or not (now.idle and now.waiting), now
    assert now.state != "down" or (alive == 0 and now.last_error), now


@final
class BookChecker(trio.abc.Instrument):
    """Checks the books of pools after each step of each task, for the length of a ``with`` block.

    Trio only logs what an instrument raises, so the first error is kept, and raised at the block's end.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sessions: list[whitepool.Session[Any]] = []
        self._error: AssertionError | None = None

    def watch(self, session: whitepool.Session[Any]) -> None:
        """Check the books of this pool, too, from now on."""
        self._sessions.append(session)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        try:
            for session in self._sessions:
                check_books(session)
        except AssertionError as error:
            self._error = self._error or error

    def __enter__(self) -> BookChecker:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)
        if self._error is not None:
            raise self._error


@asynccontextmanager
async def open_checked_pool(factory: Any, **options: Any) -> AsyncIterator[whitepool.Session[Tool]]:
    """Open a pool of tools whose books are checked at each step, its closing included."""
    with BookChecker() as books:
        async with whitepool.open_pool(factory, **options) as session:
            books.watch(session)
            yield session
        assert books.steps
