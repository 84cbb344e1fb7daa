"""Servers in Trio for the length of a block, and what those between a client and a server do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

HOST = "127.0.0.1"


@asynccontextmanager
async def listening(
    serve: Callable[[trio.SocketStream], Awaitable[object]], port: int = 0, host: str = HOST
) -> AsyncIterator[int]:
    """Serve connections for the length of a block, which gets the port."""
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, port, host=host))
        try:
            yield listener.socket.getsockname()[1]
        finally:
            nursery.cancel_scope.cancel()


async def forward(near: trio.abc.Stream, far: trio.abc.Stream, most: int | None = None) -> None:
    """Forward what each side sends, so many bytes at a time, until one of them closes."""

    async def pass_on(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream) -> None:
        with suppress(trio.BrokenResourceError):
            while data := await source.receive_some(most):
                await sink.send_all(data)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_on, near, far)
        nursery.start_soon(pass_on, far, near)
