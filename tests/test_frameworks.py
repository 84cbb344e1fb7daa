"""Services on FastAPI and Quart-Trio: a pool for each process, and what a client is told when it must
come back."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import fastapi_service
import httpx
import pytest
import quart_service
import trio
from connections import ask
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from program import EXAMPLES, everything_was_closed, open_database, until
from psycopg.rows import dict_row
from rollback_isolation import open_isolated_pool

BOUND = 40
"""Seconds that no test may take. All need much less, also on a busy machine."""

ITEM = "CREATE TABLE item (name text PRIMARY KEY, price int)"
TEA = {"name": "tea", "price": 3}


@asynccontextmanager
async def hypercorn(app: str, dsn: str, errors: Path) -> AsyncIterator[tuple[str, trio.Process]]:
    """Run an application in two processes, beside the one that starts them."""
    options = ["-k", "trio", "-w", "2", "--graceful-timeout", "6", "--bind", "127.0.0.1:0"]
    with errors.open("w") as stderr:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "hypercorn", *options, f"{app}:app"],
            cwd=EXAMPLES,
            env={**os.environ, "DATABASE_URL": dsn},
            stderr=stderr,
            start_new_session=True,
        )
    try:
        # Both say so, when they have a pool; the port is the same.
        while len(running := re.findall(r"Running on (http://[\d.:]+)", errors.read_text())) < 2:  # noqa: ASYNC240
            assert process.poll() is None
            await trio.sleep(0.05)
        assert running[0] == running[1]
        yield running[0], process
    finally:
        if process.returncode is None:
            os.killpg(process.pid, SIGKILL)
        sys.stderr.write(errors.read_text())  # noqa: ASYNC240


@pytest.mark.parametrize("app", ["fastapi_service", "quart_service"])
async def test_a_pool_in_each_process(app: str, server: EmbeddedPostgres, tmp_path: Path) -> None:
    """Two processes with two connections each serve on one port. SIGTERM ends both, and closes all."""
    with trio.fail_after(BOUND):
        async with (
            open_database(server) as (dsn, onlooker),
            hypercorn(app, dsn, tmp_path / "errors") as (url, process),
        ):
            await onlooker.execute(ITEM)
            await onlooker.execute("INSERT INTO item VALUES ('tea', 3)")
            others = (
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name <> 'onlooker'"
                " AND backend_type = 'client backend'"
            )
            assert await ask(onlooker, others) == 2 * 2

            async def get(path: str) -> Any:
                async with httpx.AsyncClient(base_url=url) as client:  # a new TCP connection
                    return (await client.get(path)).json()

            processes: dict[int, set[int]] = {}

            async def two_have_answered() -> bool:
                answer = await get("/process")
                processes.setdefault(answer["process"], set()).add(answer["connection"])
                return len(processes) == 2

            assert await get("/items/tea") == TEA
            if app == "fastapi_service":
                await until(two_have_answered)
                first, second = processes.values()
                assert not first & second
                assert process.pid not in processes
            process.send_signal(SIGTERM)
            assert await process.wait() == 0
            await everything_was_closed(onlooker)


@pytest.fixture
def item(onlooker: Onlooker, dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DATABASE_URL", dsn)
    onlooker.do(ITEM)
    yield
    onlooker.do("DROP TABLE item")


def client_of(state: Mapping[str, Any]) -> httpx.AsyncClient:
    """Make a client of the application, in this process. The state is what the lifespan yields."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await fastapi_service.app({**scope, "state": dict(state)}, receive, send)

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://shop")


@pytest.fixture
async def client(item: None) -> AsyncIterator[httpx.AsyncClient]:
    with trio.fail_after(BOUND):
        async with fastapi_service.lifespan(fastapi_service.app) as state, client_of(state) as client:
            yield client


@contextmanager
def locked(onlooker: Onlooker) -> Iterator[None]:
    onlooker.do("BEGIN")
    onlooker.do("LOCK TABLE item")
    yield
    onlooker.do("ROLLBACK")


def must_come_back(response: httpx.Response) -> bool:
    return (response.status_code, "retry-after" in response.headers) == (503, True)


async def test_fastapi_commits(client: httpx.AsyncClient, onlooker: Onlooker) -> None:
    """What an answer says is committed by then; there is no answer for what is not there."""
    assert (await client.get("/items/tea")).status_code == 404
    assert (await client.put("/items", json=TEA)).json() == TEA
    assert onlooker.ask("SELECT price FROM item") == 3
    assert (await client.get("/items/tea")).json() == TEA
    assert (await client.put("/items", json={"name": "tea"})).status_code == 422


async def test_fastapi_commits_before_it_answers(client: httpx.AsyncClient, onlooker: Onlooker) -> None:
    """A commit that fails is no 200."""
    onlooker.do("ALTER TABLE item ADD UNIQUE (price) DEFERRABLE INITIALLY DEFERRED")
    assert (await client.put("/items", json=TEA)).status_code == 200
    response = await client.put("/items", json={"name": "coffee", "price": 3})
    assert response.status_code == 500
    assert onlooker.ask("SELECT count(*) FROM item") == 1


async def test_fastapi_answers_503(
    client: httpx.AsyncClient, onlooker: Onlooker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that gets no connection in time must come back, and one whose query takes too long."""
    monkeypatch.setattr(fastapi_service, "REQUEST_TIMEOUT", 0)
    assert must_come_back(await client.get("/items/tea"))
    monkeypatch.setattr(fastapi_service, "REQUEST_TIMEOUT", 0.3)
    with locked(onlooker):
        assert must_come_back(await client.put("/items", json=TEA))
    monkeypatch.undo()
    assert (await client.get("/items/tea")).status_code == 404
    assert (await client.put("/items", json=TEA)).status_code == 200


async def test_fastapi_leaves_nothing(item: None, dsn: str, onlooker: Onlooker) -> None:
    """It works on a pool that is rolled back, too."""
    async with (
        open_isolated_pool(dsn, row_factory=dict_row) as session,
        client_of({"session": session}) as client,
    ):
        assert (await client.put("/items", json=TEA)).json() == TEA
        assert (await client.get("/items/tea")).json() == TEA
    assert onlooker.ask("SELECT count(*) FROM item") == 0


async def test_quart(item: None, onlooker: Onlooker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same: an answer, none, and a 503."""
    with trio.fail_after(BOUND):
        async with quart_service.app.test_app() as app:
            client = app.test_client()
            assert (await client.get("/items/tea")).status_code == 404
            onlooker.do("INSERT INTO item VALUES ('tea', 3)")
            assert await (await client.get("/items/tea")).get_json() == TEA
            monkeypatch.setattr(quart_service, "REQUEST_TIMEOUT", 0.3)
            with locked(onlooker):
                response = await client.get("/items/tea")
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
