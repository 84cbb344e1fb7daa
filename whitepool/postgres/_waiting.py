"""How an operation waits on Trio: for the connection's socket, and for its turn on the connection.

psycopg writes its protocol as generators. A generator yields what it waits for: that the socket is
readable, writable, or either. It is sent what the socket is ready for, and returns its result in the
end. A generator that is sent "nothing" yields the same again, so an interrupted wait can be resumed.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import wraps
from typing import TYPE_CHECKING

import psycopg
import trio
from psycopg import errors, pq
from psycopg.abc import RV, PQGen
from psycopg.waiting import Ready, Wait
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
    wait_writable,
)

from .._scheduling import NOOP, NoopAwaitable, TimeSlice, Uninterrupted
from ._readiness import wait_readable

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

BUSY_TIME = 0.001
"""Seconds for which one operation whose socket is always ready may keep the event loop to itself."""

Checkpoint = Callable[[], Awaitable[None]]


class Lock:
    """A lock that does not go through Trio's scheduler when it is free.

    psycopg takes the connection's lock for each operation, and the operation is a checkpoint itself.
    The lock has no owner, because an asynchronous generator (`notifies`, a stream) may be closed by
    another task than the one that started it.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._waiters = trio.lowlevel.ParkingLot()

    def locked(self) -> bool:
        """Return whether an operation holds the lock."""
        return self._is_taken

    # Ctrl-C must not strike between taking the lock and entering the block, nor before releasing it.
    @enable_ki_protection
    async def __aenter__(self) -> None:
        if self._is_taken:
            await self._waiters.park()
        else:
            await checkpoint_if_cancelled()
            self._is_taken = True

    @enable_ki_protection
    def __aexit__(self, *_: object) -> NoopAwaitable:
        if self._waiters:
            self._waiters.unpark()  # it has the lock now
        else:
            self._is_taken = False
        return NOOP


async def drive(
    generator: PQGen[RV],
    socket: int,
    checkpoint: Checkpoint = cancel_shielded_checkpoint,
    *,
    wanted: Wait | None = None,
    resumed: bool = False,
) -> RV:
    """Run a generator to its end, and return its result.

    If the generator never has to wait, `checkpoint` is awaited after it. By default that is not a
    cancellation point, because what the generator did has been done. If the task is cancelled during
    a wait, the generator stays where it is: call `drive` again with `resumed`. If the caller
    has begun to run it, `wanted` is what it waits for.
    """
    try:
        if wanted is None:
            wanted = generator.send(Ready.NONE) if resumed else next(generator)
    except StopIteration as end:
        # What it needed had arrived before.
        await checkpoint()
        return end.value  # type: ignore[no-any-return]  # StopIteration is not generic
    yielded = False
    time_slice: TimeSlice | None = None
    try:
        while True:
            if wanted == Wait.R:
                # The answer to a query is rarely there already: looking first would be wasted.
                await wait_readable(socket)
                yielded, ready = True, Ready.R
            else:
                # A socket is nearly always ready for writing, and a pipeline asks for each command:
                # waiting in Trio each time would cost more than sending.
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


async def drive_for(
    seconds: float, generator: PQGen[RV], socket: int, checkpoint: Checkpoint, *, or_raise: bool
) -> RV:
    """Run psycopg's generator `notifies` to its end, for at most `seconds`.

    What has arrived in time counts, also with a limit of 0. If nothing has, the generator of an older
    psycopg returns nothing. `or_raise` is for a newer one: it raises the error that psycopg expects.
    """
    with trio.move_on_after(max(0, seconds)):
        return await drive(generator, socket, checkpoint)
    ready = ready_now(socket, Wait.R)
    if or_raise and not ready:
        raise errors._WaitTimeout("wait timeout expired")
    try:
        generator.send(ready)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise psycopg.InternalError("only notifies() can have a limit")


if TYPE_CHECKING:
    uninterrupted_block = asynccontextmanager
else:

    def uninterrupted_block(function):
        """Make a block of an asynchronous generator, as `contextlib.asynccontextmanager` does.

        A Ctrl-C in the middle of psycopg's code that enters or leaves a block would leave the lock
        taken, or the transaction open. Here it comes where that code waits, as a cancellation does, or
        after it.
        """
        make = asynccontextmanager(function)

        @wraps(function)
        def block(*args, **keywords):
            return Uninterrupted(make(*args, **keywords))

        return block


def ready_now(socket: int, wanted: Wait) -> Ready:
    """Return what of `wanted` the socket is ready for, without waiting.

    A socket that has failed is ready for everything, as libpq finds out why when it uses it.
    """
    poller = select.poll()  # select() can't take a descriptor of 1024 or more
    poller.register(socket, (wanted & Wait.R and select.POLLIN) | (wanted & Wait.W and select.POLLOUT))
    found = poller.poll(0)
    event = found[0][1] if found else 0
    failed = event & (select.POLLERR | select.POLLHUP)
    ready = (event & select.POLLIN and Ready.R) | (event & select.POLLOUT and Ready.W)
    return Ready(ready or (failed and Ready.RW))


async def _wait_either(socket: int, wanted: Wait) -> Ready:
    """Wait until the socket is ready for something of `wanted`, which is writing, or either."""
    if wanted == Wait.W:
        await wait_writable(socket)
        return Ready.W
    # Trio waits for one direction at a time. Both may have been woken before one cancels the other.
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
    """Raise what a nursery raises without the group around it: the nursery is an internal detail.

    Of several exceptions, the first that is not a cancellation is raised: a task that fails in the
    nursery cancels the others, and it is the failure that has to be seen.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        _, others = group.split(trio.Cancelled)
        error = (others or group).exceptions[0]
        raise error from error.__cause__


async def poll(step: Callable[[], int], socket: Callable[[], int]) -> bool:
    """Run libpq's connecting, or its request to cancel, to the end; return whether it succeeded.

    `socket` is asked before each wait, because any step may have changed the socket.
    """
    while True:
        status = step()
        if status == pq.PollingStatus.READING:
            await wait_readable(socket())
        elif status == pq.PollingStatus.WRITING:
            await wait_writable(socket())
        else:
            return status == pq.PollingStatus.OK
