"""A bad network: a TCP proxy that cuts, stalls, swallows and delays what goes through it."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from socket import SO_LINGER, SOL_SOCKET

import trio
from serving import HOST, listening


class Link:
    """One connection through the proxy."""

    def __init__(self, near: trio.SocketStream, *, silent: bool) -> None:
        self.near = near
        self.silent = silent
        """Whatever goes in is swallowed, for good: after a gap no protocol can go on."""
        self.life = trio.CancelScope()

    def cut(self, *, reset: bool) -> None:
        if reset:  # closing it discards what is still to be sent, and says so to the peer
            self.near.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.life.cancel()


class Proxy:
    """Forwards to a server what it gets on a port of its own, until it is told otherwise."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.port = 0
        self.accepted = 0
        """Connections that were accepted, be it to reset them."""
        self.down = False
        """Whether new connections are reset at once."""
        self.links: set[Link] = set()
        self._server = server
        self._dropping = False
        self._delay = 0.0
        self._flows = trio.Event()
        self._flows.set()

    @property
    def address(self) -> dict[str, str]:
        """For `psycopg.conninfo.make_conninfo(dsn, **proxy.address)`."""
        return {"host": HOST, "port": str(self.port)}

    def cut(self, *, reset: bool = False) -> None:
        """Close all connections: in good order (FIN), or by a reset (RST)."""
        for link in self.links:
            link.cut(reset=reset)

    def stall(self) -> None:
        """Hold everything back, closing included, until `resume`."""
        self._flows = trio.Event()

    def drop(self) -> None:
        """Swallow everything, news of a close included. `resume` is for new connections only."""
        self._dropping = True
        for link in self.links:
            link.silent = True

    def delay(self, seconds: float) -> None:
        """Deliver everything late."""
        self._delay = seconds

    def resume(self) -> None:
        """Forward again what was held back, and new connections."""
        self._dropping = False
        self._flows.set()

    async def serve(self, near: trio.SocketStream) -> None:
        """Serve one connection."""
        self.accepted += 1
        link = Link(near, silent=self._dropping)
        if self.down:
            link.cut(reset=True)
        self.links.add(link)
        try:
            async with near:
                with link.life:
                    far = await trio.open_tcp_stream(*self._server)
                    async with far, trio.open_nursery() as nursery:
                        nursery.start_soon(self._forward, near, far, link)
                        nursery.start_soon(self._forward, far, near, link)
        except OSError:
            pass  # the server is down: the connection is closed
        finally:
            self.links.discard(link)

    async def _forward(self, source: trio.SocketStream, sink: trio.SocketStream, link: Link) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async for data in source:
                await trio.sleep(self._delay)
                await self._flows.wait()
                if not link.silent:
                    await sink.send_all(data)
        await self._flows.wait()
        if link.silent:
            await trio.sleep_forever()  # the peer does not learn that the other side has closed
        link.life.cancel()


@contextlib.asynccontextmanager
async def open_proxy(host: str, port: int) -> AsyncIterator[Proxy]:
    """Run a proxy in front of a server, on 127.0.0.1, for the length of a block."""
    proxy = Proxy((host, port))
    async with listening(proxy.serve) as proxy.port:
        yield proxy
