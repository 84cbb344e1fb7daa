"""A pool of something that is no database: TCP connections to a small echo server.

python examples/generic.py
"""

from __future__ import annotations

from functools import partial

import trio

import whitepool


async def echo(stream: trio.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


async def ask(session: whitepool.Session[trio.SocketStream], question: str) -> None:
    async with session.worker() as stream:
        await stream.send_all(question.encode())
        print((await stream.receive_some()).decode())


async def main() -> None:
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, echo, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        port = listener.socket.getsockname()[1]

        # A factory is all that a pool needs; a stream has an aclose(), by which it is closed.
        async def open_stream() -> trio.SocketStream:
            return await trio.open_tcp_stream("127.0.0.1", port)

        async with whitepool.open_pool(open_stream, pool_size=2, max_overflow=1) as session:
            async with trio.open_nursery() as clients:
                for number in range(10):
                    clients.start_soon(ask, session, f"question {number}")
            print(session.statistics())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
