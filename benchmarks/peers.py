"""The pools that are compared, each behind the same few operations.

Each does what its own documentation tells a user to write, with its default settings; where there is
a choice, the same on all sides: so many connections, no more and no fewer, and autocommit, as asyncpg
has no other way, so that a query is one message to the server and back.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import asyncpg
import psycopg
import psycopg_pool
import trio
import uvloop
from psycopg.conninfo import conninfo_to_dict

import whitepool.postgres

SECONDS, WARM_UP = 0.25, 0.1
"""How long operations are counted, and how long they run before that, or longer with many connections:
psycopg and asyncpg prepare a statement on each connection once they have seen it a few times."""

OPENING_AT_ONCE = 4
"""Connections that are opened at the same time: whitepool's default, for all that have the choice."""

Start = Callable[..., object]


@asynccontextmanager
async def trio_tasks() -> AsyncIterator[Start]:
    """Yield a function that starts tasks; wait for them all."""
    async with trio.open_nursery() as nursery:
        yield nursery.start_soon


@asynccontextmanager
async def asyncio_tasks() -> AsyncIterator[Start]:
    """Yield a function that starts tasks; wait for them all. (asyncio's own is new in Python 3.11.)"""
    tasks: list[asyncio.Task[object]] = []
    yield lambda function, *arguments: tasks.append(asyncio.create_task(function(*arguments)))
    await asyncio.gather(*tasks)


@dataclass(frozen=True)
class Loop:
    """What a case needs of an event loop."""

    run: Callable[..., Any]
    tasks: Callable[[], AbstractAsyncContextManager[Start]]
    sleep: Callable[[float], Awaitable[None]]
    event: Callable[[], Any]


def _run_trio_asyncio(function: Callable[..., Any], *arguments: Any) -> Any:
    import trio_asyncio  # changes what asyncio does, also for those who do not use it

    return trio_asyncio.run(function, *arguments)


TRIO = Loop(trio.run, trio_tasks, trio.sleep, trio.Event)
TRIO_ASYNCIO = Loop(_run_trio_asyncio, trio_tasks, trio.sleep, trio.Event)
ASYNCIO = Loop(
    lambda function, *arguments: asyncio.run(function(*arguments)),
    asyncio_tasks,
    asyncio.sleep,
    asyncio.Event,
)
UVLOOP = Loop(
    lambda function, *arguments: uvloop.run(function(*arguments)),
    asyncio_tasks,
    asyncio.sleep,
    asyncio.Event,
)


async def repeat(
    loop: Loop, operation: Callable[[], Awaitable[None]], tasks: int, seconds: float
) -> float:
    """Let tasks repeat an operation until the time is up; return operations a second."""
    done = 0
    began = perf_counter()

    async def client() -> None:
        nonlocal done
        while perf_counter() < began + seconds:
            await operation()
            done += 1

    async with loop.tasks() as start:
        for _ in range(tasks):
            start(client)
    return done / (perf_counter() - began)


class Pool:
    """An open pool, as the cases see it."""

    async def checkout(self, turn: bool) -> None:
        """Check a connection out and return it, at once or after a turn of the event loop."""
        raise NotImplementedError

    async def fetch(self, query: str, *parameters: object) -> None:
        """Send a query, in the words of the driver, through the pool, and fetch all of its rows."""
        raise NotImplementedError

    async def fetch_within(self, seconds: float, query: str) -> None:
        """The same, with one deadline for all of it; raises where that is not met."""
        raise NotImplementedError

    def connection(self) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]:
        """Check out one of psycopg's connections for a block."""
        raise NotImplementedError


def no_pool(_dsn: str, _size: int) -> AbstractAsyncContextManager[Pool]:
    raise NotImplementedError


@dataclass(frozen=True)
class Peer:
    """One that takes part: how it is called, where it runs, how it is opened if it is a pool."""

    name: str
    loop: Loop
    open: Callable[[str, int], AbstractAsyncContextManager[Pool]] = no_pool
    apart: bool = False
    """Whether the others could not be measured any more in a process where this one has been."""


@dataclass
class Whitepool(Pool):
    """The pool that all this is about."""

    session: whitepool.Session[whitepool.postgres.TrioConnection[Any]]

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, size: int) -> AsyncIterator[Pool]:
        async with whitepool.postgres.open_pool(
            dsn, pool_size=size, max_overflow=0, autocommit=True
        ) as session:
            yield cls(session)

    async def checkout(self, turn: bool) -> None:
        resource = await self.session.block_checkout()
        if turn:
            await trio.lowlevel.checkpoint()
        self.session.checkin(resource)

    async def fetch(self, query: str, *parameters: object) -> None:
        async with self.session.worker() as connection:
            cursor = await connection.execute(query, parameters or None)
            await cursor.fetchall()

    async def fetch_within(self, seconds: float, query: str) -> None:
        with trio.fail_after(seconds):
            async with self.session.worker(timeout=seconds) as connection:
                cursor = await connection.execute(query)
                await cursor.fetchall()

    def connection(self) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]:
        return self.session.worker()


@dataclass
class PsycopgPool(Pool):
    """psycopg's own pool, on asyncio."""

    pool: psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, size: int) -> AsyncIterator[Pool]:
        async with psycopg_pool.AsyncConnectionPool(
            dsn,
            min_size=size,
            num_workers=OPENING_AT_ONCE,
            kwargs={"autocommit": True},
            open=False,
        ) as pool:
            await pool.wait()
            yield cls(pool)

    async def checkout(self, turn: bool) -> None:
        connection = await self.pool.getconn()
        if turn:
            await asyncio.sleep(0)
        await self.pool.putconn(connection)

    async def fetch(self, query: str, *parameters: object) -> None:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(query, parameters or None)
            await cursor.fetchall()

    async def fetch_within(self, seconds: float, query: str) -> None:
        async def fetch() -> None:
            async with self.pool.connection(timeout=seconds) as connection:
                cursor = await connection.execute(query)
                await cursor.fetchall()

        await asyncio.wait_for(fetch(), seconds)

    def connection(self) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]:
        return self.pool.connection()


@dataclass
class Asyncpg(Pool):
    """asyncpg's pool, which resets a connection with a query of its own before it takes it back."""

    pool: Any

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, size: int, **options: Any) -> AsyncIterator[Pool]:
        async with asyncpg.create_pool(
            **asyncpg_keywords(dsn), min_size=size, max_size=size, **options
        ) as pool:
            yield cls(pool)

    async def checkout(self, turn: bool) -> None:
        connection = await self.pool.acquire()
        if turn:
            await asyncio.sleep(0)
        await self.pool.release(connection)

    async def fetch(self, query: str, *parameters: object) -> None:
        async with self.pool.acquire() as connection:
            await connection.fetch(query, *parameters)

    async def fetch_within(self, seconds: float, query: str) -> None:
        async def fetch() -> None:
            async with self.pool.acquire(timeout=seconds) as connection:
                await connection.fetch(query)

        await asyncio.wait_for(fetch(), seconds)


async def no_reset(_: Any) -> None:
    """Reset nothing: asyncpg still rolls back a transaction that was left open, as the others do."""


@dataclass
class Triopg(Pool):
    """asyncpg's pool on Trio, by way of trio-asyncio. It comes with asyncpg's reset only."""

    pool: Any

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, size: int) -> AsyncIterator[Pool]:
        import triopg  # imports trio_asyncio

        async with triopg.create_pool(**asyncpg_keywords(dsn), min_size=size, max_size=size) as pool:
            yield cls(pool)

    async def checkout(self, turn: bool) -> None:
        async with self.pool.acquire():
            if turn:
                await trio.lowlevel.checkpoint()

    async def fetch(self, query: str, *parameters: object) -> None:
        async with self.pool.acquire() as connection:
            await connection.fetch(query, *parameters)


@dataclass
class Threads(Pool):
    """psycopg without async, in Trio's threads."""

    pool: psycopg_pool.ConnectionPool[psycopg.Connection[Any]]
    limiter: trio.CapacityLimiter

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, size: int) -> AsyncIterator[Pool]:
        pool = psycopg_pool.ConnectionPool(
            dsn,
            min_size=size,
            num_workers=OPENING_AT_ONCE,
            kwargs={"autocommit": True},
            open=False,
        )
        try:
            await trio.to_thread.run_sync(partial(pool.open, wait=True))
            yield cls(pool, trio.CapacityLimiter(max(40, size)))  # 40 is Trio's default
        finally:
            pool.close()

    async def checkout(self, turn: bool) -> None:
        def checkout() -> None:
            connection = self.pool.getconn()
            if turn:
                time.sleep(0)  # a thread's way to give way
            self.pool.putconn(connection)

        await trio.to_thread.run_sync(checkout, limiter=self.limiter)

    async def fetch(self, query: str, *parameters: object) -> None:
        def fetch() -> None:
            with self.pool.connection() as connection:
                connection.execute(query, parameters or None).fetchall()

        await trio.to_thread.run_sync(fetch, limiter=self.limiter)


@dataclass
class Blocking(Pool):
    """The limit for psycopg: connections that block, used one after the other, without a loop."""

    free: deque[psycopg.Connection[Any]]

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, size: int) -> AsyncIterator[Pool]:
        with ExitStack() as stack:
            connect = partial(psycopg.connect, dsn, autocommit=True)
            yield cls(deque(stack.enter_context(connect()) for _ in range(size)))

    async def fetch(self, query: str, *parameters: object) -> None:
        self.free[0].execute(query, parameters or None).fetchall()
        self.free.rotate()


@dataclass
class WithoutPool(Pool):
    """The limit for queries: each task has a TrioConnection to itself."""

    free: list[whitepool.postgres.TrioConnection[Any]]

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, size: int) -> AsyncIterator[Pool]:
        connections: list[whitepool.postgres.TrioConnection[Any]] = []
        limiter = trio.CapacityLimiter(OPENING_AT_ONCE)

        async def connect() -> None:
            async with limiter:
                connections.append(await whitepool.postgres.connect(dsn, autocommit=True))

        async with trio.open_nursery() as nursery:
            for _ in range(size):
                nursery.start_soon(connect)
        try:
            yield cls(connections)
        finally:
            for connection in connections:
                await connection.close()

    async def checkout(self, turn: bool) -> None:
        """The limit for checkouts: what any operation on Trio costs that is a checkpoint."""
        await trio.lowlevel.checkpoint()

    async def fetch(self, query: str, *parameters: object) -> None:
        connection = self.free.pop()  # there is one for each task
        cursor = await connection.execute(query, parameters or None)
        await cursor.fetchall()
        self.free.append(connection)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        connection = self.free.pop()
        yield connection
        self.free.append(connection)


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number > 1 else ''}"


async def throughput(
    peer: Peer,
    dsn: str,
    size: int,
    operation: Callable[[Pool], Callable[[], Awaitable[None]]],
    tasks: int,
) -> tuple[float, float]:
    """Open a pool, and let tasks repeat an operation for a while.

    Returns how many they get done in a second, and the microseconds of CPU time that each takes here.
    """
    async with peer.open(dsn, size) as pool:
        await repeat(peer.loop, operation(pool), tasks, max(WARM_UP, size / 1000))
        cpu, began = time.process_time(), perf_counter()
        rate = await repeat(peer.loop, operation(pool), tasks, SECONDS)
        share = (time.process_time() - cpu) / (perf_counter() - began)
        return rate, 1e6 / rate * share


def asyncpg_keywords(dsn: str) -> dict[str, Any]:
    """Say in asyncpg's words where the server is."""
    words = conninfo_to_dict(dsn)
    return {
        "host": words["host"],
        "port": words["port"],
        "user": words["user"],
        "database": words["dbname"],
    }


WHITEPOOL = Peer("whitepool", TRIO, Whitepool.open)
PSYCOPG = Peer("psycopg_pool, asyncio", ASYNCIO, PsycopgPool.open)
PSYCOPG_UVLOOP = Peer("psycopg_pool, uvloop", UVLOOP, PsycopgPool.open)
ASYNCPG = Peer("asyncpg, asyncio", ASYNCIO, Asyncpg.open)
ASYNCPG_UVLOOP = Peer("asyncpg, uvloop", UVLOOP, Asyncpg.open)
ASYNCPG_BARE = Peer("asyncpg no reset, asyncio", ASYNCIO, partial(Asyncpg.open, reset=no_reset))
ASYNCPG_BARE_UVLOOP = Peer("asyncpg no reset, uvloop", UVLOOP, partial(Asyncpg.open, reset=no_reset))
TRIOPG = Peer("triopg", TRIO_ASYNCIO, Triopg.open, apart=True)
THREADS = Peer("psycopg in Trio threads", TRIO, Threads.open)
CHECKPOINT = Peer("a bare checkpoint", TRIO, WithoutPool.open)
NO_POOL = Peer("TrioConnection, no pool", TRIO, WithoutPool.open)
BLOCKING = Peer("psycopg, blocking, no loop", TRIO, Blocking.open)
TASK = Peer("a bare Trio task", TRIO)
BARE_QUEUE = Peer("a bare queue", TRIO)
CHANNEL = Peer("a memory channel, no timeouts", TRIO)
TIMED_CHANNEL = Peer("a memory channel and fail_after", TRIO)
MAILBOX = Peer("a mailbox to a supervisor", TRIO)

POOLS = (
    WHITEPOOL,
    PSYCOPG,
    PSYCOPG_UVLOOP,
    ASYNCPG,
    ASYNCPG_UVLOOP,
    ASYNCPG_BARE,
    ASYNCPG_BARE_UVLOOP,
    TRIOPG,
    THREADS,
)
LIMITS = (CHECKPOINT, NO_POOL, BLOCKING, TASK, BARE_QUEUE, CHANNEL, TIMED_CHANNEL, MAILBOX)
PEERS = {peer.name: peer for peer in (*POOLS, *LIMITS)}
