"""Hooks that run statements: either they take effect, or an error says why not, and what to do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
import trio
from connections import Connection, ask, backend, check_usable, status
from psycopg.pq import TransactionStatus
from timing import until
from workshop import check_books

import whitepool
from whitepool import Hooks
from whitepool.postgres import connect, open_pool

Notes = Callable[[], int]
Session = whitepool.Session[Connection]

WHAT_TO_DO = r"left a transaction open: end it with commit\(\), or connect with autocommit=True"


@asynccontextmanager
async def a_pool(dsn: str, **options: Any) -> AsyncIterator[Session]:
    async with open_pool(dsn, pool_size=1, max_overflow=0, **options) as session:
        yield session
        check_books(session.statistics())


async def is_idle(session: Session) -> None:
    await until(lambda: session.statistics().idle == 1)


# The examples of pg-pool, in Rust, whose hooks these are.


async def set_on_create(connection: Connection) -> None:
    await connection.execute("SET work_mem = '5MB'")


async def reset_on_checkin(connection: Connection) -> None:
    await connection.execute("RESET ALL")


async def set_on_checkout(connection: Connection) -> None:
    await connection.execute("SET application_name = 'a client'")


def committing(hook: Any) -> Any:
    async def hook_that_commits(connection: Connection) -> None:
        await hook(connection)
        await connection.commit()

    return hook_that_commits


ways = pytest.mark.parametrize("way", ["autocommit", "commit"])


def hooks_in(way: str, **hooks: Any) -> dict[str, Any]:
    """The keywords of a pool with these hooks, in which they may run."""
    if way == "commit":
        return {"hooks": Hooks(**{name: committing(hook) for name, hook in hooks.items()})}
    return {"autocommit": True, "hooks": Hooks(**hooks)}


@ways
async def test_set_on_create(dsn: str, way: str) -> None:
    """What the hook sets is set for every client."""
    async with a_pool(dsn, **hooks_in(way, on_create=set_on_create)) as session:
        for _ in range(2):
            async with session.worker() as connection:
                assert status(connection) is TransactionStatus.IDLE
                assert await ask(connection, "SHOW work_mem") == "5MB"
            await is_idle(session)


@ways
@pytest.mark.parametrize("left", ["nothing", "a transaction", "a failed one"])
async def test_reset_all_on_checkin(dsn: str, way: str, left: str) -> None:
    """The next client finds no setting of the last one, in whatever state that one left."""
    async with a_pool(dsn, **hooks_in(way, on_checkin=reset_on_checkin)) as session:
        async with session.worker() as connection:
            mine = backend(connection)
            await connection.execute("SET work_mem = '5MB'")
            await connection.commit()
            if left != "nothing":
                await connection.execute("BEGIN")
            if left == "a failed one":
                with pytest.raises(psycopg.errors.DivisionByZero):
                    await connection.execute("SELECT 1/0")
        async with session.worker() as connection:
            assert backend(connection) == mine
            assert await ask(connection, "SHOW work_mem") == "4MB"


@ways
@pytest.mark.parametrize("checkout", ["block_checkout", "nonblock_checkout", "worker", "connection"])
async def test_set_on_checkout(dsn: str, way: str, checkout: str) -> None:
    """The client gets a connection with the setting, and outside a transaction."""
    async with a_pool(dsn, **hooks_in(way, on_checkout=set_on_checkout)) as session:
        if checkout in ("worker", "connection"):
            async with getattr(session, checkout)() as connection:
                await check_set(connection)
        else:
            resource = await getattr(session, checkout)()
            await check_set(resource.get())
            session.checkin(resource)


async def check_set(connection: Connection) -> None:
    assert status(connection) is TransactionStatus.IDLE
    await connection.set_autocommit(not connection.autocommit)
    assert await ask(connection, "SHOW application_name") == "a client"


# -- Hooks that leave a transaction open ----------------------------------------------------------


@pytest.mark.parametrize("made_by", ["open_pool", "a bare factory"])
async def test_on_create_is_told_at_once(dsn: str, made_by: str) -> None:
    """The pool does not open, and does not try for `start_timeout` what can't succeed."""
    attempts: list[Connection] = []

    async def on_create(connection: Connection) -> None:
        attempts.append(connection)
        await set_on_create(connection)

    async def factory() -> Connection:
        connection: Connection = await connect(dsn)
        return connection

    hooks = Hooks(on_create=on_create)
    with (
        trio.fail_after(3),
        pytest.raises(whitepool.PoolStartError, match="the hook on_create " + WHAT_TO_DO) as caught,
    ):
        opening: Any = a_pool(dsn, hooks=hooks)
        if made_by == "a bare factory":
            opening = whitepool.open_pool(factory, pool_size=1, hooks=hooks)
        async with opening:
            raise AssertionError("opened")
    assert isinstance(caught.value.__cause__, psycopg.ProgrammingError)
    assert [connection.closed for connection in attempts] == [True]


async def test_on_checkin_is_told_to_the_operators(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """The connection is not used again, and the log says why."""
    reasons: list[str] = []
    hooks = Hooks(on_checkin=reset_on_checkin, on_destroy=reasons.append)
    async with a_pool(dsn, hooks=hooks) as session:
        async with session.worker() as connection:
            await connection.execute("SET work_mem = '5MB'")
            await connection.commit()
        async with session.worker() as another:
            assert another is not connection
            assert await ask(another, "SHOW work_mem") == "4MB"
            assert reasons == ["hook_failed"]
    (record, *_) = [r for r in caplog.records if r.message.startswith("hook_failed")]
    assert "the hook on_checkin left a transaction open" in record.message
    assert "commit()" in record.message


@pytest.mark.parametrize("checkout", ["block_checkout", "nonblock_checkout", "worker", "connection"])
async def test_on_checkout_is_told_to_the_caller(dsn: str, checkout: str) -> None:
    """The caller gets the error, and the pool has the connection, in order."""
    async with a_pool(dsn, hooks=Hooks(on_checkout=set_on_checkout)) as session:
        for _ in range(3):
            with pytest.raises(psycopg.ProgrammingError, match="the hook on_checkout " + WHAT_TO_DO):
                if checkout in ("worker", "connection"):
                    async with getattr(session, checkout)():
                        raise AssertionError("checked out")
                else:
                    await getattr(session, checkout)()
        await is_idle(session)
        now = session.statistics()
        assert (now.in_use, now.started, now.discarded) == (0, 1, 0)


async def test_checkout_nowait_looks_too(dsn: str) -> None:
    """Its hook is plain, and can do little, but it can do that."""
    states: list[Any] = []

    def on_checkout(connection: Connection) -> None:
        connection.pgconn.exec_(b"BEGIN" if not states else b"")
        states.append(connection)

    async with a_pool(dsn, hooks=Hooks(on_checkout=on_checkout)) as session:
        with pytest.raises(psycopg.ProgrammingError, match="the hook on_checkout " + WHAT_TO_DO):
            session.checkout_nowait()
        await is_idle(session)
        resource = session.checkout_nowait()
        await check_usable(resource.get())
        session.checkin(resource)
        assert states[0] is states[1]


async def test_a_hook_that_closes_the_connection(dsn: str) -> None:
    """No client gets that."""

    async def close(connection: Connection) -> None:
        await connection.close()

    async with a_pool(dsn, hooks=Hooks(on_checkout=close)) as session:
        with pytest.raises(
            psycopg.ProgrammingError, match="the hook on_checkout closed the connection"
        ):
            await session.block_checkout()
        assert session.statistics().lost == 1


# -- The client's own transaction -----------------------------------------------------------------


async def test_on_checkin_does_not_see_the_transaction_of_the_client(dsn: str, notes: Notes) -> None:
    """It is rolled back before, and counted: what the hook does must not be rolled back with it."""
    seen: list[TransactionStatus] = []

    def on_checkin(connection: Connection) -> None:
        seen.append(status(connection))

    async with a_pool(dsn, hooks=Hooks(on_checkin=on_checkin)) as session:
        async with session.worker() as connection:
            await connection.execute("INSERT INTO notes VALUES ('a')")
        await is_idle(session)
        assert seen == [TransactionStatus.IDLE]
        now = session.statistics()
        assert (now.started, now.discarded) == (1, 1)
    assert notes() == 0


async def test_a_connection_that_cannot_be_rolled_back_is_no_fault_of_the_hook(dsn: str) -> None:
    """It leaves because of its client, and the hook is not called."""
    reasons: list[str] = []
    called: list[Connection] = []
    hooks = Hooks(on_checkin=called.append, on_destroy=reasons.append)
    async with a_pool(dsn, hooks=hooks) as session:
        async with session.worker() as connection:
            block = connection.transaction()
            await block.__aenter__()
        await is_idle(session)
        assert (reasons, called) == (["reset_failed"], [])
    await block.__aexit__(None, None, None)
