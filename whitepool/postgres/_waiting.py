"""Drives psycopg's generators, and libpq's polling, with Trio.

psycopg writes its protocol as generators. One yields what it waits for: the connection's socket to
be readable, writable, or either. It is sent what happened, and returns its result in the end. A
generator that is sent "nothing" yields the same again, so a wait that was interrupted can be resumed.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from psycopg import pq
from psycopg.abc import RV, PQGen
from psycopg.waiting import Ready, Wait
from trio.lowlevel import cancel_shielded_checkpoint, wait_readable, wait_writable


async def drive(generator: PQGen[RV], socket: int) -> RV:
    """Run a generator to its end. A checkpoint, also where there is nothing to wait for."""
    try:
        wanted = next(generator)
    except StopIteration as end:
        # Not a cancellation point: what the generator did has been done.
        await cancel_shielded_checkpoint()
        return end.value  # type: ignore[no-any-return]  # StopIteration is not generic
    try:
        while True:
            if wanted == Wait.R:
                await wait_readable(socket)
                ready = Ready.R
            elif wanted == Wait.W:
                await wait_writable(socket)
                ready = Ready.W
            else:
                ready = await _wait_either(socket)
            wanted = generator.send(ready)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def _wait_either(socket: int) -> Ready:
    """Wait until a socket is readable or writable. Only queries that fill its buffer come here."""
    ready = 0

    async def wait_for(state: Ready) -> None:
        nonlocal ready
        await (wait_readable if state is Ready.R else wait_writable)(socket)
        ready |= state
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for, Ready.R)
        nursery.start_soon(wait_for, Ready.W)
    return Ready(ready)


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
