"""A request to cancel that may still arrive: its connection is not handed to another client."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET

import psycopg
import pytest
import trio
from connections import SLOW, Connection, ask, check_usable
from embedded_postgres import EmbeddedPostgres
from psycopg import capabilities
from psycopg.conninfo import make_conninfo
from serving import HOST, forward, listening
from timing import until
from tls_proxy import CANCEL_REQUEST, GSS_REQUEST, SSL_REQUEST

from whitepool.postgres import connect, open_pool

pytestmark = pytest.mark.skipif(
    not capabilities.has_cancel_safe(), reason="an older libpq does not see the end of its request"
)


class LateProxy:
    """Forwards everything, but has its way with the connections on which a request to cancel comes."""

    def __init__(self, server_port: int) -> None:
        self.address: dict[str, str] = {}
        self.end = "reset"
        """What the client sees of its request: a reset, or nothing at all."""
        self.delivered = trio.Event()
        """Set it, and the requests arrive at the server."""
        self.requests = 0
        self.arrived = 0
        self._server_port = server_port

    async def serve(self, near: trio.SocketStream) -> None:
        async with near:
            greeting = await near.receive_some(1000)
            while greeting in (SSL_REQUEST, GSS_REQUEST):
                await near.send_all(b"N")
                greeting = await near.receive_some(1000)
            async with await trio.open_tcp_stream(HOST, self._server_port) as far:
                if greeting.startswith(CANCEL_REQUEST[:8]):
                    self.requests += 1
                    if self.end == "reset":
                        near.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                        await near.aclose()
                    await self.delivered.wait()
                    await far.send_all(greeting)
                    await far.receive_some()
                    self.arrived += 1
                    return
                await far.send_all(greeting)
                await forward(near, far)


@asynccontextmanager
async def open_late_proxy(server: EmbeddedPostgres) -> AsyncIterator[LateProxy]:
    proxy = LateProxy(server.port)
    async with listening(proxy.serve) as port:
        proxy.address = {"host": HOST, "port": str(port)}
        yield proxy


@pytest.mark.parametrize("end", ["reset", "silence"])
async def test_a_late_request_does_not_reach_the_next_client(
    server: EmbeddedPostgres, end: str
) -> None:
    """A client's query ends by itself, and the request to cancel it comes to the server later."""
    async with (
        open_late_proxy(server) as proxy,
        open_pool(make_conninfo(server.dsn, **proxy.address), pool_size=1, max_overflow=0) as session,
    ):
        proxy.end = end
        with trio.move_on_after(0.05) as scope:
            async with session.worker() as connection:
                await connection.execute("SELECT pg_sleep(0.3)")
        assert scope.cancelled_caught
        assert proxy.requests
        async with session.worker() as connection, trio.open_nursery() as nursery:
            nursery.start_soon(connection.execute, "SELECT pg_sleep(0.5)")
            await trio.sleep(0.1)
            proxy.delivered.set()
        assert proxy.arrived == proxy.requests


@pytest.mark.parametrize("end", ["reset", "silence"])
async def test_a_request_of_the_clients_own_does_not_either(server: EmbeddedPostgres, end: str) -> None:
    """The same for `cancel_safe()`: the connection stays its client's, and is closed after it."""
    async with (
        open_late_proxy(server) as proxy,
        open_pool(make_conninfo(server.dsn, **proxy.address), pool_size=1, max_overflow=0) as session,
    ):
        proxy.end = end
        async with session.worker() as connection:
            with suppress(psycopg.OperationalError):
                await connection.cancel_safe(timeout=0.1)
            await check_usable(connection)
        async with session.worker() as another:
            assert another is not connection
        assert connection.closed


async def test_a_connection_is_not_handed_on_while_a_request_is_under_way(
    server: EmbeddedPostgres,
) -> None:
    """A task may still be waiting for the end of its request when another returns the connection."""
    async with (
        open_late_proxy(server) as proxy,
        open_pool(make_conninfo(server.dsn, **proxy.address), pool_size=1, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        proxy.end = "silence"
        async with session.worker() as connection:
            nursery.start_soon(connection.cancel_safe)
            await until(lambda: proxy.requests == 1)
        await until(lambda: connection.closed)
        proxy.delivered.set()


async def test_a_stream_left_early_is_closed_where_its_request_may_come_late(
    server: EmbeddedPostgres,
) -> None:
    """psycopg cancels the rest of a stream itself: after it the connection is usable, or closed."""
    async with open_late_proxy(server) as proxy:
        connection: Connection = await connect(make_conninfo(server.dsn, **proxy.address))
        query = "SELECT i, pg_sleep(0.001) FROM generate_series(1, 100) i"
        stream = connection.cursor().stream(query)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert proxy.requests
        assert connection.closed


async def test_a_request_that_was_refused_was_never_sent(server: EmbeddedPostgres) -> None:
    """Where nothing listens any more, a query that ends by itself leaves a usable connection."""
    async with open_pool(server.unix_dsn, pool_size=1, max_overflow=0) as session:
        with trio.move_on_after(0.05) as scope:
            async with session.worker() as connection:
                door = Path(connection.info.host) / f".s.PGSQL.{server.port}"
                moved = door.rename(door.with_name("moved-away"))
                await connection.execute("SELECT pg_sleep(0.2)")
        moved.rename(door)
        assert scope.cancelled_caught
        async with session.worker() as another:
            assert another is connection
            assert await ask(another, "SELECT 1") == 1


async def test_a_request_that_was_answered_leaves_no_doubt(connection: Connection) -> None:
    """The usual case: the server has closed the request's connection."""
    await connection.set_autocommit(True)
    with trio.move_on_after(0.05):
        await connection.execute(SLOW)
    assert connection.__worker_manager__.is_alive(connection)
    await check_usable(connection)
