"""Waiting together until sockets can be read: as right as waiting in Trio, and only where it pays."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, aclosing
from functools import partial
from typing import Any
from unittest.mock import Mock

import psycopg
import pytest
import trio
import trustme
from connections import BIG, SLOW, Connection, ask, backend, check_usable, closing
from embedded_postgres import EmbeddedPostgres
from keyboard import listening_to_ctrl_c, press_ctrl_c
from onlooker import Onlooker
from pairs import PATIENCE, Pair, pair_at
from serving import HOST
from tls_proxy import open_tls_proxy, server_context
from trio.lowlevel import checkpoint
from trio.testing import wait_all_tasks_blocked

from whitepool.postgres import _readiness, connect
from whitepool.postgres._readiness import _together, notify_closing, wait_readable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux do tasks wait together")


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(20)]
        for end in (end for pair in pairs for end in pair):
            stack.enter_context(end).setblocking(False)
        yield pairs


@pytest.fixture
def pair(pairs: list[Pair]) -> Pair:
    return pairs[0]


@pytest.fixture(autouse=True)
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all tasks wait together, whether it is worth it or not."""
    monkeypatch.setattr(_readiness, "PAUSE", 0)


class Waiting:
    """Waits for a socket in a task of its own, and notes how that ended."""

    def __init__(self, nursery: trio.Nursery, ours: socket.socket) -> None:
        self.outcome: object = "waiting"
        nursery.start_soon(self._wait, ours.fileno())

    async def _wait(self, fileno: int) -> None:
        try:
            await wait_readable(fileno)
        except BaseException as error:
            self.outcome = type(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.outcome = "readable"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Wakings(trio.abc.Instrument):
    """Counts how many times the task that wakes the others was woken, once it had begun to wait."""

    count = -1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += "_wake_tasks" in task.name


@pytest.fixture
async def wakings() -> Wakings:
    counting = Wakings()
    trio.lowlevel.add_instrument(counting)
    return counting


# -- What trio.lowlevel.wait_readable does, too ---------------------------------------------------


async def test_those_are_woken_that_can_read(pairs: list[Pair], nursery: trio.Nursery) -> None:
    """Of many tasks that wait, those go on whose peers have sent something, and no others."""
    tasks = [Waiting(nursery, ours) for ours, _ in pairs]
    await wait_all_tasks_blocked()
    for _, peer in pairs[::2]:
        peer.send(b"x")
    await trio.sleep(PATIENCE)
    assert [task.outcome for task in tasks] == ["readable", "waiting"] * 10
    for _, peer in pairs[1::2]:
        peer.send(b"x")
    with trio.fail_after(5):
        while any(task.outcome == "waiting" for task in tasks):
            await checkpoint()


async def test_what_is_left_to_read_wakes_again(pair: Pair) -> None:
    """A task that has not read everything need not wait for more to arrive: libpq reads in pieces."""
    ours, peer = pair
    peer.send(b"xyz")
    with trio.fail_after(5):
        for expected in (b"x", b"y", b"z"):
            await wait_readable(ours.fileno())
            assert ours.recv(1) == expected
    with trio.move_on_after(PATIENCE) as scope:
        await wait_readable(ours.fileno())
    assert scope.cancelled_caught


async def test_a_wait_can_be_cancelled(pair: Pair) -> None:
    """What arrives after a wait was cancelled is there for the next wait."""
    ours, peer = pair
    async with trio.open_nursery() as nursery:
        task = Waiting(nursery, ours)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert task.outcome is trio.Cancelled
    peer.send(b"x")
    await trio.sleep(PATIENCE)
    with trio.fail_after(5):
        await wait_readable(ours.fileno())


async def test_closing_wakes_the_task_that_waits(pairs: list[Pair], nursery: trio.Nursery) -> None:
    """It raises what Trio raises, and no other task notices anything."""
    tasks = [Waiting(nursery, ours) for ours, _ in pairs[:2]]
    await wait_all_tasks_blocked()
    for ours, _ in (pairs[0], pairs[0], pairs[5]):
        notify_closing(ours.fileno())
    await wait_all_tasks_blocked()
    assert [task.outcome for task in tasks] == [trio.ClosedResourceError, "waiting"]
    nursery.cancel_scope.cancel()


async def test_one_task_waits_at_a_time(pair: Pair, nursery: trio.Nursery) -> None:
    """A second task that would wait for the same socket is told so, and the first waits on."""
    ours, peer = pair
    first = Waiting(nursery, ours)
    await wait_all_tasks_blocked()
    with trio.fail_after(5), pytest.raises(trio.BusyResourceError):
        await wait_readable(ours.fileno())
    peer.send(b"x")
    with trio.fail_after(5):
        while first.outcome == "waiting":
            await checkpoint()
    assert first.outcome == "readable"


def test_ctrl_c_ends_a_wait(pair: Pair) -> None:
    """Ctrl-C comes out of a wait as KeyboardInterrupt itself."""
    raised = []

    async def main() -> None:
        press_ctrl_c(wait_all_tasks_blocked)
        try:
            with trio.fail_after(5):
                await wait_readable(pair[0].fileno())
        except BaseException as error:
            raised.append(type(error))

    with listening_to_ctrl_c():
        trio.run(main)
    assert raised == [KeyboardInterrupt]


# -- Descriptors that are closed, copied, or used again -------------------------------------------


async def test_a_hang_up_keeps_no_core_busy(pair: Pair, wakings: Wakings) -> None:
    """A peer that has hung up wakes the task that waits, and nothing while no task waits."""
    ours, peer = pair
    peer.close()
    with trio.fail_after(5):
        await wait_readable(ours.fileno())
    await trio.sleep(PATIENCE)
    assert wakings.count == 1


async def test_what_no_task_waits_for_wakes_nothing(pair: Pair, wakings: Wakings) -> None:
    """After a wait, a socket costs nothing until the next wait for it."""
    ours, peer = pair
    peer.send(b"x")
    with trio.fail_after(5):
        await wait_readable(ours.fileno())
    peer.send(b"x")
    await trio.sleep(PATIENCE)
    assert wakings.count == 1


async def test_a_copy_of_a_closed_socket_keeps_no_core_busy(wakings: Wakings) -> None:
    """A child process may hold a copy of a socket that was closed here without our knowing."""
    ours, peer = socket.socketpair()
    with peer:
        with trio.move_on_after(PATIENCE):
            await wait_readable(ours.fileno())
        copy = os.dup(ours.fileno())
        ours.close()
    await trio.sleep(PATIENCE)
    os.close(copy)
    assert wakings.count == 1


async def test_a_number_that_is_used_again(nursery: trio.Nursery) -> None:
    """A connection with the number of one that was closed without our knowing is waited for itself."""
    ours, peer = socket.socketpair()
    number = ours.fileno()
    with trio.move_on_after(PATIENCE):
        await wait_readable(number)
    ours.close()
    peer.close()
    ours, peer = pair_at(number)
    with ours, peer:
        task = Waiting(nursery, ours)
        await wait_all_tasks_blocked()
        peer.send(b"x")
        with trio.fail_after(5):
            while task.outcome == "waiting":
                await checkpoint()


async def test_a_copy_and_a_number_that_is_used_again() -> None:
    """What happens to the last owner of a number makes the next one look in vain, once."""
    ours, last_peer = socket.socketpair()
    number = ours.fileno()
    with trio.move_on_after(PATIENCE):
        await wait_readable(number)
    copy = os.dup(number)
    ours.close()
    ours, peer = pair_at(number)
    looks = 0
    with ours, peer, trio.move_on_after(PATIENCE):
        last_peer.close()
        while True:
            await wait_readable(number)
            looks += 1
    os.close(copy)
    assert looks == 1


# -- Runs of Trio ---------------------------------------------------------------------------------


def test_each_run_has_its_own(pair: Pair) -> None:
    """Nothing is left of a run that is over: no descriptor, and no task that waits."""
    ours, _ = pair
    seen = []

    async def main() -> None:
        with trio.move_on_after(PATIENCE) as scope:
            await wait_readable(ours.fileno())
        assert scope.cancelled_caught
        assert _together() is _together()
        seen.append(_together())

    before = open_descriptors()
    trio.run(main)
    trio.run(main)
    assert seen[0] is not seen[1]
    assert open_descriptors() == before


def test_runs_in_two_threads(pairs: list[Pair]) -> None:
    """Each wakes its own tasks."""

    async def other(ours: socket.socket, woken: Callable[[], object]) -> None:
        with trio.fail_after(5):
            await wait_readable(ours.fileno())
        woken()

    async def main() -> None:
        woken: list[socket.socket] = []
        async with trio.open_nursery() as nursery:
            for ours, _ in pairs[:2]:
                run = partial(trio.run, other, ours, partial(woken.append, ours))
                nursery.start_soon(trio.to_thread.run_sync, run)
            task = Waiting(nursery, pairs[2][0])
            await trio.sleep(PATIENCE)
            for ours, peer in pairs[:2]:
                peer.send(b"x")
                with trio.fail_after(5):
                    while ours not in woken:
                        await trio.sleep(0.001)
            assert task.outcome == "waiting"
            pairs[2][1].send(b"x")

    trio.run(main)


def test_waits_that_outlive_the_main_task(pair: Pair) -> None:
    """A system task that cleans up, shielded, while the run ends may still wait, and wait again."""
    ours, peer = pair
    received: list[bytes] = []

    async def clean_up() -> None:
        with trio.CancelScope(shield=True), trio.fail_after(5):
            while not received:
                await wait_readable(ours.fileno())
                try:
                    received.append(ours.recv(1))
                except BlockingIOError:  # it was woken because the run is ending
                    peer.send(b"x")

    async def main() -> None:
        trio.lowlevel.spawn_system_task(clean_up)
        await wait_all_tasks_blocked()

    trio.run(main)
    assert received == [b"x"]


def test_a_wait_that_begins_when_the_run_is_over(pair: Pair) -> None:
    """An asynchronous generator that Trio closes at the end may wait. No task can be started then."""
    ours, peer = pair
    closed = []

    async def generator() -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            peer.send(b"x")
            with trio.CancelScope(shield=True), trio.fail_after(5):
                await wait_readable(ours.fileno())
            closed.append(ours.recv(1))

    left = generator()

    async def main() -> None:
        await left.__anext__()

    trio.run(main)
    assert closed == [b"x"]


async def test_no_more_descriptors(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no epoll descriptor can be had, tasks wait in Trio."""
    monkeypatch.setattr("select.epoll", Mock(side_effect=OSError(24, "EMFILE")))
    ours, peer = pair
    peer.send(b"x")
    with trio.fail_after(5):
        await wait_readable(ours.fileno())


# -- Whether it is worth it -----------------------------------------------------------------------


async def woken_together(number: int, pairs: list[Pair]) -> list[bool]:
    """Wait so many times for all of these sockets, which answer at once: which waits were together?"""
    found = []

    async def wait(ours: socket.socket) -> None:
        waiting = wait_readable(ours.fileno())
        found.append(ours.fileno() in _together().tasks)
        await waiting
        ours.recv(1)

    for _ in range(number):
        async with trio.open_nursery() as nursery:
            for ours, _ in pairs:
                nursery.start_soon(wait, ours)
            await wait_all_tasks_blocked()
            for _, peer in pairs:
                peer.send(b"x")
    return found


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_readiness, "PAUSE", 100)


async def test_one_wait_at_a_time_is_left_to_trio(pairs: list[Pair], short_pauses: None) -> None:
    """Where answers arrive one by one, a few waits together, after each pause, show that."""
    found = await woken_together(300, pairs[:1])
    trials = "".join("-x"[together] for together in found).split("-" * 100)
    assert [set(trial) for trial in trials[:-1]] == [set(), {"x"}]
    assert sum(found) < 40


async def test_many_waits_at_a_time_are_together(pairs: list[Pair], short_pauses: None) -> None:
    """Where many answers arrive together, the tasks go on waiting together after the first trial."""
    found = await woken_together(20, pairs)
    assert not any(found[:100])
    assert all(found[100:])


async def test_back_to_trio(pairs: list[Pair], short_pauses: None) -> None:
    """When the load is over, the next waits are Trio's again."""
    assert all((await woken_together(20, pairs))[100:])
    assert not all(await woken_together(60, pairs[:1]))


async def test_a_few_waits_register_nothing(
    pair: Pair, nursery: trio.Nursery, short_pauses: None
) -> None:
    """A program with few queries has no epoll descriptor, and no task for it."""
    before = open_descriptors(), trio.lowlevel.current_statistics().tasks_living
    await woken_together(50, [pair])
    assert (open_descriptors(), trio.lowlevel.current_statistics().tasks_living) == before


async def test_other_systems(
    pairs: list[Pair], short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, each task waits in Trio."""
    monkeypatch.setattr(_readiness, "sys", Mock(platform="darwin"))
    assert not any(await woken_together(10, pairs))


# -- Connections that wait together ---------------------------------------------------------------


async def at_once(number: int, operation: Callable[[], Any]) -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(operation)


async def use_fully(dsn: str) -> None:
    """Do everything with a connection that reads in more than one piece."""
    async with await connect(dsn, autocommit=True) as connection:
        for _ in range(7):  # the sixth time, it is a prepared statement
            assert await ask(connection, "SELECT %s::int", 7) == 7
        assert await ask(connection, f"SELECT repeat('x', {len(BIG)})") == BIG
        cursor = await connection.execute("SELECT 1; SELECT 2")
        assert await cursor.fetchall() == [(1,)]
        assert cursor.nextset()
        assert await cursor.fetchall() == [(2,)]

        rows = 0
        query = "SELECT n, repeat('x', 3000) FROM generate_series(1, 500) AS n"
        async with closing(connection.cursor().stream(query)) as stream:
            async for number, _ in stream:
                rows += 1
                assert number == rows
                if rows % 100 == 0:
                    await trio.sleep(0.001)
        assert rows == 500

        await connection.execute("CREATE TEMP TABLE copied (n int, text text)")
        async with connection.cursor().copy("COPY copied FROM STDIN") as copy:
            for number in range(500):
                await copy.write_row((number, "x" * 3000))
        size = 0
        async with connection.cursor().copy("COPY copied TO STDOUT") as copy:
            async for block in copy:
                size += len(block)
        assert size > 500 * 3000

        async with connection.pipeline():
            cursors = [await connection.execute("SELECT %s::text", (BIG[:100_000],)) for _ in range(20)]
            assert all([await cursor.fetchone() == (BIG[:100_000],) for cursor in cursors])
        async with connection.transaction(), connection.cursor("named") as server_cursor:
            await server_cursor.execute(query)
            assert len(await server_cursor.fetchall()) == 500
        with pytest.raises(psycopg.errors.DivisionByZero):
            await connection.execute("SELECT 1 / 0")
        await check_usable(connection)


async def test_everything_at_once(dsn: str, wakings: Wakings) -> None:
    """Large results, streams, copies, pipelines and errors arrive whole on connections side by side."""
    await at_once(4, partial(use_fully, dsn))
    assert wakings.count > 0


async def test_everything_through_tls(server: EmbeddedPostgres) -> None:
    """What libpq has decrypted and not yet used is not waited for."""
    async with open_tls_proxy(server.port, server_context(trustme.CA())) as proxy:
        dsn = f"host={HOST} port={proxy.port} user=postgres dbname=postgres sslmode=require"
        await at_once(2, partial(use_fully, dsn))
        assert proxy.encrypted == 2


async def test_notifications_of_which_some_were_read(dsn: str, onlooker: Onlooker) -> None:
    """Notifications that arrived before or with an answer, or while no task waited, are not lost."""
    large = "x" * 7000
    async with await connect(dsn, autocommit=True) as connection:
        await connection.execute("LISTEN channel")
        received = []
        with trio.fail_after(5):
            for _ in range(10):  # more than libpq reads at a time
                onlooker.do(f"NOTIFY channel, '{large}'")
                onlooker.do("NOTIFY channel")
            assert await ask(connection, "SELECT 1") == 1
            onlooker.do("NOTIFY channel, 'last'")
            async with aclosing(connection.notifies()) as notifications:
                async for notify in notifications:
                    received.append(notify.payload)
                    if notify.payload == "last":
                        break
        assert received[-1] == "last"
        await check_usable(connection)


async def test_closing_a_connection_that_waits(dsn: str) -> None:
    """The task that waits gets an error, and not silence."""
    connection: Connection = await connect(dsn, autocommit=True)
    errors = []

    async def query() -> None:
        with pytest.raises(psycopg.OperationalError) as caught:
            await connection.execute(SLOW)
        errors.append(str(caught.value))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(query)
            await wait_all_tasks_blocked()
            await connection.close()
    assert errors == ["the connection is closed"]


async def test_cancelling_a_query(dsn: str, onlooker: Onlooker) -> None:
    """It is cancelled on the server as well, and the connection is usable."""
    async with await connect(dsn, autocommit=True) as connection:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.execute, SLOW)
                await onlooker.until_active(backend(connection))
                nursery.cancel_scope.cancel()
        assert onlooker.state(backend(connection)) == "idle"
        await check_usable(connection)


async def test_a_server_that_hangs_up(dsn: str, onlooker: Onlooker) -> None:
    """Its last words are read."""
    async with await connect(dsn, autocommit=True) as connection:

        async def query() -> None:
            with pytest.raises(psycopg.errors.AdminShutdown):
                await connection.execute(SLOW)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(query)
                await onlooker.until_active(backend(connection))
                onlooker.do(f"SELECT pg_terminate_backend({backend(connection)})")


def test_a_connection_that_outlives_a_run(dsn: str) -> None:
    """The next run waits for it, too."""
    connections: list[Connection] = []

    async def first() -> None:
        connections.append(await connect(dsn, autocommit=True))
        await connections[0].execute("SELECT 1")

    async def second() -> None:
        with trio.fail_after(5):
            await check_usable(connections[0])
            await connections[0].close()

    trio.run(first)
    trio.run(second)
