"""TLS for a server that was built without it: a proxy ends it, and speaks plainly to the server."""

from __future__ import annotations

import contextlib
import ssl
import struct
from collections.abc import AsyncIterator
from socket import MSG_PEEK, SO_LINGER, SOL_SOCKET

import trio
import trustme
from serving import HOST, forward, listening

# What a client may say before anything else: eight bytes, of which the first four are their number.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
GSS_REQUEST = struct.pack("!ii", 8, 80877104)
CANCEL_REQUEST = struct.pack("!ii", 16, 80877102)

RECORD = 8192
"""Bytes of one TLS record, at most. PostgreSQL itself fills no larger ones."""


def server_context(
    authority: trustme.CA, *, name: str = HOST, clients: trustme.CA | None = None
) -> ssl.SSLContext:
    """Make what a server needs: a certificate for a name and, maybe, a demand for one of the client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["postgresql"])
    authority.issue_cert(name).configure_cert(context)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        clients.configure_trust(context)
    return context


class TLSProxy:
    """Forwards to a server, on a port of its own. It counts, and it can hang up."""

    def __init__(self, server_port: int, context: ssl.SSLContext | None) -> None:
        self.port = 0
        self.context = context
        """None: TLS is off."""
        self.record = RECORD
        self.plain = 0
        """Connections without TLS that were forwarded."""
        self.encrypted = 0
        """Connections with TLS that were forwarded."""
        self.cancellations: list[bool] = []
        """Requests to cancel, and whether each came through TLS."""
        self._server_port = server_port
        self._lives: dict[trio.CancelScope, trio.SocketStream] = {}

    def hang_up(self, *, reset: bool = False) -> None:
        """Close all connections without a word of TLS: in good order (FIN), or by a reset (RST)."""
        for life, stream in self._lives.items():
            if reset:
                stream.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            life.cancel()

    async def serve(self, stream: trio.SocketStream) -> None:
        with trio.CancelScope() as life, contextlib.suppress(trio.BrokenResourceError):
            self._lives[life] = stream
            try:
                async with stream:
                    await self._serve(stream)
            finally:
                del self._lives[life]

    async def _serve(self, stream: trio.SocketStream) -> None:
        near: trio.SocketStream | trio.SSLStream[trio.SocketStream] = stream
        first = await _peek(stream, 8)
        while first in (SSL_REQUEST, GSS_REQUEST):
            await _take(stream, 8)
            if first == SSL_REQUEST and self.context is not None:
                await stream.send_all(b"S")
                near = await self._shake_hands(stream)
                break
            await stream.send_all(b"N")
            first = await _peek(stream, 8)
        else:
            if first[:1] == b"\x16" and self.context is not None:  # sslnegotiation=direct
                near = await self._shake_hands(stream)
        greeting = await near.receive_some(8)
        if greeting == b"":
            return
        if greeting == CANCEL_REQUEST[:8]:
            self.cancellations.append(near is not stream)
        elif near is stream:
            self.plain += 1
        else:
            self.encrypted += 1
        server = await trio.open_tcp_stream(HOST, self._server_port)
        async with server:
            await server.send_all(greeting)
            await forward(near, server, self.record)
        await near.aclose()  # with a goodbye in TLS, as PostgreSQL says it

    async def _shake_hands(self, stream: trio.SocketStream) -> trio.SSLStream[trio.SocketStream]:
        assert self.context is not None
        secure = trio.SSLStream(stream, self.context, server_side=True, https_compatible=True)
        try:
            await secure.do_handshake()
        except trio.BrokenResourceError:
            # With TLS 1.3, the client may be done, and sending. To close now would be a reset.
            await stream.send_eof()
            async for _ in stream:
                pass
            raise
        return secure


async def _peek(stream: trio.SocketStream, count: int) -> bytes:
    """Return the next bytes, and leave them to be received."""
    return await stream.socket.recv(count, MSG_PEEK)


async def _take(stream: trio.SocketStream, count: int) -> None:
    while count:
        count -= len(await stream.receive_some(count))


@contextlib.asynccontextmanager
async def open_tls_proxy(server_port: int, context: ssl.SSLContext | None) -> AsyncIterator[TLSProxy]:
    """Run a proxy in front of a server, for the length of a block."""
    proxy = TLSProxy(server_port, context)
    async with listening(proxy.serve) as proxy.port:
        yield proxy
