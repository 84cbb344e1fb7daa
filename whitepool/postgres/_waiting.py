"""Drives psycopg's generators, and libpq's polling, with Trio.

psycopg writes its protocol as generators. One yields what it waits for: the connection's socket to
be readable, writable, or either. It is sent what happened, and returns its result in the end. A
generator that is sent "nothing" yields the same again, so a wait that was interrupted can be resumed.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio
from psycopg import pq
from psycopg.abc import RV, PQGen
from psycopg.waiting import Ready, Wait
from trio.lowlevel import cancel_shielded_checkpoint, wait_readable, wait_writable

from .._scheduling import TimeSlice

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

BUSY_TIME = 0.001
"""Seconds for which a connection that never has to wait may keep the event loop to itself."""


async def drive(
    generator: PQGen[RV],
    socket: int,
    checkpoint: Callable[[], Awaitable[None]] = cancel_shielded_checkpoint,
    *,
    resumed: bool = False,
) -> RV:
    """Run a generator to its end. Where there is nothing to wait for, `checkpoint` is called after it.

    By default that is no cancellation point: what the generator did has been done. One whose wait was
    interrupted is `resumed`.
    """
    try:
        wanted = generator.send(Ready.NONE) if resumed else next(generator)
    except StopIteration as end:
        await checkpoint()
        return end.value  # type: ignore[no-any-return]  # StopIteration is not generic
    yielded = False
    time_slice: TimeSlice | None = None
    try:
        while True:
            if wanted == Wait.R:
                await wait_readable(socket)
                yielded, ready = True, Ready.R
            else:
                # A socket is nearly always ready for writing, and a pipeline asks for each command.
                ready = ready_now(socket, wanted)
                if time_slice is None:
                    time_slice = TimeSlice(BUSY_TIME)
                    time_slice.restart()
                if not ready or time_slice.is_over():
                    ready = await _wait_either(socket, wanted)
                    yielded = True
                    time_slice.restart()
            wanted = generator.send(ready)
    except StopIteration as end:
        if not yielded:
            await checkpoint()
        return end.value  # type: ignore[no-any-return]


def ready_now(socket: int, wanted: Wait) -> Ready:
    """Ask the system what a socket is ready for, without waiting."""
    poller = select.poll()
    poller.register(socket, (wanted & Wait.R and select.POLLIN) | (wanted & Wait.W and select.POLLOUT))
    found = poller.poll(0)
    event = found[0][1] if found else 0
    failed = event & (select.POLLERR | select.POLLHUP)  # libpq will find out why
    ready = (event & select.POLLIN and Ready.R) | (event & select.POLLOUT and Ready.W)
    return Ready(ready or (failed and Ready.RW))


async def _wait_either(socket: int, wanted: Wait) -> Ready:
    """Wait until a socket is ready for something of what is wanted."""
    if wanted == Wait.W:
        await wait_writable(socket)
        return Ready.W
    ready = 0

    async def wait_for(state: Ready) -> None:
        nonlocal ready
        await (wait_readable if state is Ready.R else wait_writable)(socket)
        ready |= state
        nursery.cancel_scope.cancel()

    with ungrouped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for, Ready.R)
            nursery.start_soon(wait_for, Ready.W)
    return Ready(ready)


@contextmanager
def ungrouped() -> Iterator[None]:
    """Let out what was raised in a nursery without the group around it; a cancellation comes last."""
    try:
        yield
    except BaseExceptionGroup as group:
        _, others = group.split(trio.Cancelled)
        error = (others or group).exceptions[0]
        raise error from error.__cause__


async def poll(step: Callable[[], int], socket: Callable[[], int]) -> bool:
    """Run libpq's connecting, or cancelling, to its end; say whether it succeeded.

    Each step may have changed the socket.
    """
    while True:
        status = step()
        if status == pq.PollingStatus.READING:
            await wait_readable(socket())
        elif status == pq.PollingStatus.WRITING:
            await wait_writable(socket())
        else:
            return status == pq.PollingStatus.OK
