"""Several pools lose their primary at the same time, in four ways, and go on at its former standby."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest
import trio
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from psycopg.conninfo import make_conninfo
from standby import REPLICATING, Standby, replicate_synchronously
from timing import until
from workshop import check_books

import whitepool
from whitepool.postgres import PostgresSession, open_pool

POOLS = 4
POOL_SIZE = 3
CLIENTS = 2
"""For each pool. So the others of its connections are idle, and no client finds out about them."""

DEADLINE = 3.0
"""Seconds that a client has for one write."""

Session = PostgresSession[Any]


class Old:
    """The primary that fails."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.server = server
        self._onlooker = Onlooker(server.dsn)
        self._frozen: list[int] = []

    async def stop_fast(self) -> None:
        await trio.to_thread.run_sync(self.server.stop)

    async def stop_immediately(self) -> None:
        await trio.to_thread.run_sync(self.server.stop, "immediate")

    async def freeze(self) -> None:
        """Stop all its processes. Its kernel goes on accepting connections, and what is sent."""
        self._stop(int((self.server._data / "postmaster.pid").read_text().split()[0]))
        # No more are started from here on.
        for pid in self._onlooker.ask("SELECT array_agg(pid) FROM pg_stat_activity"):
            self._stop(pid)

    def _stop(self, pid: int) -> None:
        self._frozen.append(pid)
        os.kill(pid, signal.SIGSTOP)

    async def demote(self) -> None:
        """Take no more writes, and keep all sessions."""
        self._onlooker.do("ALTER SYSTEM SET default_transaction_read_only = on")
        self._onlooker.do("SELECT pg_reload_conf()")

    def close(self) -> None:
        self._onlooker.close()
        while self._frozen:
            with suppress(ProcessLookupError):
                os.kill(self._frozen.pop(), signal.SIGCONT)


@pytest.fixture
def servers() -> Iterator[tuple[Old, Standby]]:
    with ExitStack() as stack:
        primary = stack.enter_context(EmbeddedPostgres(**REPLICATING))
        standby = stack.enter_context(Standby(primary))
        old = Old(primary)
        stack.callback(old.close)
        yield old, standby


class Process:
    """A pool and its clients, as one process of a fleet has them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.last_write = trio.current_time()
        self.longest_gap = 0.0
        self.errors: list[str] = []

    async def write(self, client: int, acknowledged: list[str]) -> None:
        number = 0
        while True:
            number += 1
            note = f"{self.session.name} {client} {number}"
            try:
                with trio.fail_after(DEADLINE):
                    async with self.session.connection() as connection:
                        await connection.execute("INSERT INTO ledger VALUES (%s)", (note,))
            except (psycopg.Error, whitepool.CheckoutTimeout, trio.TooSlowError) as error:
                self.errors.append(type(error).__name__)
            else:
                acknowledged.append(note)
                now = trio.current_time()
                self.longest_gap = max(self.longest_gap, now - self.last_write)
                self.last_write = now
            await trio.sleep(0.01)


async def ports(session: Session) -> set[int]:
    """The ports to which the pool's connections go."""
    async with trio.open_nursery() as nursery:
        found: list[int] = []
        enough = trio.Event()

        async def look() -> None:
            async with session.worker() as connection:
                found.append(connection.info.port)
                if len(found) == POOL_SIZE:
                    enough.set()
                await enough.wait()

        for _ in range(POOL_SIZE):
            nursery.start_soon(look)
    return set(found)


@pytest.mark.parametrize(
    ("fail", "most_seconds"),
    [
        (Old.stop_fast, 3),
        (Old.stop_immediately, 3),
        (Old.freeze, DEADLINE + 3),
        (Old.demote, 3),
    ],
)
async def test_a_fleet_goes_on_at_the_new_primary(
    servers: tuple[Old, Standby], fail: Callable[[Old], Awaitable[None]], most_seconds: float
) -> None:
    """Each pool writes again soon, all of its connections have moved, and no write is lost."""
    old, standby = servers
    onlooker = Onlooker(old.server.dsn)
    onlooker.do("CREATE TABLE ledger (note text PRIMARY KEY)")
    await replicate_synchronously(onlooker)
    onlooker.close()
    conninfo = make_conninfo(
        "user=postgres dbname=postgres host=127.0.0.1,127.0.0.1",
        port=f"{old.server.port},{standby.port}",
        target_session_attrs="read-write",
        connect_timeout=3,
        application_name="fleet",
    )
    acknowledged: list[str] = []
    fleet: list[Process] = []
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def run_process(name: str, task_status: trio.TaskStatus[None]) -> None:
                async with open_pool(
                    conninfo, name=name, pool_size=POOL_SIZE, max_overflow=0, max_lifetime=600
                ) as session:
                    fleet.append(process := Process(session))
                    async with trio.open_nursery() as clients:
                        for client in range(CLIENTS):
                            clients.start_soon(process.write, client, acknowledged)
                        task_status.started()
                        await failed_over.wait()
                        clients.cancel_scope.cancel()
                    await over.wait()

            failed_over, over = trio.Event(), trio.Event()
            for number in range(POOLS):
                await nursery.start(run_process, f"process {number}")
            await trio.sleep(0.5)
            assert acknowledged
            for process in fleet:
                process.longest_gap = 0
            began = trio.current_time()
            await fail(old)
            await trio.to_thread.run_sync(standby.promote)
            promoted = trio.current_time()
            await until(lambda: all(process.last_write > promoted + 0.5 for process in fleet))
            await until(lambda: all(process.session.statistics().idle >= 1 for process in fleet))
            failed_over.set()
            gaps = [process.longest_gap for process in fleet]
            errors = [len(process.errors) for process in fleet]
            print(
                f"\n{fail.__name__}: promoted after {promoted - began:.1f} s; seconds without a write: "
                f"{', '.join(f'{gap:.1f}' for gap in gaps)}; errors: {errors}"
            )
            await until(
                lambda: all(process.session.statistics().idle == POOL_SIZE for process in fleet)
            )
            for process in fleet:
                assert await ports(process.session) == {standby.port}
                check_books(process.session)
            new = Onlooker(standby.dsn)
            assert new.backends("fleet") == POOLS * POOL_SIZE
            written = set(new.ask("SELECT array_agg(note) FROM ledger"))
            new.close()
            over.set()
    assert set(acknowledged) <= written
    assert max(gaps) < most_seconds
