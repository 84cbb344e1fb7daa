"""Requests to cancel a query: how they are made, and what happens where they fail."""

from __future__ import annotations

import socket
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from connections import (
    INTRANS,
    SLOW,
    Connection,
    backend,
    check_usable,
    check_usable_after_rollback,
)
from embedded_postgres import EmbeddedPostgres
from keyboard import listening_to_ctrl_c, press_ctrl_c
from onlooker import Onlooker, freeze, thaw
from proxy import open_proxy
from psycopg import capabilities, pq
from psycopg.conninfo import make_conninfo
from timing import until
from trio.testing import wait_all_tasks_blocked

from whitepool.postgres import _cancel_requests, _connection, connect

CAN_CANCEL_SAFELY = capabilities.has_cancel_safe()
WAYS = [*(["without a thread"] if CAN_CANCEL_SAFELY else []), "in a thread"]


@pytest.fixture(params=WAYS)
def by_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether libpq is too old to cancel without a thread; a newer one is made to look old."""
    if request.param == "in a thread":
        monkeypatch.setattr(capabilities, "has_cancel_safe", lambda check=False: False)
        return True
    return False


async def test_cancel_safe_in_another_task_ends_a_query(
    connection: Connection, onlooker: Onlooker, by_thread: bool
) -> None:
    """cancel_safe() of another task ends a query with QueryCanceled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_query_canceled, connection)
        await onlooker.until_active(backend(connection))
        await connection.cancel_safe()
    await check_usable_after_rollback(connection)


async def test_cancel_in_another_task_ends_a_query(connection: Connection, onlooker: Onlooker) -> None:
    """cancel() of another task, which is not asynchronous, ends a query with QueryCanceled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_query_canceled, connection)
        await onlooker.until_active(backend(connection))
        connection.cancel()
    await check_usable_after_rollback(connection)


async def _expect_query_canceled(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.QueryCanceled):
        await connection.execute("BEGIN; SELECT pg_sleep(30)")


async def test_cancelling_where_nothing_runs_does_nothing(
    connection: Connection, by_thread: bool
) -> None:
    """cancel_safe() of an idle connection does nothing."""
    await connection.cancel_safe()
    await check_usable(connection)


async def test_only_an_old_libpq_cancels_in_a_thread(
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


class SilentServer:
    """Forwards one connection to a server, in threads of its own, and answers no other."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = {"host": "127.0.0.1", "port": str(self._listener.getsockname()[1])}
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._serve, args=[port], daemon=True).start()

    def _serve(self, port: int) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", port))
        self.sockets = [near, far]
        for source, sink in [(near, far), (far, near)]:
            threading.Thread(target=self._forward, args=[source, sink], daemon=True).start()
        with suppress(OSError):
            while True:
                self.sockets.append(self._listener.accept()[0])

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(10_000):
                sink.sendall(data)

    def end(self) -> None:
        self._listener.close()
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


async def test_a_silent_server_does_not_stop_other_tasks(
    server: EmbeddedPostgres, by_thread: bool
) -> None:
    """While a request to cancel has no answer, other tasks run."""
    silent = SilentServer(server.port)
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        while True:
            begun = time.perf_counter()
            await trio.sleep(0.01)
            longest = max(longest, time.perf_counter() - begun)

    ending = threading.Timer(1.5, silent.end)  # a thread that waits for an answer has to come back
    ending.start()
    async with trio.open_nursery() as nursery:
        connection: Connection = await connect(
            make_conninfo(server.dsn, **silent.address, sslmode="disable", gssencmode="disable")
        )
        nursery.start_soon(beat)
        with pytest.raises(psycopg.errors.CancellationTimeout):
            await connection.cancel_safe(timeout=0.5)
        nursery.cancel_scope.cancel()
    await connection.close()
    ending.join()
    assert longest < 0.3


async def test_connecting_warns_where_cancelling_would_stop_other_tasks(
    dsn: str, by_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, if psycopg is compiled, its libpq is old, and the way around can't be taken."""
    monkeypatch.setattr(_cancel_requests, "_libpq", lambda module: None)
    monkeypatch.setattr(pq, "__impl__", "c")
    _cancel_requests.warn_if_cancelling_freezes.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            await (await connect(dsn)).close()
    _cancel_requests.warn_if_cancelling_freezes.cache_clear()
    assert len(caught) == by_thread
    for warning in caught:
        assert warning.category is RuntimeWarning
        assert "install psycopg[binary] 3.2.13 or newer" in str(warning.message)
        assert warning.filename == __file__


async def test_where_the_server_ignores_requests_to_cancel_the_connection_is_closed(
    dsn: str, monkeypatch: pytest.MonkeyPatch, onlooker: Onlooker, by_thread: bool
) -> None:
    """Where a query does not end however often it is cancelled, the connection is closed in the end."""
    connection = await connect(dsn, cleanup_timeout=0.5)
    mine = backend(connection)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.execute, SLOW)
        await onlooker.until_active(mine)
        freeze(mine)  # requests are answered by another process
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    taken = trio.current_time() - begun
    thaw(mine)
    assert connection.broken  # that is: closed, and not by its user
    assert 0.4 < taken < 2
    await onlooker.until_gone(mine)


async def test_where_the_network_swallows_a_request_to_cancel_the_connection_is_closed(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, onlooker: Onlooker, by_thread: bool
) -> None:
    """Where a request to cancel is never answered, the connection is closed after a bounded time."""
    patience = 2.0

    async def lose_patience() -> None:
        await trio.sleep(patience)  # a thread that waits for an answer has to come back
        proxy.cut()

    async with open_proxy("127.0.0.1", server.port) as proxy, trio.open_nursery() as nursery:
        connection = await connect(make_conninfo(server.dsn, **proxy.address), cleanup_timeout=0.3)
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
    assert connection.broken  # that is: closed, and not by its user
    assert proxy.accepted > 1
    assert 0.2 < taken < patience - 0.5
    onlooker.ask("SELECT pg_terminate_backend(%s)", mine)


async def test_where_a_request_to_cancel_is_refused_the_connection_is_closed(
    server: EmbeddedPostgres, onlooker: Onlooker, by_thread: bool
) -> None:
    """Where a request to cancel does not get through at all, the connection is closed at once."""
    connection = await connect(server.unix_dsn)
    mine = backend(connection)
    door = Path(connection.info.host) / f".s.PGSQL.{server.port}"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.execute, SLOW)
        await onlooker.until_active(mine)
        door = door.rename(door.with_name("moved-away"))
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    taken = trio.current_time() - begun
    door.rename(door.with_name(f".s.PGSQL.{server.port}"))
    assert connection.broken  # that is: closed, and not by its user
    assert taken < 2
    with pytest.raises(psycopg.OperationalError):
        await connection.execute("SELECT 1")
    onlooker.ask("SELECT pg_terminate_backend(%s)", mine)


async def test_two_blocks_left_by_one_cancellation_leave_a_usable_connection(
    connection: Connection,
) -> None:
    """Tasks that leave their blocks together leave a connection whose queries can be cancelled."""

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
async def test_a_copy_whose_writing_timed_out_fails(connection: Connection, inside: bool) -> None:
    """A write to a COPY that a timeout has ended raises QueryCanceled."""
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


def test_ctrl_c_ends_the_wait_for_a_cancelled_query(dsn: str) -> None:
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


def test_ctrl_c_is_not_hidden_by_the_end_of_a_pipeline(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is raised, and not an error that it has caused."""

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
async def test_leaving_a_block_is_bounded_where_the_server_does_not_answer(
    dsn: str, monkeypatch: pytest.MonkeyPatch, onlooker: Onlooker, block: str, left_by: str
) -> None:
    """Where the server does not answer when a block is left, a cancellation still ends the waiting."""
    connection = await connect(dsn, cleanup_timeout=0.2)
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
    """A request to cancel that is not answered raises CancellationTimeout."""
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
