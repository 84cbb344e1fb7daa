"""How a pool of connections treats them: opening, configuring, checking, rolling back and closing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import psycopg
import pytest
import trio
from connections import Connection, backend, check_usable, status
from onlooker import Onlooker
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from timing import until
from workshop import check_books

import whitepool
from whitepool.postgres import PostgresManager, TrioConnection, _resetting, connect, open_pool

Session = whitepool.Session[Connection]
OpenPool = Callable[..., AbstractAsyncContextManager[Session]]

APPLICATION = "whitepool-manager"
"""What the connections of these tests call themselves, for the onlooker."""


@pytest.fixture(params=["open_pool", "a bare factory"])
def pool_of_one(request: pytest.FixtureRequest, dsn: str) -> OpenPool:
    """Opens a pool of one connection, in either way."""

    def by_open_pool(**keywords: Any) -> AbstractAsyncContextManager[Session]:
        return open_pool(dsn, application_name=APPLICATION, pool_size=1, max_overflow=0, **keywords)

    def by_bare_factory(**keywords: Any) -> AbstractAsyncContextManager[Session]:
        async def factory() -> Connection:
            connection: Connection = await connect(dsn, application_name=APPLICATION, **keywords)
            return connection

        return whitepool.open_pool(factory, pool_size=1, max_overflow=0)

    return by_open_pool if request.param == "open_pool" else by_bare_factory


# -- Opening --------------------------------------------------------------------------------------


async def test_keywords_go_where_they_belong(dsn: str) -> None:
    """open_pool takes the options of a pool and the keywords of connect, and mixes up neither."""
    async with open_pool(
        dsn,
        pool_size=2,
        max_overflow=3,
        name="mixed",
        autocommit=True,
        row_factory=dict_row,
        application_name=APPLICATION,
        connect_timeout=10,
    ) as session:
        now = session.statistics()
        assert (now.name, now.pool_size, now.max_overflow) == ("mixed", 2, 3)
        async with session.worker() as connection:
            assert isinstance(connection, TrioConnection)
            assert connection.autocommit
            cursor = await connection.execute("SHOW application_name")
            assert await cursor.fetchall() == [{"application_name": APPLICATION}]


async def test_a_manager_and_a_factory_can_be_given_to_the_pool_itself(dsn: str) -> None:
    """A PostgresManager, and a bare lambda that connects, are all that whitepool.open_pool needs."""
    async with (
        whitepool.open_pool(PostgresManager(dsn), pool_size=1) as session,
        whitepool.open_pool(lambda: connect(dsn), pool_size=1) as bare,
        session.worker() as connection,
        bare.worker() as plain,
    ):
        await check_usable(connection)
        await check_usable(plain)


@pytest.mark.parametrize("make", [PostgresManager, open_pool])
def test_a_wrong_type_is_refused_at_once(make: Callable[..., object]) -> None:
    """A conninfo of another type, and a configure that can't be called, are a TypeError at once."""
    with pytest.raises(TypeError, match="conninfo must be a str or a callable, not int"):
        make(5432)
    with pytest.raises(TypeError, match="conninfo must be a str or a callable, not NoneType"):
        make(None)
    with pytest.raises(TypeError, match="configure must be an async callable, not 'nonsense'"):
        make("", configure="nonsense")


def test_a_wrong_option_is_refused_at_once(dsn: str) -> None:
    """Options of the pool are checked by open_pool as they are by whitepool.open_pool."""
    with pytest.raises(TypeError, match="pool_size"):
        open_pool(dsn, pool_size="5")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="max_overflow"):
        open_pool(dsn, max_overflow=-1)


# -- Configuring ----------------------------------------------------------------------------------


async def test_configure_runs_once_for_each_new_connection(dsn: str) -> None:
    """Each connection is configured once, before a client gets it; so is one that replaces another."""
    configured: list[int] = []

    async def configure(connection: Connection) -> None:
        await connection.set_autocommit(True)
        await connection.execute("SET work_mem = '5MB'")
        configured.append(backend(connection))

    async with open_pool(
        dsn, configure=configure, pool_size=2, max_overflow=0, strategy="fifo"
    ) as session:
        assert len(configured) == 2
        seen = set()
        for _ in range(6):
            async with session.worker() as connection:
                seen.add(backend(connection))
                cursor = await connection.execute("SHOW work_mem")
                assert await cursor.fetchall() == [("5MB",)]
        assert seen == set(configured)
        assert len(configured) == 2
        session.destroyed(session.checkout_nowait())
        await until(lambda: session.statistics().idle == 2)
        assert len(set(configured)) == len(configured) == 3


async def _raises(_: Connection) -> None:
    raise LookupError("not configured")


async def _leaves_a_transaction_open(connection: Connection) -> None:
    await connection.execute("SELECT 1")


async def _leaves_a_failed_transaction_open(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await connection.execute("SELECT 1/0")


@pytest.mark.parametrize(
    ("configure", "cause", "message"),
    [
        (_raises, LookupError, "not configured"),
        (_leaves_a_transaction_open, psycopg.ProgrammingError, "left a transaction open"),
        (_leaves_a_failed_transaction_open, psycopg.ProgrammingError, "left a transaction open"),
    ],
)
async def test_a_failure_to_configure_is_a_failure_to_start(
    dsn: str,
    onlooker: Onlooker,
    configure: Callable[[Connection], Awaitable[None]],
    cause: type[Exception],
    message: str,
) -> None:
    """Where configure fails, or leaves a transaction open, no pool opens, and no connection stays."""
    with pytest.raises(whitepool.PoolStartError) as caught:
        async with open_pool(
            dsn,
            configure=configure,
            application_name=APPLICATION,
            pool_size=1,
            max_overflow=0,
            start_timeout=1,
        ):
            raise AssertionError("opened")
    assert isinstance(caught.value.__cause__, cause)
    assert message in str(caught.value.__cause__)
    await until(lambda: onlooker.backends(APPLICATION) == 0)


async def test_a_failure_to_configure_may_pass(dsn: str, onlooker: Onlooker) -> None:
    """A connection that can't be configured is closed, and another one is tried."""
    attempts: list[int] = []

    async def configure(connection: Connection) -> None:
        attempts.append(backend(connection))
        if len(attempts) == 1:
            raise LookupError("not yet")

    async with open_pool(
        dsn, configure=configure, application_name=APPLICATION, pool_size=1, max_overflow=0
    ) as session:
        async with session.worker() as connection:
            assert backend(connection) == attempts[1]
        now = session.statistics()
        assert (now.started, now.start_failures) == (1, 1)
        await onlooker.until_gone(attempts[0])


# -- Returning a connection inside a transaction --------------------------------------------------


@pytest.mark.parametrize("left", [TransactionStatus.INTRANS, TransactionStatus.INERROR])
async def test_a_transaction_is_rolled_back_after_the_return(
    pool_of_one: OpenPool, notes: Callable[[], int], left: TransactionStatus
) -> None:
    """A connection returned inside a transaction is rolled back by its host, before its next use."""
    async with pool_of_one() as session:
        resource = await session.block_checkout()
        connection = resource.get()
        mine = backend(connection)
        await connection.execute("INSERT INTO notes VALUES ('a')")
        if left is TransactionStatus.INERROR:
            with pytest.raises(psycopg.errors.DivisionByZero):
                await connection.execute("SELECT 1/0")
        session.checkin(resource)
        # checkin has only left a note: nothing has been sent yet.
        assert status(connection) is left
        now = session.statistics()
        check_books(now)
        assert (now.resetting, now.idle, now.in_use) == (1, 0, 0)
        with pytest.raises(trio.WouldBlock):
            session.checkout_nowait()

        async with session.worker() as connection:
            assert backend(connection) == mine
            await check_usable(connection)
            cursor = await connection.execute("SELECT count(*) FROM notes")
            assert await cursor.fetchall() == [(0,)]
            await connection.rollback()
        now = session.statistics()
        check_books(now)
        assert (now.idle, now.started) == (1, 1)
    assert notes() == 0


async def test_a_clean_return_needs_no_reset(pool_of_one: OpenPool) -> None:
    """A connection returned outside a transaction can be had again at once."""
    async with pool_of_one() as session:
        async with session.worker() as connection:
            await connection.execute("SELECT 1")
            await connection.commit()
        assert session.statistics().resetting == 0
        resource = session.checkout_nowait()
        assert resource.get() is connection
        session.checkin(resource)


async def test_the_next_waiter_waits_for_the_rollback(
    pool_of_one: OpenPool, notes: Callable[[], int]
) -> None:
    """A waiter gets the connection when it has been rolled back, and not before."""
    seen: list[TransactionStatus] = []

    async def next_client() -> None:
        async with session.worker() as connection:
            seen.append(status(connection))

    async with (
        pool_of_one() as session,
        trio.open_nursery() as nursery,
        session.worker() as connection,
    ):
        await connection.execute("INSERT INTO notes VALUES ('a')")
        nursery.start_soon(next_client)
        await until(lambda: session.statistics().waiting == 1)
    assert seen == [TransactionStatus.IDLE]
    assert notes() == 0


async def test_a_connection_that_cannot_be_rolled_back_is_replaced(
    pool_of_one: OpenPool, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """Where the server has hung up on an open transaction, the next client gets another connection."""
    async with pool_of_one() as session:
        async with session.worker() as connection:
            mine = backend(connection)
            await connection.execute("INSERT INTO notes VALUES ('a')")
            onlooker.ask("SELECT pg_terminate_backend(%s)", mine)
            await onlooker.until_gone(mine)
        async with session.worker() as another:
            assert backend(another) != mine
            await check_usable(another)
        now = session.statistics()
        check_books(now)
        assert (now.idle, now.started, now.lost + now.destroyed) == (1, 2, 1)
    assert notes() == 0


async def test_a_transaction_block_that_was_not_left_costs_the_connection(
    pool_of_one: OpenPool,
) -> None:
    """A connection returned inside a `transaction()` block is not given to another client."""
    async with pool_of_one() as session:
        resource = await session.block_checkout()
        connection = resource.get()
        block = connection.transaction()
        await block.__aenter__()
        session.checkin(resource)
        async with session.worker() as another:
            assert another is not connection
            await check_usable(another)
        await block.__aexit__(None, None, None)  # it has been closed: there is nothing to commit
        check_books(session)


# -- Returning a connection that is of no more use ------------------------------------------------


async def test_a_closed_connection_is_discarded(pool_of_one: OpenPool) -> None:
    """A connection that its client has closed counts as lost, and is replaced."""
    async with pool_of_one() as session:
        async with session.worker() as connection:
            await connection.close()
        assert session.statistics().lost == 1
        async with session.worker() as another:
            assert another is not connection
            await check_usable(another)
        now = session.statistics()
        check_books(now)
        assert (now.idle, now.started, now.lost) == (1, 2, 1)


async def _in_a_pipeline(connection: Connection) -> None:
    connection.pgconn.enter_pipeline_mode()


async def _in_a_copy(connection: Connection) -> None:
    connection.pgconn.send_query(b"COPY notes FROM STDIN")
    await connection.wait(psycopg.generators.execute(connection.pgconn))
    connection.pgconn.put_copy_data(b"a\n")


async def _in_a_copy_out(connection: Connection) -> None:
    connection.pgconn.send_query(b"COPY (SELECT generate_series(1, 1000000)) TO STDOUT")
    await connection.wait(psycopg.generators.execute(connection.pgconn))


async def _in_a_query(connection: Connection) -> None:
    connection.pgconn.send_query(b"SELECT pg_sleep(30)")


async def _with_an_unread_answer(connection: Connection) -> None:
    connection.pgconn.send_query(b"SELECT 1")
    await trio.lowlevel.wait_readable(connection.pgconn.socket)


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize(
    "leave", [_in_a_pipeline, _in_a_copy, _in_a_copy_out, _in_a_query, _with_an_unread_answer]
)
async def test_a_connection_in_the_middle_of_something_is_discarded(
    pool_of_one: OpenPool,
    onlooker: Onlooker,
    notes: Callable[[], int],
    leave: Callable[[Connection], Awaitable[None]],
    autocommit: bool,
) -> None:
    """A connection left in a pipeline, a copy or a query counts as lost, and no client gets it."""
    async with pool_of_one(autocommit=autocommit) as session:
        async with session.worker() as connection:
            mine = backend(connection)
            await leave(connection)
        now = session.statistics()
        check_books(now)
        assert (now.lost, now.idle, now.resetting) == (1, 0, 0)
        async with session.worker() as another:
            assert backend(another) != mine
            cursor = await another.execute("SELECT 1")
            assert await cursor.fetchall() == [(1,)]
        assert connection.closed
        if leave is _in_a_query:
            onlooker.ask("SELECT pg_terminate_backend(%s)", mine)  # it would sleep on
        await onlooker.until_gone(mine)
    assert notes() == 0


async def test_a_cancelled_pipeline_does_not_reach_the_next_client(pool_of_one: OpenPool) -> None:
    """After a client was cancelled inside a pipeline the next one gets a connection in order."""
    async with pool_of_one(autocommit=True) as session:
        for _ in range(3):
            with trio.move_on_after(0.02) as scope:
                async with session.worker() as connection, connection.pipeline():
                    await connection.execute("SELECT pg_sleep(30)")
                    await trio.sleep_forever()
            assert scope.cancelled_caught
            async with session.worker() as connection:
                assert status(connection) is TransactionStatus.IDLE
                with trio.fail_after(3):
                    cursor = await connection.execute("SELECT 1")
                    assert await cursor.fetchall() == [(1,)]
        check_books(session)


async def test_a_cancelled_query_costs_no_connection(pool_of_one: OpenPool) -> None:
    """A client that is cancelled in a query returns its connection for others to use."""
    async with pool_of_one() as session:
        async with session.worker() as connection:
            mine = backend(connection)
        for _ in range(3):
            with trio.move_on_after(0.02) as scope:
                async with session.worker() as connection:
                    await connection.execute("SELECT pg_sleep(30)")
            assert scope.cancelled_caught
        async with session.worker() as connection:
            assert backend(connection) == mine
            await check_usable(connection)
        assert session.statistics().started == 1


# -- Closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["safe_shutdown", "leaving", "an exception"])
async def test_no_backend_is_left(dsn: str, onlooker: Onlooker, by: str) -> None:
    """When a pool is closed, in any way, the server has none of its connections any more."""
    try:
        async with open_pool(dsn, application_name=APPLICATION, pool_size=4) as session:
            async with session.worker() as connection:
                await connection.execute("SELECT 1")
            assert onlooker.backends(APPLICATION) == 4
            if by == "safe_shutdown":
                await session.safe_shutdown()
                await until(lambda: onlooker.backends(APPLICATION) == 0)
            elif by == "an exception":
                raise LookupError
    except LookupError:
        assert by == "an exception"
    await until(lambda: onlooker.backends(APPLICATION) == 0)
    now = session.statistics()
    check_books(now)
    assert (now.state, now.started, now.retired) == ("closed", 4, 4)


async def test_a_shutdown_with_a_query_under_way(dsn: str, onlooker: Onlooker) -> None:
    """A client that is still in a query when its time is up gets an OperationalError, and no more."""
    errors: list[type[BaseException]] = []

    async def client() -> None:
        try:
            async with session.worker() as connection:
                pids.append(backend(connection))
                await connection.execute("SELECT pg_sleep(30)")
        except psycopg.Error as error:
            errors.append(type(error))

    pids: list[int] = []
    async with open_pool(dsn, application_name=APPLICATION, pool_size=2) as session:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            await until(lambda: bool(pids))
            await onlooker.until_active(pids[0])
            with trio.fail_after(5):
                await session.safe_shutdown(0.05)
        assert errors == [psycopg.OperationalError]
        onlooker.ask("SELECT pg_terminate_backend(%s)", pids[0])  # it would sleep on
        await until(lambda: onlooker.backends(APPLICATION) == 0)
    check_books(session)


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("poolsize", "pool_size"),
        ("autocomit", "autocommit"),
        ("pasword", "password"),
        ("configur", "configure"),
    ],
)
def test_a_misspelt_keyword(keyword: str, meant: str) -> None:
    """The error says which option of the pool, of psycopg, or of libpq was meant."""
    options: Any = {keyword: 5}
    with pytest.raises(ValueError, match=rf"{keyword}.*: did you mean {meant}\?$"):
        open_pool("dbname=shop", **options)


@pytest.mark.parametrize("option", ["configure", "reset"])
def test_a_callable_that_cannot_be_called(option: str) -> None:
    """It is refused where the pool is made."""
    options: Any = {option: lambda: None}
    with pytest.raises(TypeError, match=rf"{option} is called with \(connection\)"):
        PostgresManager("dbname=shop", **options)


async def test_a_configure_that_is_not_async(dsn: str) -> None:
    """That is known after the first call, and opening the pool fails at once."""
    configure: Any = lambda connection: None  # noqa: E731
    with pytest.raises(whitepool.PoolStartError, match="configure must be async"):
        async with open_pool(dsn, configure=configure):
            pass


def test_a_connection_on_asyncio() -> None:
    """It says that it needs Trio."""
    with pytest.raises(RuntimeError, match=r"a TrioConnection needs Trio.*not with asyncio\.run"):
        asyncio.run(connect("dbname=shop"))


# -- Server sessions that are shared -------------------------------------------------------------------
#
# tests/postgres/test_pgbouncer_modes.py has the same with a real PgBouncer.


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process number looks as if PgBouncer had made it up."""
    monkeypatch.setattr(_resetting, "LARGEST_PID", 0)


def misconfigured(caplog: pytest.LogCaptureFixture) -> list[Any]:
    records = [vars(record) for record in caplog.records]
    return [record["reason"] for record in records if record["event"] == "misconfigured"]


async def use_all(session: Session, size: int) -> None:
    """Have each connection of a pool returned, and wait until they have been reset."""
    resources = [await session.block_checkout() for _ in range(size)]
    for resource in resources:
        session.checkin(resource)
    await until(lambda: session.statistics().idle == size)


async def no_reset(connection: Connection) -> None:
    """A reset of one's own that does nothing."""


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("query", "size", "reset", "is_told"),
    [
        (b"SELECT 1, 2", 3, "session", True),  # all are in one
        (b"SELECT 1, random()", 1, "session", True),  # one is in several
        (b"SELECT 1, 2", 1, "session", False),
        (_resetting._WHICH_SESSION, 3, "session", False),
        (b"SELECT 1, 2", 3, "rollback", False),
        (b"SELECT 1, 2", 3, no_reset, False),
    ],
)
async def test_a_reset_that_has_no_effect_is_told(
    query: bytes,
    size: int,
    reset: Any,
    is_told: bool,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once, when connections turn out to share the sessions of the server."""
    monkeypatch.setattr(_resetting, "_WHICH_SESSION", query)
    async with open_pool(dsn, reset=reset, pool_size=size, max_overflow=0) as session:
        for _ in range(3):
            await use_all(session, size)
        assert len(misconfigured(caplog)) == is_told
        async with session.worker() as connection:
            await check_usable(connection)
        assert session.statistics().destroyed == 0


@pytest.mark.usefixtures("made_up")
async def test_only_connections_that_are_open_can_share(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In session mode PgBouncer gives the session of one that has ended to the next."""
    monkeypatch.setattr(_resetting, "_WHICH_SESSION", b"SELECT 1, 2")
    async with open_pool(dsn, reset="session", pool_size=1, max_overflow=0) as session:
        await use_all(session, 1)
        async with session.worker() as first:
            await first.close()
        async with session.worker() as second:
            assert second is not first
        await use_all(session, 1)
        assert not misconfigured(caplog)
        assert session.statistics().destroyed == 0


async def test_nothing_is_asked_of_a_real_backend(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without PgBouncer, a reset costs nothing more."""
    monkeypatch.setattr(_resetting, "_WHICH_SESSION", b"SELECT 1, 2")
    async with open_pool(dsn, reset="session", pool_size=3, max_overflow=0) as session:
        await use_all(session, 3)
        assert not misconfigured(caplog)
