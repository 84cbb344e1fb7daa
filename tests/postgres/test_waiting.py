"""How psycopg's generators, and libpq's polling, are driven: over socket pairs, without a server."""

from __future__ import annotations

import socket
from collections.abc import Generator, Iterator
from contextlib import suppress

import pytest
import trio
from keyboard import listening_to_ctrl_c, press_ctrl_c
from pairs import Pair
from psycopg import pq
from psycopg.waiting import Ready, Wait
from trio.testing import wait_all_tasks_blocked

from whitepool.postgres._waiting import drive, poll


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a connection: ours, and the peer's."""
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    with ours, peer:
        yield ours, peer


def fill(ours: socket.socket) -> None:
    """Write until the socket takes no more."""
    with suppress(BlockingIOError):
        while True:
            ours.send(b"x" * 65536)


def drain(peer: socket.socket) -> None:
    with suppress(BlockingIOError):
        while True:
            peer.recv(65536)


def waits_for(*wanted: Wait) -> Generator[Wait, Ready | int, list[Ready | int]]:
    """Wait for one thing after the other, and return what happened."""
    happened = []
    for wait in wanted:
        while not (ready := (yield wait)):
            pass
        happened.append(ready)
    return happened


class Driven:
    """A generator being driven in a task of its own."""

    def __init__(
        self,
        nursery: trio.Nursery,
        generator: Generator[Wait, Ready | int, list[Ready | int]],
        ours: socket.socket,
    ) -> None:
        self.happened: list[Ready | int] | None = None
        nursery.start_soon(self._drive, generator, ours.fileno())

    async def _drive(
        self, generator: Generator[Wait, Ready | int, list[Ready | int]], descriptor: int
    ) -> None:
        self.happened = await drive(generator, descriptor)


@pytest.mark.parametrize(
    ("wanted", "ready"),
    [(Wait.R, Ready.R), (Wait.W, Ready.W), (Wait.RW, Ready.R), (Wait.RW, Ready.W)],
)
async def test_waits_until_ready(pair: Pair, wanted: Wait, ready: Ready) -> None:
    """A generator goes on when it can do what it wants, and not before; of two, it learns which."""
    ours, peer = pair
    fill(ours)
    async with trio.open_nursery() as nursery:
        driven = Driven(nursery, waits_for(wanted), ours)
        await wait_all_tasks_blocked()
        assert driven.happened is None
        if ready is Ready.R:
            peer.send(b"x")
        else:
            drain(peer)
    assert driven.happened == [ready]


async def test_waits_for_either_and_can_do_both(pair: Pair) -> None:
    """A generator that wants either is told something true where both are possible at once."""
    ours, peer = pair
    peer.send(b"x")
    happened = await drive(waits_for(Wait.RW), ours.fileno())
    assert happened in ([Ready.R], [Ready.W], [Ready.RW])


async def test_waits_for_one_thing_after_the_other(pair: Pair) -> None:
    """Each thing that a generator waits for is sent to it in its turn, and its result is returned."""
    ours, peer = pair
    peer.send(b"x")
    happened = await drive(waits_for(Wait.W, Wait.R, Wait.W), ours.fileno())
    assert happened == [Ready.W, Ready.R, Ready.W]


async def test_a_generator_that_has_begun_goes_on_from_there(pair: Pair) -> None:
    """A generator whose first step its caller has made is sent the answer to that, and nothing else."""
    ours, peer = pair
    peer.send(b"x")

    def asks_once() -> Generator[Wait, Ready | int, Ready | int]:
        return (yield Wait.R)

    generator = asks_once()
    assert await drive(generator, ours.fileno(), wanted=next(generator)) == Ready.R


async def test_an_immediate_end_lets_other_tasks_run(pair: Pair) -> None:
    """A generator that waits for nothing still gives way to other tasks once."""
    ran = []

    async def other() -> None:
        ran.append("other")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        # Twice: the scheduler may run the tasks of one round in either order.
        for _ in range(2):
            assert await drive(waits_for(), pair[0].fileno()) == []
        assert ran == ["other"]


async def test_an_immediate_end_is_not_cancelled(pair: Pair) -> None:
    """What a generator has done without waiting is returned, even where the task is being cancelled."""
    with trio.CancelScope() as scope:
        scope.cancel()
        happened = await drive(waits_for(), pair[0].fileno())
    assert happened == []
    assert not scope.cancelled_caught


@pytest.mark.parametrize("wanted", [Wait.R, Wait.W, Wait.RW])
async def test_a_cancelled_wait_can_be_resumed(pair: Pair, wanted: Wait) -> None:
    """A generator whose wait was cancelled waits for the same again when it is driven once more."""
    ours, peer = pair
    fill(ours)
    generator = waits_for(wanted)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            driven = Driven(nursery, generator, ours)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert driven.happened is None
    if wanted == Wait.W:
        drain(peer)
    else:
        peer.send(b"x")
    happened = await drive(generator, ours.fileno())
    assert happened == [Ready.W if wanted == Wait.W else Ready.R]


@pytest.mark.parametrize("wanted", [Wait.R, Wait.W, Wait.RW])
async def test_a_cancelled_wait_raises_cancelled(pair: Pair, wanted: Wait) -> None:
    """A cancelled wait raises `trio.Cancelled` itself, and no group, for `except` clauses to catch."""
    ours, _ = pair
    fill(ours)
    raised = []

    async def wait() -> None:
        try:
            await drive(waits_for(wanted), ours.fileno())
        except BaseException as error:
            raised.append(type(error))
            raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert raised == [trio.Cancelled]


@pytest.mark.parametrize("wanted", [Wait.R, Wait.W, Wait.RW])
async def test_a_wait_for_a_closing_socket_ends(pair: Pair, wanted: Wait) -> None:
    """A generator that waits for a socket gets out of it, with one error, when the socket is closed."""
    ours, _ = pair
    fill(ours)
    errors = []

    async def closed_under_it() -> None:
        try:
            await drive(waits_for(wanted), ours.fileno())
        except Exception as error:
            errors.append(type(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(closed_under_it)
        await wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(ours)
    assert errors == [trio.ClosedResourceError]


async def test_an_error_of_the_generator_is_raised(pair: Pair) -> None:
    """What a generator raises arrives unchanged, before a wait and after one."""

    def fails(*wanted: Wait) -> Generator[Wait, Ready | int, None]:
        yield from waits_for(*wanted)
        raise LookupError("from the generator")

    for wanted in ([], [Wait.W]):
        with pytest.raises(LookupError, match="from the generator"):
            await drive(fails(*wanted), pair[0].fileno())


async def test_polling_waits_for_what_each_step_wants(pair: Pair) -> None:
    """Polling waits until it may read, or write, as the last step said, and reports success."""
    ours, peer = pair
    steps = iter([pq.PollingStatus.WRITING, pq.PollingStatus.READING, pq.PollingStatus.OK])
    taken: list[pq.PollingStatus] = []
    results: list[bool] = []

    def step() -> int:
        taken.append(next(steps))
        return taken[-1]

    async def run() -> None:
        results.append(await poll(step, ours.fileno))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        assert taken == [pq.PollingStatus.WRITING, pq.PollingStatus.READING]
        peer.send(b"x")
    assert results == [True]


async def test_polling_reports_failure(pair: Pair) -> None:
    """Polling says so when libpq has given up."""
    assert not await poll(lambda: pq.PollingStatus.FAILED, pair[0].fileno)


async def test_polling_follows_a_change_of_socket(pair: Pair) -> None:
    """Polling asks for the socket anew at each step, as libpq opens another for the next attempt."""
    ours, peer = pair
    peer.send(b"x")
    first, second = socket.socketpair()
    sockets = iter([first.fileno(), ours.fileno()])
    steps = iter([pq.PollingStatus.WRITING, pq.PollingStatus.READING, pq.PollingStatus.OK])
    with first, second, trio.fail_after(5):
        assert await poll(lambda: next(steps), lambda: next(sockets))


@pytest.mark.parametrize("wanted", [Wait.R, Wait.W, Wait.RW])
def test_ctrl_c_ends_a_wait(pair: Pair, wanted: Wait) -> None:
    """Ctrl-C comes out of a wait as KeyboardInterrupt itself."""
    ours, _ = pair
    fill(ours)
    raised = []

    async def main() -> None:
        press_ctrl_c(wait_all_tasks_blocked)
        try:
            with trio.fail_after(5):
                await drive(waits_for(wanted), ours.fileno())
        except BaseException as error:
            raised.append(type(error))

    with listening_to_ctrl_c():
        trio.run(main)
    assert raised == [KeyboardInterrupt]


@pytest.mark.parametrize("wanted", [Wait.R, Wait.RW])
async def test_two_that_wait_for_the_same(pair: Pair, wanted: Wait) -> None:
    """Who waits for what another task is waiting for is told so, and does not spin."""
    ours, _ = pair
    fill(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.wait_readable, ours)
        await wait_all_tasks_blocked()
        with trio.fail_after(5), pytest.raises(trio.BusyResourceError):
            await drive(waits_for(wanted), ours.fileno())
        nursery.cancel_scope.cancel()
