"""A server that has one answer to each query: what clients cost where PostgreSQL would be the limit.

It speaks as much of PostgreSQL's protocol as libpq needs to connect and to send `SELECT 1`, prepared or
not. It has one thread, and looks at nothing but the kinds of messages. Run as a program, it prints its
port, and ends with its standard input.
"""

from __future__ import annotations

import selectors
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

SSL, GSS, VERSION_3 = 80877103, 80877104, 196608
SETTINGS = {
    "server_version": "18.0",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "standard_conforming_strings": "on",
    "integer_datetimes": "on",
    "in_hot_standby": "off",
    "default_transaction_read_only": "off",
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
}


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!i", 4 + len(body)) + body


READY = message(b"Z", b"I")
GREETING = (
    message(b"R", struct.pack("!i", 0))
    + b"".join(message(b"S", f"{name}\0{value}\0".encode()) for name, value in SETTINGS.items())
    + message(b"K", struct.pack("!ii", 1, 1))
    + READY
)
COLUMNS = message(
    b"T", struct.pack("!h", 1) + b"?column?\0" + struct.pack("!ihihih", 0, 0, 23, 4, -1, 0)
)
ROW = message(b"D", struct.pack("!hi", 1, 1) + b"1") + message(b"C", b"SELECT 1\0")
ANSWERS = {
    b"Q": COLUMNS + ROW + READY,
    b"P": message(b"1"),
    b"B": message(b"2"),
    b"D": COLUMNS,
    b"E": ROW,
    b"C": message(b"3"),
    b"S": READY,
}


@lru_cache
def answer(received: bytes) -> tuple[bytes, int]:
    """Return the answer to the whole messages that were received, and how many bytes they were."""
    answers, at = b"", 0
    while len(received) >= at + 5:
        end = at + 1 + struct.unpack_from("!i", received, at + 1)[0]
        if end > len(received):
            break
        answers += ANSWERS.get(received[at : at + 1], b"")
        at = end
    return answers, at


def answer_startup(received: bytes) -> tuple[bytes, int]:
    """Say no to encryption, and yes to anyone."""
    if len(received) < 8 or len(received) < (size := struct.unpack_from("!i", received)[0]):
        return b"", 0
    code = struct.unpack_from("!i", received, 4)[0]
    return b"N" if code in (SSL, GSS) else GREETING, size


class Client:
    """One connection to the server."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.answer = answer_startup

    def serve(self) -> bool:
        """Answer what has come. Returns whether the client is still there."""
        data = b""
        with suppress(ConnectionError):
            data = self.sock.recv(65536)
        self.received += data
        answers, used = self.answer(self.received)
        self.received = self.received[used:]
        if answers:
            with suppress(ConnectionError):
                self.sock.sendall(answers)
            if answers is GREETING:
                self.answer = answer
        return bool(data)


def serve(listener: socket.socket) -> None:
    """Serve until standard input ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listener:
                    sock = listener.accept()[0]
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    selector.register(sock, selectors.EVENT_READ, Client(sock))
                elif not key.data.serve():
                    selector.unregister(key.data.sock)
                    key.data.sock.close()


@contextmanager
def canned_server() -> Iterator[str]:
    """Yield the connection string of such a server, which runs in a process of its own."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        with process.stdin:
            yield f"host=127.0.0.1 port={int(process.stdout.readline())} user=postgres dbname=postgres"


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(listener)


if __name__ == "__main__":
    main()
