"""What works behind PgBouncer in session mode, and in transaction mode: the table of the how-to page.

Each test takes a row. In transaction mode a server session belongs to a client for one transaction:
`elsewhere` has the next one run in another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from bouncer import ROLE, Mode, PgBouncer, add_role, remove_role, running, version
from connections import SLOW, Connection, ask, backend, check_usable
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from psycopg import errors
from psycopg.conninfo import make_conninfo
from timing import until

import whitepool
from whitepool.postgres import connect, open_pool
from whitepool.postgres._resetting import LARGEST_PID

pytestmark = pytest.mark.pgbouncer

FIRST_TO_TRACK = (1, 21)
"""The release of PgBouncer that introduced `max_prepared_statements`."""


@pytest.fixture(params=["session", "transaction"])
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


@pytest.fixture(autouse=True)
def role(onlooker: Onlooker) -> Iterator[None]:
    add_role(onlooker)
    yield
    remove_role(onlooker)


@pytest.fixture
async def bouncer(server: EmbeddedPostgres, tmp_path: Path, mode: Mode) -> AsyncIterator[PgBouncer]:
    # Its default for this depends on its release.
    settings = {"max_prepared_statements": 0} if version() >= FIRST_TO_TRACK else {}
    async with running(server, tmp_path, mode, **settings) as bouncer:
        yield bouncer


def open_one(bouncer: PgBouncer, **arguments: Any) -> Any:
    """Open a pool of one connection, in which each statement is a transaction."""
    arguments = {"pool_size": 1, "max_overflow": 0, "prepare_threshold": None, **arguments}
    return open_pool(bouncer.dsn, autocommit=True, **arguments)


@asynccontextmanager
async def elsewhere(bouncer: PgBouncer, connection: Connection) -> AsyncIterator[Connection]:
    """Have the connection's next transactions run in another server session, if the mode allows it.

    Another client takes the one in which the connection's last transaction has run: the block gets it.
    """
    here = await ask(connection, "SELECT pg_backend_pid()")
    other: Connection
    async with await connect(bouncer.dsn, prepare_threshold=None) as other:
        assert (await ask(other, "SELECT pg_backend_pid()") == here) is (bouncer.mode == "transaction")
        yield other


async def test_set(bouncer: PgBouncer, mode: Mode) -> None:
    """SET stays with the server session, and is another client's in transaction mode."""
    async with open_one(bouncer) as pool, pool.worker() as connection:
        await connection.execute("SET statement_timeout = '1234ms'")
        async with elsewhere(bouncer, connection) as other:
            mine = await ask(connection, "SHOW statement_timeout")
            theirs = await ask(other, "SHOW statement_timeout")
    assert (mine, theirs) == (("1234ms", "0") if mode == "session" else ("0", "1234ms"))


async def test_set_local(bouncer: PgBouncer) -> None:
    """SET LOCAL holds to the end of the transaction, in both modes."""
    async with open_one(bouncer) as pool, pool.worker() as connection:
        async with connection.transaction():
            await connection.execute("SET LOCAL statement_timeout = '1234ms'")
            assert await ask(connection, "SHOW statement_timeout") == "1234ms"
        async with elsewhere(bouncer, connection) as other:
            assert await ask(connection, "SHOW statement_timeout") == "0"
            assert await ask(other, "SHOW statement_timeout") == "0"


@pytest.mark.parametrize("name", ["TimeZone", "DateStyle", "application_name"])
async def test_set_what_pgbouncer_tracks(bouncer: PgBouncer, name: str) -> None:
    """A few parameters are the client's own: PgBouncer sets them before each of its transactions."""
    value = {"TimeZone": "Asia/Tokyo", "DateStyle": "SQL, DMY", "application_name": "shop"}[name]
    async with open_one(bouncer) as pool, pool.worker() as connection:
        await connection.execute(f"SET {name} = '{value}'".encode())
        async with elsewhere(bouncer, connection) as other:
            assert await ask(connection, f"SHOW {name}") == value
            # A client that has no name of its own may keep another one's.
            assert name == "application_name" or await ask(other, f"SHOW {name}") != value


async def test_configure_with_set(bouncer: PgBouncer, mode: Mode) -> None:
    """What `configure` sets stays with the server session, too."""

    async def configure(connection: Connection) -> None:
        await connection.execute("SET statement_timeout = '1234ms'")

    async with (
        open_one(bouncer, configure=configure) as pool,
        pool.worker() as connection,
        elsewhere(bouncer, connection),
    ):
        timeout = await ask(connection, "SHOW statement_timeout")
    assert timeout == ("1234ms" if mode == "session" else "0")


async def test_options(bouncer: PgBouncer) -> None:
    """A setting in the connection string is refused, and ends the opening of a pool at once."""
    with trio.fail_after(2), pytest.raises(whitepool.PoolStartError, match="unsupported startup param"):
        async with open_one(bouncer, options="-c statement_timeout=1234ms", start_timeout=10):
            pytest.fail("the pool was opened")


async def test_listen(bouncer: PgBouncer, mode: Mode, onlooker: Onlooker) -> None:
    """Notifications arrive in session mode only. In transaction mode none does, and no error."""
    async with open_one(bouncer) as pool, pool.worker() as connection:
        await connection.execute("LISTEN news")
        async with elsewhere(bouncer, connection):
            onlooker.do("NOTIFY news, 'good'")
            heard = [note.payload async for note in connection.notifies(timeout=0.3)]
            await check_usable(connection)
    assert heard == (["good"] if mode == "session" else [])


async def test_notify(bouncer: PgBouncer, dsn: str) -> None:
    """To send notifications works in both."""
    listener: Connection
    async with await connect(dsn, autocommit=True) as listener:
        await listener.execute("LISTEN news")
        async with open_one(bouncer) as pool, pool.worker() as connection:
            await connection.execute("NOTIFY news, 'good'")
        heard = [note.payload async for note in listener.notifies(timeout=5, stop_after=1)]
        assert heard == ["good"]


def advisory_locks(onlooker: Onlooker) -> int:
    count: int = onlooker.ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
    return count


async def test_advisory_locks(bouncer: PgBouncer, mode: Mode, onlooker: Onlooker) -> None:
    """A lock of the session is still held when the pool has closed, in transaction mode."""
    async with open_one(bouncer) as pool, pool.worker() as connection:
        await connection.execute("SELECT pg_advisory_lock(7)")
        async with elsewhere(bouncer, connection):
            unlocked = await ask(connection, "SELECT pg_advisory_unlock(7)")
    if mode == "session":
        assert unlocked
        await until(lambda: advisory_locks(onlooker) == 0)
    else:
        assert not unlocked
        await trio.sleep(0.2)
        assert advisory_locks(onlooker) == 1


async def test_advisory_locks_of_a_transaction(bouncer: PgBouncer, onlooker: Onlooker) -> None:
    """They end with the transaction, in both modes."""
    async with open_one(bouncer) as pool, pool.worker() as connection:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(7)")
            assert advisory_locks(onlooker) == 1
        assert advisory_locks(onlooker) == 0


async def test_temporary_tables(bouncer: PgBouncer, mode: Mode) -> None:
    """The next transaction doesn't see the table, in transaction mode, and another client does."""
    async with open_one(bouncer) as pool, pool.worker() as connection:
        await connection.execute("CREATE TEMPORARY TABLE mine (i int)")
        async with elsewhere(bouncer, connection) as other:
            if mode == "session":
                assert await ask(connection, "SELECT count(*) FROM mine") == 0
            else:
                with pytest.raises(errors.UndefinedTable):
                    await connection.execute("SELECT count(*) FROM mine")
                assert await ask(other, "SELECT count(*) FROM mine") == 0
        async with connection.transaction():
            await connection.execute("CREATE TEMPORARY TABLE brief (i int) ON COMMIT DROP")
            assert await ask(connection, "SELECT count(*) FROM brief") == 0


async def test_cursors_with_hold(bouncer: PgBouncer, mode: Mode) -> None:
    """A server-side cursor outlives its transaction in session mode only; within one it works."""
    async with open_one(bouncer) as pool, pool.worker() as connection:
        async with connection.transaction(), connection.cursor("brief") as cursor:
            await cursor.execute("SELECT generate_series(1, 3)")
            assert await cursor.fetchall() == [(1,), (2,), (3,)]
        cursor = connection.cursor("lasting", withhold=True)
        await cursor.execute("SELECT generate_series(1, 3)")
        async with elsewhere(bouncer, connection):
            if mode == "session":
                assert await cursor.fetchall() == [(1,), (2,), (3,)]
            else:
                with pytest.raises(errors.InvalidCursorName):
                    await cursor.fetchall()
        await cursor.close()  # the other client has gone, so this is where it is
        await check_usable(connection)


async def prepare_elsewhere(bouncer: PgBouncer) -> None:
    """Run statements twice, in two server sessions where the mode allows it. They are prepared."""
    async with open_one(bouncer, prepare_threshold=0) as pool, pool.worker() as connection:
        for number in range(20):
            await connection.execute("SELECT %s::int + " + str(number), (1,))
        async with elsewhere(bouncer, connection):
            for number in range(20):
                cursor = await connection.execute("SELECT %s::int + " + str(number), (1,))
                assert await cursor.fetchone() == (1 + number,)


async def test_prepared_statements(bouncer: PgBouncer, mode: Mode) -> None:
    """They belong to the server session: in transaction mode, another one doesn't know them."""
    if mode == "session":
        await prepare_elsewhere(bouncer)
    else:
        with pytest.raises(errors.InvalidSqlStatementName):
            await prepare_elsewhere(bouncer)


async def test_prepared_statements_that_pgbouncer_tracks(
    server: EmbeddedPostgres, tmp_path: Path
) -> None:
    """With `max_prepared_statements`, they work in transaction mode. Before 1.21 there was none."""
    if version() < FIRST_TO_TRACK:
        async with running(server, tmp_path) as bouncer:
            with pytest.raises(errors.InvalidSqlStatementName):
                await prepare_elsewhere(bouncer)
    else:
        async with running(server, tmp_path, max_prepared_statements=100) as bouncer:
            await prepare_elsewhere(bouncer)


async def test_a_transaction_prepares_and_runs_in_one_session(bouncer: PgBouncer) -> None:
    """With ``prepare_threshold=None``, nothing is prepared under a name, also by `executemany`."""
    async with open_one(bouncer) as pool, pool.worker() as connection:
        for _ in range(3):
            async with elsewhere(bouncer, connection):
                for number in range(10):
                    assert await ask(connection, "SELECT %s::int", number) == number
                await connection.cursor().executemany(
                    "INSERT INTO visits VALUES (%s)", [(i,) for i in range(10)]
                )
                async with connection.pipeline():
                    cursors = [await connection.execute("SELECT %s::int", (i,)) for i in range(3)]
                assert [await cursor.fetchone() for cursor in cursors] == [(0,), (1,), (2,)]


async def test_cancel(bouncer: PgBouncer, onlooker: Onlooker) -> None:
    """A cancelled query ends on the server, and its connection goes on, in both modes."""
    running_slow = (
        "SELECT count(*) FROM pg_stat_activity "
        f"WHERE usename = '{ROLE}' AND query = '{SLOW}' AND state = 'active'"
    )
    async with open_one(bouncer) as pool, pool.worker() as connection:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.execute, SLOW)
                await until(lambda: onlooker.ask(running_slow) == 1)
                nursery.cancel_scope.cancel()
            assert onlooker.ask(running_slow) == 0
            await check_usable(connection)
        assert pool.statistics().lost == 0


async def test_hand_over(bouncer: PgBouncer) -> None:
    """It is about tasks, and not about the server."""

    async def use(pool: Any, resource: Any) -> None:
        await check_usable(resource.get())
        pool.checkin(resource)

    async with open_one(bouncer, held_warning=0.05) as pool, trio.open_nursery() as nursery:

        async def take() -> None:
            resource = await pool.block_checkout()
            resource.hand_over()
            nursery.start_soon(use, pool, resource)

        nursery.start_soon(take)
        await until(lambda: pool.statistics().checkouts == 1 and pool.statistics().idle == 1)


async def test_target_session_attrs(bouncer: PgBouncer, mode: Mode, onlooker: Onlooker) -> None:
    """A new connection is judged by what the server told PgBouncer when that connected. What changes
    later is learnt, in transaction mode, by the connection whose query is answered next, and no other.
    """
    writer = make_conninfo(bouncer.dsn, target_session_attrs="read-write")
    first: Connection = await connect(writer, autocommit=True, prepare_threshold=None)
    second: Connection = await connect(writer, autocommit=True, prepare_threshold=None)
    async with first, second:
        for connection in (first, second):
            assert await ask(connection, "SHOW transaction_read_only") == "off"
        onlooker.do("ALTER SYSTEM SET default_transaction_read_only = on")
        onlooker.do("SELECT pg_reload_conf()")
        try:
            # It is told before the answer to a query that comes after the reload.
            await until(lambda: onlooker.ask("SHOW default_transaction_read_only") == "on")
            for connection in (first, second):
                with trio.fail_after(5):
                    while await ask(connection, "SHOW transaction_read_only") != "on":
                        await trio.sleep(0.01)
            parameter = b"default_transaction_read_only"
            known = [connection.pgconn.parameter_status(parameter) for connection in (first, second)]
            await (await connect(writer)).close()  # PgBouncer has not noticed
            await bouncer.command("RECONNECT")
            with pytest.raises(psycopg.OperationalError, match="session is read-only"):
                await connect(writer)
        finally:
            onlooker.do("SET default_transaction_read_only = off")
            onlooker.do("ALTER SYSTEM RESET default_transaction_read_only")
            onlooker.do("SELECT pg_reload_conf()")
    assert known == [b"on", b"on" if mode == "session" else b"off"]


# -- reset="session" ---------------------------------------------------------------------------------


def misconfigured(caplog: pytest.LogCaptureFixture) -> list[Any]:
    records = [vars(record) for record in caplog.records]
    return [record["reason"] for record in records if record["event"] == "misconfigured"]


async def test_reset_session(bouncer: PgBouncer, mode: Mode) -> None:
    """In transaction mode it resets the session of the moment, and that may be another one."""
    async with open_one(bouncer, reset="session") as pool:
        async with pool.worker() as connection:
            await connection.execute("SET statement_timeout = '1234ms'")
            blocked = elsewhere(bouncer, connection)
            other = await blocked.__aenter__()
        await until(lambda: pool.statistics().idle == 1)
        theirs = await ask(other, "SHOW statement_timeout")
        await blocked.__aexit__(None, None, None)
        async with pool.worker() as connection:
            mine = await ask(connection, "SHOW statement_timeout")
    assert theirs == ("0" if mode == "session" else "1234ms")
    assert mine == ("0" if mode == "session" else "1234ms")


@pytest.mark.parametrize("size", [1, 6])
async def test_a_pool_says_that_it_can_not_work(
    bouncer: PgBouncer, mode: Mode, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """When the first connections have been returned, and once. In session mode it never does."""
    async with open_one(bouncer, reset="session", pool_size=size, strategy="fifo") as pool:
        for _ in range(3):
            for _ in range(size):
                async with pool.worker() as connection:
                    await connection.execute("SELECT 1")
            await until(lambda: pool.statistics().idle == size)
            if size == 1:
                # Another client takes the session: the next one is another. In session mode it can't.
                async with pool.worker() as connection:
                    blocked = elsewhere(bouncer, connection)
                    await blocked.__aenter__()
                await until(lambda: pool.statistics().idle == size)
                await blocked.__aexit__(None, None, None)
        assert [reason.partition(":")[0] for reason in misconfigured(caplog)] == (
            [] if mode == "session" else ['reset="session" has no effect']
        )
        if mode == "session":
            # New connections have the server sessions of those that have gone.
            pool.retire_all()
            await until(lambda: pool.statistics().retired == size and pool.statistics().idle == size)
            for _ in range(size):
                async with pool.worker() as connection:
                    await connection.execute("SELECT 1")
            await until(lambda: pool.statistics().idle == size)
            assert not misconfigured(caplog)


async def test_the_number_of_the_backend(bouncer: PgBouncer, dsn: str) -> None:
    """PgBouncer makes one up, which PostgreSQL could not have, in all but one of some hundred cases."""
    real: Connection
    async with await connect(dsn) as real:
        assert 0 < backend(real) <= LARGEST_PID
    made_up = 0
    for _ in range(10):
        connection: Connection
        async with await connect(bouncer.dsn) as connection:
            made_up += not 0 < backend(connection) <= LARGEST_PID
    assert made_up >= 8


# -- Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["scram-sha-256", "md5"])
async def test_a_wrong_password_is_final(server: EmbeddedPostgres, tmp_path: Path, auth: str) -> None:
    """PgBouncer says it in words of its own."""
    async with running(server, tmp_path, auth_type=auth) as bouncer:
        connection: Connection
        async with await connect(bouncer.dsn, password="secret") as connection:
            await check_usable(connection)
        with (
            trio.fail_after(2),
            pytest.raises(whitepool.PoolStartError, match="authentication failed"),
        ):
            async with open_one(bouncer, password="wrong", start_timeout=10):
                pytest.fail("the pool was opened")


def test_these_are_psycopgs_errors() -> None:
    """The table names them by SQLSTATE."""
    assert errors.InvalidSqlStatementName.sqlstate == "26000"
    assert errors.UndefinedTable.sqlstate == "42P01"
    assert errors.InvalidCursorName.sqlstate == "34000"
    assert issubclass(errors.ProtocolViolation, psycopg.OperationalError)
