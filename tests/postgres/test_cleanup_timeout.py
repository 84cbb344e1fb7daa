"""How long a cancelled operation may take to leave the connection in order: `cleanup_timeout`."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
from connections import SLOW, Connection, backend, check_usable, closing, read_all
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker, freeze, thaw
from proxy import Proxy, open_proxy
from psycopg.conninfo import make_conninfo
from timing import until

from whitepool.postgres import (
    PostgresManager,
    TrioConnection,
    _cancelling,
    _connection,
    connect,
    open_pool,
)

Stall = Callable[[], None]
Operation = Callable[[Connection, Stall], Awaitable[object]]


@pytest.fixture
async def proxy(server: EmbeddedPostgres) -> AsyncIterator[Proxy]:
    async with open_proxy("127.0.0.1", server.port) as proxy:
        yield proxy


@pytest.fixture
async def connection(server: EmbeddedPostgres, proxy: Proxy) -> AsyncIterator[Connection]:
    """One that has a fifth of a second to clean up, through the proxy."""
    connection: Connection = await connect(
        make_conninfo(server.dsn, **proxy.address), cleanup_timeout=0.2
    )
    yield connection
    await connection.close()


async def query(connection: Connection, stall: Stall) -> None:
    stall()
    await connection.execute(SLOW)


async def transaction(connection: Connection, stall: Stall) -> None:
    async with connection.transaction():
        await query(connection, stall)


async def idle_transaction(connection: Connection, stall: Stall) -> None:
    async with connection.transaction():
        stall()
        await trio.sleep_forever()


async def nested_transactions(connection: Connection, stall: Stall) -> None:
    async with connection.transaction(), connection.transaction(), connection.transaction():
        await connection.execute("SELECT 1")
        stall()
        await trio.sleep_forever()


async def transactions_in_a_pipeline(connection: Connection, stall: Stall) -> None:
    async with connection.pipeline(), connection.transaction(), connection.transaction():
        await connection.execute("SELECT 1")
        await query(connection, stall)
        await trio.sleep_forever()


async def pipelines_in_transactions(connection: Connection, stall: Stall) -> None:
    async with connection.transaction(), connection.pipeline(), connection.transaction():
        await query(connection, stall)
        await connection.commit()


async def nested_transactions_in_a_query(connection: Connection, stall: Stall) -> None:
    async with connection.transaction(), connection.transaction():
        await query(connection, stall)


async def pipeline_left(connection: Connection, stall: Stall) -> None:
    """What it has sent is under way, and no operation waits for it."""
    async with connection.pipeline():
        await connection.execute("SELECT pg_sleep(30)")
        stall()
        await trio.sleep_forever()


async def stream(connection: Connection, stall: Stall) -> None:
    query = "SELECT repeat('x', 10000), pg_sleep(0.01) FROM generate_series(1, 10000)"
    async with closing(connection.cursor().stream(query)) as rows:
        await anext(rows)
        stall()
        await read_all(rows)


async def stream_left_early(connection: Connection, stall: Stall) -> None:
    query = "SELECT repeat('x', 10000), pg_sleep(0.01) FROM generate_series(1, 10000)"
    async with closing(connection.cursor().stream(query)) as rows:
        await anext(rows)
        stall()
        await trio.sleep_forever()


async def copy_out(connection: Connection, stall: Stall) -> None:
    rows = "SELECT repeat('x', 10000), pg_sleep(0.01) FROM generate_series(1, 10000)"
    async with connection.cursor().copy(f"COPY ({rows}) TO STDOUT") as copy:
        stall()
        await read_all(copy.rows())


async def copy_in(connection: Connection, stall: Stall) -> None:
    await connection.execute("CREATE TEMP TABLE copied (x text)")
    async with connection.cursor().copy("COPY copied FROM STDIN") as copy:
        stall()
        await copy.write("a\n")
        await trio.sleep_forever()


async def executemany(connection: Connection, stall: Stall) -> None:
    stall()
    await connection.cursor().executemany("SELECT pg_sleep(%s)", [(0.01,)] * 1000)


async def server_cursor(connection: Connection, stall: Stall) -> None:
    async with connection.transaction(), connection.cursor("named") as cursor:
        await cursor.execute("SELECT generate_series(1, 1000)")
        stall()
        await cursor.fetchall()


async def whole_connection(connection: Connection, stall: Stall) -> None:
    async with connection, connection.transaction():
        await query(connection, stall)


OPERATIONS = [
    query,
    transaction,
    idle_transaction,
    nested_transactions,
    transactions_in_a_pipeline,
    pipelines_in_transactions,
    stream,
    stream_left_early,
    copy_out,
    copy_in,
    executemany,
    server_cursor,
    whole_connection,
]


@pytest.mark.parametrize(
    ("operation", "network"),
    [
        *((operation, "stalls") for operation in OPERATIONS),
        *((operation, "swallows") for operation in (query, nested_transactions, stream)),
    ],
)
async def test_a_silent_network_delays_a_cancelled_task_once(
    proxy: Proxy, connection: Connection, operation: Operation, network: str
) -> None:
    """However many blocks are left, and whatever was under way in them: then it is closed."""
    connection.cleanup_timeout = 0.5
    with trio.move_on_after(0.3) as scope:
        await operation(connection, proxy.stall if network == "stalls" else proxy.drop)
    # Twice would be a second.
    assert trio.current_time() - scope.deadline < 0.95
    assert scope.cancelled_caught
    assert connection.closed


async def test_a_slow_network_uses_up_the_time_of_all_blocks_together(
    proxy: Proxy, connection: Connection
) -> None:
    """Each rollback would succeed in the time, but not all of them: they share it."""
    connection.cleanup_timeout = 0.5
    with trio.CancelScope() as scope:
        async with connection.transaction(), connection.transaction(), connection.transaction():
            await connection.execute("SELECT 1")
            proxy.delay(0.1)  # each way, and an inner rollback takes two round trips
            begun = trio.current_time()
            scope.cancel()
            await trio.sleep_forever()
    assert connection.closed
    assert 0.4 < trio.current_time() - begun < 0.7


async def test_each_cancellation_has_all_the_time(proxy: Proxy, connection: Connection) -> None:
    """What one cancellation has used is not missing for the next."""
    connection.cleanup_timeout = 1
    proxy.delay(0.05)
    for _ in range(6):
        with trio.move_on_after(0.01):
            async with connection.transaction():
                await trio.sleep_forever()
        with trio.move_on_after(0.2) as scope:
            async with connection.transaction():
                await connection.execute(SLOW)
        assert scope.cancelled_caught
        assert not connection.closed
    proxy.delay(0)
    await check_usable(connection)


async def test_time_that_the_user_needs_is_not_counted(proxy: Proxy, connection: Connection) -> None:
    """Between two blocks that a cancellation leaves, the task may do something of its own."""
    connection.cleanup_timeout = 0.5
    with trio.CancelScope() as scope:
        async with connection.transaction():
            try:
                async with connection.transaction():
                    scope.cancel()
                    await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.6)
    assert not connection.closed
    await check_usable(connection)


async def test_it_is_a_keyword_and_an_attribute(dsn: str) -> None:
    """Five seconds, unless said otherwise, to `connect`, to the manager, or to the connection."""
    async with await connect(dsn) as connection:
        assert connection.cleanup_timeout == 5.0
        connection.cleanup_timeout = math.inf
        await check_usable(connection)
    async with await TrioConnection.connect(dsn, cleanup_timeout=0) as connection:
        assert connection.cleanup_timeout == 0
    async with (
        open_pool(dsn, pool_size=1, cleanup_timeout=0.3) as session,
        session.worker() as connection,
    ):
        assert connection.cleanup_timeout == 0.3


async def test_no_time_at_all_closes_at_once(server: EmbeddedPostgres) -> None:
    """With 0, a cancelled query closes the connection."""
    connection: Connection = await connect(server.dsn, cleanup_timeout=0)
    with trio.move_on_after(0.05) as scope:
        async with connection.transaction():
            await connection.execute("SELECT pg_sleep(0.5)")
    assert scope.cancelled_caught
    assert connection.closed


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (math.nan, ValueError), ("5", TypeError), (True, TypeError)]
)
async def test_it_is_a_number_of_seconds(dsn: str, value: Any, error: type[Exception]) -> None:
    """0 or more; what is not is refused before anything is connected."""
    with pytest.raises(error, match="cleanup_timeout must be"):
        await connect(dsn, cleanup_timeout=value)
    with pytest.raises(error, match="cleanup_timeout must be"):
        PostgresManager(dsn, cleanup_timeout=value)


async def test_without_a_bound(dsn: str) -> None:
    """A cancellation that leaves nested blocks takes as long as it takes, and is raised."""
    async with await connect(dsn, cleanup_timeout=math.inf) as connection:
        with trio.move_on_after(0.1) as scope:
            async with connection.transaction(), connection.transaction():
                await connection.execute(SLOW)
        assert scope.cancelled_caught
        await check_usable(connection)


# -- A server that is silent is not waited for until the end ------------------------------------------

SILENT = "08006: the server did not answer a request to cancel"


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long a server may take for a request to cancel. It is longer where no test waits for it."""
    for module in (_cancelling, _connection):
        monkeypatch.setattr(module, "SILENCE", 0.6)
    return 0.6


@pytest.mark.parametrize(
    "operation",
    [nested_transactions_in_a_query, pipeline_left, stream_left_early, copy_out],
)
async def test_a_silent_server_is_given_up_early(
    proxy: Proxy, connection: Connection, operation: Operation, silence: float
) -> None:
    """It does not process the first request to cancel, so it will not do what a clean-up waits for."""
    connection.cleanup_timeout = 5
    with trio.move_on_after(0.3) as scope:
        await operation(connection, proxy.drop)
    taken = trio.current_time() - scope.deadline
    assert silence - 0.1 < taken < silence + 0.5
    assert scope.cancelled_caught
    assert connection.closed
    assert connection._last_words == SILENT


async def test_a_server_that_processes_requests_has_all_the_time(
    dsn: str, onlooker: Onlooker, silence: float
) -> None:
    """It is alive, and one query may take longer to end: the connection is saved."""
    async with await connect(dsn) as connection:
        mine = backend(connection)

        async def thaw_later() -> None:
            await trio.sleep(2 * silence)
            thaw(mine)

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(freeze_when_active, onlooker, mine, scope)
                nursery.start_soon(thaw_later)
                await connection.execute(SLOW)
        assert scope.cancelled_caught
        await connection.rollback()
        await check_usable(connection)


async def freeze_when_active(onlooker: Onlooker, backend: int, scope: trio.CancelScope) -> None:
    await onlooker.until_active(backend)
    freeze(backend)
    scope.cancel()


@pytest.mark.parametrize(("cleanup_timeout", "words"), [(0.3, SILENT), (0.01, ""), (0, "")])
async def test_a_shorter_time_may_tell_as_well(
    proxy: Proxy, connection: Connection, cleanup_timeout: float, words: str
) -> None:
    """That the server is silent; but a hundredth of a second is too short to say so."""
    connection.cleanup_timeout = cleanup_timeout
    with trio.move_on_after(0.1):
        await query(connection, proxy.drop)
    assert connection.closed
    assert connection._last_words == words


async def test_one_that_is_silent_makes_the_others_suspect(
    server: EmbeddedPostgres, proxy: Proxy
) -> None:
    """The client that finds out loses its time. No other does: all connections are replaced."""
    conninfo = make_conninfo(server.dsn, **proxy.address)
    async with open_pool(conninfo, pool_size=5, max_overflow=0, autocommit=True) as session:
        proxy.drop()
        with trio.move_on_after(0.1) as scope:
            async with session.worker() as connection:
                await connection.execute("SELECT 1")
        assert scope.cancelled_caught
        found = trio.current_time()
        proxy.resume()  # for new connections: those that are open have lost what was sent
        with trio.fail_after(5):
            for _ in range(10):
                async with session.worker() as connection:
                    await connection.execute("SELECT 1")
        assert trio.current_time() - found < 1
        await until(lambda: session.statistics().idle == 5)
        assert trio.current_time() - found < 2
        now = session.statistics()
        assert now.last_words == {"dead": SILENT}
        assert (now.lost, now.started) == (5, 10)
