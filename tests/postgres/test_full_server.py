"""A server that has no more connections to give: a pool lives with those that it has."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from connections import Connection, ask
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from psycopg.conninfo import make_conninfo
from timing import until

import whitepool
from whitepool.postgres import connect, open_pool
from whitepool.postgres._connecting import is_full

OpenPool = Callable[..., AbstractAsyncContextManager[whitepool.Session[Connection]]]

CROWD = Path(__file__).parent / "crowd.py"

ROLE = "crowded"
"""A role that may have two connections. It is no superuser: for those there is no limit."""


def allow(onlooker: Onlooker, connections: int) -> None:
    onlooker.do(f"ALTER ROLE {ROLE} CONNECTION LIMIT {connections}")


@pytest.fixture
def crowded(onlooker: Onlooker, dsn: str) -> Iterator[str]:
    """A connection string for that role."""
    onlooker.do(f"DROP ROLE IF EXISTS {ROLE}")
    onlooker.do(f"CREATE ROLE {ROLE} LOGIN CONNECTION LIMIT 2")
    yield make_conninfo(dsn, user=ROLE)
    onlooker.do(f"DROP ROLE {ROLE}")


def events(caplog: pytest.LogCaptureFixture) -> list[Any]:
    events = [record.__dict__["event"] for record in caplog.records]
    return [event for event in events if event not in ("pool_opened", "pool_closed")]


@pytest.mark.parametrize("how", ["open_pool", "a bare factory"])
async def test_it_does_not_fail_the_opening(
    how: str, crowded: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool opens with what it gets, says so once, and grows when it may and a task waits."""
    caplog.set_level("INFO", "whitepool")

    async def factory() -> Connection:
        connection: Connection = await connect(crowded)
        return connection

    opened: AbstractAsyncContextManager[whitepool.Session[Connection]] = (
        open_pool(crowded, pool_size=4, max_overflow=0, max_starting=1)
        if how == "open_pool"
        else whitepool.open_pool(factory, pool_size=4, max_overflow=0, max_starting=1)
    )
    with trio.fail_after(20):
        async with opened as session:
            await until(lambda: session.statistics().idle == 2)
            for _ in range(3):
                async with session.worker() as connection:
                    assert await ask(connection, "SELECT current_user") == ROLE
            await until(lambda: session.statistics().idle == 2)
            now = session.statistics()
            assert now.state == "ready"
            assert "too many connections for role" in str(now.last_error)
            await until(lambda: session.statistics().retired == 1)  # others may need its place
            assert events(caplog) == ["server_full"]
            async with session.worker() as connection:
                allow(onlooker, 10)
                async with session.worker():  # it goes on trying where a task waits
                    assert await ask(connection, "SELECT current_user") == ROLE
            assert session.statistics().last_error is None
            assert events(caplog) == ["server_full"]


async def test_without_any_connection_the_opening_fails(crowded: str, onlooker: Onlooker) -> None:
    """The error says why."""
    allow(onlooker, 0)
    with pytest.raises(whitepool.PoolStartError, match=r"0 of 2.*too many connections for role"):
        async with open_pool(crowded, pool_size=2, start_timeout=0.5):
            pass


async def test_the_limit_of_a_database(server: EmbeddedPostgres, onlooker: Onlooker) -> None:
    """It is the same to a pool, for which both are one limit."""
    onlooker.do("CREATE DATABASE crowded CONNECTION LIMIT 1")
    onlooker.do(f"CREATE ROLE {ROLE} LOGIN")
    dsn = make_conninfo(server.dsn, dbname="crowded", user=ROLE)
    try:
        async with open_pool(dsn, pool_size=2) as session:
            with pytest.raises(whitepool.CheckoutTimeout, match="too many connections for database"):
                async with session.worker(), session.worker(2.5):
                    pass
            assert session.statistics().state in ("ready", "overflow")
    finally:
        onlooker.do("DROP DATABASE crowded WITH (FORCE)")
        onlooker.do(f"DROP ROLE {ROLE}")


async def test_one_of_several_hosts(crowded: str, refusing_port: int, server: EmbeddedPostgres) -> None:
    """The one that is there is full; that another one is down changes nothing for the pool."""
    hosts = make_conninfo(crowded, host="127.0.0.1,127.0.0.1", port=f"{refusing_port},{server.port}")
    async with open_pool(hosts, pool_size=3, start_timeout=5) as session:
        await until(lambda: session.statistics().idle == 2)
        async with session.worker(), session.worker():
            with pytest.raises(whitepool.CheckoutTimeout, match="Multiple connection attempts failed"):
                await session.block_checkout(4.1)


async def test_processes_share_it(onlooker: Onlooker, dsn: str) -> None:
    """Four saturated processes that want 24 of 10 places: each gets some, and soon."""
    onlooker.do("DROP ROLE IF EXISTS fleet")
    onlooker.do("CREATE ROLE fleet LOGIN CONNECTION LIMIT 10")
    reports: list[dict[str, Any]] = []

    async def process(stop_at: float) -> None:
        arguments = [make_conninfo(dsn, user="fleet"), "3", "3", "10", str(stop_at)]
        done = await trio.run_process(
            [sys.executable, str(CROWD), *arguments], capture_stdout=True, env=dict(os.environ)
        )
        reports.append(json.loads(done.stdout))

    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                stop_at = time.time() + 30  # openings try more often, and count less in a longer time
                for _ in range(4):
                    nursery.start_soon(process, stop_at)
                    await trio.sleep(0.2)
    finally:
        await until(
            lambda: not onlooker.ask("SELECT count(*) FROM pg_stat_activity WHERE usename = 'fleet'")
        )
        onlooker.do("DROP ROLE fleet")
    assert [report["error"] for report in reports] == [None] * 4
    assert max(report["first"] or math.inf for report in reports) < 5, reports
    assert max(report["refused_per_second"] for report in reports) <= 1, reports
    rates = [report["per_second"] for report in reports]
    assert max(rates) < 3 * min(rates), reports


@pytest.mark.parametrize(
    "text",
    [
        "sorry, too many clients already",
        # The first until PostgreSQL 15, the others since.
        "remaining connection slots are reserved for non-replication superuser connections",
        "remaining connection slots are reserved for roles with the SUPERUSER attribute",
        "remaining connection slots are reserved for roles with privileges of the "
        '"pg_use_reserved_connections" role',
        'too many connections for role "crowded"',
        'too many connections for database "crowded"',
        # PgBouncer
        "no more connections allowed (max_client_conn)",
        "client connections exceeded (max_user_client_connections)",
        "client connections exceeded (max_db_client_connections)",
    ],
)
def test_what_servers_say(text: str) -> None:
    """A connection that is refused has no SQLSTATE: the text is all there is to know it by."""
    assert is_full(psycopg.OperationalError(f"connection failed: FATAL:  {text}"))


@pytest.mark.parametrize(
    "error",
    [
        psycopg.OperationalError("connection failed: Connection refused"),
        psycopg.OperationalError("connection failed: FATAL:  the database system is starting up"),
        psycopg.OperationalError('connection failed: FATAL:  role "crowded" does not exist'),
        psycopg.errors.ConnectionTimeout("connection timeout expired"),
        psycopg.errors.DuplicateTable('relation "too many connections for role" already exists'),
        trio.TooSlowError("not open within 30 s"),
        OSError("sorry, too many clients already"),
    ],
)
def test_other_failures(error: Exception) -> None:
    """The rest is what it was: a failed start."""
    assert not is_full(error)
