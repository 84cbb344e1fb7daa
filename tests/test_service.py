"""The example service, from the outside: as a process, under load, against a real server."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, cast
from uuid import uuid4

import httpx
import hypercorn.trio
import pytest
import trio
from connections import Connection, ask
from embedded_postgres import EmbeddedPostgres
from hypercorn.config import Config
from program import (
    Errors,
    everything_was_closed,
    open_database,
    refuses,
    run_example,
    until,
)
from service.app import app

from whitepool.postgres import connect

LOAD = str(Path(__file__).parent / "load.py")

BOUND = 40
"""Seconds that no test may take. All need much less, also on a busy machine."""


class Service:
    """A client of the service, with some insight."""

    def __init__(self, url: str) -> None:
        # Requests that wait on purpose must not keep others from being sent.
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=url, limits=limits, timeout=BOUND, verify=False)
        self.address = self.http.base_url.host, self.http.base_url.port or 80

    async def transfer(self, payer: int = 1, payee: int = 2, id: str | None = None) -> int:
        """Move 1 from one account to another, and return the status."""
        order = {"payer": payer, "payee": payee, "amount": 1}
        response = await self.http.put(f"/transfers/{id or uuid4()}", json=order)
        assert response.status_code in (200, 201, 503)
        # A client that is refused is told when to come back.
        assert ("retry-after" in response.headers) == (response.status_code == 503)
        return response.status_code

    async def is_ready(self) -> bool:
        return (await self.http.get("/readyz")).is_success

    async def is_unready(self) -> bool:
        return not await self.is_ready()

    async def statistic(self, name: str) -> int:
        return int((await self.http.get("/readyz")).json()[name])

    async def counts(self, name: str, number: int) -> bool:
        return await self.statistic(name) == number


@asynccontextmanager
async def run_service(
    errors: Errors, **environment: str
) -> AsyncIterator[tuple[Service, trio.Process]]:
    """Run the service as a process until the end of a block."""
    async with run_example("-m", "service", errors=errors, **environment) as (process, url):
        service = Service(url)
        async with service.http:
            yield service, process


@asynccontextmanager
async def serve(dsn: str, monkeypatch: pytest.MonkeyPatch, **settings: float) -> AsyncIterator[Service]:
    """Run the service in this process, with one connection, and one more when that is busy."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    for name, value in {"POOL_SIZE": 1, **settings}.items():
        monkeypatch.setattr(f"service.app.{name}", value)
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.loglevel = "WARNING"
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        run = partial(hypercorn.trio.serve, cast("Any", app), config, shutdown_trigger=stop.wait)
        (url,) = await nursery.start(run)
        service = Service(url)
        async with service.http:
            yield service
        stop.set()


@pytest.fixture
def errors(tmp_path: Path) -> Errors:
    return Errors(tmp_path / "errors")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for temporary files, of which none may be left at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as another user
        yield folder
        assert list(folder.iterdir()) == []


async def open_accounts(onlooker: Connection) -> None:
    """Open accounts 1 to 4, with a million on each, as soon as the service has made the table."""

    async def has_table() -> bool:
        return bool(await ask(onlooker, "SELECT to_regclass('account') IS NOT NULL"))

    await until(has_table)
    await onlooker.execute(
        "INSERT INTO account (owner, balance) SELECT 'Ada', 1000000 FROM generate_series(1, 4)"
    )


async def balances(onlooker: Connection) -> list[int]:
    """Return what is on the accounts, less the million."""
    cursor = await onlooker.execute("SELECT balance - 1000000 FROM account ORDER BY id")
    return [row[0] for row in await cursor.fetchall()]


async def transfers(onlooker: Connection) -> list[str]:
    cursor = await onlooker.execute("SELECT id::text FROM transfer ORDER BY id")
    return [row[0] for row in await cursor.fetchall()]


@asynccontextmanager
async def locked(dsn: str, account: int) -> AsyncIterator[int]:
    """Make transfers of an account wait until the end of a block; yield the process that locks it."""
    async with await connect(dsn, application_name="onlooker") as holder:
        await holder.execute("SELECT FROM account WHERE id = %s FOR UPDATE", (account,))
        yield holder.info.backend_pid


async def how_many_wait_for(onlooker: Connection, holder: int) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
    return int(await ask(onlooker, query, holder))


async def test_accounts_and_transfers(folder: Path, errors: Errors) -> None:
    """Money moves once, however often a client says so, and never more than there is.

    Without DATABASE_URL there is a server, which is removed at the end.
    """
    with trio.fail_after(BOUND):
        async with run_service(errors, DATABASE_URL="", TMPDIR=str(folder)) as (service, process):
            http = service.http
            for id, owner in (1, "Ada"), (2, "Bo"):
                response = await http.post("/accounts", json={"owner": owner, "balance": 10})
                assert response.status_code == 201
                assert response.json() == {"id": id, "owner": owner, "balance": 10}
            path = f"/transfers/{uuid4()}"
            order = {"payer": 1, "payee": 2, "amount": 7}
            for status in 201, 200, 200:
                assert (await http.put(path, json=order)).status_code == status
            for id, balance in (1, 3), (2, 17):
                assert (await http.get(f"/accounts/{id}")).json()["balance"] == balance
            nonsense: object
            for nonsense in (
                order,  # not that much money is left
                {**order, "amount": -1},
                {**order, "amount": 10**30},
                {**order, "payee": 99},
                {**order, "amount": 1.5},
                {"payer": 1},
                [],
            ):
                response = await http.put(f"/transfers/{uuid4()}", json=nonsense)
                assert response.status_code == 422
            nameless = await http.post("/accounts", json={"owner": None, "balance": 1})
            assert nameless.status_code == 422
            assert (await http.get("/accounts/99")).status_code == 404
            assert (await http.get("/healthz")).status_code == 200
            assert await service.is_ready()
            assert await service.counts("in_use", 0)
            process.send_signal(SIGINT)
            assert await process.wait() == 0
            assert errors.read() == ""


async def test_sigterm_loses_no_request(server: EmbeddedPostgres, errors: Errors) -> None:
    """A service that is told to stop in the middle of its work finishes it, and leaves nothing."""
    outcomes: dict[str, list[str]] = {}
    slow = str(uuid4())

    async def load(url: str) -> None:
        clients = await trio.run_process([sys.executable, LOAD, url, "8"], capture_stdout=True)
        outcomes.update(json.loads(clients.stdout))

    async def ask_slowly(service: Service) -> None:
        assert await service.transfer(3, 4, slow) == 201

    with trio.fail_after(BOUND):
        async with (
            open_database(server) as (dsn, onlooker),
            run_service(errors, DATABASE_URL=dsn, REQUEST_TIMEOUT="20", DRAIN_NOTICE=str(BOUND)) as (
                service,
                process,
            ),
            await trio.open_tcp_stream(*service.address) as silent,
            trio.open_nursery() as slow_client,
        ):
            await open_accounts(onlooker)
            async with locked(dsn, account=3) as holder:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(load, str(service.http.base_url))

                    async def is_in_the_middle() -> bool:
                        return len(await transfers(onlooker)) >= 100

                    async def is_slow() -> bool:
                        return await how_many_wait_for(onlooker, holder) == 1

                    await until(is_in_the_middle)
                    slow_client.start_soon(ask_slowly, service)
                    await until(is_slow)
                    process.send_signal(SIGTERM)
                    await until(service.is_unready)
                    # The load ends by itself: each client is told to try another server, and does.

                # From here on no client needs the notice any more, so cut it short.
                process.send_signal(SIGTERM)
                await until(lambda: refuses(service.address))
                assert await silent.receive_some() == b""  # which may not hold up anything
                assert await is_slow()
                assert process.poll() is None
            with trio.fail_after(10):
                assert await process.wait() == 0
            await everything_was_closed(onlooker)
            assert errors.read() == ""
            assert list(outcomes) == ["201"]  # nothing else than "created"
            assert await transfers(onlooker) == sorted([*outcomes["201"], slow])
            count = len(outcomes["201"])
            assert await balances(onlooker) == [-count, count, -1, 1]


@pytest.fixture
def mortal_server() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as server:
        yield server


async def test_it_heals(mortal_server: EmbeddedPostgres, errors: Errors) -> None:
    """When its database crashes, clients are asked to come back, until it is up again; no restart."""
    done: list[str] = []
    stop = trio.Event()

    async def repeat(service: Service) -> None:
        """Be a client that repeats each transfer until it is done."""
        while not stop.is_set():
            id = str(uuid4())
            while await service.transfer(id=id) == 503:
                await trio.sleep(0.01)
            done.append(id)

    with trio.fail_after(BOUND):
        async with (
            await connect(mortal_server.dsn, autocommit=True) as onlooker,
            run_service(errors, DATABASE_URL=mortal_server.dsn, REQUEST_TIMEOUT="3") as (service, _),
        ):
            await open_accounts(onlooker)
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(repeat, service)

                async def is_busy(beyond: int = 0) -> bool:
                    return len(done) >= beyond + 50

                await until(is_busy)
                await trio.to_thread.run_sync(mortal_server.stop, "immediate")
                await until(service.is_unready)
                assert await service.transfer() == 503
                assert (await service.http.get("/healthz")).status_code == 200
                assert (await service.http.get("/accounts/1")).status_code == 503

                await trio.to_thread.run_sync(mortal_server.start)
                await until(service.is_ready)
                before = len(done)
                await until(lambda: is_busy(before))
                stop.set()
            async with await connect(mortal_server.dsn, autocommit=True) as onlooker:
                assert await transfers(onlooker) == sorted(done)
                assert await balances(onlooker) == [-len(done), len(done), 0, 0]
            assert "Traceback" not in errors.read()


async def test_an_outage_is_answered_at_once(mortal_server: EmbeddedPostgres, errors: Errors) -> None:
    """While the database is away, each request gets its 503 in milliseconds; a second after its return
    at the latest, each is served. It may be away when the service starts, too."""
    refused: list[float] = []

    async def status(service: Service) -> int:
        began = trio.current_time()
        status = await service.transfer()
        if status == 503:
            refused.append(trio.current_time() - began)
        return status

    async def is_back(service: Service) -> float:
        """Return the seconds from the return of the database to the first request that is served."""
        await trio.to_thread.run_sync(mortal_server.start)
        began = trio.current_time()
        while await status(service) == 503:
            await trio.sleep(0.01)
        return trio.current_time() - began

    async def stays_away(service: Service) -> None:
        while (await service.http.get("/readyz")).json().get("state") != "down":
            await trio.sleep(0.01)
        # From then on the outage has lasted for longer than a request would wait.
        await trio.sleep(0.5 + 0.1)
        refused.clear()
        for _ in range(100):
            assert await status(service) == 503
            await trio.sleep(0.01)  # until the next attempt of the pool, and beyond it
        assert sorted(refused)[50] < 0.05
        assert max(refused) < 0.4  # on a busy machine; without it a request waits for 0.5 s
        answer = await service.http.get("/readyz")
        assert (answer.status_code, answer.json()["state"]) == (503, "down")
        assert (await service.http.get("/healthz")).status_code == 200

    with trio.fail_after(BOUND):
        await trio.to_thread.run_sync(mortal_server.stop, "immediate")
        async with run_service(errors, DATABASE_URL=mortal_server.dsn, REQUEST_TIMEOUT="1") as (
            service,
            _,
        ):
            await stays_away(service)
            await trio.to_thread.run_sync(mortal_server.start)
            await until(service.is_ready)
            async with await connect(mortal_server.dsn, autocommit=True) as onlooker:
                await open_accounts(onlooker)
            assert await status(service) == 201
            for _ in range(2):
                await trio.to_thread.run_sync(mortal_server.stop, "immediate")
                await until(service.is_unready)
                await stays_away(service)
                assert await is_back(service) < 1
        assert "Traceback" not in errors.read()


async def test_a_long_queue_is_not_made_longer(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that comes when 20 are waiting is refused at once. The others are served."""
    statuses: list[int] = []

    async def one(service: Service) -> None:
        statuses.append(await service.transfer())

    with trio.fail_after(BOUND):
        async with (
            open_database(server) as (dsn, onlooker),
            serve(dsn, monkeypatch, REQUEST_TIMEOUT=30, CHECKOUT_TIMEOUT=20) as service,
            trio.open_nursery() as nursery,
        ):
            await open_accounts(onlooker)
            async with locked(dsn, account=1):
                for doing, count in ("in_use", 2), ("waiting", 20):
                    for _ in range(count):
                        nursery.start_soon(one, service)
                    await until(partial(service.counts, doing, count))
                assert await service.is_ready()  # the next instance would be no better
                assert await service.transfer() == 503
                assert statuses == []
                assert await service.counts("overloads", 1)

            async def are_served() -> bool:
                return statuses == [201] * 22

            await until(are_served)


async def test_no_request_waits_longer_than_it_may(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that gets no connection in time is refused, and its client may try another server."""
    with trio.fail_after(BOUND):
        async with (
            open_database(server) as (dsn, onlooker),
            serve(dsn, monkeypatch, REQUEST_TIMEOUT=30, CHECKOUT_TIMEOUT=0.2) as service,
            trio.open_nursery() as nursery,
        ):
            await open_accounts(onlooker)
            async with locked(dsn, account=1):
                # Also these two may have to try more than once, on a busy machine.
                while not await service.counts("in_use", 2):
                    nursery.start_soon(service.transfer)
                    await trio.sleep(0.1)
                before = await service.statistic("timeouts")
                assert await service.transfer() == 503
                assert await service.statistic("timeouts") > before


async def test_a_request_has_a_deadline(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that waits too long for the database is answered, and its query is cancelled."""
    with trio.fail_after(BOUND):
        async with (
            open_database(server) as (dsn, onlooker),
            serve(dsn, monkeypatch, REQUEST_TIMEOUT=1) as service,
        ):
            await open_accounts(onlooker)
            async with locked(dsn, account=1) as holder:
                assert await service.transfer() == 503
                assert await how_many_wait_for(onlooker, holder) == 0
            assert await transfers(onlooker) == []

            async def is_served() -> bool:
                return await service.transfer() == 201

            await until(is_served)


async def test_connections_to_a_demoted_primary_are_left(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that can only read is called broken, and the next one may do better."""
    with trio.fail_after(BOUND):
        async with (
            open_database(server) as (dsn, onlooker),
            serve(dsn, monkeypatch) as service,
        ):
            name = onlooker.info.dbname
            read_only = f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode()
            read_write = f"ALTER DATABASE {name} RESET default_transaction_read_only".encode()
            kill = (
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE application_name = %s"
            )
            await open_accounts(onlooker)

            async def is_called_broken() -> bool:
                await service.transfer()
                return await service.statistic("destroyed") > 0

            async def is_served() -> bool:
                return await service.transfer() == 201

            # These settings are for new connections.
            await onlooker.execute(read_only)
            assert await ask(onlooker, kill, name) == 1
            await until(is_called_broken)
            await onlooker.execute(read_write)
            await until(is_served)
