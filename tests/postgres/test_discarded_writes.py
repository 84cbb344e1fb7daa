"""What a client has written, and not committed, is rolled back, and the operators are told."""

from __future__ import annotations

import logging
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import pytest
import trio
from connections import Connection, check_usable
from timing import until
from workshop import check_books

import whitepool
from whitepool.postgres import PostgresManager, PostgresSession, _resetting, connect, open_pool

Notes = Callable[[], int]
Told = Callable[[], list[str]]
Session = whitepool.Session[Connection]

INSERT = "INSERT INTO notes VALUES ('a')"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Call it for the places where the lost transactions were checked out, as the log has them."""

    def places() -> list[str]:
        events: list[Any] = [r for r in caplog.records if vars(r).get("event") == "writes_discarded"]
        assert all(event.levelno == logging.WARNING and event.pool == "mine" for event in events)
        return [event.checked_out_at for event in events]

    return places


@asynccontextmanager
async def a_pool(dsn: str, **options: Any) -> AsyncIterator[PostgresSession[Any]]:
    async with open_pool(dsn, name="mine", pool_size=1, max_overflow=0, **options) as session:
        yield session


async def use(session: Session, *statements: str) -> None:
    """Execute, and return the connection without a commit; then wait until it has been reset."""
    async with session.worker() as connection:
        for statement in statements:
            await connection.execute(statement.encode())
    await until(lambda: session.statistics().idle == 1)
    check_books(session.statistics())


@pytest.mark.parametrize(
    "statements",
    [
        (INSERT,),
        ("SELECT 1", INSERT, "SELECT 1"),
        ("CREATE TABLE numbers (i int)",),
        ("TRUNCATE notes",),
        ("SAVEPOINT a", INSERT, "RELEASE a"),
        ("WITH new AS (INSERT INTO notes VALUES ('a') RETURNING note) SELECT * FROM new",),
    ],
    ids=lambda statements: statements[-1],
)
async def test_writes_are_counted(dsn: str, notes: Notes, told: Told, statements: tuple[str]) -> None:
    """They are gone; the statistics and the log say so, and the connection is as good as before."""
    async with a_pool(dsn) as session:
        await use(session, *statements)
        assert session.statistics().discarded == 1
        assert told() == ["unknown: trace it with python -X tracemalloc=10"]
        async with session.worker() as connection:
            await check_usable(connection)
        assert session.statistics().started == 1
    assert notes() == 0


@pytest.mark.parametrize(
    "statements",
    [
        (),
        ("SELECT * FROM notes",),
        ("SET work_mem = '5MB'",),
        ("DECLARE a CURSOR FOR SELECT * FROM notes",),
        (INSERT, "COMMIT"),
        (INSERT, "COMMIT", "BEGIN", "SELECT * FROM notes"),
        (INSERT, "ROLLBACK", "SELECT * FROM notes"),
    ],
    ids=lambda statements: statements[-1] if statements else "nothing",
)
async def test_reads_are_not(dsn: str, notes: Notes, told: Told, statements: tuple[str]) -> None:
    """Most clients end in a transaction that has only read. No one needs to hear of that."""
    async with a_pool(dsn) as session:
        await use(session, *statements)
        assert session.statistics().discarded == 0
    assert told() == []


async def test_a_failed_transaction_is_not(dsn: str, notes: Notes, told: Told) -> None:
    """Its client has had the error. And the server can't be asked."""
    async with a_pool(dsn) as session:
        async with session.worker() as connection:
            await connection.execute(INSERT)
            with suppress(psycopg.errors.DivisionByZero):
                await connection.execute("SELECT 1/0")
        await until(lambda: session.statistics().idle == 1)
        assert session.statistics().discarded == 0
        assert session.statistics().started == 1
    assert (notes(), told()) == (0, [])


async def test_a_block_that_commits_discards_nothing(dsn: str, notes: Notes, told: Told) -> None:
    """And where it raises, or is cancelled, its client knows."""
    async with a_pool(dsn) as session:
        async with session.connection() as connection:
            await connection.execute(INSERT)
        with pytest.raises(LookupError):
            async with session.connection() as connection:
                await connection.execute(INSERT)
                raise LookupError
        with trio.move_on_after(0.05):
            async with session.connection() as connection:
                await connection.execute(INSERT)
                await connection.execute("SELECT pg_sleep(30)")
        await until(lambda: session.statistics().idle == 1)
        assert session.statistics().discarded == 0
    assert (notes(), told()) == (1, [])


async def test_tracing_tells_where(dsn: str, notes: Notes, told: Told) -> None:
    """With tracemalloc on, the log names the line of the checkout."""
    tracemalloc.start(10)
    try:
        async with a_pool(dsn) as session:
            line = this_line() + 1
            async with session.worker() as connection:
                await connection.execute(INSERT)
            await until(lambda: session.statistics().idle == 1)
            assert told() == [f"{__file__}:{line}"]
    finally:
        tracemalloc.stop()


def this_line() -> int:
    """Return the line of the caller."""
    return sys._getframe(1).f_lineno


@pytest.mark.parametrize("how", ["session", "callable", "bare factory", "subclass"])
async def test_however_it_is_reset(dsn: str, notes: Notes, told: Told, how: str) -> None:
    """Each reset begins with the rollback, and it is the rollback that counts."""

    async def reset(connection: Connection) -> None:
        await connection.execute("SELECT 1")
        await connection.commit()

    class Manager(PostgresManager):
        async def reset(self, worker: Connection) -> None:
            await super().reset(worker)

    made: Any = {
        "session": PostgresManager(dsn, reset="session"),
        "callable": PostgresManager(dsn, reset=reset),
        "bare factory": lambda: connect(dsn),
        "subclass": Manager(dsn),
    }[how]
    async with whitepool.open_pool(made, name="mine", pool_size=1, max_overflow=0) as session:
        await use(session, INSERT)
        assert session.statistics().discarded == 1
        assert len(told()) == 1
        await use(session, "SELECT 1")
        assert session.statistics().discarded == 1
    assert notes() == 0


async def test_one_that_is_too_old_is_asked_before_it_goes(dsn: str, notes: Notes, told: Told) -> None:
    """One that has reached its `max_lifetime` is closed when it comes back, but rolled back before."""
    async with a_pool(dsn, max_lifetime=0.1) as session:
        async with session.worker() as connection:
            await connection.execute(INSERT)
            await trio.sleep(0.3)
        await until(lambda: session.statistics().retired == 1)
        assert session.statistics().discarded == 1
        assert len(told()) == 1
        check_books(session.statistics())


async def test_one_that_is_returned_in_a_shutdown(dsn: str, notes: Notes, told: Told) -> None:
    """It would be closed without a reset, if that had nothing to say."""
    async with (
        a_pool(dsn) as session,
        trio.open_nursery() as nursery,
        session.worker() as connection,
    ):
        await connection.execute(INSERT)
        nursery.start_soon(session.safe_shutdown)
        await until(lambda: session.statistics().state == "draining")
    assert session.statistics().discarded == 1
    assert len(told()) == 1


async def test_one_that_its_client_calls_broken(dsn: str, notes: Notes, told: Told) -> None:
    """Its client has said that what it holds is of no use."""
    async with a_pool(dsn) as session:
        resource = await session.block_checkout()
        await resource.get().execute(INSERT)
        session.destroyed(resource)
        await until(lambda: session.statistics().idle == 1)
        assert session.statistics().discarded == 0
    assert told() == []


async def test_many_are_counted_and_few_are_told(dsn: str, notes: Notes, told: Told) -> None:
    """A program that never commits must not drown its log: there is one warning in a second."""
    async with a_pool(dsn) as session:
        for _ in range(20):
            await use(session, INSERT)
        assert session.statistics().discarded == 20
    assert 1 <= len(told()) <= 3


# -- Asking the server ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "function"),
    [(180000, "pg_current_xact_id"), (130000, "pg_current_xact_id"), (120022, "txid_current")],
)
async def test_every_server_is_asked_in_its_own_way(
    connection: Connection, notes: Notes, version: int, function: str
) -> None:
    """PostgreSQL 13 has renamed the function. The old one is still there, so it can be tried."""
    question = _resetting._has_written(version)
    assert f"{function}_if_assigned".encode() in question
    for statement, is_null in (("SELECT 1", True), (INSERT, False)):
        await connection.execute(statement.encode())
        answer = await (await connection.execute(question)).fetchone()
        assert (answer == (None,)) is is_null


def test_a_server_that_is_very_old_is_not_asked() -> None:
    """PostgreSQL 9.6 has no such function."""
    assert _resetting._has_written(90624) == b""


@pytest.mark.parametrize("question", [b"", b"SELECT no_such_function()"])
async def test_a_server_that_cannot_answer(
    dsn: str, notes: Notes, told: Told, monkeypatch: pytest.MonkeyPatch, question: bytes
) -> None:
    """There is a rollback all the same, and the connection stays."""
    monkeypatch.setattr(_resetting, "_has_written", lambda version: question)
    async with a_pool(dsn) as session:
        await use(session, INSERT)
        async with session.worker() as connection:
            await check_usable(connection)
        now = session.statistics()
        assert (now.started, now.discarded) == (1, 0)
    assert (notes(), told()) == (0, [])


async def test_it_costs_no_round_trip(dsn: str, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question goes with the rollback in one message."""
    sent: list[bytes] = []
    run = _resetting.run

    async def note(connection: Connection, command: bytes) -> Any:
        sent.append(command)
        return await run(connection, command)

    monkeypatch.setattr(_resetting, "run", note)
    async with a_pool(dsn) as session:
        await use(session, INSERT)
        with suppress(psycopg.errors.DivisionByZero):
            await use(session, "SELECT 1/0")
        await until(lambda: session.statistics().idle == 1)
    assert sent == [b"SELECT pg_catalog.pg_current_xact_id_if_assigned(); ROLLBACK", b"ROLLBACK"]
