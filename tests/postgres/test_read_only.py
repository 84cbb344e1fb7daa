"""A server turns read-only and keeps its sessions: the pool connects to another that takes writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from connections import Connection, ask, backend
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from proxy import open_proxy
from psycopg.conninfo import make_conninfo
from standby import REPLICATING, Standby, replicate_synchronously
from timing import until
from workshop import check_books

import whitepool
from whitepool.postgres import PostgresSession, connect, open_pool

NOT_BY_DEFAULT = "25006: the server is read-only: default_transaction_read_only is on"
IN_STANDBY = "25006: the server is read-only: in_hot_standby is on"

Session = PostgresSession[Any]
Write = Callable[[Session], Awaitable[None]]


def conninfo_of(first: EmbeddedPostgres, second: EmbeddedPostgres, want: str | None) -> str:
    return make_conninfo(
        "user=postgres dbname=postgres host=127.0.0.1,127.0.0.1",
        port=f"{first.port},{second.port}",
        target_session_attrs=want,
    )


@dataclass
class Servers:
    """Two servers that take writes, until the first of them turns read-only."""

    first: EmbeddedPostgres
    second: EmbeddedPostgres
    onlooker: Onlooker
    """Of the first. Its session is the oldest, and the server tells the oldest last of a change."""

    def conninfo(self, want: str | None = "read-write") -> str:
        return conninfo_of(self.first, self.second, want)

    def turn(self, setting: str) -> None:
        """Have the first take no writes, or take them again. Its sessions live on."""
        self.onlooker.do(f"ALTER SYSTEM SET default_transaction_read_only = {setting}")
        self.onlooker.do("SELECT pg_reload_conf()")
        # Once this session knows, each of the others learns it with its next query.
        while self.onlooker.ask("SHOW default_transaction_read_only") != setting:
            pass


@pytest.fixture(scope="module")
def both() -> Iterator[Servers]:
    with ExitStack() as stack:
        first, second = [stack.enter_context(EmbeddedPostgres()) for _ in range(2)]
        onlookers = [Onlooker(server.dsn) for server in (first, second)]
        for onlooker in onlookers:
            onlooker.do("CREATE TABLE notes (note text)")
        yield Servers(first, second, onlookers[0])
        for onlooker in onlookers:
            onlooker.close()


@pytest.fixture
def servers(both: Servers) -> Iterator[Servers]:
    yield both
    both.turn("off")


async def ports(session: Session) -> set[int]:
    """The ports to which the pool's connections go, of which none is in use."""
    async with AsyncExitStack() as stack:
        held = [
            await stack.enter_async_context(session.worker())
            for _ in range(session.statistics().pool_size)
        ]
        return {connection.info.port for connection in held}


async def write_and_return(session: Session) -> None:
    async with session.worker() as connection:
        await connection.execute("INSERT INTO notes VALUES ('w')")
        await connection.commit()


async def write_in_a_block(session: Session) -> None:
    async with session.worker() as connection, connection.transaction():
        await connection.execute("INSERT INTO notes VALUES ('t')")


async def write_and_commit(session: Session) -> None:
    async with session.connection() as connection:
        await connection.execute("INSERT INTO notes VALUES ('c')")


async def write_or_destroy(session: Session) -> None:
    resource = await session.block_checkout()
    try:
        await resource.get().execute("INSERT INTO notes VALUES ('d')")
        await resource.get().commit()
    except psycopg.errors.ReadOnlySqlTransaction:
        session.destroyed(resource)
        raise
    session.checkin(resource)


@pytest.mark.parametrize("reset", ["rollback", "session"])
@pytest.mark.parametrize(
    "write", [write_and_return, write_in_a_block, write_and_commit, write_or_destroy]
)
async def test_one_error_and_no_straggler(servers: Servers, write: Write, reset: Any) -> None:
    """The client that finds out gets an error. At once all others are probed, and replaced."""
    left: list[tuple[str, str]] = []
    hooks = whitepool.Hooks(on_destroy=lambda reason, words: left.append((reason, words)))
    async with open_pool(
        servers.conninfo(), pool_size=5, max_overflow=0, reset=reset, hooks=hooks
    ) as session:
        await write(session)
        assert await ports(session) == {servers.first.port}
        await until(lambda: session.statistics().idle == 5)
        servers.turn("on")
        errors = 0
        for _ in range(20):
            try:
                await write(session)
            except psycopg.errors.ReadOnlySqlTransaction:
                errors += 1
        assert errors == 1
        await until(lambda: len(left) == 5 and session.statistics().idle == 5)
        assert await ports(session) == {servers.second.port}
        found = "destroyed" if write is write_or_destroy else "dead"
        assert left == [(found, NOT_BY_DEFAULT)] + [("check_failed", NOT_BY_DEFAULT)] * 4
        now = session.statistics()
        assert now.last_words == {found: NOT_BY_DEFAULT, "check_failed": NOT_BY_DEFAULT}
        assert (now.started, now.discarded) == (10, 0)
        check_books(session)


async def test_a_reader_finds_out_without_an_error(servers: Servers) -> None:
    """Any answer tells. Its transaction has written something, so the rollback is counted."""
    async with open_pool(servers.conninfo(), pool_size=2, max_overflow=0) as session:
        async with session.worker() as connection:
            await connection.execute("INSERT INTO notes VALUES ('lost')")
            servers.turn("on")
            assert await ask(connection, "SELECT 1") == 1
        await until(lambda: session.statistics().lost == 2 and session.statistics().idle == 2)
        assert await ports(session) == {servers.second.port}
        assert session.statistics().discarded == 1


async def test_probes_find_out_without_a_client(servers: Servers) -> None:
    """One of them does, and then all others are probed."""
    async with open_pool(
        servers.conninfo(), pool_size=5, max_overflow=0, check_interval=0.2
    ) as session:
        servers.turn("on")
        await until(lambda: session.statistics().lost == 5 and session.statistics().idle == 5)
        assert await ports(session) == {servers.second.port}
        assert session.statistics().last_words == {"check_failed": NOT_BY_DEFAULT}


@pytest.mark.parametrize("how", ["environment", "service"])
async def test_a_wish_from_elsewhere(
    servers: Servers, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq is asked what is in effect: it may come from the environment, or from a service file."""
    conninfo = servers.conninfo(want=None)
    if how == "environment":
        monkeypatch.setenv("PGTARGETSESSIONATTRS", "read-write")
    else:
        path = tmp_path / "services"
        path.write_text("[shop]\ntarget_session_attrs=read-write\n")
        monkeypatch.setenv("PGSERVICEFILE", str(path))
        conninfo += " service=shop"
    async with open_pool(conninfo, pool_size=1, max_overflow=0) as session:
        servers.turn("on")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await write_and_return(session)
        assert await ports(session) == {servers.second.port}


@pytest.mark.parametrize("want", ["any", "primary", None])
async def test_who_does_not_ask_for_writes_keeps_them(servers: Servers, want: str | None) -> None:
    """A primary whose transactions are read-only by default is a primary."""
    async with open_pool(servers.conninfo(want), pool_size=1, max_overflow=0) as session:
        servers.turn("on")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await write_and_return(session)
        assert await ports(session) == {servers.first.port}
        assert session.statistics().last_words == {}


async def test_a_factory_of_connections(servers: Servers) -> None:
    """The pool treats its connections in the same way."""

    async def create() -> Connection:
        connection: Connection = await connect(servers.conninfo())
        return connection

    async with whitepool.open_pool(create, pool_size=3, max_overflow=0) as session:
        servers.turn("on")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            async with session.worker() as connection:
                await connection.execute("INSERT INTO notes VALUES ('f')")
        await until(lambda: session.statistics().lost == 3 and session.statistics().idle == 3)
        async with session.worker() as connection:
            assert connection.info.port == servers.second.port


@asynccontextmanager
async def open_through_proxy(
    dsn: str, want: str
) -> AsyncIterator[tuple[Session, Callable[[], Awaitable[None]]]]:
    """A pool of one connection, and a function that tells it that its server is a standby now."""
    report = b"in_hot_standby\0on\0"
    message = b"S" + (4 + len(report)).to_bytes(4, "big") + report
    where = psycopg.conninfo.conninfo_to_dict(dsn)
    async with open_proxy(str(where["host"]), int(str(where["port"]))) as proxy:

        async def demote() -> None:
            for link in proxy.links:
                await link.near.send_all(message)

        conninfo = make_conninfo(dsn, **proxy.address, target_session_attrs=want)
        async with open_pool(conninfo, pool_size=1, max_overflow=0, autocommit=True) as session:
            yield session, demote


@pytest.mark.parametrize(("want", "stays"), [("primary", False), ("read-write", False), ("any", True)])
async def test_a_connection_that_is_to_a_standby_now(dsn: str, want: str, stays: bool) -> None:
    """As behind a proxy that keeps the sessions of its clients when it changes the server."""
    async with open_through_proxy(dsn, want) as (session, demote):
        async with session.worker() as connection:
            before = backend(connection)
            await demote()
            await connection.execute("SELECT 1")
        async with session.worker() as connection:
            assert (backend(connection) == before) is stays
        assert session.statistics().last_words == ({} if stays else {"dead": IN_STANDBY})


async def test_a_client_that_makes_its_session_read_only(dsn: str) -> None:
    """The next client could not write, so the connection is replaced."""
    async with open_pool(
        dsn, pool_size=1, max_overflow=0, autocommit=True, target_session_attrs="read-write"
    ) as session:
        async with session.worker() as connection:
            await connection.execute("SET default_transaction_read_only = on")
        await write_nothing(session)
        assert session.statistics().last_words == {"dead": NOT_BY_DEFAULT}


async def write_nothing(session: Session) -> None:
    """Make a table that no other session sees, for which a transaction must be able to write."""
    async with session.worker() as connection:
        await connection.execute("CREATE TABLE never (i int); DROP TABLE never")


async def test_a_pool_that_contradicts_itself(dsn: str) -> None:
    """Connections that `configure` makes read-only don't open: each would be replaced at its return."""

    async def configure(connection: Connection) -> None:
        await connection.execute("SET default_transaction_read_only = on")
        await connection.commit()

    with pytest.raises(whitepool.PoolStartError, match="default_transaction_read_only is on"):
        async with open_pool(
            dsn,
            pool_size=1,
            start_timeout=1,
            configure=configure,
            target_session_attrs="read-write",
        ):
            pass
    async with open_pool(
        dsn, pool_size=1, configure=configure, target_session_attrs="primary"
    ) as session:
        async with session.worker() as connection:
            assert await ask(connection, "SELECT 1") == 1
        await until(lambda: session.statistics().idle == 1)
        assert session.statistics().lost == 0


async def test_a_switchover() -> None:
    """The primary stops in good order, its standby takes its place, and it comes back as a standby.

    All connections follow. The old primary said why it ended the old ones.
    """
    with ExitStack() as stack:
        primary = stack.enter_context(EmbeddedPostgres(**REPLICATING))
        standby = stack.enter_context(Standby(primary))
        onlooker = Onlooker(primary.dsn)
        onlooker.do("CREATE TABLE notes (note text)")
        await replicate_synchronously(onlooker)
        onlooker.do("INSERT INTO notes VALUES ('replicated')")
        onlooker.close()
        conninfo = conninfo_of(primary, standby, "primary")
        async with open_pool(conninfo, pool_size=5, max_overflow=0) as session:
            assert await ports(session) == {primary.port}
            await trio.to_thread.run_sync(primary.stop)
            (primary._data / "standby.signal").touch()
            await trio.to_thread.run_sync(primary.start)
            await trio.to_thread.run_sync(standby.promote)
            await until(lambda: session.statistics().idle == 5)
            assert await ports(session) == {standby.port}
            await write_and_return(session)
            words = "57P01: terminating connection due to administrator command"
            assert session.statistics().last_words == {"hung_up": words}
            assert session.statistics().lost == 5
