"""PostgresManager: what one client leaves behind, and what the next one finds."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import psycopg
import pytest
import trio
from connections import Connection, ask
from onlooker import Onlooker
from psycopg import AsyncClientCursor, AsyncRawCursor, IsolationLevel, errors
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row, tuple_row
from psycopg.types.string import TextLoader
from timing import until
from trio.testing import wait_all_tasks_blocked

from whitepool import PoolStartError, Session, open_pool
from whitepool.postgres import PostgresManager
from whitepool.postgres import open_pool as open_postgres_pool

Step = Callable[[Connection], Awaitable[object]]

SECRET = "s3cret-of-the-tests"


@pytest.fixture
def onlooker(onlooker: Onlooker) -> Iterator[Onlooker]:
    """It has a sequence `numbers` and a role `resident`."""
    onlooker.do("DROP SEQUENCE IF EXISTS numbers; CREATE SEQUENCE numbers")
    onlooker.do("DROP ROLE IF EXISTS resident; CREATE ROLE resident")
    yield onlooker
    onlooker.do("DROP SEQUENCE numbers; DROP ROLE resident")


@asynccontextmanager
async def a_pool(dsn: str, **options: Any) -> AsyncIterator[Session[Connection]]:
    """A pool of a single connection."""
    async with open_postgres_pool(dsn, pool_size=1, max_overflow=0, **options) as pool:
        yield pool


async def outcome(work: Awaitable[object]) -> object:
    try:
        return await work
    except psycopg.Error as error:
        return type(error).__name__


async def see(connection: Connection, look: Step) -> object:
    """What a client sees, in a transaction that is rolled back."""
    found = await outcome(look(connection))
    await connection.rollback()
    return found


# Everything that a client may leave on the server: how it does, and how one sees it


async def do_nothing(connection: Connection) -> None:
    return None


def run(*statements: str) -> Step:
    async def step(connection: Connection) -> None:
        for statement in statements:
            await connection.execute(statement.encode())
        await connection.commit()

    return step


def showing(query: str) -> Step:
    async def look(connection: Connection) -> Any:
        return await ask(connection, query)

    return look


async def leave_prepared(connection: Connection) -> None:
    await connection.execute("SELECT %s::int AS prepared", (1,), prepare=True)
    await connection.commit()


class Left(NamedTuple):
    """One thing to leave behind."""

    leave: Step
    look: Step


PREPARED = showing("SELECT count(*) FROM pg_prepared_statements")
LOCKS = showing("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")

ON_THE_SERVER = {
    "role": Left(run("SET ROLE resident"), showing("SELECT current_user")),
    "session authorization": Left(
        run("SET SESSION AUTHORIZATION resident"), showing("SELECT session_user")
    ),
    "both": Left(
        run("SET SESSION AUTHORIZATION resident", "SET ROLE resident"),
        showing("SELECT session_user || current_user"),
    ),
    "setting": Left(run("SET work_mem = '7MB'"), showing("SHOW work_mem")),
    "own setting": Left(
        run("SET whitepool.tenant = 'x'"),
        showing("SELECT coalesce(current_setting('whitepool.tenant', true), '')"),
    ),
    "set_config": Left(
        run("SELECT set_config('search_path', 'nowhere', false)"), showing("SHOW search_path")
    ),
    "application name": Left(run("SET application_name = 'x'"), showing("SHOW application_name")),
    "client encoding": Left(run("SET client_encoding = 'latin1'"), showing("SHOW client_encoding")),
    "read-only sessions": Left(
        run("SET default_transaction_read_only = on"), showing("SHOW transaction_read_only")
    ),
    "session characteristics": Left(
        run("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE"),
        showing("SHOW transaction_isolation"),
    ),
    "temporary table": Left(
        run("CREATE TEMP TABLE scratch (x int)"), showing("SELECT to_regclass('scratch')::text")
    ),
    "temporary table that hides another": Left(
        run("CREATE TEMP TABLE pg_class (x int)"),
        showing("SELECT count(*) FROM pg_catalog.pg_class WHERE relname = 'scratch'"),
    ),
    "advisory lock": Left(run("SELECT pg_advisory_lock(7), pg_advisory_lock(7)"), LOCKS),
    "shared advisory lock": Left(run("SELECT pg_advisory_lock_shared(7)"), LOCKS),
    "LISTEN": Left(run("LISTEN news"), showing("SELECT count(*) FROM pg_listening_channels()")),
    "cursor": Left(
        run("DECLARE held CURSOR WITH HOLD FOR SELECT 1"), showing("SELECT count(*) FROM pg_cursors")
    ),
    "PREPARE": Left(run("PREPARE mine AS SELECT 1"), PREPARED),
    "prepared by psycopg": Left(leave_prepared, PREPARED),
    "sequence": Left(run("SELECT nextval('numbers')"), showing("SELECT currval('numbers')")),
    "lastval": Left(run("SELECT nextval('numbers')"), showing("SELECT lastval()")),
}


@pytest.mark.parametrize("name", ON_THE_SERVER)
async def test_nothing_is_left_on_the_server(dsn: str, onlooker: Onlooker, name: str) -> None:
    """With reset="session", the next client sees what the first one saw."""
    left = ON_THE_SERVER[name]
    async with a_pool(dsn, reset="session") as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
            before = await see(connection, left.look)
            await left.leave(connection)
            if not name.startswith("temporary table that hides"):
                assert await see(connection, left.look) != before
        async with pool.worker() as connection:
            assert connection.info.backend_pid == backend
            assert await see(connection, left.look) == before
        assert pool.statistics().destroyed == 0


@pytest.mark.parametrize("name", ["setting", "advisory lock", "PREPARE", "temporary table"])
async def test_a_rollback_keeps_the_session(dsn: str, onlooker: Onlooker, name: str) -> None:
    """With the default, reset="rollback", what was committed to the session stays."""
    left = ON_THE_SERVER[name]
    async with a_pool(dsn) as pool:
        async with pool.worker() as connection:
            before = await see(connection, left.look)
            await left.leave(connection)
        async with pool.worker() as connection:
            assert await see(connection, left.look) != before


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_an_open_transaction_is_rolled_back(
    dsn: str, onlooker: Onlooker, reset: str, failed: bool
) -> None:
    """A transaction that a client left open, failed or not, is gone in both modes."""
    async with a_pool(dsn, reset=reset) as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
            await connection.execute("CREATE TABLE left_open (x int)")
            await connection.execute("SET LOCAL work_mem = '7MB'")
            if failed:
                assert await outcome(ask(connection, "SELECT 1/0")) == "DivisionByZero"
        async with pool.worker() as connection:
            assert connection.info.backend_pid == backend
            assert connection.info.transaction_status == TransactionStatus.IDLE
            assert await ask(connection, "SELECT to_regclass('left_open')") is None
            assert await ask(connection, "SHOW work_mem") != "7MB"


async def test_the_default_is_to_roll_back(dsn: str, onlooker: Onlooker) -> None:
    """A connection outside a transaction is not reset at all by default."""
    async with a_pool(dsn) as pool:
        resource = await pool.block_checkout()
        await resource.get().execute("SELECT 1")
        await resource.get().commit()
        pool.checkin(resource)
        assert (pool.statistics().resetting, pool.statistics().idle) == (0, 1)


# Everything that a client may leave on the object


class Loader(TextLoader):
    """A loader that can be told from psycopg's."""

    def load(self, data: Any) -> str:
        return f"<{super().load(data)!r}>"


async def set_autocommit(connection: Connection) -> None:
    await connection.set_autocommit(True)


async def set_isolation_level(connection: Connection) -> None:
    await connection.set_isolation_level(IsolationLevel.SERIALIZABLE)
    await connection.execute("SELECT 1")  # now the statement that begins a transaction is cached
    await connection.rollback()


async def set_read_only(connection: Connection) -> None:
    await connection.set_read_only(True)
    await connection.execute("SELECT 1")
    await connection.rollback()


async def set_deferrable(connection: Connection) -> None:
    await connection.set_deferrable(True)
    await connection.execute("SELECT 1")
    await connection.rollback()


async def set_row_factory(connection: Connection) -> None:
    connection.row_factory = dict_row


async def set_cursor_factory(connection: Connection) -> None:
    connection.cursor_factory = AsyncRawCursor


async def set_server_cursor_factory(connection: Connection) -> None:
    connection.server_cursor_factory = type("Mine", (connection.server_cursor_factory,), {})


async def set_prepare_threshold(connection: Connection) -> None:
    connection.prepare_threshold = 0


async def set_prepared_max(connection: Connection) -> None:
    connection.prepared_max = 1


async def register_loader(connection: Connection) -> None:
    connection.adapters.register_loader("text", Loader)


async def look_at_loader(connection: Connection) -> object:
    return await ask(connection, "SELECT 'x'::text")


async def add_handlers(connection: Connection) -> None:
    connection.add_notice_handler(lambda notice: heard.append("notice"))
    connection.add_notify_handler(lambda note: heard.append("notify"))


heard: list[str] = []


async def look_at_handlers(connection: Connection) -> object:
    heard.clear()
    await connection.execute("LISTEN news")
    await connection.execute("DO $$ BEGIN RAISE WARNING 'x'; END $$")
    await connection.execute("NOTIFY news")
    await connection.commit()
    await connection.execute("UNLISTEN *")
    await connection.commit()
    return list(heard)


async def leave_notifications(connection: Connection) -> None:
    await connection.execute("LISTEN news")
    await connection.execute("NOTIFY news")
    await connection.commit()


async def look_at_notifications(connection: Connection) -> object:
    return len([note async for note in connection.notifies(timeout=0.01)])


def attribute(name: str) -> Step:
    async def look(connection: Connection) -> object:
        return getattr(connection, name)

    return look


ON_THE_OBJECT = {
    "autocommit": Left(set_autocommit, attribute("autocommit")),
    "isolation_level": Left(set_isolation_level, attribute("isolation_level")),
    "isolation level in use": Left(set_isolation_level, showing("SHOW transaction_isolation")),
    "read_only": Left(set_read_only, attribute("read_only")),
    "read-only in use": Left(set_read_only, showing("SHOW transaction_read_only")),
    "deferrable": Left(set_deferrable, attribute("deferrable")),
    "deferrable in use": Left(set_deferrable, showing("SHOW transaction_deferrable")),
    "row_factory": Left(set_row_factory, attribute("row_factory")),
    "cursor_factory": Left(set_cursor_factory, attribute("cursor_factory")),
    "server_cursor_factory": Left(set_server_cursor_factory, attribute("server_cursor_factory")),
    "prepare_threshold": Left(set_prepare_threshold, attribute("prepare_threshold")),
    "prepared_max": Left(set_prepared_max, attribute("prepared_max")),
    "loader": Left(register_loader, look_at_loader),
    "handlers": Left(add_handlers, look_at_handlers),
}
if tuple(int(part) for part in re.findall(r"\d+", psycopg.__version__)[:3]) >= (3, 2, 4):
    ON_THE_OBJECT["notifications"] = Left(leave_notifications, look_at_notifications)


@pytest.mark.parametrize("name", ON_THE_OBJECT)
async def test_nothing_is_left_on_the_object(dsn: str, onlooker: Onlooker, name: str) -> None:
    """With reset="session", the object is as it was when it was new."""
    left = ON_THE_OBJECT[name]
    async with a_pool(dsn, reset="session") as pool:
        async with pool.worker() as connection:
            before = await see(connection, left.look)
            await left.leave(connection)
            if name == "notifications":  # looking at them takes them
                await left.leave(connection)
            else:
                assert await see(connection, left.look) != before
        async with pool.worker() as again:
            assert again is connection
            assert await see(again, left.look) == before


# What is there again


async def test_configure_runs_again_after_a_reset(dsn: str, onlooker: Onlooker) -> None:
    """What `configure` sets, on the server and on the object, is there for every client."""
    configured: list[Connection] = []

    async def configure(connection: Connection) -> None:
        configured.append(connection)
        await connection.set_autocommit(True)
        await connection.execute("SET work_mem = '3MB'")
        await connection.execute("LISTEN news")
        connection.row_factory = dict_row
        connection.cursor_factory = AsyncClientCursor
        connection.adapters.register_loader("text", Loader)
        connection.add_notice_handler(lambda notice: heard.append("configured"))

    async with a_pool(dsn, reset="session", configure=configure) as pool:
        for client in range(3):
            async with pool.worker() as connection:
                assert len(configured) == client + 1
                assert connection.autocommit
                assert await ask(connection, "SHOW work_mem") == "<'3MB'>"
                assert await ask(connection, "SELECT count(*) FROM pg_listening_channels()") == 1
                assert connection.row_factory is dict_row
                assert connection.cursor_factory is AsyncClientCursor
                heard.clear()
                await connection.execute("DO $$ BEGIN RAISE WARNING 'x'; END $$")
                assert heard == ["configured"]
                await connection.execute("SET work_mem = '9MB'")
                await connection.set_autocommit(False)
                connection.row_factory = tuple_row
                connection.cursor_factory = AsyncRawCursor


async def test_keywords_of_connect_hold_again_after_a_reset(dsn: str) -> None:
    """What was given to connect holds for every client."""
    context = AdaptersMap(psycopg.adapters)
    context.register_loader("text", Loader)
    keywords = {"autocommit": True, "row_factory": dict_row, "prepare_threshold": None}
    async with a_pool(
        dsn, reset="session", context=psycopg_context(context), application_name="mine", **keywords
    ) as pool:
        for _client in range(2):
            async with pool.worker() as connection:
                assert connection.autocommit
                assert connection.row_factory is dict_row
                assert connection.prepare_threshold is None
                assert await ask(connection, "SHOW application_name") == "<'mine'>"
                await connection.set_autocommit(False)
                connection.row_factory = tuple_row
                connection.prepare_threshold = 1
                connection.adapters.register_loader("text", TextLoader)
                await connection.execute("SET application_name = 'yours'")
                await connection.commit()


def psycopg_context(adapters: AdaptersMap) -> psycopg.abc.AdaptContext:
    class Context:
        connection = None

        def __init__(self) -> None:
            self.adapters = adapters

    return Context()


@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_prepared_statements_go_on_working(dsn: str, reset: str) -> None:
    """psycopg's bookkeeping of prepared statements agrees with the server's after each reset."""
    async with a_pool(dsn, reset=reset) as pool:
        for client in range(6):
            async with pool.worker() as connection:
                connection.prepare_threshold = 0
                connection.prepared_max = 2
                for _ in range(2):
                    for query in ("SELECT 1 + %s::int", "SELECT 2 + %s::int", "SELECT 3 + %s::int"):
                        cursor = await connection.execute(query.encode(), (client,))
                        assert await cursor.fetchone() == (client + int(query[7]),)
                if client % 2:
                    await connection.commit()
                if client % 3 == 2:
                    assert await outcome(connection.execute("SELECT 1/0")) == "DivisionByZero"
        assert pool.statistics().destroyed == 0


async def test_a_statement_prepared_of_a_table_that_is_gone(dsn: str) -> None:
    """A statement prepared in a transaction, of a table made in it, is prepared again."""
    for reset in ("rollback", "session"):
        async with a_pool(dsn, reset=reset) as pool:
            for _client in range(3):
                async with pool.worker() as connection:
                    connection.prepare_threshold = 0
                    await connection.execute("CREATE TABLE made_again (x int)")
                    await connection.execute("SELECT * FROM made_again")


# When it happens


async def test_a_reset_happens_in_the_worker_task(dsn: str) -> None:
    """checkin returns at once; the connection is being reset then, and ready afterwards."""
    async with a_pool(dsn, reset="session") as pool:
        resource = await pool.block_checkout()
        await resource.get().execute("SELECT 1")
        pool.checkin(resource)
        assert (pool.statistics().resetting, pool.statistics().idle) == (1, 0)
        with pytest.raises(trio.WouldBlock):
            pool.checkout_nowait()
        with trio.fail_after(5):
            await until(lambda: pool.statistics().idle == 1)
        assert pool.statistics().resetting == 0


async def test_a_waiter_waits_for_the_reset(dsn: str) -> None:
    """A connection goes to the next waiter only when it has been reset."""
    async with a_pool(dsn, reset="session") as pool:
        resource = await pool.block_checkout()
        await resource.get().execute("SET work_mem = '7MB'")
        await resource.get().commit()

        async def next_waiter() -> None:
            async with pool.worker() as connection:
                assert await ask(connection, "SHOW work_mem") != "7MB"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(next_waiter)
            await until(lambda: pool.statistics().waiting == 1)
            pool.checkin(resource)


async def test_a_session_that_cannot_be_reset_is_replaced(dsn: str, onlooker: Onlooker) -> None:
    """Where the server is too slow in resetting, the connection is destroyed, and another opened."""
    async with a_pool(dsn, reset="session", reset_timeout=0.2) as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
            # Dropping the temporary table has to wait for a transaction that reads its definition.
            await connection.execute("CREATE TEMP TABLE wanted (x int)")
            await connection.commit()
            schema = await ask(connection, "SELECT pg_my_temp_schema()::regnamespace::text")
            await connection.rollback()
            onlooker.do("BEGIN")
            onlooker.do(f"LOCK TABLE {schema}.wanted IN ACCESS SHARE MODE")
        async with pool.worker() as connection:
            assert connection.info.backend_pid != backend
        onlooker.do("ROLLBACK")
        assert pool.statistics().destroyed == 1


async def test_serializable_deferrable_sessions_are_reset(dsn: str, onlooker: Onlooker) -> None:
    """A session whose every transaction waits for a safe snapshot is reset without waiting for it."""
    async with a_pool(dsn, reset="session", reset_timeout=0.5) as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
            await connection.execute(
                "SET SESSION CHARACTERISTICS AS TRANSACTION"
                " ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE"
            )
            await connection.commit()
            onlooker.do("BEGIN ISOLATION LEVEL SERIALIZABLE")
            onlooker.do("SELECT nextval('numbers')")
        async with pool.worker() as connection:
            onlooker.do("ROLLBACK")
            assert connection.info.backend_pid == backend


async def test_a_two_phase_transaction_costs_the_connection(dsn: str) -> None:
    """Only its client knows how a two-phase transaction should end: the connection is replaced."""
    for reset in ("rollback", "session"):
        async with a_pool(dsn, reset=reset) as pool:
            async with pool.worker() as connection:
                backend = connection.info.backend_pid
                await connection.tpc_begin("left")
                await connection.execute("SELECT 1")
            async with pool.worker() as connection:
                assert connection.info.backend_pid != backend


async def notify(onlooker: Onlooker) -> None:
    """Send a notification when the tasks that want it wait for it."""
    await wait_all_tasks_blocked()
    onlooker.do("NOTIFY news")


@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_a_generator_that_is_kept_costs_the_connection(
    dsn: str, onlooker: Onlooker, reset: str
) -> None:
    """No client is given a connection whose lock another task still holds."""
    async with a_pool(dsn, reset=reset, reset_timeout=0.2, autocommit=True) as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
            await connection.execute("LISTEN news")
            kept = connection.notifies()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(notify, onlooker)
                await kept.__anext__()
        async with pool.worker() as connection:
            with trio.fail_after(5):
                assert await ask(connection, "SELECT pg_backend_pid()") != backend
        assert pool.statistics().destroyed == 1
        await kept.aclose()


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
async def test_a_generator_left_to_the_garbage_collector_costs_nothing(
    dsn: str, onlooker: Onlooker
) -> None:
    """The end of a connection's last use is waited for, in its worker task."""
    async with a_pool(dsn, autocommit=True) as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
            await connection.execute("LISTEN news")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(notify, onlooker)
                async for _ in connection.notifies():
                    break
        async with pool.worker() as connection:
            assert await ask(connection, "SELECT pg_backend_pid()") == backend


async def test_a_block_that_was_never_left_costs_the_connection(dsn: str) -> None:
    """A transaction() block whose transaction was ended behind its back is noticed, too."""
    async with a_pool(dsn) as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
            block = connection.transaction()
            await block.__aenter__()
            await connection.execute("COMMIT")
        async with pool.worker() as connection, connection.transaction():
            assert await ask(connection, "SELECT pg_backend_pid()") != backend
        await block.__aexit__(None, None, None)


# A callable of your own


@pytest.mark.parametrize("left_open", [False, True])
async def test_a_callable_of_your_own_resets(dsn: str, left_open: bool) -> None:
    """It gets the connection after each client, outside a transaction."""
    seen: list[tuple[Connection, int]] = []

    async def reset(connection: Connection) -> None:
        seen.append((connection, connection.info.transaction_status))
        await connection.execute("SET work_mem = '5MB'")
        await connection.commit()

    async with a_pool(dsn, reset=reset) as pool:
        async with pool.worker() as connection:
            if left_open:
                await connection.execute("SELECT 1")
        assert seen == []
        async with pool.worker() as again:
            assert again is connection
            assert seen == [(connection, TransactionStatus.IDLE)]
            assert await ask(again, "SHOW work_mem") == "5MB"


async def fail(connection: Connection) -> None:
    raise LookupError("no way to reset it")


async def fail_on_the_server(connection: Connection) -> None:
    await connection.execute("SELECT 1/0")


async def leave_a_transaction(connection: Connection) -> None:
    await connection.execute("SELECT 1")


async def close_it(connection: Connection) -> None:
    await connection.close()


@pytest.mark.parametrize("reset", [fail, fail_on_the_server, leave_a_transaction, close_it])
async def test_a_callable_that_fails_costs_the_connection(dsn: str, reset: Step) -> None:
    """One that raises, or that leaves a transaction open, has the connection replaced."""
    async with a_pool(dsn, reset=reset) as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
        async with pool.worker() as connection:
            assert connection.info.backend_pid != backend
        await until(lambda: pool.statistics().idle == 1)
        assert pool.statistics().destroyed + pool.statistics().lost == 2


@pytest.mark.parametrize("configure", [fail, fail_on_the_server, leave_a_transaction])
async def test_configure_that_fails_at_the_start(dsn: str, onlooker: Onlooker, configure: Step) -> None:
    """No pool opens with a `configure` that raises, or that leaves a transaction open."""
    with pytest.raises(PoolStartError):
        async with a_pool(dsn, configure=configure, application_name="not configured", start_timeout=1):
            pass
    await until(lambda: onlooker.backends("not configured") == 0)


async def test_configure_that_fails_at_a_reset(dsn: str) -> None:
    """A connection that can't be configured again is replaced."""
    calls: list[int] = []

    async def configure(connection: Connection) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise LookupError("not again")

    async with a_pool(dsn, reset="session", configure=configure) as pool:
        async with pool.worker() as connection:
            pass
        async with pool.worker() as other:
            assert other is not connection
        assert pool.statistics().destroyed == 1


# Arguments


@pytest.mark.parametrize(
    ("reset", "kind"), [("always", ValueError), ("", ValueError), (None, TypeError), (7, TypeError)]
)
def test_a_wrong_reset(reset: Any, kind: type[Exception]) -> None:
    """A reset that can't be is refused at once, by its name."""
    with pytest.raises(kind, match=r"^reset must be .*" + repr(reset)):
        PostgresManager(reset=reset)
    with pytest.raises(kind, match="reset"):
        open_postgres_pool(reset=reset)


def test_a_wrong_configure_or_conninfo() -> None:
    """A configure that can't be called, and a conninfo that is no text, are refused at once."""
    with pytest.raises(TypeError, match="configure"):
        PostgresManager(configure="SET x = 1")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="conninfo must be a str or a callable, not int"):
        PostgresManager(7)  # type: ignore[call-overload]


@pytest.mark.parametrize("host", ["/run/postgres@17", "@abstract", "127.0.0.1,/run/postgres@17"])
def test_a_host_with_an_at_sign(host: str) -> None:
    """A folder of sockets may have one in its name, and an abstract socket begins with one."""
    PostgresManager(f"host={host} dbname=postgres")


UNPARSABLE = [
    f"host=127.0.0.1 password='{SECRET}",
    f"host=127.0.0.1 password={SECRET} nonsense",
    f"host=127.0.0.1 {SECRET}",
    f"passwort={SECRET}",
    f"postgresql://user:{SECRET}@[::1/db",
    f"postgresql://user:{SECRET}%zz@localhost/db",
    f"postgresql://user@localhost/db?password={SECRET}&nonsense=1",
    f"postgresql://user@localhost/db?{SECRET}",
    # A password that was not quoted: its second half looks like an option.
    f"password=half {SECRET.replace('-', '_')}=half",
]


@pytest.mark.parametrize("conninfo", UNPARSABLE)
def test_a_conninfo_that_cannot_be_parsed(conninfo: str) -> None:
    """It is refused at once, without quoting what may be a password."""
    with pytest.raises(ValueError, match="conninfo") as caught:
        PostgresManager(conninfo)
    check_no_secret(caught.value)


def test_an_unknown_keyword(dsn: str) -> None:
    """A keyword that connect does not have is refused at once, and named."""
    with pytest.raises(ValueError, match="passwort") as caught:
        PostgresManager(dsn, passwort=SECRET)  # type: ignore[call-overload]
    check_no_secret(caught.value)


@pytest.mark.parametrize("keyword", ["connect_timeout", "port"])
async def test_a_keyword_with_a_nonsensical_value(dsn: str, keyword: str) -> None:
    """A value that will never be valid ends the opening of a pool at once, or earlier."""
    wrong: dict[str, Any] = {keyword: "nonsense"}
    with trio.fail_after(1), pytest.raises((PoolStartError, ValueError)):
        manager = PostgresManager(dsn, **wrong)
        async with open_pool(manager, pool_size=1):
            pass


def check_no_secret(error: BaseException) -> None:
    shown = "".join(traceback.format_exception(error))
    half = SECRET.replace("-", "_")
    assert SECRET not in shown
    assert half not in shown.replace("UNPARSABLE", "")


# Refusals that are final


class Counting(PostgresManager):
    """Counts how often it is asked for a connection."""

    attempts = 0

    async def create(self) -> Connection:
        self.attempts += 1
        return await super().create()


@pytest.mark.parametrize("wrong", [{"dbname": "nowhere"}, {"user": "nobody"}])
async def test_a_final_refusal(dsn: str, wrong: dict[str, Any]) -> None:
    """A database, or a role, that does not exist ends the opening of a pool at the first attempt."""
    manager = Counting(dsn, **wrong)
    (name,) = wrong.values()
    with trio.fail_after(3), pytest.raises(PoolStartError, match=f'"{name}" does not exist') as caught:
        async with open_pool(manager, pool_size=1):
            pass
    assert manager.attempts == 1
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)


async def test_a_refusal_that_is_not_final(dsn: str) -> None:
    """A server that is not there is asked again."""
    manager = Counting(dsn, port=1)
    with trio.fail_after(3), pytest.raises(PoolStartError):
        async with open_pool(manager, pool_size=1, start_timeout=0.5):
            pass
    assert manager.attempts > 1


async def test_one_host_of_two_refuses_for_good(dsn: str) -> None:
    """A refusal is final only where that of every host is."""
    port = conninfo_to_dict(dsn)["port"]
    hosts: dict[str, Any] = {"host": "127.0.0.1,127.0.0.1", "dbname": "nowhere"}
    manager = Counting(dsn, port=f"1,{port}", **hosts)
    with trio.fail_after(3), pytest.raises(PoolStartError):
        async with open_pool(manager, pool_size=1, start_timeout=0.5):
            pass
    assert manager.attempts > 1
    manager = Counting(dsn, port=f"{port},{port}", **hosts)
    with trio.fail_after(3), pytest.raises(PoolStartError):
        async with open_pool(manager, pool_size=1):
            pass
    assert manager.attempts == 1


# Passwords


async def test_the_password_is_never_shown(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not in a repr, not in what is logged while everything goes well."""
    caplog.set_level(logging.DEBUG)
    for manager in (
        PostgresManager(make_conninfo(dsn, password=SECRET), reset="session"),
        PostgresManager(dsn, password=SECRET),
    ):
        async with open_pool(manager, pool_size=1) as pool:
            resource = await pool.block_checkout()
            await resource.get().execute("SELECT 1")
            for thing in (manager, pool, resource, resource.get(), pool.statistics()):
                assert SECRET not in repr(thing) + str(thing)
            pool.checkin(resource)
            await until(lambda pool=pool: pool.statistics().idle == 1)  # type: ignore[misc]
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [{"dbname": "nowhere"}, {"user": "nobody"}, {"port": "1"}, {"host": "host.invalid"}],
)
async def test_the_password_is_not_in_errors(
    dsn: str, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any]
) -> None:
    """Not in what is raised, or logged, where a pool can't be opened; nor in what is chained to it."""
    caplog.set_level(logging.DEBUG)
    manager = PostgresManager(make_conninfo(dsn, password=SECRET), **wrong)
    with pytest.raises(PoolStartError) as caught:
        async with open_pool(manager, pool_size=1, start_timeout=1):
            pass
    check_no_secret(caught.value)
    assert SECRET not in caplog.text
    connection_error = caught.value.__cause__
    assert isinstance(connection_error, (psycopg.Error, errors.Error))
