"""The pool in front of PgBouncer, which has pooled the server's connections by transaction already."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from bouncer import PgBouncer, add_role, remove_role, running
from connections import check_usable
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from psycopg.conninfo import make_conninfo
from timing import until
from workshop import check_books

import whitepool
from whitepool.postgres import TrioConnection, connect, open_pool

pytestmark = pytest.mark.pgbouncer

SERVER_CONNECTIONS = 2
"""What PgBouncer makes do with. Every pool here is larger."""

SLOW = "SELECT pg_sleep(30)"

Session = whitepool.Session[TrioConnection[Any]]


@pytest.fixture(scope="module")
def onlooker(server: EmbeddedPostgres) -> Iterator[Onlooker]:
    """It looks at the server directly."""
    onlooker = Onlooker(server.dsn)
    add_role(onlooker)
    yield onlooker
    remove_role(onlooker)
    onlooker.close()


@pytest.fixture
async def bouncer(
    server: EmbeddedPostgres, onlooker: Onlooker, tmp_path: Path
) -> AsyncIterator[PgBouncer]:
    onlooker.do("TRUNCATE visits")
    async with running(server, tmp_path, default_pool_size=SERVER_CONNECTIONS) as bouncer:
        yield bouncer
    onlooker.do("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'bouncer'")


def server_connections(onlooker: Onlooker, state: str = "%") -> int:
    count: int = onlooker.ask(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = 'bouncer' AND state LIKE %s", state
    )
    return count


def visits(onlooker: Onlooker) -> int:
    count: int = onlooker.ask("SELECT count(*) FROM visits")
    return count


async def visit(pool: Session, client: int) -> None:
    """What a good client does."""
    async with pool.worker() as connection, connection.transaction():
        await connection.execute("INSERT INTO visits VALUES (%s)", (client,))
        cursor = await connection.execute("SELECT %s::int", (client,))
        assert await cursor.fetchone() == (client,)


async def test_more_workers_than_server_connections(bouncer: PgBouncer, onlooker: Onlooker) -> None:
    """Clients of a pool that is larger than PgBouncer's own all make progress, and don't mix."""

    async def client(number: int, pool: Session) -> None:
        for _ in range(5):
            await visit(pool, number)

    with trio.fail_after(10):
        async with open_pool(bouncer.dsn, prepare_threshold=None, pool_size=8) as pool:
            async with trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(client, number, pool)
            check_books(pool)
            assert 0 < server_connections(onlooker) <= SERVER_CONNECTIONS
    assert visits(onlooker) == 150


async def test_transactions_left_open_are_rolled_back(bouncer: PgBouncer, onlooker: Onlooker) -> None:
    """A transaction that a client forgot gives its server connection back, with nothing written."""
    with trio.fail_after(10):
        async with open_pool(bouncer.dsn, prepare_threshold=None, pool_size=6, strategy="fifo") as pool:
            for number in range(12):
                async with pool.worker() as connection:
                    await connection.execute("INSERT INTO visits VALUES (%s)", (number,))
            await until(lambda: pool.statistics().idle == 6)
            assert server_connections(onlooker, "idle in transaction%") == 0
            assert visits(onlooker) == 0
            statistics = pool.statistics()
            assert (statistics.lost, statistics.destroyed, statistics.started) == (0, 0, 6)
            async with pool.worker() as connection:
                await check_usable(connection)


async def test_a_running_query_is_cancelled(bouncer: PgBouncer, onlooker: Onlooker) -> None:
    """A cancelled query ends on the server, its connection goes on, and no other client is hit."""
    visited = 0

    async def bystander(pool: Session) -> None:
        nonlocal visited
        while True:
            await visit(pool, 0)
            visited += 1

    with trio.fail_after(10):
        async with (
            open_pool(bouncer.dsn, prepare_threshold=None, pool_size=4) as pool,
            trio.open_nursery() as bystanders,
        ):
            bystanders.start_soon(bystander, pool)
            for _ in range(5):
                async with pool.worker() as connection:
                    with trio.CancelScope() as scope:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(connection.execute, SLOW)
                            await until(lambda: slow_queries(onlooker) == 1)
                            scope.cancel()
                    assert scope.cancelled_caught
                    assert slow_queries(onlooker) == 0
                    await connection.rollback()
                    await check_usable(connection)
            before = visited
            await until(lambda: visited > before)
            bystanders.cancel_scope.cancel()
        assert pool.statistics().lost == 0


def slow_queries(onlooker: Onlooker) -> int:
    count: int = onlooker.ask(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE usename = 'bouncer' AND state = 'active' AND query = %s",
        SLOW,
    )
    return count


async def test_a_query_that_waits_for_a_server_connection_is_cancelled(
    bouncer: PgBouncer, onlooker: Onlooker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that PgBouncer has not even passed on can be cancelled, and the pool stays whole."""
    # PgBouncer ignores a request to cancel what it has not passed on: the connection is given up.
    with trio.fail_after(10):
        async with open_pool(
            bouncer.dsn, prepare_threshold=None, cleanup_timeout=0.5, pool_size=SERVER_CONNECTIONS + 1
        ) as pool:

            async def occupy() -> None:
                async with pool.worker() as connection:
                    await connection.execute(SLOW)

            async with trio.open_nursery() as occupants:
                for _ in range(SERVER_CONNECTIONS):
                    occupants.start_soon(occupy)
                await until(lambda: slow_queries(onlooker) == SERVER_CONNECTIONS)
                with trio.move_on_after(0.1) as scope:
                    async with pool.worker() as connection:
                        await connection.execute("SELECT 'no room'")
                assert scope.cancelled_caught
                assert connection.closed
                occupants.cancel_scope.cancel()
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(visit, pool, number)
            check_books(pool)
    assert visits(onlooker) == 10


async def test_a_restart_heals(bouncer: PgBouncer, onlooker: Onlooker) -> None:
    """Clients who try again survive a crash of PgBouncer; idle connections to it are not handed out."""
    done: set[int] = set()
    failures = 0
    stopping = False

    async def client(number: int, pool: Session) -> None:
        nonlocal failures
        while not stopping:
            try:
                await visit(pool, number)
            except (psycopg.OperationalError, whitepool.CheckoutTimeout):
                failures += 1
                await trio.sleep(0.01)
            else:
                done.add(number)

    with trio.fail_after(20):
        async with open_pool(bouncer.dsn, prepare_threshold=None, pool_size=6) as pool:
            await until(lambda: pool.statistics().idle == 6)
            await trio.to_thread.run_sync(bouncer.kill)
            await until(lambda: pool.statistics().lost == 6)
            with pytest.raises(whitepool.CheckoutTimeout) as caught:
                await pool.block_checkout(timeout=0.1)
            assert isinstance(caught.value.__cause__, psycopg.OperationalError)
            await bouncer.start()
            async with trio.open_nursery() as nursery:
                for number in range(12):
                    nursery.start_soon(client, number, pool)
                for _ in range(3):
                    done.clear()
                    await until(lambda: len(done) == 12)
                    await trio.to_thread.run_sync(bouncer.kill)
                    await bouncer.start()
                done.clear()
                await until(lambda: len(done) == 12)
                stopping = True
            assert failures > 0
            await until(lambda: pool.statistics().idle >= 6)
            check_books(pool)


async def test_an_unknown_database_is_final(bouncer: PgBouncer) -> None:
    """A database that PgBouncer doesn't know ends the opening of a pool at once."""
    nowhere = make_conninfo(bouncer.dsn, dbname="atlantis")
    with pytest.raises(psycopg.OperationalError, match="no such database"):
        await connect(nowhere)
    with trio.fail_after(2), pytest.raises(whitepool.PoolStartError, match="no such database"):
        async with open_pool(nowhere, pool_size=1, start_timeout=4):
            pytest.fail("the pool was opened")


async def test_one_that_is_full(
    server: EmbeddedPostgres, onlooker: Onlooker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes `max_client_conn` clients, and no more: the pool makes do, and says so once."""
    bouncer = PgBouncer(server, tmp_path, max_client_conn=2)
    try:
        await bouncer.start()
        async with open_pool(bouncer.dsn, pool_size=4, max_overflow=0) as session:
            async with session.worker(), session.worker(5):
                with pytest.raises(whitepool.CheckoutTimeout, match="no more connections allowed"):
                    await session.block_checkout(3)
            assert session.statistics().start_failures <= 8
    finally:
        bouncer.kill()
    told = [record.__dict__["event"] for record in caplog.records]
    assert told == ["server_full"]
