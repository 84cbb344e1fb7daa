"""A TCP server that shuts down gracefully, in plain Trio.

    python examples/graceful.py

It answers what it is sent in upper case, with the help of PostgreSQL. On SIGTERM or Ctrl-C it accepts
no more connections, and reads no more from those it has; it finishes its answers within GRACE seconds,
and closes the pool: from the inside out, as the blocks are nested. It listens on PORT, or any free one.
Runs against DATABASE_URL, or a PostgreSQL of its own.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import partial
from signal import SIGINT, SIGTERM
from socket import SHUT_RD
from typing import Any

import trio
from embedded_postgres import database_url

import whitepool.postgres

Session = whitepool.Session[whitepool.postgres.TrioConnection[Any]]

GRACE = 10


async def answer(session: Session, streams: set[trio.SocketStream], stream: trio.SocketStream) -> None:
    """Serve one connection, until the client hangs up or the server is shutting down."""
    streams.add(stream)
    try:
        async with stream:
            async for question in stream:
                async with session.worker() as connection:
                    cursor = await connection.execute("SELECT upper(%s)", (question.decode(),))
                    (reply,) = await cursor.fetchone() or ("",)
                await stream.send_all(reply.encode())
    except Exception:
        logging.exception("one connection failed")  # which is nothing to the others
    finally:
        streams.remove(stream)


async def main(dsn: str) -> None:
    streams: set[trio.SocketStream] = set()
    async with (
        whitepool.postgres.open_pool(dsn, pool_size=4, autocommit=True) as session,
        trio.open_nursery() as handlers,
    ):
        with trio.open_signal_receiver(SIGINT, SIGTERM) as signals:
            async with trio.open_nursery() as acceptors:
                serve = partial(trio.serve_tcp, host="127.0.0.1", handler_nursery=handlers)
                port = int(os.environ.get("PORT", "0"))
                (listener,) = await acceptors.start(serve, partial(answer, session, streams), port)
                print(*listener.socket.getsockname(), flush=True)
                await anext(signals)
                acceptors.cancel_scope.cancel()
        for stream in streams:
            with suppress(OSError):  # the client was quicker
                stream.socket.shutdown(SHUT_RD)  # what has arrived is still read, then the end
        handlers.cancel_scope.deadline = trio.current_time() + GRACE


if __name__ == "__main__":
    with database_url() as url:
        trio.run(main, url)
