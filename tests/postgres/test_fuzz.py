"""A server that sends any message at any time: no spin, no hang, no other client's rows, books right.

Each seed is a run of its own: a server, a pool, and a few clients that are cancelled at random.
``python test_fuzz.py 17`` runs seed 17, and says what happens. `make fuzz` tries a hundred thousand.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psycopg
import pytest
import trio
from connections import closing
from serving import listening
from timing import alarm
from workshop import check_books

from whitepool import Hooks, PoolError
from whitepool.postgres import TrioConnection, connect, open_pool

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

SEEDS = int(os.environ.get("FUZZ_SEEDS", "1000"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
CHUNK = 100
"""Seeds of one test."""

CLEANUP = 0.05
"""Seconds that a cancelled operation may take to clean up."""

BOUND = 4
"""Seconds that a run may take."""

SPIN = 2
"""Seconds after which an event loop that has not turned is taken for spinning."""

Connection = TrioConnection[Any]


# -- The server ----------------------------------------------------------------------------------------


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def rows_of(tag: bytes, count: int) -> bytes:
    """Rows of one column, the client's tag."""
    column = struct.pack("!h", 1) + struct.pack("!i", len(tag)) + tag
    return message(b"D", column) * count


DESCRIPTION = message(
    b"T", struct.pack("!h", 1) + b"tag\0" + struct.pack("!ihihih", 0, 0, 25, -1, -1, 0)
)
ERROR = message(b"E", b"SERROR\0VERROR\0C57014\0Mcanceling\0\0")
FATAL = message(b"E", b"SFATAL\0VFATAL\0C57P01\0Mterminating\0\0")
COPY_BODY = struct.pack("!bhh", 0, 1, 0)
HELLO = (
    message(b"R", struct.pack("!i", 0))
    + message(b"S", b"client_encoding\0UTF8\0")
    + message(b"S", b"server_version\x0015.0\0")
    + message(b"K", struct.pack("!ii", 1, 1))
    + message(b"Z", b"I")
)


class Server:
    """One connection of a client: it mostly answers as PostgreSQL does, and then does not.

    Answers have no numbers in this protocol. A server that has ended one too early, or twice, answers
    each later query with what belongs to an earlier one, and no client can know. So from its first odd
    answer on, its rows carry no client's tag.
    """

    def __init__(self, chance: random.Random, madness: float) -> None:
        self._random = chance
        self._madness = madness
        self._tag = b""
        self._query = b""
        self._statements: dict[bytes, bytes] = {}
        self._is_odd = False
        self._status = b"I"
        self._copying_in = False
        self._skipping = False

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._serve(stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        buffer = bytearray()
        begun = False
        async for data in stream:
            buffer += data
            while len(buffer) >= 4:
                if not begun:
                    (length,) = struct.unpack_from("!i", buffer)
                    if len(buffer) < length:
                        break
                    (code,) = struct.unpack_from("!i", buffer, 4)
                    del buffer[:length]
                    if code == 80877102:  # a request to cancel
                        await self._end_of_request(stream)
                        return
                    if code != 196608 and code != 196610:
                        await stream.send_all(b"N")
                        continue
                    begun = True
                    if code == 196610:  # libpq 18 or newer may ask for protocol 3.2
                        await stream.send_all(message(b"v", struct.pack("!ii", 196608, 0)))
                    await stream.send_all(HELLO)
                    continue
                if len(buffer) < 5:
                    break
                (length,) = struct.unpack_from("!i", buffer, 1)
                if len(buffer) < length + 1:
                    break
                kind, body = bytes(buffer[:1]), bytes(buffer[5 : length + 1])
                del buffer[: length + 1]
                if kind == b"X":
                    return
                answer: bytes | None = self._answer(kind, body)
                assert answer is not None
                if self._random.random() < self._madness:
                    self._is_odd = True
                    if self._tag:
                        answer = answer.replace(self._tag, b"x" * len(self._tag))
                    self._tag = b"x" * len(self._tag)
                    answer = self._madden(answer)
                if answer is None:
                    if self._random.random() < 0.5:
                        await trio.sleep_forever()
                    return
                if answer:
                    await stream.send_all(answer)

    async def _end_of_request(self, stream: trio.SocketStream) -> None:
        fate = self._random.random()
        if fate < 0.1:
            await trio.sleep_forever()
        if fate < 0.2:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fate < 0.3:
            await stream.send_all(b"?")

    def _answer(self, kind: bytes, body: bytes) -> bytes:
        """What PostgreSQL would answer, more or less."""
        if kind == b"Q":
            answer = b"".join(self._run(query) for query in body.rstrip(b"\0").split(b"; "))
            return answer if self._copying_in else answer + message(b"Z", self._status)
        if self._skipping and kind != b"S":
            return b""
        if kind == b"P":
            name, query, *_ = body.split(b"\0")
            self._statements[name] = query
            return message(b"1")
        if kind == b"B":
            self._query = self._statements.get(body.split(b"\0")[1], b"")
            return message(b"2")
        if kind == b"D":
            return DESCRIPTION
        if kind == b"E":
            return self._run(self._query, described=True)
        if kind == b"C":
            return message(b"3")
        if kind == b"S":
            self._skipping = False
            return message(b"Z", self._status)
        if kind in (b"c", b"f") and self._copying_in:
            self._copying_in = False
            done = message(b"C", b"COPY 1\0") if kind == b"c" else ERROR
            return done + message(b"Z", self._status)
        return b""

    def _note_tag(self, query: bytes) -> None:
        if b"'" in query:
            tag = query.split(b"'")[1]
            self._tag = b"x" * len(tag) if self._is_odd else tag

    def _run(self, query: bytes, *, described: bool = False) -> bytes:
        self._note_tag(query)
        words = query.upper().split() or [b""]
        if words[0] == b"BEGIN":
            self._status = b"T"
        elif words[0] in (b"COMMIT", b"ROLLBACK") and b"TO" not in words:
            self._status = b"I"
        elif words[0] == b"COPY":
            if b"STDIN" in words:
                self._copying_in = True
                return message(b"G", COPY_BODY)
            data = message(b"d", self._tag + b"\n") * self._random.randrange(1, 30)
            done = message(b"c") + message(b"C", b"COPY 1\0")
            return message(b"H", COPY_BODY) + data + done
        elif words[0] in (b"SELECT", b"FETCH"):
            count = self._random.randrange(1, 30)
            result = b"" if described else DESCRIPTION
            return result + rows_of(self._tag, count) + message(b"C", b"SELECT %d\0" % count)
        elif words[0] == b"":
            return message(b"I")
        return message(b"C", words[0] + b"\0")

    def _madden(self, answer: bytes) -> bytes | None:
        """Make something else of an answer; None: silence, or an end."""
        chance = self._random
        odd = [
            message(b"G", COPY_BODY),
            message(b"G", COPY_BODY) * 300,
            message(b"H", COPY_BODY),
            message(b"W", COPY_BODY),
            message(b"H", COPY_BODY) + message(b"c"),
            message(b"d", self._tag),
            message(b"c"),
            message(b"Z", b"I"),
            message(b"Z", b"T"),
            message(b"Z", b"E"),
            message(b"Z", b"?"),
            message(b"C", b"SELECT 1\0"),
            message(b"C", b"SELECT 1\0") * 500,
            message(b"I"),
            message(b"N", b"SNOTICE\0Mhello\0\0"),
            message(b"A", struct.pack("!i", 1) + b"channel\0payload\0"),
            message(b"S", b"client_encoding\0UTF8\0"),
            message(b"1"),
            message(b"2"),
            message(b"3"),
            message(b"n"),
            message(b"s"),
            message(b"t", struct.pack("!h", 0)),
            message(b"K", struct.pack("!ii", 2, 2)),
            message(b"R", struct.pack("!i", 3)),
            message(b"V", struct.pack("!i", 4) + b"tag\0"),
            DESCRIPTION,
            rows_of(self._tag, 1),
            rows_of(self._tag, 500),
            ERROR,
            ERROR * 3,
            FATAL,
            b"D" + struct.pack("!i", -1),
            b"D" + struct.pack("!i", 2**31 - 1),
            b"G" + struct.pack("!i", 3),
            b"?" + struct.pack("!i", 9) + b"rubbish",
            b"Z" + struct.pack("!i", 100),
            bytes(chance.randrange(256) for _ in range(chance.randrange(1, 40))),
        ]
        what = chance.randrange(8)
        if what == 0:
            return None
        if what == 1:
            return b""
        if what == 2:
            return answer * 2
        if what == 3:
            return answer[: chance.randrange(len(answer) + 1)]
        pieces = b"".join(chance.choice(odd) for _ in range(chance.randrange(1, 4)))
        if what == 4:
            return pieces
        if what == 5:
            return answer + pieces
        if what == 6:
            return pieces + answer
        cut = chance.randrange(len(answer) + 1)
        return answer[:cut] + pieces + answer[cut:]


# -- The clients ---------------------------------------------------------------------------------------


class Leaked(BaseException):
    """A client has got what belongs to another. Not an `Exception`, so that nothing suppresses it."""


class Client:
    """Does this and that, and looks whether every row that it gets is its own."""

    def __init__(self, name: str, chance: random.Random) -> None:
        self._random = chance
        self.tag = name
        self.operations: list[Callable[[Connection], Awaitable[None]]] = [
            self.execute,
            self.executemany,
            self.executemany_returning,
            self.stream,
            self.copy_in,
            self.copy_out,
            self.both_copies,
            self.pipeline,
            self.transaction,
            self.nested,
            self.transaction_in_a_pipeline,
            self.notifies,
            self.server_cursor,
        ]

    def check(self, rows: list[Any]) -> None:
        for row in rows:
            value = row[0] if row else None
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            if isinstance(text, str) and text.startswith("client-") and text != self.tag:
                raise Leaked(f"{self.tag} got {text}")

    @property
    def query(self) -> str:
        return f"SELECT '{self.tag}'"

    async def execute(self, connection: Connection) -> None:
        cursor = await connection.execute(self.query)
        self.check(await cursor.fetchall())

    async def executemany(self, connection: Connection) -> None:
        await connection.cursor().executemany(self.query + " WHERE %s", [(True,)] * 5)

    async def executemany_returning(self, connection: Connection) -> None:
        cursor = connection.cursor()
        await cursor.executemany(self.query + " WHERE %s", [(True,)] * 5, returning=True)
        self.check(await cursor.fetchall())
        while cursor.nextset():
            self.check(await cursor.fetchall())

    async def stream(self, connection: Connection) -> None:
        left = self._random.randrange(40)
        async with closing(connection.cursor().stream(self.query)) as rows:
            async for row in rows:
                self.check([row])
                left -= 1
                if left < 0:
                    break

    async def copy_in(self, connection: Connection) -> None:
        async with connection.cursor().copy("COPY notes FROM STDIN") as copy:
            for _ in range(self._random.randrange(10)):
                await copy.write_row((self.tag,))

    async def copy_out(self, connection: Connection) -> None:
        async with connection.cursor().copy(f"COPY (SELECT '{self.tag}') TO STDOUT") as copy:
            async for row in copy.rows():
                self.check([row])

    async def both_copies(self, connection: Connection) -> None:
        query = f"COPY (SELECT '{self.tag}') TO STDOUT; COPY notes FROM STDIN"
        async with connection.cursor().copy(query) as copy:
            self.check([await copy.read_row()])

    async def pipeline(self, connection: Connection) -> None:
        async with connection.pipeline() as pipeline:
            first = await connection.execute(self.query)
            second = await connection.execute(self.query)
            self.check(await first.fetchall())
            await pipeline.sync()
            self.check(await second.fetchall())
            await connection.execute(self.query)

    async def transaction(self, connection: Connection) -> None:
        async with connection.transaction():
            await self.execute(connection)

    async def nested(self, connection: Connection) -> None:
        async with connection.transaction(), connection.transaction():
            await self._random.choice(self.operations)(connection)

    async def transaction_in_a_pipeline(self, connection: Connection) -> None:
        async with connection.pipeline(), connection.transaction():
            await self.execute(connection)

    async def notifies(self, connection: Connection) -> None:
        notifications = connection.notifies(timeout=0.005, stop_after=2)
        async with closing(notifications) as each:
            async for _ in each:
                pass

    async def server_cursor(self, connection: Connection) -> None:
        async with connection.cursor("named") as cursor:
            await cursor.execute(self.query)
            # psycopg in C crashes on rows of a cursor that was described as one without columns.
            if cursor.description:
                self.check(await cursor.fetchmany(2))


TOLERATED = (psycopg.Error, PoolError, trio.TooSlowError)
"""What a client expects of such a server. psycopg's own assumptions about servers fail, too."""

OF_PSYCOPG = (AssertionError, AttributeError, IndexError, KeyError, TypeError, UnicodeError, ValueError)


def is_of_psycopg(error: BaseException) -> bool:
    """Say whether an error comes from psycopg's code, which trusts the server in places."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, OF_PSYCOPG) and "psycopg" in frames[-1].filename


def tolerated(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(tolerated, error.exceptions))
    return isinstance(error, TOLERATED) or is_of_psycopg(error)


# -- A run ---------------------------------------------------------------------------------------------


class Spins(BaseException):
    """The event loop has not turned for too long."""


@contextmanager
def watched() -> Iterator[Callable[[], None]]:
    """Raise `Spins` where the code is, if what this yields was not called for `SPIN` seconds."""

    def ring(_: int, frame: FrameType | None) -> None:
        raise Spins("".join(traceback.format_stack(frame, 12)))

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SPIN) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def run(seed: int, turned: Callable[[], None]) -> None:
    """One seed: a server, a pool, and clients."""
    chance = random.Random(seed)
    madness = chance.choice([0.0, 0.02, 0.1, 0.3])

    async def serve(stream: trio.SocketStream) -> None:
        await Server(random.Random(chance.random()), madness).serve(stream)

    async def beat() -> None:
        while True:
            turned()
            await trio.sleep(0.05)

    async def client(name: str) -> None:
        mine = random.Random(f"{seed} {name}")
        client = Client(name, mine)
        for _ in range(mine.randrange(1, 4)):
            with trio.move_on_after(mine.choice([0.001, 0.003, 0.01])) as scope:
                try:
                    async with session.worker(timeout=0.1) as connection:
                        await mine.choice(client.operations)(connection)
                        if mine.random() < 0.5:
                            await mine.choice(client.operations)(connection)
                except BaseException as error:
                    if not isinstance(error, trio.Cancelled) and not tolerated(error):
                        raise
            scope.cancel()

    connections: list[Connection] = []
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        await trio.lowlevel.checkpoint()
        with trio.fail_after(BOUND):
            async with open_pool(
                f"host=127.0.0.1 port={port} user=fuzz dbname=fuzz sslmode=disable gssencmode=disable",
                lazy=True,
                pool_size=2,
                max_overflow=1,
                cleanup_timeout=CLEANUP,
                autocommit=chance.random() < 0.5,
                reset=chance.choice(["rollback", "session"]),
                prepare_threshold=chance.choice([0, 5, None]),
                reset_timeout=0.05,
                close_timeout=0.05,
                shutdown_timeout=1,
                hooks=Hooks(on_create=connections.append),
            ) as session:
                async with trio.open_nursery() as clients:
                    for number in range(4):
                        clients.start_soon(client, f"client-{number}")
                session._supervisor.roster.check()
                check_books(session.statistics())
            session._supervisor.roster.check()
            check_books(session.statistics())
            assert session.statistics().in_use == session.statistics().idle == 0
            assert all(connection.closed for connection in connections)
        nursery.cancel_scope.cancel()


def try_seed(seed: int) -> None:
    with watched() as turned:
        turned()
        trio.run(run, seed, turned)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """psycopg warns of each error that it ignores."""
    before = logging.root.manager.disable
    logging.disable()
    yield
    logging.disable(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, CHUNK))
def test_a_server_that_sends_anything(first: int) -> None:
    """No spin, no hang, no row of another client, the books right."""
    for seed in range(first, min(first + CHUNK, FIRST + SEEDS)):
        try:
            try_seed(seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error


# -- What it has found ---------------------------------------------------------------------------------


class CopyAfterRows(Server):
    """Begins a COPY after the rows of a query: psycopg's stream() fetched that for ever."""

    def _run(self, query: bytes, *, described: bool = False) -> bytes:
        answer = super()._run(query, described=described)
        return answer + message(b"G", COPY_BODY) if query.startswith(b"SELECT") else answer


class EndlessCopies(Server):
    """Answers the end of each COPY by beginning the next."""

    def _answer(self, kind: bytes, body: bytes) -> bytes:
        if kind in (b"c", b"f"):
            return message(b"G", COPY_BODY) * 2000
        return super()._answer(kind, body)


class EndlessResults(Server):
    """Answers a query with results, and never comes to an end."""

    async def serve(self, stream: trio.SocketStream) -> None:
        async def flood() -> None:
            while True:
                await stream.send_all(message(b"C", b"SELECT 1\0") * 1000)

        async with stream, trio.open_nursery() as nursery:
            with suppress(trio.BrokenResourceError):
                nursery.start_soon(self._serve, stream)
                while self._query != b"flood":
                    await trio.sleep(0.001)
                await flood()

    def _answer(self, kind: bytes, body: bytes) -> bytes:
        if b"SELECT" in body:
            self._query = b"flood"
        return b"" if self._query == b"flood" else super()._answer(kind, body)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        (CopyAfterRows, Client.stream),
        (CopyAfterRows, Client.execute),
        (CopyAfterRows, Client.server_cursor),
        (EndlessCopies, Client.copy_in),
        (EndlessCopies, Client.both_copies),
        (EndlessResults, Client.execute),
        (EndlessResults, Client.stream),
        (EndlessResults, Client.pipeline),
    ],
)
async def test_found(
    kind: type[Server], operation: Callable[[Client, Connection], Awaitable[None]]
) -> None:
    """It ends, within the time of the task and that for cleaning up, and other tasks run."""

    async def serve(stream: trio.SocketStream) -> None:
        await kind(random.Random(1), 0).serve(stream)

    with alarm(10):
        async with listening(serve) as port:
            connection: Connection = await connect(
                f"host=127.0.0.1 port={port} user=fuzz sslmode=disable gssencmode=disable",
                cleanup_timeout=CLEANUP,
                autocommit=True,
            )
            begun = trio.current_time()
            with trio.move_on_after(0.2):
                try:
                    await operation(Client("client-0", random.Random(1)), connection)
                except Exception as error:
                    if not tolerated(error):
                        raise
            assert trio.current_time() - begun < 1
            await connection.close()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        try_seed(int(argument))
