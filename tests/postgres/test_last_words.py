"""What PostgreSQL said when it ended a session: in the log, to the hook, and in the statistics."""

from __future__ import annotations

import fcntl
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import pytest
import trio
from connections import Connection, backend, closing, read_all
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from timing import until
from workshop import check_books

import whitepool
from whitepool._hangup import HangupWatch
from whitepool.postgres import connect, open_pool

TERMINATED = "57P01: terminating connection due to administrator command"
IDLE_TOO_LONG = "57P05: terminating connection due to idle-session timeout"
CRASHED = "57P01: terminating connection due to immediate shutdown command"


class Witness:
    """A pool, and what it tells when a connection leaves."""

    def __init__(self, session: whitepool.Session[Connection]) -> None:
        self.session = session
        self.told: list[tuple[str, str]] = []

    def check(self, caplog: pytest.LogCaptureFixture, reason: str, words: str, times: int = 1) -> None:
        """The hook, the statistics and the log agree."""
        assert self.told == [(reason, words)] * times
        assert self.session.statistics().last_words == {reason: words}
        lost = [vars(r) for r in caplog.records if vars(r)["event"] == "worker_lost"]
        assert {(record["reason"], record["last_words"]) for record in lost} == {(reason, words)}
        assert all(f"last_words={words}" in record["message"] for record in lost)
        check_books(self.session)


@asynccontextmanager
async def open_witnessed(dsn: str, **options: Any) -> AsyncIterator[Witness]:
    witness: Witness
    hooks = whitepool.Hooks(on_destroy=lambda reason, words: witness.told.append((reason, words)))
    async with open_pool(dsn, max_overflow=0, hooks=hooks, **options) as session:
        witness = Witness(session)
        yield witness


def unread(connection: Connection) -> int:
    """Bytes that have arrived, and that libpq has not read."""
    answer = fcntl.ioctl(connection.pgconn.socket, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def terminate(onlooker: Onlooker, connection: Connection) -> None:
    """End a session, and return when it is gone."""
    assert onlooker.ask("SELECT pg_terminate_backend(%s, 5000)", backend(connection))


@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_an_idle_connection(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture, reset: Any
) -> None:
    """Its server's last words lie unread in the socket."""
    async with open_witnessed(dsn, pool_size=1, reset=reset) as witness:
        async with witness.session.worker() as connection:
            pass
        await until(lambda: witness.session.statistics().idle == 1)
        terminate(onlooker, connection)
        await until(lambda: bool(witness.told))
        witness.check(caplog, "hung_up", TERMINATED)


async def test_unread_notifications_come_first(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    """The last words may lie behind more than libpq reads at once."""
    async with open_witnessed(dsn, pool_size=1, autocommit=True) as witness:
        async with witness.session.worker() as connection:
            await connection.execute("LISTEN news")
        onlooker.do("SELECT pg_notify('news', i || repeat('x', 7000)) FROM generate_series(1, 5) i")
        terminate(onlooker, connection)
        await until(lambda: bool(witness.told))
        witness.check(caplog, "hung_up", TERMINATED)


@pytest.mark.parametrize("autocommit", [True, False])
async def test_one_in_use(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture, autocommit: bool
) -> None:
    """Its client has got them, with the error of its query."""
    async with open_witnessed(dsn, pool_size=1, autocommit=autocommit) as witness:
        with pytest.raises(psycopg.errors.AdminShutdown):
            async with witness.session.worker() as connection:
                await connection.execute("SELECT 1")
                terminate(onlooker, connection)
                await connection.execute("SELECT 1")
        await until(lambda: bool(witness.told))
        witness.check(caplog, "hung_up", TERMINATED)


@pytest.mark.parametrize("how", ["stream", "copy"])
async def test_one_whose_rows_are_read(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """They come in the place of a row."""
    query = """
        SELECT repeat('x', 10000), CASE WHEN x = 4 THEN pg_sleep(30) END FROM generate_series(1, 4) x
    """
    async with open_witnessed(dsn, pool_size=1, autocommit=True) as witness:
        async with witness.session.worker() as connection:
            with pytest.raises(psycopg.errors.AdminShutdown):
                if how == "stream":
                    async with closing(connection.cursor().stream(query)) as rows:
                        await anext(rows)
                        terminate(onlooker, connection)
                        await read_all(rows)
                else:
                    async with connection.cursor().copy(f"COPY ({query}) TO STDOUT") as copy:
                        await copy.read()
                        terminate(onlooker, connection)
                        await read_all(copy.rows())
        await until(lambda: bool(witness.told))
        witness.check(caplog, "hung_up", TERMINATED)


async def test_one_in_use_whose_client_noticed_nothing(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    """It is returned in a transaction, with the last words unread."""
    async with open_witnessed(dsn, pool_size=1) as witness:
        async with witness.session.worker() as connection:
            await connection.execute("SELECT 1")
            terminate(onlooker, connection)
        await until(lambda: bool(witness.told))
        witness.check(caplog, "hung_up", TERMINATED)


async def test_one_that_its_client_destroys(dsn: str, onlooker: Onlooker) -> None:
    """The reason is the client's, and the words are the server's. One that lives has none."""
    async with open_witnessed(dsn, pool_size=1, autocommit=True) as witness:
        session = witness.session
        session.destroyed(await session.block_checkout())
        resource = await session.block_checkout()
        terminate(onlooker, resource.get())
        with pytest.raises(psycopg.errors.AdminShutdown):
            await resource.get().execute("SELECT 1")
        session.destroyed(resource)
        await until(lambda: len(witness.told) == 2)
        assert witness.told == [("destroyed", ""), ("destroyed", TERMINATED)]
        assert session.statistics().last_words == {"destroyed": TERMINATED}


async def test_a_client_that_listens(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    """libpq takes them for a notice then. The client's own handler gets it, too."""
    notices: list[str | None] = []
    async with open_witnessed(dsn, pool_size=1, autocommit=True) as witness:

        async def listen() -> None:
            async with witness.session.worker() as connection:
                connection.add_notice_handler(lambda diag: notices.append(diag.sqlstate))
                await connection.execute("LISTEN news")
                listening.append(connection)
                with pytest.raises(psycopg.OperationalError):
                    async for _ in connection.notifies():
                        pass

        listening: list[Connection] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await until(lambda: bool(listening))
            terminate(onlooker, listening[0])
        await until(lambda: bool(witness.told))
        witness.check(caplog, "hung_up", TERMINATED)
    assert notices == ["57P01"]


async def test_one_that_is_reset(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    """The reset gets them, and tells."""

    async def end(connection: Connection) -> None:
        terminate(onlooker, connection)
        await connection.execute("SELECT 1")

    async with open_witnessed(dsn, pool_size=1, reset=end) as witness:
        async with witness.session.worker():
            pass
        await until(lambda: bool(witness.told))
        ((reason, words),) = witness.told
        assert (reason in ("hung_up", "reset_failed"), words) == (True, TERMINATED)
        assert witness.session.statistics().last_words == {reason: TERMINATED}


async def test_a_probe_gets_them(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Where hang-ups are not seen, as on other systems than Linux."""
    monkeypatch.setattr(HangupWatch, "add", lambda *_: None)
    async with open_witnessed(dsn, pool_size=1, check_interval=0.1) as witness:
        async with witness.session.worker() as connection:
            pass
        terminate(onlooker, connection)
        await until(lambda: bool(witness.told))
        witness.check(caplog, "check_failed", TERMINATED)


async def test_an_idle_session_timeout(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """57P05, new in PostgreSQL 14."""
    async with open_witnessed(dsn, pool_size=1, autocommit=True) as witness:
        async with witness.session.worker() as connection:
            await connection.execute("SET idle_session_timeout = 50")
        await until(lambda: bool(witness.told))
        witness.check(caplog, "hung_up", IDLE_TOO_LONG)


async def test_a_timeout_in_a_transaction(
    dsn: str, onlooker: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    """Any fatal message counts, whatever its class: this one is 25P03."""
    async with open_witnessed(dsn, pool_size=1) as witness:
        async with witness.session.worker() as connection:
            await connection.execute("SET idle_in_transaction_session_timeout = 50")
            await onlooker.until_gone(backend(connection))
            with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
                await connection.execute("SELECT 1")
        await until(lambda: bool(witness.told))
        words = "25P03: terminating connection due to idle-in-transaction timeout"
        witness.check(caplog, "hung_up", words)


async def test_an_error_is_not_the_last_word(dsn: str) -> None:
    """What a client got for a statement of its own says nothing about the end of the session."""
    async with open_witnessed(dsn, pool_size=1, autocommit=True) as witness:
        resource = await witness.session.block_checkout()
        with pytest.raises(psycopg.errors.DivisionByZero):
            await resource.get().execute("SELECT 1 / 0")
        witness.session.destroyed(resource)
        await until(lambda: bool(witness.told))
        assert witness.told == [("destroyed", "")]


@pytest.mark.parametrize("level", ["NOTICE", "EXCEPTION"])
async def test_what_a_client_raises_is_not_the_last_word(dsn: str, level: str) -> None:
    """It may have the SQLSTATE of an end, and its session goes on."""
    async with open_witnessed(dsn, pool_size=1, autocommit=True) as witness:
        resource = await witness.session.block_checkout()
        with suppress(psycopg.errors.AdminShutdown):
            await resource.get().execute(
                f"DO $$ BEGIN RAISE {level} 'mine' USING ERRCODE='57P01'; END $$"
            )
        await resource.get().execute("SELECT 1")
        witness.session.destroyed(resource)
        await until(lambda: bool(witness.told))
        assert witness.told == [("destroyed", "")]


async def test_in_the_middle_of_an_answer(dsn: str) -> None:
    """A long answer is not read to the end only to learn the last words."""
    async with open_witnessed(dsn, pool_size=1, autocommit=True) as witness:
        resource = await witness.session.block_checkout()
        connection = resource.get()
        connection.pgconn.send_query(b"SELECT repeat('x', 1000000) FROM generate_series(1, 50)")
        await until(lambda: connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE)
        await until(lambda: unread(connection) > 100_000)
        before = unread(connection)
        witness.session.destroyed(resource)
        assert unread(connection) >= before
        await until(lambda: bool(witness.told))
        assert witness.told == [("destroyed", "")]


# -- A server that stops ----------------------------------------------------------------------------


@pytest.fixture
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server for one test, which may stop it."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.mark.parametrize(("mode", "words"), [("fast", TERMINATED), ("immediate", CRASHED)])
async def test_a_restart(
    own_server: EmbeddedPostgres, caplog: pytest.LogCaptureFixture, mode: str, words: str
) -> None:
    """All say the same. A server that ends in a hurry only warns; that counts, too."""
    async with open_witnessed(own_server.dsn, pool_size=3) as witness:
        await trio.to_thread.run_sync(own_server.stop, mode)
        await until(lambda: len(witness.told) == 3)
        witness.check(caplog, "hung_up", words, times=3)
        await trio.to_thread.run_sync(own_server.start)
        await until(lambda: witness.session.statistics().idle == 3)


async def test_a_server_that_takes_no_connections(
    own_server: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """57P03 is said to those that connect. libpq gives its text only: `start_failed` has it."""
    async with await connect(own_server.dsn) as holder:
        # It refuses new sessions from now on, and stops when this one ends.
        own_server._pg_ctl("stop", "-m", "smart", "-W")
        with pytest.raises(whitepool.PoolStartError, match="database system is shutting down"):
            async with open_pool(own_server.dsn, pool_size=1, start_timeout=0.5):
                pass
        assert not holder.closed
    await until(lambda: not (own_server._data / "postmaster.pid").exists())
    errors = {vars(record)["error"] for record in caplog.records}
    assert any("FATAL: the database system is shutting down" in error for error in errors)
