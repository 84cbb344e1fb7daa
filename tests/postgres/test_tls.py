"""Connections through TLS: what each sslmode accepts, and that the pool can tell nothing else apart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
import trustme
from connections import backend, check_usable
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from psycopg.conninfo import make_conninfo
from serving import HOST, listening
from timing import until
from tls_proxy import TLSProxy, open_tls_proxy, server_context
from workshop import check_books

import whitepool
from whitepool.postgres import PostgresManager, TrioConnection, connect, open_pool

APPLICATION = "test_tls"
SLOW = "SELECT pg_sleep(30)"
END_ALL = f"""
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{APPLICATION}'
"""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def stranger() -> trustme.CA:
    """An authority that the other side does not know."""
    return trustme.CA()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def roots(authority: trustme.CA, folder: Path) -> str:
    """What `sslrootcert` needs to trust the proxy."""
    authority.cert_pem.write_to_path(folder / "roots.pem")
    return str(folder / "roots.pem")


@pytest.fixture(scope="module")
def foreign_roots(stranger: trustme.CA, folder: Path) -> str:
    stranger.cert_pem.write_to_path(folder / "foreign.pem")
    return str(folder / "foreign.pem")


@pytest.fixture
async def proxy(server: EmbeddedPostgres, authority: trustme.CA) -> AsyncIterator[TLSProxy]:
    """A server with TLS, and a certificate for 127.0.0.1."""
    async with open_tls_proxy(server.port, server_context(authority)) as proxy:
        yield proxy


@pytest.fixture
async def plain_proxy(server: EmbeddedPostgres) -> AsyncIterator[TLSProxy]:
    """A server without TLS."""
    async with open_tls_proxy(server.port, None) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def no_certificates_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in ~/.postgresql is not part of the test."""
    for name in ("CERT", "KEY", "ROOTCERT", "CRL"):
        monkeypatch.setenv(f"PGSSL{name}", str(folder / "none"))


def at(proxy: TLSProxy, **keywords: Any) -> str:
    return make_conninfo(
        f"host={HOST} port={proxy.port} user=postgres dbname=postgres",
        application_name=APPLICATION,
        **keywords,
    )


def client_certificate(authority: trustme.CA, folder: Path, name: str) -> dict[str, str]:
    """Make the keywords for a client with a certificate."""
    certificate = authority.issue_cert(identity := "postgres@example.org", common_name=identity)
    key, chain = folder / f"{name}.key", folder / f"{name}.pem"
    key.touch(mode=0o600)  # libpq refuses a key that others can read
    certificate.private_key_pem.write_to_path(key)
    certificate.cert_chain_pems[0].write_to_path(chain)
    return {"sslkey": str(key), "sslcert": str(chain)}


async def check_connects(conninfo: str, *, secure: bool) -> None:
    """A connection and a pool get in, and both say whether TLS is in use."""
    with trio.fail_after(5):
        async with await connect(conninfo) as connection:
            assert connection.pgconn.ssl_in_use is secure
            await check_usable(connection)
        async with open_pool(conninfo, pool_size=2) as pool:
            async with pool.worker() as worker:
                assert worker.pgconn.ssl_in_use is secure
                await worker.execute("SELECT 1")  # the transaction is rolled back by the pool
            async with pool.worker() as worker:
                await check_usable(worker)
        check_books(pool)


async def check_refused(conninfo: str, what: str) -> None:
    """Neither a connection nor a pool gets in, and both say why."""
    with trio.fail_after(5):
        with pytest.raises(psycopg.OperationalError, match=what):
            await connect(conninfo)
        async with open_pool(conninfo, pool_size=1, lazy=True) as pool:
            with pytest.raises(whitepool.PoolStartError, match=what):
                await pool.nonblock_checkout()


async def check_refused_for_good(conninfo: str, what: str) -> None:
    """The refusal ends the opening of a pool, too: it would only be repeated."""
    await check_refused(conninfo, what)
    with trio.fail_after(5), pytest.raises(whitepool.PoolStartError, match=what):
        async with open_pool(conninfo, pool_size=1):
            pytest.fail("the pool was opened")


# -- What each sslmode makes of a server with TLS -------------------------------------------------


@pytest.mark.parametrize("mode", ["disable", "allow"])
async def test_modes_that_prefer_no_tls(proxy: TLSProxy, mode: str) -> None:
    """disable and allow don't ask a server for TLS that takes them without."""
    await check_connects(at(proxy, sslmode=mode), secure=False)
    assert proxy.encrypted == 0
    assert proxy.plain == 3


@pytest.mark.parametrize("mode", ["prefer", "require"])
async def test_modes_that_believe_any_certificate(proxy: TLSProxy, mode: str) -> None:
    """prefer and require use TLS where there is TLS, and believe any certificate."""
    await check_connects(at(proxy, sslmode=mode), secure=True)
    assert proxy.plain == 0
    assert proxy.encrypted == 3


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_a_certificate_of_a_known_authority(proxy: TLSProxy, roots: str, mode: str) -> None:
    """A certificate for the right name, from a known authority, satisfies every mode."""
    await check_connects(at(proxy, sslmode=mode, sslrootcert=roots), secure=True)


async def test_the_information_about_tls(proxy: TLSProxy, roots: str) -> None:
    """psycopg's own information about a connection knows of the TLS in use."""
    async with await connect(at(proxy, sslmode="verify-full", sslrootcert=roots)) as connection:
        parameters = connection.info.get_parameters()
        assert connection.pgconn.ssl_in_use
        assert parameters["sslmode"] == "verify-full"
        assert connection.info.port == proxy.port


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
async def test_a_certificate_of_a_strange_authority(
    proxy: TLSProxy, foreign_roots: str, mode: str
) -> None:
    """The verifying modes refuse a certificate from an authority they don't know."""
    await check_refused_for_good(
        at(proxy, sslmode=mode, sslrootcert=foreign_roots), "certificate verify failed"
    )
    assert proxy.encrypted == proxy.plain == 0


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
async def test_verifying_without_an_authority(proxy: TLSProxy, folder: Path, mode: str) -> None:
    """The verifying modes need the certificate of an authority, and say so."""
    nowhere = str(folder / "nowhere.pem")
    await check_refused_for_good(
        at(proxy, sslmode=mode, sslrootcert=nowhere), "nowhere.pem.* does not exist"
    )


async def test_a_certificate_for_another_name(
    server: EmbeddedPostgres, authority: trustme.CA, roots: str
) -> None:
    """verify-ca does not mind the name in the certificate, verify-full does."""
    context = server_context(authority, name="elsewhere.example")
    async with open_tls_proxy(server.port, context) as proxy:
        await check_connects(at(proxy, sslmode="verify-ca", sslrootcert=roots), secure=True)
        await check_refused_for_good(
            at(proxy, sslmode="verify-full", sslrootcert=roots), "elsewhere.example.* does not match"
        )


async def test_a_name_that_is_looked_up(
    server: EmbeddedPostgres, authority: trustme.CA, roots: str
) -> None:
    """The name that verify-full compares is the one that was given, not the address it stands for."""
    async with open_tls_proxy(server.port, server_context(authority, name="localhost")) as proxy:
        by_name = at(proxy, host="localhost", sslmode="verify-full", sslrootcert=roots)
        await check_connects(by_name, secure=True)
        by_both = at(proxy, host="localhost", hostaddr=HOST, sslmode="verify-full", sslrootcert=roots)
        await check_connects(by_both, secure=True)


@pytest.mark.skipif(psycopg.pq.version() < 170000, reason="new in libpq 17")
async def test_tls_without_asking_first(proxy: TLSProxy, roots: str) -> None:
    """sslnegotiation=direct starts with TLS at once."""
    direct = at(proxy, sslmode="verify-full", sslrootcert=roots, sslnegotiation="direct")
    await check_connects(direct, secure=True)


# -- A server without TLS -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer"])
async def test_modes_that_do_without_tls(plain_proxy: TLSProxy, mode: str) -> None:
    """A server that declines TLS is good enough for these."""
    await check_connects(at(plain_proxy, sslmode=mode), secure=False)


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_modes_that_insist_on_tls(plain_proxy: TLSProxy, roots: str, mode: str) -> None:
    """A server that declines TLS is refused by these."""
    conninfo = at(plain_proxy, sslmode=mode, sslrootcert=roots)
    await check_refused_for_good(conninfo, "server does not support SSL")
    assert plain_proxy.plain == 0


# -- Certificates of clients ----------------------------------------------------------------------


@pytest.fixture
async def strict_proxy(server: EmbeddedPostgres, authority: trustme.CA) -> AsyncIterator[TLSProxy]:
    """A server that demands a certificate of its clients."""
    context = server_context(authority, clients=authority)
    async with open_tls_proxy(server.port, context) as proxy:
        yield proxy


async def test_a_client_with_a_certificate(
    strict_proxy: TLSProxy, authority: trustme.CA, roots: str, folder: Path
) -> None:
    """A client that has the certificate which the server demands is let in."""
    certificate = client_certificate(authority, folder, "client")
    full = at(strict_proxy, sslmode="verify-full", sslrootcert=roots, **certificate)
    await check_connects(full, secure=True)


async def test_a_client_without_a_certificate(strict_proxy: TLSProxy) -> None:
    """A client that has no certificate is not let in where the server demands one."""
    await check_refused(at(strict_proxy, sslmode="require"), "SSL error|SSL SYSCALL error")
    assert strict_proxy.encrypted == 0


async def test_a_client_with_a_strange_certificate(
    strict_proxy: TLSProxy, stranger: trustme.CA, folder: Path
) -> None:
    """A certificate that the server's authority has not issued is as good as none."""
    certificate = client_certificate(stranger, folder, "stranger")
    conninfo = at(strict_proxy, sslmode="require", **certificate)
    await check_refused(conninfo, "SSL error|SSL SYSCALL error")
    assert strict_proxy.encrypted == 0


# -- Life with TLS --------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_a_peer_that_hangs_up_is_noticed(proxy: TLSProxy, reset: bool) -> None:
    """Idle connections whose TLS ends without a word are replaced before a client gets them."""
    with trio.fail_after(5):
        async with open_pool(at(proxy, sslmode="require"), pool_size=3) as pool:
            await until(lambda: pool.statistics().idle == 3)
            proxy.hang_up(reset=reset)
            await until(lambda: pool.statistics().lost == 3)
            await until(lambda: pool.statistics().idle == 3)
            for _ in range(3):
                async with pool.worker() as connection:
                    assert connection.pgconn.ssl_in_use
                    await check_usable(connection)
            check_books(pool)


async def test_a_server_that_says_goodbye_is_noticed(proxy: TLSProxy, onlooker: Onlooker) -> None:
    """Idle connections that the server ends, with its reason sent through TLS, are replaced."""
    with trio.fail_after(5):
        async with open_pool(at(proxy, sslmode="require"), pool_size=3) as pool:
            onlooker.do(END_ALL)
            await until(lambda: pool.statistics().lost == 3)
            await until(lambda: pool.statistics().idle == 3)
            async with pool.worker() as connection:
                await check_usable(connection)


async def test_a_hang_up_during_a_query(proxy: TLSProxy, onlooker: Onlooker) -> None:
    """A client whose connection goes down with its query gets an error, and the pool a new worker."""
    with trio.fail_after(5):
        async with open_pool(at(proxy, sslmode="require"), pool_size=1) as pool:

            async def ask() -> None:
                async with pool.worker() as connection:
                    with pytest.raises(psycopg.OperationalError):
                        await connection.execute(SLOW)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await until(lambda: onlooker.active(APPLICATION) == 1)
                proxy.hang_up()
            async with pool.worker() as connection:
                await check_usable(connection)
            assert pool.statistics().started == 2
    # The server has not noticed, as it has nothing to say yet.
    onlooker.do(END_ALL)


async def test_a_query_is_cancelled_through_tls(proxy: TLSProxy, onlooker: Onlooker) -> None:
    """A cancelled query ends on the server too, and its connection serves the next client."""
    async with open_pool(at(proxy, sslmode="require"), pool_size=1, max_overflow=0) as pool:
        with trio.fail_after(5):
            async with pool.worker() as connection:
                mine = backend(connection)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(connection.execute, SLOW)
                        await onlooker.until_active(mine)
                        scope.cancel()
                assert scope.cancelled_caught
                assert onlooker.state(mine) != "active"
            async with pool.worker() as connection:
                assert backend(connection) == mine
                await check_usable(connection)
        # As of version 17, libpq encrypts the request where it encrypted the connection.
        assert set(proxy.cancellations) == {psycopg.pq.version() >= 170000}


async def test_an_attempt_that_hangs_in_the_handshake(server: EmbeddedPostgres) -> None:
    """Connecting gives up, and can be cancelled, where the server is silent in the handshake."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(8)
            await stream.send_all(b"S")
            await trio.sleep_forever()

    async with listening(serve) as port:
        silent = f"host={HOST} port={port} user=postgres sslmode=require"
        with trio.move_on_after(0.1) as scope:
            await connect(silent)
        assert scope.cancelled_caught
        with trio.fail_after(4), pytest.raises(psycopg.errors.ConnectionTimeout):
            await connect(silent, connect_timeout=2)


@pytest.mark.parametrize("record", [8192, 100])
async def test_much_to_read_and_to_write(proxy: TLSProxy, record: int) -> None:
    """Large parameters and results pass in both directions, in large and in small records."""
    proxy.record = record
    size = 200 * record
    with trio.fail_after(10):
        async with await connect(at(proxy, sslmode="require")) as connection:
            for length in (1, record - 1, record, record + 1, size):
                text = "x" * length
                cursor = await connection.execute("SELECT %s::text, repeat('y', %s)", (text, length))
                assert await cursor.fetchone() == (text, "y" * length)
            rows = "SELECT repeat('z', 1000) FROM generate_series(1, %s)"
            cursor = await connection.execute(rows, (record // 5,))
            assert len(await cursor.fetchall()) == record // 5


async def test_many_clients_through_tls(proxy: TLSProxy) -> None:
    """Many clients share a pool of encrypted connections."""
    answers: list[int] = []

    async def client(number: int, pool: whitepool.Session[TrioConnection[Any]]) -> None:
        for _ in range(5):
            async with pool.worker() as connection, connection.transaction():
                cursor = await connection.execute("SELECT %s::int", (number,))
                row = await cursor.fetchone()
                assert row is not None
                answers.append(row[0])

    with trio.fail_after(10):
        manager = PostgresManager(at(proxy, sslmode="require"))
        async with whitepool.open_pool(manager, pool_size=3, max_overflow=2) as pool:
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(client, number, pool)
            check_books(pool)
    assert sorted(answers) == sorted(list(range(20)) * 5)
    assert proxy.plain == 0
