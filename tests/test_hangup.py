"""A peer that hangs up is noticed, and nothing else is."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from time import perf_counter
from typing import Any
from unittest.mock import Mock

import pytest
import trio
from pairs import PATIENCE, Pair, pair_at
from timing import until
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Workshop, check_books, use

import whitepool
from whitepool._hangup import HangupWatch

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="hang-ups are watched for on Linux only"
)


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    ours, theirs = connect(request.param)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def watch() -> Iterator[HangupWatch[str]]:
    watch: HangupWatch[str] = HangupWatch()
    yield watch
    watch.close()


def connect(kind: str = "unix") -> Pair:
    if kind == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        return ours, theirs


async def news(watch: HangupWatch[str]) -> list[str]:
    """Wait until a peer may have hung up, and return the workers."""
    with trio.fail_after(5):
        await watch.wait()
    return watch.hung_up()


async def note_news(watch: HangupWatch[str], woken: trio.Event) -> None:
    """Wait until a peer may have hung up, and set an event."""
    await watch.wait()
    woken.set()


async def is_quiet(watch: HangupWatch[Any]) -> bool:
    """Say whether no task is woken."""
    with trio.move_on_after(PATIENCE):
        await watch.wait()
        return False
    return True


async def test_traffic_wakes_no_task(pair: Pair, watch: HangupWatch[str]) -> None:
    """Nor does data that is read, or left unread."""
    ours, theirs = pair
    watch.add(ours.fileno(), "worker")
    theirs.sendall(b"x" * 10_000)
    assert await is_quiet(watch)
    ours.recv(100)
    ours.sendall(b"y" * 10_000)
    assert await is_quiet(watch)
    assert watch.hung_up() == []
    assert watch


async def test_a_look_wakes_no_task_either(pair: Pair, watch: HangupWatch[str]) -> None:
    """If it finds nothing; and it does not keep other tasks from running."""
    watch.add(pair[0].fileno(), "worker")
    woken = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(note_news, watch, woken)
        await wait_all_tasks_blocked()
        began = perf_counter()
        assert watch.hung_up() == []
        assert perf_counter() - began < 0.5
        await wait_all_tasks_blocked()
        assert not woken.is_set()
        nursery.cancel_scope.cancel()


async def test_a_hang_up_is_found_once(pair: Pair, watch: HangupWatch[str]) -> None:
    """A peer that closes wakes the watch, which returns the worker and then forgets it."""
    ours, theirs = pair
    watch.add(ours.fileno(), "worker")
    theirs.close()
    assert await news(watch) == ["worker"]
    assert not watch.watched
    assert watch.hung_up() == []
    assert await is_quiet(watch)


async def test_unread_data_hides_no_hang_up(pair: Pair, watch: HangupWatch[str]) -> None:
    """A peer's last words need not be read before its hang-up is noticed."""
    ours, theirs = pair
    watch.add(ours.fileno(), "worker")
    theirs.sendall(b"FATAL: goodbye")
    theirs.close()
    assert await news(watch) == ["worker"]
    assert ours.recv(100) == b"FATAL: goodbye"


async def test_half_a_hang_up_is_one(pair: Pair, watch: HangupWatch[str]) -> None:
    """A peer that will send nothing more is of no use, even where it still listens."""
    ours, theirs = pair
    watch.add(ours.fileno(), "worker")
    theirs.shutdown(socket.SHUT_WR)
    assert await news(watch) == ["worker"]


async def test_a_reset_is_a_hang_up(watch: HangupWatch[str]) -> None:
    """A connection that the peer aborts is noticed like one that it closes."""
    ours, theirs = connect("tcp")
    with ours, theirs:
        watch.add(ours.fileno(), "worker")
        ours.sendall(b"what the peer leaves unread makes its close a reset")
        theirs.close()
        assert await news(watch) == ["worker"]


async def test_a_hang_up_before_the_watch_began(pair: Pair, watch: HangupWatch[str]) -> None:
    """It is noticed all the same."""
    ours, theirs = pair
    theirs.close()
    watch.add(ours.fileno(), "worker")
    assert await news(watch) == ["worker"]


async def test_all_that_hung_up_are_found_at_once(watch: HangupWatch[str]) -> None:
    """One look finds every worker whose peer is gone, and no other."""
    pairs = [connect() for _ in range(50)]
    for number, (ours, _) in enumerate(pairs):
        watch.add(ours.fileno(), f"worker {number}")
    for _, theirs in pairs[::2]:
        theirs.close()
    assert sorted(await news(watch)) == sorted(f"worker {number}" for number in range(0, 50, 2))
    assert await is_quiet(watch)
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


async def test_a_removed_worker_is_not_found(pair: Pair, watch: HangupWatch[str]) -> None:
    """What is watched no more wakes no task."""
    ours, theirs = pair
    watch.add(ours.fileno(), "worker")
    watch.remove(ours.fileno(), "worker")
    assert not watch.watched
    theirs.close()
    assert await is_quiet(watch)
    assert watch.hung_up() == []


async def test_removing_what_is_not_watched(pair: Pair, watch: HangupWatch[str]) -> None:
    """It does nothing, and nothing to other workers."""
    ours, theirs = pair
    watch.add(ours.fileno(), "worker")
    for fileno in (None, -1, 10_000, theirs.fileno(), ours.fileno()):
        watch.remove(fileno, "another worker")
    theirs.close()
    assert await news(watch) == ["worker"]
    watch.remove(ours.fileno(), "worker")


async def test_a_descriptor_that_its_owner_closed(watch: HangupWatch[str]) -> None:
    """A client may close the worker: that wakes no task, and it can still be removed."""
    ours, theirs = connect()
    fileno = ours.fileno()
    watch.add(fileno, "worker")
    ours.close()
    theirs.close()
    assert await is_quiet(watch)
    watch.remove(fileno, "worker")
    assert not watch.watched


async def test_a_descriptor_number_that_is_used_again(watch: HangupWatch[str]) -> None:
    """The number belongs to the new worker: the old one's end does not touch it."""
    ours, theirs = connect()
    fileno = ours.fileno()
    watch.add(fileno, "old")
    ours.close()
    theirs.close()
    ours, theirs = pair_at(fileno)
    with ours, theirs:
        watch.add(fileno, "new")
        watch.remove(fileno, "old")
        theirs.sendall(b"traffic")
        assert await is_quiet(watch)
        theirs.close()
        assert await news(watch) == ["new"]


async def test_a_copy_of_a_closed_descriptor(watch: HangupWatch[str]) -> None:
    """A child process that holds copies of our sockets, as after a fork, keeps no core busy.

    The kernel goes on watching a descriptor that was closed here, for as long as a copy is open.
    """
    ours, theirs = connect()
    fileno, copy = ours.fileno(), os.dup(ours.fileno())
    watch.add(fileno, "worker")
    ours.close()
    watch.remove(fileno, "worker")
    theirs.close()
    woken = 0
    with trio.move_on_after(PATIENCE):
        while True:
            await watch.wait()
            assert watch.hung_up() == []
            woken += 1
    os.close(copy)
    assert woken <= 1


async def test_a_task_that_waits_hears_of_a_new_beginning(watch: HangupWatch[str]) -> None:
    """Where the watch begins again because of such a copy: it would wait for nothing otherwise."""
    ours, theirs = connect()
    fileno, copy = ours.fileno(), os.dup(ours.fileno())
    watch.add(fileno, "worker")
    woken = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(note_news, watch, woken)
        await wait_all_tasks_blocked()
        ours.close()
        watch.remove(fileno, "worker")
        theirs.close()
        assert watch.hung_up() == []
        with trio.fail_after(5):
            await woken.wait()
    os.close(copy)


async def test_a_copy_and_a_number_that_is_used_again(watch: HangupWatch[str]) -> None:
    """A worker is not blamed, not even once, for what happens to the last owner of its number."""
    ours, theirs = connect()
    fileno, copy = ours.fileno(), os.dup(ours.fileno())
    watch.add(fileno, "old")
    ours.close()
    watch.remove(fileno, "old")
    new_ours, new_theirs = pair_at(fileno)
    with new_ours, new_theirs:
        watch.add(fileno, "new")
        theirs.close()
        await is_quiet(watch)
        found = watch.hung_up()
        os.close(copy)
        assert not found
        new_theirs.close()
        assert await news(watch) == ["new"]


async def test_what_can_not_be_watched(watch: HangupWatch[str]) -> None:
    """A worker without a descriptor, or with one that has no peer, is not watched."""
    with tempfile.TemporaryFile() as file:
        watch.add(file.fileno(), "worker on a file")
        closed = os.dup(file.fileno())
        os.close(closed)
        watch.add(closed, "worker that is closed")
        watch.add(-1, "worker that says it is closed")
        watch.add(2**40, "worker with a number that is none")
        watch.add(None, "worker without a descriptor")
        assert not watch.watched
        assert await is_quiet(watch)
        watch.remove(file.fileno(), "worker on a file")


async def test_a_closed_watch_is_empty(pair: Pair) -> None:
    """Closing the watch leaves the descriptors alone, and may be done twice."""
    ours, theirs = pair
    watch: HangupWatch[str] = HangupWatch()
    watch.add(ours.fileno(), "worker")
    watch.close()
    watch.close()
    assert not watch.watched
    assert watch.hung_up() == []
    theirs.sendall(b"still open")
    assert ours.recv(100) == b"still open"


def waited_for() -> int:
    """Return for how many descriptors Trio waits."""
    statistics: Any = trio.lowlevel.current_statistics().io_statistics
    return int(statistics.tasks_waiting_read)


async def test_nothing_is_registered_before_there_is_something_to_watch(
    nursery: trio.Nursery, pair: Pair, watch: HangupWatch[str]
) -> None:
    """A pool whose workers have no descriptors costs Trio nothing."""
    before = waited_for()
    nursery.start_soon(watch.wait)
    watch.add(None, "worker")
    watch.add(-1, "another worker")
    await wait_all_tasks_blocked()
    assert waited_for() == before
    watch.add(pair[0].fileno(), "worker with a descriptor")
    await wait_all_tasks_blocked()
    assert waited_for() == before + 1


async def test_a_pool_that_watches_nothing_registers_nothing() -> None:
    """Neither with Trio nor with the kernel."""
    files, before = set(os.listdir("/proc/self/fd")), waited_for()
    async with whitepool.open_pool(Workshop().make, pool_size=2):
        await wait_all_tasks_blocked()
        assert waited_for() == before
        assert set(os.listdir("/proc/self/fd")) <= files


async def test_other_systems(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is watched there, and the watch may be used all the same."""
    monkeypatch.setattr("whitepool._hangup.sys", Mock(platform="darwin"))
    watch: HangupWatch[str] = HangupWatch()
    ours, theirs = pair
    watch.add(ours.fileno(), "worker")
    assert not watch.watched
    theirs.close()
    assert await is_quiet(watch)
    assert watch.hung_up() == []
    watch.remove(ours.fileno(), "worker")
    watch.close()


# -- The watch in the pool: any worker with a descriptor will do. --------------------------------------


class Exchange:
    """A server for streams that are only connected."""

    def __init__(self) -> None:
        self.peers: list[trio.SocketStream] = []
        self.port = 0
        self.hangs_up_at_once = False

    async def serve(self, peer: trio.SocketStream) -> None:
        if self.hangs_up_at_once:
            return
        self.peers.append(peer)
        await trio.sleep_forever()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_tcp, self.serve, 0, host="127.0.0.1")
            (listener,) = await nursery.start(serve)
            self.port = listener.socket.getsockname()[1]
            task_status.started()

    async def dial(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)


async def until_started(session: whitepool.Session[Any], number: int) -> None:
    with trio.fail_after(5):
        now = session.statistics()
        while now.started < number or now.idle < now.pool_size:
            await trio.sleep(0.001)
            now = session.statistics()


async def test_a_stream_whose_peer_closes_is_replaced(nursery: trio.Nursery) -> None:
    """A bare factory of Trio's streams is enough: the pool finds the socket by itself."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    async with whitepool.open_pool(exchange.dial, pool_size=2) as session:
        with trio.fail_after(5):
            while len(exchange.peers) < 2:
                await trio.sleep(0.001)
        await exchange.peers[0].send_all(b"traffic")
        await trio.sleep(PATIENCE)
        assert session.statistics().lost == 0
        for lost in 1, 2:
            await exchange.peers[lost - 1].aclose()
            await until_started(session, 2 + lost)
            now = session.statistics()
            assert (now.lost, now.idle) == (lost, 2)
        check_books(session)


@pytest.mark.parametrize("is_in_use", [False, True])
async def test_a_hang_up_is_logged(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, is_in_use: bool
) -> None:
    """With its reason, at once where the worker is idle, else when its client returns it."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    async with whitepool.open_pool(exchange.dial, pool_size=1, max_overflow=0) as session:
        while not exchange.peers:
            await trio.sleep(0.001)
        if is_in_use:
            async with session.worker() as stream:
                await exchange.peers[0].aclose()
                assert await stream.receive_some() == b""
                assert not caplog.records
        else:
            await exchange.peers[0].aclose()
        await until_started(session, 2)
    told = [(record.__dict__["event"], record.__dict__.get("reason")) for record in caplog.records]
    assert told == [("worker_lost", "hung_up")]


async def test_a_checkin_looks_whether_the_peer_has_hung_up(nursery: trio.Nursery) -> None:
    """Before the watch, which is a task, has had its turn: the next client must not get the worker."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    async with whitepool.open_pool(exchange.dial, pool_size=1, max_overflow=0) as session:
        resource = await session.block_checkout()
        while not exchange.peers:
            await trio.sleep(0.001)
        await trio.sleep(0.01)
        exchange.peers[0].socket.close()
        session.checkin(resource)
        assert (session.statistics().lost, session.statistics().idle) == (1, 0)


async def test_a_checkout_looks_whether_the_peer_has_hung_up(nursery: trio.Nursery) -> None:
    """Before the watch has had its turn, too."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    async with whitepool.open_pool(exchange.dial, pool_size=1, max_overflow=0) as session:
        while not exchange.peers:
            await trio.sleep(0.001)
        await trio.sleep(0.01)
        exchange.peers[0].socket.close()
        with pytest.raises(trio.WouldBlock):
            session.checkout_nowait()
        assert (session.statistics().lost, session.statistics().in_use) == (1, 0)


async def test_a_worker_that_has_hung_up_goes_when_it_is_returned(nursery: trio.Nursery) -> None:
    """Although a task waits, for which no other can be opened: it is of no use to it."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    dials, gate = 0, trio.Event()

    async def dial() -> trio.SocketStream:
        nonlocal dials
        dials += 1
        if dials == 2:
            await gate.wait()
        return await exchange.dial()

    async with whitepool.open_pool(dial, pool_size=1, max_overflow=1) as session:
        async with trio.open_nursery() as clients:
            async with session.worker() as stream:
                clients.start_soon(use, session)
                await until(lambda: dials == 2 and len(exchange.peers) == 1)
                await exchange.peers[0].aclose()
                assert await stream.receive_some() == b""
                await wait_all_tasks_blocked()
                assert session.statistics().lost == 0
            assert (session.statistics().lost, session.statistics().in_use) == (1, 0)
            gate.set()
        check_books(session)


async def test_checkins_ask_the_kernel_once_in_a_while(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask costs more than a checkin, so a millisecond's checkins ask once."""
    pairs: list[Pair] = []
    asked: list[float] = []
    hung_up = HangupWatch.hung_up

    def note(self: HangupWatch[Any]) -> list[Any]:
        asked.append(trio.current_time())
        return hung_up(self)

    async def make() -> socket.socket:
        pairs.append(connect())
        return pairs[-1][0]

    monkeypatch.setattr(HangupWatch, "hung_up", note)
    async with whitepool.open_pool(make, pool_size=1) as session:
        for passed in (0.5, 0, 0, 0.25, 0):
            resource = await session.block_checkout()
            asked.clear()
            mock_clock.jump(passed)
            session.checkin(resource)
            assert asked == ([trio.current_time()] if passed else [])
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


async def test_a_stream_that_is_closed_by_its_client_is_lost_once(nursery: trio.Nursery) -> None:
    """Where a client breaks its worker, and says so, the watch does not count it again."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    async with whitepool.open_pool(exchange.dial, pool_size=1, max_overflow=0) as session:
        for turn in range(10):
            resource = await session.block_checkout()
            await resource.get().aclose()
            session.destroyed(resource)
            await until_started(session, turn + 2)
        now = session.statistics()
        assert (now.destroyed, now.lost, now.idle) == (10, 0, 1)
        check_books(session)


async def test_a_worker_that_is_being_closed_is_not_watched(nursery: trio.Nursery) -> None:
    """That its peer hangs up then is no news: it leaves for another reason."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    async with whitepool.open_pool(exchange.dial, pool_size=1, max_overflow=0) as session:
        resource = await session.block_checkout()
        watched = session._supervisor._hangups.watched
        assert list(watched) == [resource.get().socket.fileno()]
        session.destroyed(resource)
        assert not watched


async def test_a_pool_that_is_closed_leaves_no_descriptor(nursery: trio.Nursery) -> None:
    """Although something may still refer to its session."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    async with whitepool.open_pool(exchange.dial, pool_size=1) as session:
        await until(lambda: len(exchange.peers) == 1)
        watch = session._supervisor._hangups
        assert watch._epoll is not None
        assert not watch._epoll.closed
    assert watch._epoll.closed


async def test_a_peer_that_hangs_up_during_a_reset(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """No wonder that the reset fails: the worker is lost, and not destroyed."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    begun, gate = trio.Event(), trio.Event()

    class Dialing(whitepool.WorkerManager[trio.SocketStream]):
        async def create(self) -> trio.SocketStream:
            return await exchange.dial()

        def needs_reset(self, worker: trio.SocketStream) -> bool:
            return True

        async def reset(self, worker: trio.SocketStream) -> None:
            begun.set()
            await gate.wait()
            raise OSError("no answer")

    async with whitepool.open_pool(Dialing(), pool_size=1, max_overflow=0) as session:
        await until(lambda: len(exchange.peers) == 1)
        async with session.worker():
            pass
        await begun.wait()
        (entry,) = session._supervisor.roster.entries
        await exchange.peers[0].aclose()
        await until(lambda: entry.evict_reason == "hung_up")
        gate.set()
        await until_started(session, 2)
        assert (session.statistics().lost, session.statistics().destroyed) == (1, 0)
    (record,) = caplog.records
    assert (vars(record)["event"], vars(record)["reason"]) == ("worker_lost", "hung_up")


async def test_a_peer_that_accepts_and_hangs_up(nursery: trio.Nursery) -> None:
    """A balancer without a backend does that: there are pauses between the starts."""
    exchange = Exchange()
    await nursery.start(exchange.run)
    async with whitepool.open_pool(exchange.dial, pool_size=2) as session:
        exchange.hangs_up_at_once = True
        for peer in exchange.peers:
            await peer.aclose()
        await trio.sleep(1)
        now = session.statistics()
        check_books(session)
        print(f"\nstarted within a second, for nothing: {now.started - 2}")
        assert now.started < 50
