"""What happens to a PgBouncer and to its server, while clients work: nothing is lost, and it heals."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from bouncer import ROLE, Mode, PgBouncer, add_role, running
from connections import Connection, check_usable
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from timing import until
from workshop import check_books

import whitepool
from whitepool.postgres import open_pool

pytestmark = pytest.mark.pgbouncer

POOL_SIZE = 6
CLIENTS = 10
SERVER_CONNECTIONS = 2
"""What PgBouncer makes do with in transaction mode."""

HEALED = 4.0
"""Seconds within which every client is served again: PgBouncer tries once a second, then the pool."""


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server that may be stopped; each test leaves it running."""
    with EmbeddedPostgres() as server:
        onlooker = Onlooker(server.dsn)
        add_role(onlooker)
        onlooker.close()
        yield server


@pytest.fixture(params=["session", "transaction"])
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


class Work:
    """Clients who insert numbers, each in a transaction, and go on after an error."""

    def __init__(self, pool: whitepool.Session[Connection], bouncer: PgBouncer) -> None:
        self.pool = pool
        self.bouncer = bouncer
        self.written: set[int] = set()
        """What was committed, as far as a client was told."""
        self.hit: Counter[Connection] = Counter()
        """How many clients each connection has failed."""
        self.unserved = 0
        """Checkouts that have failed."""
        self._number = 0
        self._served: set[int] = set()

    async def client(self, me: int) -> None:
        while True:
            self._number += 1
            number = self._number
            try:
                async with self.pool.worker(timeout=10) as connection:
                    try:
                        async with connection.transaction():
                            await connection.execute("INSERT INTO visits VALUES (%s)", (number,))
                    except psycopg.Error:
                        self.hit[connection] += 1
                        raise
                self.written.add(number)
                self._served.add(me)
            except psycopg.Error:
                pass  # mostly an OperationalError, or psycopg's InternalError for two results at once
            except whitepool.CheckoutTimeout:
                self.unserved += 1
            await trio.sleep(0.005)

    async def until_all_are_served(self, within: float = HEALED) -> None:
        self._served.clear()
        await until(lambda: len(self._served) == CLIENTS, within)


@asynccontextmanager
async def working(server: EmbeddedPostgres, folder: Path, mode: Mode) -> AsyncIterator[Work]:
    """Have clients work behind a PgBouncer; check at the end that nothing is lost, and the rest."""
    onlooker = Onlooker(server.dsn)
    onlooker.do("TRUNCATE visits")
    onlooker.close()
    size = POOL_SIZE if mode == "session" else SERVER_CONNECTIONS
    async with running(server, folder, mode, default_pool_size=size) as bouncer:
        async with open_pool(
            bouncer.dsn, prepare_threshold=None, pool_size=POOL_SIZE, max_overflow=0
        ) as pool:
            async with trio.open_nursery() as nursery:
                work = Work(pool, bouncer)
                for me in range(CLIENTS):
                    nursery.start_soon(work.client, me)
                await work.until_all_are_served()
                yield work
                await work.until_all_are_served()
                nursery.cancel_scope.cancel()
            await until(lambda: pool.statistics().idle >= POOL_SIZE)
            check_books(pool)
        onlooker = Onlooker(server.dsn)
        present = onlooker.ask("SELECT array_agg(client) FROM visits")
        onlooker.close()
        assert work.written <= set(present)
        assert len(present) == len(set(present))
        # No connection that had died was handed to a second client.
        assert set(work.hit.values()) <= {1}
        assert work.unserved == 0


@asynccontextmanager
async def stopped(server: EmbeddedPostgres) -> AsyncIterator[None]:
    """Have a server stopped for the length of a block."""
    await trio.to_thread.run_sync(server.stop, "fast")
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(server.start)


async def test_killed(mode: Mode, own_server: EmbeddedPostgres, tmp_path: Path) -> None:
    """Each connection dies once; the pool waits for PgBouncer to come back."""
    async with working(own_server, tmp_path, mode) as work:
        for _ in range(2):
            await trio.to_thread.run_sync(work.bouncer.kill)
            await trio.sleep(0.3)
            await work.bouncer.start()
            await work.until_all_are_served()
        assert sum(work.hit.values()) <= 2 * 2 * POOL_SIZE


async def test_restarted(own_server: EmbeddedPostgres, tmp_path: Path) -> None:
    """It lets transactions end first (in session mode it would wait for the pool to be closed)."""
    async with working(own_server, tmp_path, "transaction") as work:
        for _ in range(2):
            await work.bouncer.stop()
            await work.bouncer.start()
            await work.until_all_are_served()
        assert sum(work.hit.values()) <= 2 * 2 * POOL_SIZE


async def test_reconnect(mode: Mode, own_server: EmbeddedPostgres, tmp_path: Path) -> None:
    """PgBouncer replaces its own connections: no client notices."""
    async with working(own_server, tmp_path, mode) as work:
        size = POOL_SIZE if mode == "session" else SERVER_CONNECTIONS
        before = await backends(own_server, lambda found: len(found) == size)
        # If it came in the middle of a login, PgBouncer would take that for one that has failed.
        await work.bouncer.command("RECONNECT")
        await work.until_all_are_served()
        if mode == "transaction":
            await backends(own_server, lambda found: len(found) == size and not found & before)
        assert not work.hit
        assert work.pool.statistics().lost == 0


async def test_pause_and_resume(own_server: EmbeddedPostgres, tmp_path: Path) -> None:
    """Queries wait for as long as PgBouncer is paused: no client gets an error."""
    async with working(own_server, tmp_path, "transaction") as work:
        for _ in range(3):
            await work.bouncer.command("PAUSE")
            await trio.sleep(0.5)
            await work.bouncer.command("RESUME")
            await work.until_all_are_served()
        assert not work.hit
        assert work.pool.statistics().lost == 0


async def test_pause_in_session_mode(own_server: EmbeddedPostgres, tmp_path: Path) -> None:
    """PAUSE waits for every connection that was used. A pool keeps its own, until it replaces them."""
    async with (
        running(own_server, tmp_path, "session") as bouncer,
        open_pool(bouncer.dsn, prepare_threshold=None, pool_size=2) as pool,
    ):
        async with pool.worker() as connection:
            await connection.execute("SELECT 1")
        paused = trio.Event()

        async def pause() -> None:
            await bouncer.command("PAUSE")
            paused.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pause)
            with trio.move_on_after(0.5):
                await paused.wait()
            assert not paused.is_set()
            pool.retire_all()
            await paused.wait()
        await bouncer.command("RESUME")
        async with pool.worker() as connection:
            await check_usable(connection)


async def test_its_server_is_restarted(
    mode: Mode, own_server: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Each connection dies once at most, and within a second or two of the restart all are served."""
    async with working(own_server, tmp_path, mode) as work:
        async with stopped(own_server):
            pass
        await work.until_all_are_served()
        assert sum(work.hit.values()) <= 2 * POOL_SIZE


async def test_an_outage_of_its_server(
    mode: Mode, own_server: EmbeddedPostgres, tmp_path: Path
) -> None:
    """PgBouncer accepts connections all the time, and ends them at their first query. The pool tries
    few times a second, and no client gets one of those."""
    async with working(own_server, tmp_path, mode) as work:
        async with stopped(own_server):
            before = attempts(work)
            await trio.sleep(4)
            tried = attempts(work) - before
        await work.until_all_are_served()
        # Two and a half a second on average, as pauses are drawn up to 0.8 s; the first are shorter.
        assert tried <= 4 * 4 + POOL_SIZE
        assert sum(work.hit.values()) <= 2 * POOL_SIZE


def attempts(work: Work) -> Any:
    now = work.pool.statistics()
    return now.started + now.start_failures


async def backends(server: EmbeddedPostgres, are_these: Callable[[set[int]], bool]) -> set[int]:
    """Wait until the backends of PgBouncer are as they should be, and return their process ids."""
    onlooker = Onlooker(server.dsn)
    query = f"SELECT array_agg(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'"
    await until(lambda: are_these(set(onlooker.ask(query) or ())))
    found = set(onlooker.ask(query))
    onlooker.close()
    return found
