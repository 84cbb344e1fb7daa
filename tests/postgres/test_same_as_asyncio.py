"""TrioConnection does what psycopg's AsyncConnection does: each scenario runs on both.

A scenario knows nothing of its event loop. It returns what can be seen from outside; what it returns
on asyncio is what is expected on Trio.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import inspect
import re
import select
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from decimal import Decimal
from enum import Enum
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple, cast

import psycopg
import pytest
import trio
from psycopg import errors, pq, sql
from psycopg.adapt import AdaptersMap, Dumper
from psycopg.conninfo import make_conninfo
from psycopg.copy import AsyncLibpqWriter, AsyncWriter
from psycopg.rows import class_row, dict_row, kwargs_row, namedtuple_row, scalar_row, tuple_row
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.enum import EnumInfo, register_enum
from psycopg.types.json import Json, Jsonb, set_json_loads
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range
from psycopg.types.string import TextLoader

from whitepool.postgres import TrioConnection, open_pool

Connection = psycopg.AsyncConnection[Any]
Scenario = Callable[[Connection, str], Awaitable[object]]

PSYCOPG = tuple(int(part) for part in re.findall(r"\d+", psycopg.__version__)[:3])
LIBPQ = pq.version() // 10000

LISTS_FAILURES = "All failures were" in inspect.getsource(psycopg.AsyncConnection.connect)
"""Older releases of psycopg tell of the last failure only; on Trio all are listed."""

SCENARIOS: list[Scenario] = []
TYPES: list[Scenario] = []
"""Those of `SCENARIOS` that are about types: they run on a pooled connection as well."""

LAST_WORDS = (errors.AdminShutdown, errors.IdleInTransactionSessionTimeout)

TIMEOUT = 20
"""Seconds that one scenario may take, that is: forever."""


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


def scenario_if(condition: bool) -> Callable[[Scenario], Scenario]:
    """A scenario of something that not every psycopg, or libpq, has."""
    return scenario if condition else lambda function: function


def types(function: Scenario) -> Scenario:
    TYPES.append(function)
    return scenario(function)


# What a scenario sees


def describe(error: BaseException) -> tuple[object, ...]:
    """An exception, without what must differ: addresses of objects, and numbers of processes."""
    # Whether the server's last words are read before the end is a matter of chance.
    if isinstance(error, LAST_WORDS) or "server closed the connection unexpectedly" in str(error):
        return ("the server hung up",)
    message = re.sub(r"0x[0-9a-f]+", "0x…", str(error))
    message = re.sub(r"(process|PID|pid) \d+", r"\1 …", message)
    # The class that appears in the repr of a transaction, say, is not the same.
    message = message.replace("whitepool.postgres._blocks.TrioTransaction", "AsyncTransaction")
    message = message.replace("psycopg.AsyncTransaction", "AsyncTransaction")
    if not LISTS_FAILURES:
        message = message.partition("\nMultiple connection attempts failed")[0]
    chain = error.__cause__ and describe(error.__cause__)
    return type(error).__name__, getattr(error, "sqlstate", None), message, chain


def status(block: psycopg.AsyncTransaction) -> object:
    """How a transaction stands, where psycopg tells."""
    return getattr(block, "status", None)


async def attempt(work: Awaitable[object]) -> object:
    """Return what an awaitable returns, or a description of what it raises."""
    try:
        result = await work
    except Exception as error:
        return describe(error)
    if isinstance(result, psycopg.AsyncCursor):
        return result.statusmessage, result.rowcount
    return result


def attempt_now(work: Callable[[], object]) -> object:
    try:
        return work()
    except Exception as error:
        return describe(error)


def state(conn: Connection) -> tuple[object, ...]:
    return (
        "closed" if conn.closed else "open",
        "broken" if conn.broken else "not broken",
        conn.info.transaction_status.name,
        None if conn.closed else conn.info.pipeline_status.name,
    )


async def rows(conn: Connection, query: str = "SELECT id, note FROM notes ORDER BY id") -> list[Any]:
    cursor = await conn.execute(query.encode())
    return await cursor.fetchall()


def server_says(dsn: str, query: str, *parameters: object) -> Any:
    """Ask over another connection, which has nothing to do with any event loop."""
    with psycopg.connect(dsn, autocommit=True) as other:
        row = other.execute(query.encode(), parameters or None).fetchone()
        return row and row[0]


def wait_until(dsn: str, query: str, *parameters: object) -> None:
    for _ in range(1000):
        if server_says(dsn, query, *parameters):
            return
        time.sleep(0.005)
    raise TimeoutError(query)


def terminate(dsn: str, pid: int) -> None:
    """End a backend, and return when it is gone."""
    assert server_says(dsn, "SELECT pg_terminate_backend(%s, 5000)", pid)


def when_active(dsn: str, pid: int, action: Callable[[], object]) -> threading.Thread:
    """Do something, in a thread, as soon as a backend is busy."""

    def run() -> None:
        with psycopg.connect(dsn, autocommit=True) as other:
            for _ in range(1000):
                found = other.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", [pid]
                )
                if found.fetchone():
                    break
                time.sleep(0.005)
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def closing(stream: AsyncIterator[Any]) -> aclosing[AsyncGenerator[Any, None]]:
    """Close a stream where its block ends. (It is declared as less than it is.)"""
    return aclosing(cast("AsyncGenerator[Any, None]", stream))


# Cursors


@scenario
async def client_cursor(conn: Connection, dsn: str) -> object:
    """A cursor fetches, scrolls, iterates, and describes what it got."""
    seen: list[object] = []
    async with conn.cursor() as cursor:
        await cursor.execute("SELECT id, note FROM notes ORDER BY id")
        seen += [await cursor.fetchone(), await cursor.fetchmany(1), cursor.rownumber]
        await cursor.scroll(-2)
        seen += [await attempt(cursor.scroll(100)), await attempt(cursor.scroll(0, "wrong"))]
        seen += [[row async for row in cursor], await cursor.fetchone(), await cursor.fetchmany(5)]
        await cursor.scroll(1, "absolute")
        seen += [await cursor.fetchall(), cursor.rowcount, cursor.statusmessage, cursor.arraysize]
        seen += [[str(column) for column in cursor.description or ()], cursor.closed]
    return [*seen, cursor.closed, await attempt(cursor.fetchone()), state(conn)]


@scenario
async def nothing_to_fetch(conn: Connection, dsn: str) -> object:
    """Fetching where nothing was executed, and where the statement returned no rows, is an error."""
    cursor = conn.cursor()
    seen = [await attempt(cursor.fetchone())]
    await cursor.execute("UPDATE notes SET note = 'x'")
    seen += [await attempt(cursor.fetchone()), await attempt(cursor.fetchall()), cursor.rowcount]
    await cursor.execute("")
    return [*seen, await attempt(cursor.fetchall()), cursor.statusmessage, cursor.rowcount]


@scenario
async def parameters(conn: Connection, dsn: str) -> object:
    """Parameters go by position, by name, in binary, and wrong ones are refused."""
    return [
        await (await conn.execute("SELECT %s, %s::text", (1, "a"))).fetchall(),
        await (await conn.execute("SELECT %(a)s::int", {"a": 1})).fetchall(),
        await (await conn.execute("SELECT %b::int, 1", (1,), binary=True)).fetchall(),
        await attempt(conn.execute("SELECT %s, %s", (1,))),
        await attempt(conn.execute("SELECT %(a)s", {"b": 1})),
        await attempt(conn.execute("SELECT %s", ("nul\0",))),
        await attempt(conn.execute("SELECT %s", (object,))),
        state(conn),
    ]


@scenario
async def several_results(conn: Connection, dsn: str) -> object:
    """Several statements in one query give several results."""
    cursor = await conn.execute("SELECT 1; SELECT 2, 3; UPDATE notes SET note = ''")
    seen: list[object] = [await cursor.fetchall(), cursor.nextset(), await cursor.fetchall()]
    seen += [cursor.nextset(), cursor.rowcount, cursor.statusmessage, cursor.nextset()]
    return [*seen, await attempt(conn.execute("SELECT 1; SELECT 1/0; SELECT 3")), state(conn)]


@scenario_if(PSYCOPG >= (3, 3))
async def results_one_by_one(conn: Connection, dsn: str) -> object:
    """`results` and `set_result` go from one result to another."""
    cursor = await conn.execute("SELECT 1; SELECT 2; SELECT 3")
    seen: list[object] = [await result.fetchall() async for result in cursor.results()]
    await cursor.set_result(-2)
    return [*seen, await cursor.fetchall(), await attempt(cursor.set_result(7))]


@scenario
async def row_factories(conn: Connection, dsn: str) -> object:
    """Rows come as the connection's factory, or the cursor's, makes them."""

    class Note(NamedTuple):
        id: int
        note: str

    query = "SELECT id, note FROM notes ORDER BY id"
    seen: list[object] = []
    factories: list[Any] = [
        dict_row,
        namedtuple_row,
        class_row(Note),
        kwargs_row(dict),
        tuple_row,
        scalar_row,
    ]
    for factory in factories:
        async with conn.cursor(row_factory=factory) as cursor:
            await cursor.execute(query)
            seen.append(str(await cursor.fetchall()))
    conn.row_factory = dict_row
    cursor = conn.cursor()
    await cursor.execute(query)
    first = await cursor.fetchone()
    cursor.row_factory = scalar_row
    return [*seen, first, await cursor.fetchone(), await (await conn.execute(query)).fetchone()]


@scenario
async def raw_and_client_binding_cursors(conn: Connection, dsn: str) -> object:
    """Cursors of other classes take their own placeholders."""
    seen: list[object] = []
    conn.cursor_factory = psycopg.AsyncRawCursor
    seen.append(await (await conn.execute("SELECT $1::int + $2::int", (1, 2))).fetchall())
    seen.append(await attempt(conn.execute("SELECT %s", (1,))))
    await conn.rollback()
    conn.cursor_factory = psycopg.AsyncClientCursor
    seen.append(await (await conn.execute("SELECT %s, %s; SELECT 3", (1, "it's"))).fetchall())
    cursor = psycopg.AsyncClientCursor(conn)
    seen.append(cursor.mogrify("SELECT %s, %s", ("a'b", dt.date(2020, 1, 1))))
    await cursor.execute("CREATE TABLE made (x int DEFAULT %s)", (7,))
    return seen


@scenario
async def server_cursor(conn: Connection, dsn: str) -> object:
    """A server-side cursor fetches in steps, scrolls and iterates."""
    seen: list[object] = []
    async with conn.cursor("steps", scrollable=True) as cursor:
        cursor.itersize = 3
        await cursor.execute("SELECT generate_series(1, %s)", (10,))
        seen += [repr(cursor).split(" at ")[0].split(".")[-1], cursor.name, cursor.scrollable]
        seen += [await cursor.fetchone(), await cursor.fetchmany(2), cursor.rownumber]
        await cursor.scroll(-2)
        seen += [await cursor.fetchone()]
        await cursor.scroll(8, "absolute")
        seen += [await cursor.fetchall(), await cursor.fetchone(), cursor.rownumber]
        seen += [
            await attempt(cursor.scroll(1000)),
            await attempt(cursor.executemany("SELECT 1", [()])),
        ]
        await cursor.scroll(0, "absolute")
        seen += [[row async for row in cursor], cursor.description and cursor.description[0].name]
    seen += [await attempt(cursor.fetchone()), state(conn)]
    return seen


@scenario
async def server_cursor_not_scrollable(conn: Connection, dsn: str) -> object:
    """A server-side cursor that was declared not to scroll does not."""
    cursor = conn.cursor("forward", scrollable=False)
    await cursor.execute("SELECT generate_series(1, 10)")
    seen = [await cursor.fetchmany(2), await attempt(cursor.scroll(-1)), state(conn)]
    await conn.rollback()
    return [*seen, await attempt(cursor.close()), state(conn)]


@scenario
async def server_cursor_with_hold(conn: Connection, dsn: str) -> object:
    """A cursor WITH HOLD survives the commit, another one does not."""
    held, plain = conn.cursor("held", withhold=True), conn.cursor("plain")
    for cursor in (held, plain):
        await cursor.execute("SELECT generate_series(1, 5)")
    await conn.commit()
    seen = [await held.fetchmany(2), state(conn), await attempt(plain.fetchone()), state(conn)]
    await conn.rollback()
    seen += [await held.fetchall()]
    await held.close()
    return [*seen, await attempt(plain.close()), await attempt(held.fetchone()), state(conn)]


@scenario
async def server_cursor_in_autocommit(conn: Connection, dsn: str) -> object:
    """Without a transaction only a cursor WITH HOLD can be declared."""
    await conn.set_autocommit(True)
    plain = conn.cursor("plain")
    seen = [await attempt(plain.execute("SELECT 1")), await attempt(plain.close()), state(conn)]
    held = conn.cursor("held", withhold=True)
    await held.execute("SELECT generate_series(1, 5)")
    seen += [await held.fetchall()]
    await held.close()
    async with conn.transaction(), conn.cursor("inside") as cursor:
        await cursor.execute("SELECT 1")
        seen += [await cursor.fetchall()]
    return seen


@scenario
async def server_cursor_errors(conn: Connection, dsn: str) -> object:
    """Errors of a server-side cursor: at declaring, at fetching, a name that is taken, reuse."""
    cursor = conn.cursor("one")
    seen = [await attempt(cursor.execute("SELEKT")), await attempt(cursor.close()), state(conn)]
    await conn.rollback()
    cursor = conn.cursor("two")
    await cursor.execute("SELECT 1 / (3 - x) FROM generate_series(1, 5) x")
    seen += [await cursor.fetchone(), await attempt(cursor.fetchall()), state(conn)]
    seen += [await attempt(cursor.close())]
    await conn.rollback()
    taken, other = conn.cursor("three"), conn.cursor("three")
    await taken.execute("SELECT 1")
    seen += [await attempt(other.execute("SELECT 2")), state(conn)]
    await conn.rollback()
    seen += [await attempt(taken.close()), await attempt(other.close()), state(conn)]
    await conn.rollback()
    async with conn.cursor("four") as cursor:
        await cursor.execute("SELECT 1")
        await cursor.execute("SELECT 2")
        seen += [await cursor.fetchall()]
    async with conn.cursor("five") as cursor:
        seen += [await attempt(cursor.fetchone())]
    return seen


@scenario
async def server_cursor_ended_by_its_block(conn: Connection, dsn: str) -> object:
    """A block that is left by an error in the transaction does not hide the error."""

    async def work() -> None:
        async with conn.transaction(), conn.cursor("inner") as cursor:
            await cursor.execute("SELECT 1 / (3 - x) FROM generate_series(1, 5) x")
            await cursor.fetchall()

    return [await attempt(work()), state(conn)]


# executemany


@scenario
async def executemany(conn: Connection, dsn: str) -> object:
    """executemany with and without returning, with nothing, with a generator."""
    cursor = conn.cursor()
    insert = "INSERT INTO notes VALUES (%s, %s) RETURNING id"
    await cursor.executemany(insert, [(10, "a"), (11, "b")])
    seen: list[object] = [cursor.rowcount, await attempt(cursor.fetchone()), state(conn)]
    await cursor.executemany(insert, ((number, "c") for number in range(20, 23)), returning=True)
    while True:
        seen += [cursor.rowcount, await cursor.fetchall()]
        if not cursor.nextset():
            break
    await cursor.executemany(insert, [])
    seen += [cursor.rowcount, await attempt(cursor.fetchone())]
    await cursor.executemany(insert, [], returning=True)
    return [*seen, cursor.rowcount, await attempt(cursor.fetchone()), await rows(conn), state(conn)]


@scenario
async def executemany_errors(conn: Connection, dsn: str) -> object:
    """executemany stops at a row that the server refuses, and at one that can't be adapted."""
    seen: list[object] = []
    insert = "INSERT INTO notes VALUES (%s, %s)"

    def broken() -> Iterator[tuple[object, ...]]:
        yield 60, "x"
        raise LookupError("the source ran dry")

    for autocommit in (False, True):
        await conn.rollback()
        await conn.set_autocommit(autocommit)
        for source in (
            [(50, "x"), (1, "taken"), (51, "y")],
            [(52, "x"), (53, object), (54, "y")],
            [(55, "x"), (56,)],
            broken(),
        ):
            seen += [await attempt(conn.cursor().executemany(insert, source)), state(conn)]
            await conn.rollback()
        seen += [await attempt(conn.cursor().executemany("SELEKT", [()])), state(conn)]
        await conn.rollback()
        seen += [await rows(conn)]
    return seen


@scenario
async def executemany_of_many(conn: Connection, dsn: str) -> object:
    """executemany of more than what fits between the client and the server."""
    cursor = conn.cursor()
    await cursor.executemany(
        "INSERT INTO notes VALUES (%s, %s)", [(number, "x" * 3000) for number in range(100, 1100)]
    )
    count = await rows(conn, "SELECT count(*), sum(length(note)) FROM notes")
    await cursor.executemany(
        "SELECT %s::text", [("y" * 3000,) for number in range(1000)], returning=True
    )
    total = 0
    while True:
        total += len((await cursor.fetchone())[0])  # type: ignore[index]
        if not cursor.nextset():
            return [count, total, state(conn)]


@scenario
async def executemany_in_a_pipeline(conn: Connection, dsn: str) -> object:
    """executemany rides on a pipeline that is there already."""
    async with conn.pipeline() as pipeline, conn.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO notes VALUES (%s, 'p') RETURNING id", [(10,), (11,)], returning=True
        )
        seen: list[object] = [await cursor.fetchall(), cursor.nextset(), await cursor.fetchall()]
        await cursor.executemany("INSERT INTO notes VALUES (%s, 'p')", [(12,), (10,)])
        seen.append(await attempt(pipeline.sync()))
    seen.append(state(conn))  # inside, it depends on how much of the answer has arrived
    await conn.rollback()
    return [*seen, await rows(conn)]


# stream


@scenario
async def stream(conn: Connection, dsn: str) -> object:
    """stream yields row by row, and leaves the connection in order."""
    cursor = conn.cursor()
    found = [row async for row in cursor.stream("SELECT generate_series(1, %s), 'x'", (5,))]
    seen = [found, cursor.rownumber, cursor.statusmessage, state(conn)]
    binary = [row async for row in cursor.stream("SELECT 1, 'a'::text", binary=True)]
    empty = [row async for row in cursor.stream("SELECT 1 WHERE false")]
    return [*seen, binary, empty, await rows(conn), state(conn)]


@scenario_if(LIBPQ >= 17)
async def stream_in_chunks(conn: Connection, dsn: str) -> object:
    """stream with a size fetches chunks, and still yields row by row."""
    cursor = conn.cursor()
    found = [row async for row in cursor.stream("SELECT generate_series(1, 1000)", size=7)]
    async with closing(cursor.stream("SELECT generate_series(1, 10000000)", size=7)) as stream:
        async for row in stream:
            if row[0] == 20:
                break
    return [found, state(conn), await attempt(rows(conn))]


@scenario
async def stream_size_unsupported_or_wrong(conn: Connection, dsn: str) -> object:
    """A size that can't be is an error."""
    cursor = conn.cursor()

    async def consume(size: int) -> list[Any]:
        return [row async for row in cursor.stream("SELECT generate_series(1, 5)", size=size)]

    seen = [await attempt(consume(0)), await attempt(consume(-1))]
    # The query had been sent. Whether it was still there to be cancelled is a matter of chance.
    await conn.rollback()
    return [*seen, await attempt(conn.execute("SELECT 1")), state(conn)]


@scenario
async def stream_left_early(conn: Connection, dsn: str) -> object:
    """A stream left early is cancelled, and its transaction has failed."""
    cursor = conn.cursor()
    seen: list[object] = []
    for autocommit in (False, True):
        await conn.rollback()
        await conn.set_autocommit(autocommit)
        async with closing(cursor.stream("SELECT generate_series(1, 10000000)")) as stream:
            async for row in stream:
                seen.append(row)
                break
        seen += [state(conn), await attempt(conn.execute("SELECT 1"))]
    return seen


@scenario
async def stream_left_by_an_exception(conn: Connection, dsn: str) -> object:
    """An exception in the loop goes through."""

    async def work() -> None:
        async with closing(conn.cursor().stream("SELECT generate_series(1, 10000000)")) as stream:
            async for _row in stream:
                raise LookupError("enough")

    return [await attempt(work()), state(conn)]


@scenario
async def stream_errors(conn: Connection, dsn: str) -> object:
    """An error before the first row, one in the middle, a statement that can't be streamed."""
    seen: list[object] = []

    async def consume(conn: Connection, query: bytes) -> None:
        async with closing(conn.cursor().stream(query)) as stream:
            async for row in stream:
                seen.append(row)

    for query in (
        b"SELEKT",
        b"SELECT 1 / (3 - x) FROM generate_series(1, 5) x",
        b"UPDATE notes SET note = 'x'",
        b"COPY notes TO STDOUT",
        b"",
        b"SELECT 1; SELECT 2",
    ):
        other = await type(conn).connect(dsn)
        seen += [await attempt(consume(other, query)), state(other), await attempt(other.rollback())]
        await other.close()
    async with conn.pipeline():
        seen += [await attempt(consume(conn, b"SELECT 1"))]
    return [*seen, await rows(conn)]


# COPY


@scenario
async def copy_in_by_row_and_block(conn: Connection, dsn: str) -> object:
    """COPY FROM by row, by block of text, of bytes, of more than fits into one message."""
    async with conn.cursor() as cursor:
        async with cursor.copy("COPY notes FROM STDIN") as copy:
            await copy.write_row((10, "a\tb\n\\"))
            await copy.write_row([11, None])
        seen: list[object] = [cursor.rowcount, cursor.statusmessage, state(conn)]
        async with cursor.copy("COPY notes FROM STDIN") as copy:
            await copy.write("12\ttwelve\n13\t")
            await copy.write(b"thirteen\n")
        async with cursor.copy("COPY notes FROM STDIN (FORMAT csv)") as copy:
            await copy.write('14,"a, b"\n')
        async with cursor.copy("COPY notes FROM STDIN") as copy:
            await copy.write(b"15\t" + b"x" * 3_000_000 + b"\n")
        async with cursor.copy("COPY notes FROM STDIN"):
            pass
        seen += [cursor.rowcount, state(conn)]
    return [*seen, await rows(conn, "SELECT id, left(note, 10), length(note) FROM notes ORDER BY id")]


@scenario
async def copy_in_binary(conn: Connection, dsn: str) -> object:
    """COPY FROM in binary, with and without types, and with wrong ones."""
    seen: list[object] = []

    async def work(types: list[str] | None, row: tuple[object, ...]) -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN (FORMAT binary)") as copy:
            if types:
                copy.set_types(types)
            await copy.write_row(row)

    for types, row in (
        (["int4", "text"], (10, "a")),
        (["int8", "text"], (11, "b")),
        (["int4", "text"], ("no number", "c")),
        (None, (12, "d")),
        (["int4"], (13, "e")),
    ):
        seen += [await attempt(work(types, row)), state(conn)]
        await conn.rollback()
    return seen


@scenario
async def copy_in_errors(conn: Connection, dsn: str) -> object:
    """COPY FROM ends at a row that the server refuses, at an exception, at a wrong statement."""
    seen: list[object] = []

    async def bad_row(conn: Connection) -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write("10\tten\nno number\televen\n")

    async def too_many_columns(conn: Connection) -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write_row((1, 2, 3))

    async def not_adaptable(conn: Connection) -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write_row((10, object))

    async def exception(conn: Connection) -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write_row((10, "ten"))
            raise LookupError("no more rows, and a “quote”")

    async def wrong_direction(conn: Connection) -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.read()

    async def statement(conn: Connection, statement: bytes) -> None:
        async with conn.cursor().copy(statement) as copy:
            await copy.write("x")

    for autocommit in (False, True):
        for work in (bad_row, too_many_columns, not_adaptable, exception, wrong_direction):
            async with await type(conn).connect(dsn, autocommit=autocommit) as other:
                seen += [await attempt(work(other)), state(other), await attempt(other.rollback())]
        for wrong in (b"SELECT 1", b"COPY nowhere FROM STDIN", b"KOPY", b"", b"COPY notes TO STDOUT"):
            other = await type(conn).connect(dsn, autocommit=autocommit)
            seen += [await attempt(statement(other, wrong)), state(other)]
            seen += [await attempt(other.rollback()), state(other)]
            await other.close()
        for direction in (b"FROM STDIN", b"TO STDOUT"):
            other = await type(conn).connect(dsn, autocommit=autocommit)
            seen += [await attempt(other.execute(b"COPY notes " + direction)), state(other)]
            seen += [await attempt(other.rollback()), state(other)]
            await other.close()
    return [*seen, await rows(conn)]


@scenario
async def copy_in_bad_row_early_in_much_data(conn: Connection, dsn: str) -> object:
    """The server refuses the first of many rows: the rest is thrown away."""

    async def work() -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write("no number\tx\n")
            for number in range(2000):
                await copy.write_row((number, "x" * 1000))

    return [await attempt(work()), state(conn)]


@scenario
async def copy_out(conn: Connection, dsn: str) -> object:
    """COPY TO by block, by read, by row, with types, in binary, with parameters."""
    cursor = conn.cursor()
    seen: list[object] = []
    async with cursor.copy("COPY (SELECT * FROM notes ORDER BY id) TO STDOUT") as copy:
        seen += [[bytes(block) async for block in copy], cursor.rowcount]
    async with cursor.copy("COPY (SELECT * FROM notes ORDER BY id) TO STDOUT") as copy:
        seen += [bytes(await copy.read()), await copy.read_row()]
        seen += [[row async for row in copy.rows()], bytes(await copy.read())]
    for format in ("text", "binary"):
        async with cursor.copy(
            sql.SQL("COPY (SELECT * FROM notes ORDER BY id) TO STDOUT (FORMAT {})").format(
                sql.Identifier(format)
            )
        ) as copy:
            copy.set_types(["int4", "text"])
            seen += [[row async for row in copy.rows()]]
        async with cursor.copy(
            sql.SQL("COPY (SELECT 1::int4, 'x') TO STDOUT (FORMAT {})").format(sql.Identifier(format))
        ) as copy:
            seen += [[row async for row in copy.rows()]]
    async with cursor.copy("COPY (SELECT * FROM notes WHERE id = %s) TO STDOUT", (2,)) as copy:
        seen += [[row async for row in copy.rows()], await copy.read_row()]
    return [*seen, state(conn)]


@scenario
async def copy_out_left_early(conn: Connection, dsn: str) -> object:
    """COPY TO that is left early, by a break, by an exception, before reading, and after the end."""
    query = "COPY (SELECT generate_series(1, 1000000)) TO STDOUT"

    async def read(rows: int) -> None:
        async with conn.cursor().copy(query) as copy:
            for _ in range(rows):
                await copy.read_row()

    async def exception() -> None:
        async with conn.cursor().copy(query) as copy:
            await copy.read_row()
            raise LookupError("enough")

    async def exception_after_the_end() -> None:
        async with conn.cursor().copy("COPY (SELECT 1) TO STDOUT") as copy:
            while await copy.read():
                pass
            raise LookupError("enough")

    seen: list[object] = []
    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        for work in (exception(), exception_after_the_end()):
            seen += [await attempt(work), state(conn)]
            await conn.rollback()
    return seen


@scenario
async def copy_out_not_read_to_its_end(conn: Connection, dsn: str) -> object:
    """A block of COPY TO that is left in peace, but too early."""

    async def work() -> None:
        async with conn.cursor().copy("COPY (SELECT generate_series(1, 100000)) TO STDOUT") as copy:
            await copy.read_row()

    return [await attempt(work()), state(conn), await attempt(conn.execute("SELECT 1"))]


@scenario
async def copy_out_errors(conn: Connection, dsn: str) -> object:
    """COPY TO that fails in the middle."""
    seen: list[object] = []

    async def read() -> None:
        query = "COPY (SELECT 1 / (3 - x) FROM generate_series(1, 5) x) TO STDOUT"
        async with conn.cursor().copy(query) as copy:
            async for row in copy.rows():
                seen.append(row)

    async def write() -> None:
        async with conn.cursor().copy("COPY notes TO STDOUT") as copy:
            await copy.write("1\tx\n")

    for work in (read, write):
        seen += [await attempt(work()), state(conn)]
        await conn.rollback()
    return seen


class Collect(AsyncWriter):
    """A writer of somebody's own: to nowhere."""

    def __init__(self) -> None:
        self.written: list[object] = []

    async def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    async def finish(self, exc: BaseException | None = None) -> None:
        self.written.append(exc and type(exc).__name__)


@scenario
async def copy_with_a_writer(conn: Connection, dsn: str) -> object:
    """Writers: psycopg's own with another threshold, and one that writes elsewhere."""
    cursor = conn.cursor()
    writer = AsyncLibpqWriter(cursor, **({"flush_threshold": 0} if PSYCOPG >= (3, 3, 5) else {}))
    async with cursor.copy("COPY notes FROM STDIN", writer=writer) as copy:
        await copy.write_row((10, "x"))
    collect = Collect()
    copy = psycopg.AsyncCopy(conn.cursor(), binary=True, writer=collect)
    copy.set_types(["int4"])
    await copy.write_row((10,))
    await copy.finish(None)
    return [await rows(conn), collect.written, state(conn)]


@scenario
async def copy_in_a_pipeline(conn: Connection, dsn: str) -> object:
    """There is no COPY in a pipeline."""
    seen: list[object] = []

    async def work() -> None:
        async with conn.pipeline(), conn.cursor().copy("COPY notes TO STDOUT"):
            pass

    return [*seen, await attempt(work()), state(conn)]


@scenario
async def copy_to_another_connection(conn: Connection, dsn: str) -> object:
    """What one connection copies out, another copies in."""
    async with await type(conn).connect(dsn) as other:
        await conn.execute("CREATE TABLE target (LIKE notes)")
        await conn.commit()
        async with (
            other.cursor().copy("COPY notes TO STDOUT") as source,
            conn.cursor().copy("COPY target FROM STDIN") as target,
        ):
            async for block in source:
                await target.write(block)
    return [await rows(conn, "SELECT * FROM target ORDER BY id"), other.closed]


# Pipelines


@scenario
async def pipeline(conn: Connection, dsn: str) -> object:
    """A pipeline sends first and fetches later."""
    async with conn.pipeline() as pipeline:
        seen: list[object] = [conn.info.pipeline_status.name]
        first = await conn.execute("SELECT 1")
        second = await conn.execute("INSERT INTO notes VALUES (10, 'x') RETURNING id")
        third = conn.cursor()
        await third.execute("SELECT %s", (3,))
        seen += [await first.fetchall(), await second.fetchone(), conn.info.transaction_status.name]
        await pipeline.sync()
        seen += [await third.fetchall(), conn.info.transaction_status.name]
        await conn.commit()
        seen += [conn.info.transaction_status.name]
    return [*seen, state(conn), await rows(conn)]


@scenario
async def pipeline_nested(conn: Connection, dsn: str) -> object:
    """A pipeline in a pipeline syncs, and only the outer one ends it."""
    await conn.set_autocommit(True)
    async with conn.pipeline() as outer:
        first = await conn.execute("SELECT 1")
        async with conn.pipeline() as inner:
            second = await conn.execute("SELECT 2")
            seen: list[object] = [inner is outer, await first.fetchall()]
        seen += [conn.info.pipeline_status.name, await second.fetchall()]
    return [*seen, state(conn)]


@scenario
async def pipeline_errors(conn: Connection, dsn: str) -> object:
    """An error in a pipeline aborts what follows, until it is synced."""
    await conn.set_autocommit(True)

    # Which of several calls brings the error is up to chance: it depends on when the answer arrives.
    async def failing() -> None:
        await conn.execute("SELECT 1/0")
        await (await conn.execute("SELECT 3")).fetchall()

    async with conn.pipeline() as pipeline:
        first = await conn.execute("SELECT 1")
        await pipeline.sync()
        seen: list[object] = [await attempt(failing())]
        await attempt(pipeline.sync())
        seen += [conn.info.pipeline_status.name]
        fifth = await conn.execute("SELECT 5")
        seen += [await fifth.fetchall(), await first.fetchall()]
    return [*seen, state(conn)]


@scenario
async def pipeline_error_at_its_end(conn: Connection, dsn: str) -> object:
    """An error that nobody has fetched is raised where the block ends."""

    async def work() -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1/0")
            await conn.execute("SELECT 2")

    async def work_nested() -> None:
        async with conn.pipeline():
            async with conn.pipeline():
                await conn.execute("SELECT 1/0")
            await conn.execute("SELECT 2")

    async def work_hidden() -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1/0")
            raise LookupError("the block's own")

    seen: list[object] = []
    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        for block in (work, work_nested, work_hidden):
            seen += [await attempt(block()), state(conn)]
            await conn.rollback()
    return seen


@scenario
async def pipeline_in_a_transaction_and_reverse(conn: Connection, dsn: str) -> object:
    """Transactions in pipelines, pipelines in transactions, and errors in both."""
    seen: list[object] = []

    async def inside(query: bytes) -> None:
        async with conn.transaction(), conn.pipeline():
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            await conn.execute(query)

    async def outside(query: bytes) -> None:
        async with conn.pipeline(), conn.transaction():
            await conn.execute("INSERT INTO notes VALUES (11, 'x')")
            await conn.execute(query)

    async def nested(query: bytes) -> None:
        async with conn.pipeline(), conn.transaction():
            await conn.execute("INSERT INTO notes VALUES (12, 'x')")
            try:
                async with conn.transaction("inner"):
                    await conn.execute(query)
            except psycopg.Error as error:
                seen.append(describe(error))
            await conn.execute("INSERT INTO notes VALUES (13, 'x')")

    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        for block in (inside, outside, nested):
            for query in (b"SELECT 1", b"SELECT 1/0"):
                seen += [await attempt(block(query)), state(conn), await rows(conn)]
                await conn.execute("DELETE FROM notes WHERE id > 3")
                await conn.commit()
    return seen


@scenario
async def pipeline_with_rollback_and_commit(conn: Connection, dsn: str) -> object:
    """commit and rollback in a pipeline, also where it is aborted."""
    seen: list[object] = []
    async with conn.pipeline() as pipeline:
        await conn.execute("INSERT INTO notes VALUES (10, 'x')")
        await conn.commit()
        await conn.execute("INSERT INTO notes VALUES (11, 'x')")
        await conn.rollback()
        await conn.execute("SELECT 1/0")
        seen += [await attempt(pipeline.sync()), await attempt(conn.rollback())]
        seen += [await attempt(conn.set_read_only(True)), conn.info.transaction_status.name]
        cursor = await conn.execute("SHOW transaction_read_only")
        seen += [await cursor.fetchall()]
    return [*seen, state(conn), await rows(conn)]


@scenario
async def pipeline_of_much_data(conn: Connection, dsn: str) -> object:
    """Far more in both directions than fits between the client and the server."""
    async with conn.pipeline():
        cursors = [await conn.execute("SELECT %s::text", ("x" * 10_000,)) for _ in range(300)]
        lengths = {len((await cursor.fetchone())[0]) for cursor in cursors}  # type: ignore[index]
    return [lengths, state(conn)]


@scenario
async def pipeline_refusals(conn: Connection, dsn: str) -> object:
    """What can't be done in a pipeline."""
    seen: list[object] = []

    async def several() -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1; SELECT 2")

    async def server_side() -> None:
        async with conn.pipeline(), conn.cursor("named") as cursor:
            await cursor.execute("SELECT generate_series(1, 3)")
            seen.append(await cursor.fetchall())

    for work in (several, server_side):
        seen += [await attempt(work()), state(conn)]
        await conn.rollback()
    return seen


# Notifications and notices


@scenario
async def notifies(conn: Connection, dsn: str) -> object:
    """notifies ends at its timeout, or after a number of notifications."""
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    seen: list[object] = [[n async for n in conn.notifies(timeout=0)]]
    started = time.monotonic()
    seen += [[n async for n in conn.notifies(timeout=0.2)], time.monotonic() - started >= 0.19]
    server_says(dsn, "SELECT pg_notify('news', 'a'), pg_notify('news', 'ü')")
    found = [note async for note in conn.notifies(timeout=5, stop_after=2)]
    seen += [[note[:2] for note in found], state(conn)]
    await conn.execute("SELECT pg_notify('news', 'own')")
    found = [note async for note in conn.notifies(timeout=0.2, stop_after=1)]
    seen += [[(*note[:2], note.pid == conn.info.backend_pid) for note in found]]
    async with aclosing(conn.notifies()) as generator:
        server_says(dsn, "SELECT pg_notify('news', 'b')")
        async for note in generator:
            seen.append(note[:2])
            break
    return [*seen, await rows(conn), state(conn)]


@scenario
async def notifies_without_waiting(conn: Connection, dsn: str) -> object:
    """A timeout of 0 still takes what is there."""
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    server_says(dsn, "SELECT pg_notify('news', 'a')")
    select.select([conn.fileno()], [], [], 5)  # it has arrived
    return [[note[:2] async for note in conn.notifies(timeout=0)], state(conn)]


@scenario
async def notify_handlers(conn: Connection, dsn: str) -> object:
    """Handlers are called for what arrives with a query's answer, until they are removed."""
    seen: list[object] = []

    def first(note: psycopg.Notify) -> None:
        seen.append(("first", *note[:2]))

    def second(note: psycopg.Notify) -> None:
        seen.append(("second", *note[:2]))

    conn.add_notify_handler(first)
    conn.add_notify_handler(second)
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    await conn.execute("SELECT pg_notify('news', 'a')")
    conn.remove_notify_handler(first)
    await conn.execute("SELECT pg_notify('news', 'b')")
    seen += [attempt_now(lambda: conn.remove_notify_handler(first))]
    await conn.execute("UNLISTEN news")
    await conn.execute("SELECT pg_notify('news', 'c')")
    return seen


@scenario
async def notify_handler_that_fails(conn: Connection, dsn: str) -> object:
    """A handler that raises."""

    def handler(note: psycopg.Notify) -> None:
        raise LookupError("no such news")

    conn.add_notify_handler(handler)
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    return [await attempt(conn.execute("SELECT pg_notify('news', 'a')")), conn.closed]


@scenario
async def notifies_and_handlers_together(conn: Connection, dsn: str) -> object:
    """psycopg warns of using both (and a warning is an error here), or it does not."""
    conn.add_notify_handler(lambda note: None)

    async def work() -> list[Any]:
        return [note async for note in conn.notifies(timeout=0)]

    return await attempt(work())


@scenario
async def notices(conn: Connection, dsn: str) -> object:
    """Notices go to the handlers, with all fields; a handler that fails disturbs nobody."""
    seen: list[object] = []

    def first(notice: psycopg.errors.Diagnostic) -> None:
        seen.append((notice.severity, notice.sqlstate, notice.message_primary, notice.message_hint))

    def second(notice: psycopg.errors.Diagnostic) -> None:
        raise LookupError("ignored")

    conn.add_notice_handler(first)
    conn.add_notice_handler(second)
    raising = "DO $$ BEGIN RAISE WARNING 'hot' USING HINT = 'ümlaut', ERRCODE = '01000'; END $$"
    await conn.execute(raising)
    await conn.execute("DROP TABLE IF EXISTS nowhere")
    conn.remove_notice_handler(first)
    await conn.execute(raising)
    return [*seen, attempt_now(lambda: conn.remove_notice_handler(first)), state(conn)]


# Transactions


@scenario
async def implicit_transactions(conn: Connection, dsn: str) -> object:
    """Without autocommit the first query begins a transaction."""
    seen: list[object] = [state(conn)]
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    seen += [state(conn)]
    await conn.rollback()
    seen += [state(conn), await rows(conn)]
    await conn.commit()
    await conn.commit()
    await conn.rollback()
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    await conn.commit()
    await attempt(conn.execute("SELECT 1/0"))
    seen += [state(conn), await attempt(conn.execute("SELECT 1")), await attempt(conn.commit())]
    return [*seen, state(conn), await rows(conn)]


@scenario
async def transactions(conn: Connection, dsn: str) -> object:
    """Blocks commit, roll back at exceptions, nest, and can be forced to roll back."""
    seen: list[object] = []
    for autocommit in (True, False):
        await conn.set_autocommit(autocommit)
        async with conn.transaction() as outer:
            seen += [status(outer), outer.savepoint_name, state(conn)]
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            async with conn.transaction() as inner:
                seen += [inner.savepoint_name, inner.connection is conn]
                await conn.execute("INSERT INTO notes VALUES (11, 'x')")
                async with conn.transaction("named", force_rollback=True) as forced:
                    seen += [forced.savepoint_name]
                    await conn.execute("INSERT INTO notes VALUES (12, 'x')")
            seen += [status(inner), status(forced), status(outer)]
        seen += [status(outer), state(conn), await rows(conn)]
        await conn.rollback()
        async with conn.transaction():
            await conn.execute("DELETE FROM notes WHERE id > 3")
    return seen


@scenario
async def transactions_left_by_exceptions(conn: Connection, dsn: str) -> object:
    """An exception rolls back and goes through; Rollback ends the block it names."""
    seen: list[object] = []
    made: list[psycopg.AsyncTransaction] = []

    async def fail(error: Callable[[], Exception]) -> None:
        made.clear()
        async with conn.transaction() as outer:
            made.append(outer)
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            async with conn.transaction() as inner:
                made.append(inner)
                await conn.execute("INSERT INTO notes VALUES (11, 'x')")
                raise error()
            seen.append("after the inner block")

    for error in (
        lambda: LookupError("wrong"),
        lambda: psycopg.Rollback(),
        lambda: psycopg.Rollback(made[1]),
        lambda: psycopg.Rollback(made[0]),
    ):
        seen += [await attempt(fail(error)), [status(block) for block in made], state(conn)]
        seen += [await rows(conn)]
        await conn.execute("DELETE FROM notes WHERE id > 3")
        await conn.commit()
    seen += [await attempt(_raise_in_transaction(conn, b"SELECT 1/0")), state(conn)]
    seen += [await attempt(_raise_in_transaction(conn, b"COMMIT")), state(conn)]
    return seen


async def _raise_in_transaction(conn: Connection, query: bytes) -> None:
    async with conn.transaction():
        await conn.execute(query)


@scenario
async def an_error_caught_in_a_savepoint(conn: Connection, dsn: str) -> object:
    """The outer block goes on after an error in an inner one, and not without an inner one."""
    seen: list[object] = []

    async def caught_inside() -> None:
        async with conn.transaction():
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            seen.append(await attempt(conn.execute("SELECT 1/0")))

    async with conn.transaction():
        await conn.execute("INSERT INTO notes VALUES (9, 'x')")
        seen += [await attempt(_raise_in_transaction(conn, b"SELECT 1/0")), state(conn)]
        await conn.execute("INSERT INTO notes VALUES (11, 'x')")
    seen += [await attempt(caught_inside()), state(conn)]
    return [*seen, await rows(conn)]


@scenario
async def transactions_out_of_order(conn: Connection, dsn: str) -> object:
    """Blocks that are left in the wrong order are an error."""
    seen: list[object] = []
    for error in (None, LookupError("wrong")):
        first, second = conn.transaction(), conn.transaction("second")
        await first.__aenter__()
        await second.__aenter__()
        left = (type(error) if error else None, error, None)
        seen += [await attempt(first.__aexit__(*left)), state(conn)]
        seen += [await attempt(second.__aexit__(*left)), state(conn)]
        seen += [await attempt(conn.rollback()), state(conn)]
    return seen


@scenario
async def what_is_forbidden_in_a_transaction(conn: Connection, dsn: str) -> object:
    """commit, rollback and the attributes are forbidden inside, and a block is used once."""
    seen: list[object] = []
    async with conn.transaction() as block:
        seen += [await attempt(conn.commit()), await attempt(conn.rollback())]
        seen += [await attempt(conn.set_autocommit(True)), await attempt(conn.set_read_only(True))]
        seen += [await attempt(conn.tpc_begin("x")), state(conn)]
    seen += [await attempt(block.__aenter__()), state(conn)]
    return seen


@scenario
async def a_block_in_an_open_transaction(conn: Connection, dsn: str) -> object:
    """A block inside an implicit transaction is a savepoint only."""
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    async with conn.transaction() as block:
        await conn.execute("INSERT INTO notes VALUES (11, 'x')")
    seen = [block.savepoint_name, state(conn), await rows(conn)]
    await conn.rollback()
    return [*seen, await rows(conn)]


@scenario
async def a_commit_that_fails(conn: Connection, dsn: str) -> object:
    """A deferred constraint fails at the commit, of all kinds."""
    await conn.execute("CREATE TABLE late (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    await conn.commit()
    await conn.execute("INSERT INTO late VALUES (1), (1)")
    seen = [await attempt(conn.commit()), state(conn)]
    seen += [await attempt(_raise_in_transaction(conn, b"INSERT INTO late VALUES (1), (1)"))]
    return [*seen, state(conn), await rows(conn, "SELECT * FROM late")]


@scenario
async def a_block_on_a_failed_transaction(conn: Connection, dsn: str) -> object:
    """A block can't be entered in a transaction that has failed."""
    await attempt(conn.execute("SELECT 1/0"))
    seen = [await attempt(_raise_in_transaction(conn, b"SELECT 1")), state(conn)]
    await conn.rollback()
    return [*seen, await rows(conn), state(conn)]


@scenario
async def isolation(conn: Connection, dsn: str) -> object:
    """The attributes of transactions are used for each, and only between them changed."""
    seen: list[object] = []
    await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    await conn.set_read_only(True)
    await conn.set_deferrable(True)
    seen += [conn.isolation_level, conn.read_only, conn.deferrable, conn.autocommit]
    shown = "SELECT current_setting('transaction_' || x) FROM unnest(%s::text[]) x"
    names = ["isolation", "read_only", "deferrable"]
    seen += [await (await conn.execute(shown, (names,))).fetchall()]
    for set_it in (conn.set_autocommit, conn.set_read_only, conn.set_deferrable):
        seen += [await attempt(set_it(False))]
    seen += [await attempt(conn.set_isolation_level(None))]
    seen += [await attempt(conn.execute("INSERT INTO notes VALUES (10, 'x')"))]
    await conn.rollback()
    seen += [await attempt(conn.set_isolation_level(99))]  # type: ignore[arg-type]
    await conn.set_isolation_level(None)
    await conn.set_read_only(None)
    await conn.set_deferrable(None)
    async with conn.transaction():
        seen += [await (await conn.execute(shown, (names,))).fetchall()]
    return [*seen, state(conn)]


@scenario
async def attributes_are_set_by_methods(conn: Connection, dsn: str) -> object:
    """Setting an attribute directly is refused, as that may have to wait."""
    seen: list[object] = []
    for name in ("autocommit", "isolation_level", "read_only", "deferrable"):
        seen += [attempt_now(partial(setattr, conn, name, True)), getattr(conn, name)]
    return seen


# Two-phase commit


@scenario
async def two_phase_commit(conn: Connection, dsn: str) -> object:
    """Begun, prepared, committed or rolled back: in one piece, by xid, by another connection."""
    seen: list[object] = []
    for end in ("commit", "rollback"):
        for prepare in (True, False):
            await conn.tpc_begin(conn.xid(1, f"{end}-{prepare}", "b"))
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            seen += [state(conn)]
            if prepare:
                await conn.tpc_prepare()
                seen += [state(conn)]
            await (conn.tpc_commit() if end == "commit" else conn.tpc_rollback())
            seen += [state(conn), await rows(conn)]
            await conn.execute("DELETE FROM notes WHERE id > 3")
            await conn.commit()
    return seen


@scenario
async def two_phase_recovery(conn: Connection, dsn: str) -> object:
    """Prepared transactions are found again, and finished by somebody else."""
    await conn.tpc_begin("left behind")
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    await conn.tpc_prepare()
    await conn.close()
    async with await type(conn).connect(dsn) as other:
        (xid,) = await other.tpc_recover()
        seen: list[object] = [xid.gtrid, xid.format_id, xid.bqual, xid.owner, xid.database, str(xid)]
        seen += [state(other), await attempt(other.tpc_commit("wrong")), state(other)]
        await other.rollback()
        await other.tpc_commit(xid)
        seen += [await rows(other), await other.tpc_recover()]
    return seen


@scenario
async def two_phase_wrong_states(conn: Connection, dsn: str) -> object:
    """What is not possible at each stage of a two-phase commit."""
    seen: list[object] = [await attempt(conn.tpc_prepare()), await attempt(conn.tpc_commit())]
    seen += [await attempt(conn.tpc_rollback()), state(conn)]
    await conn.set_autocommit(True)
    seen += [await attempt(conn.tpc_begin("x"))]
    await conn.set_autocommit(False)
    await conn.execute("SELECT 1")
    seen += [await attempt(conn.tpc_begin("x"))]
    await conn.rollback()
    await conn.tpc_begin("wrong states")
    seen += [await attempt(conn.commit()), await attempt(conn.rollback())]
    seen += [await attempt(conn.tpc_begin("y")), await attempt(conn.tpc_commit("wrong states"))]
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    await conn.tpc_prepare()
    seen += [await attempt(conn.tpc_prepare()), await attempt(conn.commit())]
    seen += [await attempt(conn.cancel_safe()), attempt_now(conn.cancel), state(conn)]
    seen += [await attempt(conn.execute("SELECT 1")), state(conn)]
    await attempt(conn.execute("ROLLBACK"))
    seen += [await attempt(conn.tpc_rollback()), state(conn)]
    await conn.tpc_begin("fails")
    seen += [await attempt(conn.execute("SELECT 1/0")), await attempt(conn.tpc_prepare()), state(conn)]
    seen += [await attempt(conn.tpc_rollback()), state(conn)]
    for xid in ((-1, "a", "b"), (1, "", "b"), (1, "x" * 100, "b"), (1, "a", "ü")):
        seen += [str(attempt_now(partial(conn.xid, *xid)))]
    return seen


# Prepared statements


async def prepared(conn: Connection) -> list[Any]:
    return await rows(
        conn, "SELECT statement FROM pg_prepared_statements WHERE from_sql = false ORDER BY 1"
    )


@scenario
async def prepared_statements(conn: Connection, dsn: str) -> object:
    """A query is prepared at its threshold, at once if asked to, never if asked not to."""
    await conn.set_autocommit(True)
    seen: list[object] = [conn.prepare_threshold, conn.prepared_max]
    conn.prepare_threshold = 2
    for _ in range(4):
        await conn.execute("SELECT %s::int + 1", (1,))
        await conn.execute("SELECT 2", prepare=False)
        seen += [await prepared(conn)]
    await conn.execute("SELECT %s::int + 3", (1,), prepare=True)
    seen += [await prepared(conn)]
    conn.prepare_threshold = None
    for _ in range(8):
        await conn.execute("SELECT 4")
    seen += [await attempt(conn.execute("SELECT 5; SELECT 6", prepare=True))]
    return [*seen, await prepared(conn)]


@scenario
async def prepared_max(conn: Connection, dsn: str) -> object:
    """Statements beyond the maximum are forgotten, by the server too."""
    await conn.set_autocommit(True)
    conn.prepare_threshold = 0
    conn.prepared_max = 2
    for number in range(5):
        await conn.execute(f"SELECT {number}, 'many'".encode(), prepare=True)
    conn.prepare_threshold = None
    seen = [await prepared(conn), conn.prepared_max]
    conn.prepared_max = None
    seen += [conn.prepared_max]
    await conn.execute("DEALLOCATE ALL")
    return [*seen, await prepared(conn)]


@scenario
async def prepared_statements_and_rollback(conn: Connection, dsn: str) -> object:
    """A statement prepared in a transaction that is rolled back is prepared again."""
    conn.prepare_threshold = 0
    seen: list[object] = []
    for _ in range(3):
        await conn.execute("CREATE TABLE made (x int)")
        await conn.execute("SELECT * FROM made")
        await conn.rollback()
        seen += [await (await conn.execute("SELECT %s::int", (1,))).fetchall()]
    await conn.execute("CREATE TABLE changing (x int)")
    await conn.execute("SELECT * FROM changing")
    await conn.commit()
    await conn.execute("ALTER TABLE changing ADD y int")
    seen += [await attempt(conn.execute("SELECT * FROM changing")), state(conn)]
    await conn.rollback()
    async with conn.pipeline():
        for _ in range(3):
            await conn.execute("SELECT 'in a pipeline'")
    await conn.rollback()
    return [*seen, state(conn)]


# Adaptation


class Loud(str):
    """A type that is dumped by a dumper of its own."""


class LoudDumper(Dumper):
    def dump(self, obj: Any) -> bytes:
        return str(obj).upper().encode()


class LoudLoader(TextLoader):
    def load(self, data: Any) -> str:
        return f"<{super().load(data)!r}>"


@scenario
async def adaptation(conn: Connection, dsn: str) -> object:
    """Dumpers and loaders of the connection, of a cursor, and of a context given to connect."""
    seen: list[object] = []
    cursor = conn.cursor()
    cursor.adapters.register_loader("text", LoudLoader)
    await cursor.execute("SELECT 'a'::text")
    seen += [await cursor.fetchone(), await rows(conn, "SELECT 'a'::text")]
    conn.adapters.register_loader("text", LoudLoader)
    conn.adapters.register_dumper(Loud, LoudDumper)
    seen += [await (await conn.execute("SELECT %s::text", (Loud("a"),))).fetchall()]
    seen += [sql.Literal(Loud("b")).as_string(conn), conn.connection is conn]
    context = AdaptersMap(psycopg.adapters)
    context.register_loader("int4", LoudLoader)
    for given in (conn, cursor):
        async with await type(conn).connect(dsn, context=given) as other:
            seen += [await rows(other, "SELECT 'a'::text")]
    set_json_loads(lambda data: ["mine", data], conn)
    return [*seen, await rows(conn, """SELECT '{"a": 1}'::json""")]


async def there_and_back(conn: Connection, values: Iterable[object]) -> list[object]:
    """Send values and fetch them again, in text and in binary, alone and in a list."""
    seen: list[object] = []
    for value in values:
        for form in ("%s", "%t", "%b"):
            for binary in (False, True):
                query = f"SELECT {form}, pg_typeof({form})::text".encode()
                cursor = conn.cursor(binary=binary)
                found = await attempt(cursor.execute(query, (value, value)))
                fetched = await cursor.fetchone() if cursor.description else found
                seen += [(form, binary, repr(fetched))]
                await conn.rollback()
    return seen


@types
async def plain_types(conn: Connection, dsn: str) -> object:
    """None, truth, numbers, text and bytes."""
    large = bytes(range(256)) * 1000
    cursor = await conn.execute("SELECT %s::bytea, octet_length(%s)", (large, large))
    values: tuple[Any, ...] = (
        None,
        True,
        1,
        2**40,
        2**70,
        -1.5,
        float("inf"),
        Decimal("1.10"),
        Decimal("NaN"),
        "ü'\\",
    )
    seen = await there_and_back(conn, (*values, b"\0\xff", bytearray(b"x"), memoryview(b"y"), ""))
    return [await cursor.fetchone() == (large, len(large)), *seen]


@types
async def times(conn: Connection, dsn: str) -> object:
    """Dates, times, intervals and time zones, also those that Python can't represent."""
    zone = dt.timezone(dt.timedelta(hours=5, minutes=30))
    moment = dt.datetime(2020, 2, 29, 12, 30, 15, 123456)
    values: tuple[Any, ...] = (
        moment,
        moment.replace(tzinfo=zone),
        moment.date(),
        moment.time(),
        dt.timedelta(-3, 5, 7),
    )
    seen = await there_and_back(conn, (*values, moment.timetz().replace(tzinfo=zone)))
    await conn.execute("SET timezone TO 'Europe/Rome'")
    seen += await rows(conn, "SELECT '2020-07-01 12:00+00'::timestamptz, '24:00'::time::text")
    seen += [str(conn.info.timezone)]
    for wrong in (
        "'infinity'::date",
        "'10000-01-01'::timestamp",
        "'24:00'::time",
        "'1 month'::interval",
    ):
        cursor = await conn.execute(f"SELECT {wrong}".encode())
        seen += [await attempt(cursor.fetchone())]
    return seen


@types
async def uuids_networks_and_json(conn: Connection, dsn: str) -> object:
    """UUID, inet, cidr, JSON and JSONB."""
    values: tuple[Any, ...] = (
        uuid.UUID(int=7),
        ip_address("10.0.0.1"),
        ip_network("10.0.0.0/8"),
        ip_address("::1"),
    )
    document = {"a": [1, None, "ü"], "b": {"c": 1.5}}
    seen = await there_and_back(conn, (*values, Json(document), Jsonb(document)))
    return [*seen, await attempt(conn.execute("SELECT %s", (document,))), state(conn)]


@types
async def arrays(conn: Connection, dsn: str) -> object:
    """Arrays: empty, nested, with nulls, of several types, and uneven ones."""
    values: tuple[Any, ...] = (
        [],
        [1, 2],
        [1, None],
        [[1, 2], [3, 4]],
        ["a,b", '"', "NULL", None],
        [dt.date(2020, 1, 1)],
    )
    return await there_and_back(
        conn, (*values, [uuid.UUID(int=1)], [2**40, 1], [1, "x"], [[1], [2, 3]])
    )


@types
async def ranges(conn: Connection, dsn: str) -> object:
    """Ranges and multiranges."""
    day = dt.date(2020, 1, 1)
    values: list[object] = [Range(1, 5), Range(1, 5, "[]"), Range(None, 5), Range(empty=True)]
    values += [Range(day, None), Range(Decimal(1), Decimal("1.5"), "(]"), [Range(1, 2)]]
    values += [Multirange([Range(1, 2), Range(5, 9)]), Multirange([])]
    return await there_and_back(conn, values)


class Mood(Enum):
    """The Python side of an enum."""

    GOOD = "fine"
    BAD = "so so"


@types
async def enums_and_composites(conn: Connection, dsn: str) -> object:
    """Types that are looked up on the server: enums and composites."""
    await conn.execute("CREATE TYPE mood AS ENUM ('fine', 'so so')")
    await conn.execute("CREATE TYPE point3 AS (x int, y text, mood mood)")
    await conn.commit()
    seen: list[object] = []
    enum_info = await EnumInfo.fetch(conn, "mood")
    assert enum_info is not None
    register_enum(enum_info, conn, Mood, mapping={mood: mood.value for mood in Mood})
    composite_info = await CompositeInfo.fetch(conn, "point3")
    assert composite_info is not None
    register_composite(composite_info, conn)
    assert composite_info.python_type is not None
    value = composite_info.python_type(1, "a,(b", Mood.GOOD)
    for binary in (False, True):
        cursor = conn.cursor(binary=binary)
        await cursor.execute(
            "SELECT %s::mood, %s::mood[], %s::point3, ARRAY[%s::point3]",
            (Mood.BAD, list(Mood), value, value),
        )
        seen += [repr(await cursor.fetchone())]
    seen += [enum_info.labels, composite_info.field_names]
    seen += [await attempt(EnumInfo.fetch(conn, "nowhere")), state(conn)]
    await conn.rollback()
    await conn.execute("DROP TYPE point3, mood")
    await conn.commit()
    return seen


# Errors


@scenario
async def errors_of_the_server(conn: Connection, dsn: str) -> object:
    """Errors have their class, their state and their details; the transaction has failed."""
    seen: list[object] = []
    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        for query in (
            b"SELEKT 1",
            b"INSERT INTO notes VALUES (1, 'again')",
            b"SELECT 1/0",
            b"SELECT * FROM nowhere",
            b"SELECT 'x'::int",
            b"DO $$ BEGIN RAISE EXCEPTION 'own' USING ERRCODE = 'AB123', DETAIL = 'd'; END $$",
            b"SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(5)",
        ):
            try:
                await conn.execute(query)
            except psycopg.Error as error:
                diag = error.diag
                seen += [describe(error), state(conn), diag.constraint_name, diag.message_detail]
                seen += [diag.severity, diag.statement_position, error.pgresult is not None]
            await conn.rollback()
    return seen


@scenario
async def wrong_arguments(conn: Connection, dsn: str) -> object:
    """Arguments that are no queries, no parameters, no options."""
    return [
        await attempt(conn.execute(7)),  # type: ignore[call-overload]
        await attempt(conn.execute("SELECT %s", 7)),  # type: ignore[call-overload]
        await attempt(conn.execute("SELECT %x", (1,))),
        state(conn),
    ]


@scenario
async def statement_timeout(conn: Connection, dsn: str) -> object:
    """A statement's own timeout is an error like others."""
    seen: list[object] = []
    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        await conn.execute("SET statement_timeout = 50")
        await conn.commit()
        seen += [await attempt(conn.execute("SELECT pg_sleep(10)")), state(conn)]
        await conn.rollback()
    return seen


@scenario
async def lock_timeout(conn: Connection, dsn: str) -> object:
    """A lock that can't be had in time is an error like others."""
    await conn.execute("SET lock_timeout = 50")
    with psycopg.connect(dsn) as other:
        other.execute("LOCK TABLE notes")
        return [await attempt(conn.execute("SELECT * FROM notes")), state(conn)]


@scenario
async def idle_in_transaction_timeout(conn: Connection, dsn: str) -> object:
    """The server hangs up on a transaction that does nothing, which is noticed at the next query."""
    await conn.execute("SET idle_in_transaction_session_timeout = 30")
    pid = conn.info.backend_pid
    wait_until(dsn, "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = %s)", pid)
    seen = [conn.closed, await attempt(conn.execute("SELECT 1")), state(conn)]
    return [*seen, await attempt(conn.execute("SELECT 1")), await attempt(conn.rollback()), state(conn)]


@scenario
async def terminated_in_a_query(conn: Connection, dsn: str) -> object:
    """The backend is ended in the middle of a query."""
    seen = [await attempt(conn.execute("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(5)"))]
    return [*seen, state(conn), await attempt(conn.execute("SELECT 1")), await attempt(conn.commit())]


@scenario
async def terminated_by_another_in_a_query(conn: Connection, dsn: str) -> object:
    """The backend is ended by somebody else in the middle of a query."""
    pid = conn.info.backend_pid
    await conn.set_autocommit(True)
    thread = when_active(dsn, pid, lambda: terminate(dsn, pid))
    seen = [await attempt(conn.execute("SELECT pg_sleep(10)")), state(conn)]
    thread.join()
    return seen


@scenario
async def terminated_while_idle(conn: Connection, dsn: str) -> object:
    """The backend is ended while nothing happens; the next operation notices."""
    await conn.set_autocommit(True)
    terminate(dsn, conn.info.backend_pid)
    seen = [state(conn), await attempt(conn.execute("SELECT 1")), state(conn)]
    await conn.close()
    return [*seen, state(conn)]


@scenario
async def terminated_in_a_transaction(conn: Connection, dsn: str) -> object:
    """The backend is ended inside a block."""
    blocks: list[psycopg.AsyncTransaction] = []

    async def work() -> None:
        async with conn.transaction() as block:
            blocks.append(block)
            await conn.execute("SELECT 1")
            terminate(dsn, conn.info.backend_pid)

    async def work_twice() -> None:
        async with conn.transaction() as block:
            blocks.append(block)
            terminate(dsn, conn.info.backend_pid)
            await conn.execute("SELECT 1")

    seen = [await attempt(work()), state(conn), [status(block) for block in blocks]]
    async with await type(conn).connect(dsn) as conn:
        seen += [await attempt(work_twice()), state(conn), [status(block) for block in blocks]]
    return seen


@scenario
async def terminated_in_a_pipeline(conn: Connection, dsn: str) -> object:
    """The backend is ended inside a pipeline."""

    async def work() -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1")
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(5)")

    found = await attempt(work())
    # How much of the last words is read, and thus which error it is, is up to chance in both.
    return [isinstance(found, tuple), state(conn)[:2], await attempt(conn.execute("SELECT 1"))]


@scenario
async def terminated_in_a_copy(conn: Connection, dsn: str) -> object:
    """The backend is ended inside a COPY."""

    async def into() -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write_row((10, "x"))
            terminate(dsn, conn.info.backend_pid)

    async def out() -> None:
        async with conn.cursor().copy("COPY (SELECT generate_series(1, 3000000)) TO STDOUT") as copy:
            await copy.read()
            terminate(dsn, conn.info.backend_pid)
            while await copy.read():
                pass

    seen = [await attempt(into()), state(conn)]
    async with await type(conn).connect(dsn) as conn:
        seen += [await attempt(out()), state(conn)]
    return seen


@scenario
async def terminated_in_a_stream(conn: Connection, dsn: str) -> object:
    """The backend is ended while it streams."""

    async def work() -> None:
        async with closing(conn.cursor().stream("SELECT generate_series(1, 3000000)")) as stream:
            async for _row in stream:
                terminate(dsn, conn.info.backend_pid)
                break
            async for _row in stream:
                pass

    return [await attempt(work()), state(conn)]


@scenario
async def terminated_while_listening(conn: Connection, dsn: str) -> object:
    """The backend is ended while somebody waits for notifications."""
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    pid = conn.info.backend_pid
    thread = threading.Timer(0.1, terminate, (dsn, pid))
    thread.start()

    async def work() -> None:
        async for _note in conn.notifies(timeout=10):
            pass

    seen = [await attempt(work()), state(conn)]
    thread.join()
    return seen


# Cancelling


@scenario
async def cancel(conn: Connection, dsn: str) -> object:
    """cancel and cancel_safe with nothing under way do nothing; a thread's cancel ends a query."""
    conn.cancel()
    await conn.cancel_safe()
    await conn.cancel_safe(timeout=0)
    seen: list[object] = [await rows(conn)]
    thread = when_active(dsn, conn.info.backend_pid, conn.cancel)
    seen += [await attempt(conn.execute("SELECT pg_sleep(10)")), state(conn)]
    thread.join()
    return seen


@scenario
async def cancel_safe_in_a_pipeline(conn: Connection, dsn: str) -> object:
    """cancel_safe ends what a pipeline has sent."""
    await conn.set_autocommit(True)

    async def work() -> None:
        async with conn.pipeline() as pipeline:
            await conn.execute("SELECT pg_sleep(10)")
            pid = conn.info.backend_pid
            sleeping = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"
            wait_until(dsn, sleeping, pid)
            await conn.cancel_safe()
            await pipeline.sync()

    return [await attempt(work()), state(conn), await attempt(conn.execute("SELECT 1"))]


@scenario
async def cancel_safe_in_a_copy_and_a_stream(conn: Connection, dsn: str) -> object:
    """cancel_safe ends a COPY and a stream from inside their blocks."""

    async def copy() -> None:
        query = "COPY (SELECT generate_series(1, 30000000)) TO STDOUT"
        async with conn.cursor().copy(query) as copy:
            await copy.read()
            await conn.cancel_safe()
            while await copy.read():
                pass

    async def stream() -> None:
        query = "SELECT generate_series(1, 30000000)"
        async with closing(conn.cursor().stream(query)) as stream:
            cancelled = False
            async for _row in stream:
                if not cancelled:
                    await conn.cancel_safe()
                    cancelled = True

    seen = [await attempt(copy()), state(conn)]
    await conn.rollback()
    return [*seen, await attempt(stream()), state(conn)]


# The connection itself


@scenario
async def info(conn: Connection, dsn: str) -> object:
    """The connection describes itself."""
    about = conn.info
    seen: list[object] = [about.vendor, about.host, about.port, about.dbname, about.user, about.status]
    seen += [about.options, about.encoding, about.server_version, about.hostaddr, about.error_message]
    seen += [about.password, about.parameter_status("server_encoding"), about.parameter_status("no")]
    seen += [about.backend_pid > 0, about.get_parameters(), about.dsn, about.timezone]
    seen += [conn.fileno() > 0, conn.closed, conn.broken, repr(conn).split(" at ")[0].split(" ", 1)[1]]
    seen += [conn.pgconn.nonblocking, conn.Error is psycopg.Error]
    await conn.close()
    seen += [attempt_now(lambda: conn.info.dbname), attempt_now(conn.fileno), state(conn)]
    return [*seen, repr(conn).split(" at ")[0].split(" ", 1)[1]]


@scenario
async def client_encoding(conn: Connection, dsn: str) -> object:
    """Text goes in the encoding of the client."""
    await conn.execute("SET client_encoding TO latin1")
    seen = [conn.info.encoding, await (await conn.execute("SELECT %s::text", ("é",))).fetchall()]
    return [*seen, await attempt(conn.execute("SELECT %s", ("€",))), state(conn)]


@scenario
async def left_in_peace(conn: Connection, dsn: str) -> object:
    """`async with` commits and closes."""
    async with conn as entered:
        await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    seen = [entered is conn, state(conn)]
    async with await type(conn).connect(dsn) as other:
        seen += [await rows(other)]
        await other.close()
    return [*seen, state(other)]


@scenario
async def left_by_an_exception(conn: Connection, dsn: str) -> object:
    """`async with` rolls back, and closes, at an exception."""

    async def work(query: bytes) -> None:
        async with conn:
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            await conn.execute(query)
            raise LookupError("wrong")

    seen = [await attempt(work(b"SELECT 1")), state(conn)]
    async with await type(conn).connect(dsn) as conn:
        seen += [
            await attempt(work(b"SELECT 1/0")),
            state(conn),
            server_says(dsn, "SELECT max(id) FROM notes"),
        ]
    return seen


@scenario
async def left_when_it_is_gone(conn: Connection, dsn: str) -> object:
    """`async with` on a connection that the server has closed meanwhile."""

    async def work(error: Exception | None) -> None:
        async with conn:
            await conn.execute("SELECT 1")
            terminate(dsn, conn.info.backend_pid)
            if error:
                raise error

    seen = [await attempt(work(None)), conn.closed]
    async with await type(conn).connect(dsn) as conn:
        seen += [await attempt(work(LookupError("wrong"))), conn.closed]
    return seen


@scenario
async def use_after_close(conn: Connection, dsn: str) -> object:
    """Every method of a closed connection says so, or does nothing."""
    cursor, named = conn.cursor(), conn.cursor("named")
    await cursor.execute("SELECT 1")
    await conn.close()
    await conn.close()

    async def block(manager: Callable[[], Any]) -> None:
        async with manager():
            pass

    async def loop(iterator: Callable[[], AsyncIterator[Any]]) -> None:
        async for _ in iterator():
            pass

    return [
        state(conn),
        await attempt(conn.execute("SELECT 1")),
        await attempt(conn.commit()),
        await attempt(conn.rollback()),
        attempt_now(conn.cursor),
        await attempt(cursor.execute("SELECT 1")),
        await attempt(cursor.executemany("SELECT 1", [()])),
        await attempt(cursor.fetchone()),
        await attempt(loop(lambda: cursor.stream("SELECT 1"))),
        await attempt(block(lambda: cursor.copy("COPY notes FROM STDIN"))),
        await attempt(named.execute("SELECT 1")),
        await attempt(named.close()),
        await attempt(block(conn.transaction)),
        await attempt(block(conn.pipeline)),
        await attempt(block(lambda: conn)),
        await attempt(loop(lambda: conn.notifies(timeout=0.1))),
        await attempt(conn.set_autocommit(True)),
        await attempt(conn.set_read_only(True)),
        await attempt(conn.tpc_begin("x")),
        await attempt(conn.tpc_prepare()),
        await attempt(conn.tpc_recover()),
        await attempt(conn.cancel_safe()),
        attempt_now(conn.cancel),
        attempt_now(conn.fileno),
        state(conn),
    ]


@scenario
async def closed_in_the_middle(conn: Connection, dsn: str) -> object:
    """Closing inside a transaction, a pipeline, a COPY, a stream."""

    async def transaction(conn: Connection) -> None:
        async with conn.transaction():
            await conn.execute("SELECT 1")
            await conn.close()

    async def pipeline(conn: Connection) -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1")
            await conn.close()

    async def copy(conn: Connection) -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write_row((10, "x"))
            await conn.close()

    async def stream(conn: Connection) -> None:
        async with closing(conn.cursor().stream("SELECT generate_series(1, 1000000)")) as stream:
            async for _row in stream:
                await conn.close()

    seen: list[object] = []
    for work in (transaction, pipeline, copy, stream):
        async with await type(conn).connect(dsn) as other:
            seen += [await attempt(work(other)), state(other)]
    return seen


@scenario
async def broken_stays_broken(conn: Connection, dsn: str) -> object:
    """A connection that was lost is still called broken when it has been closed as well."""
    await attempt(conn.execute("SELECT pg_terminate_backend(pg_backend_pid())"))
    seen = [conn.broken]
    await conn.close()
    return [*seen, conn.broken]


# Connecting


async def connecting(conn: Connection, dsn: str, **keywords: Any) -> object:
    """Connect another connection of the same kind, and say how it went."""
    try:
        other = await type(conn).connect(dsn, **keywords)
    except Exception as error:
        return describe(error)
    async with other:
        return [
            other.info.host,
            other.info.hostaddr,
            other.info.port == conn.info.port,
            other.autocommit,
        ]


@scenario
async def connect_keywords(conn: Connection, dsn: str) -> object:
    """What connect takes besides the connection string."""
    other = await type(conn).connect(
        dsn,
        autocommit=True,
        prepare_threshold=None,
        row_factory=dict_row,
        cursor_factory=psycopg.AsyncRawCursor,
        application_name="somebody",
    )
    async with other:
        cursor = await other.execute("SELECT current_setting('application_name') AS name")
        seen = [await cursor.fetchall(), type(cursor).__name__, other.autocommit, state(other)]
        seen += [other.prepare_threshold, type(other.cursor()).__name__]
    return [*seen, type(other) is type(conn)]


@scenario
async def connecting_with_nonsense(conn: Connection, dsn: str) -> object:
    """Connection strings and options that can't be."""
    return [
        await connecting(conn, "nonsense"),
        await connecting(conn, "host='unclosed"),
        await connecting(conn, dsn, nonsense=1),
        await connecting(conn, dsn, connect_timeout="soon"),
        await connecting(conn, dsn, connect_timeout=-1),
        await connecting(conn, dsn, connect_timeout=0),
        await connecting(conn, dsn, connect_timeout="1"),
        await connecting(conn, dsn, port="many"),
        await connecting(conn, dsn, port=99999),
        await connecting(conn, dsn, port="1,2,3"),
        await connecting(conn, dsn, sslmode="perhaps"),
        await connecting(conn, dsn, target_session_attrs="sometimes"),
        await connecting(conn, dsn, options="-c nonsense=1"),
        await connecting(conn, dsn, client_encoding="klingon"),
        await connecting(conn, dsn, service="nowhere"),
        await connecting(conn, dsn, password=object()),
    ]


@scenario
async def connecting_to_nowhere(conn: Connection, dsn: str) -> object:
    """Hosts that don't exist, ports that nobody listens on, sockets that aren't there."""
    return [
        await connecting(conn, dsn, host="host.invalid"),
        await connecting(conn, dsn, host="host.invalid,also.invalid"),
        await connecting(conn, dsn, port=1),
        await connecting(conn, dsn, host="/nowhere"),
        await connecting(conn, dsn, host="@nowhere"),
        await connecting(conn, dsn, hostaddr="127.0.0.1", port=1),
        await connecting(conn, dsn, hostaddr="nonsense"),
        await connecting(conn, dsn, dbname="nowhere"),
        await connecting(conn, dsn, dbname="nöwhere"),
        await connecting(conn, dsn, user="nobody"),
    ]


@scenario
async def connecting_to_several_hosts(conn: Connection, dsn: str) -> object:
    """Several hosts are tried in their order, and the failures of all are listed."""
    port = conn.info.port
    local = "127.0.0.1"
    return [
        await connecting(conn, dsn, host=f"{local},{local}", port=f"1,{port}"),
        await connecting(conn, dsn, host=f"host.invalid,{local}", port=port),
        await connecting(conn, dsn, host=f"{local},host.invalid", port=f"1,{port}"),
        await connecting(conn, dsn, host=f"{local},{local},/nowhere", port="1,2,3"),
        await connecting(conn, dsn, host=f"{local},{local}", port=f"1,{port}", dbname="nowhere"),
        await connecting(conn, dsn, host=f"{local},{local}", port=f"{port},1", dbname="nowhere"),
        await connecting(conn, dsn, host="a,b", hostaddr=f"{local},{local}", port=f"1,{port}"),
        await connecting(conn, dsn, host="a", hostaddr=f"{local},{local}", port=f"1,{port}"),
        await connecting(conn, dsn, host="a.invalid", hostaddr=local),
        await connecting(conn, dsn, host="localhost", hostaddr=local),
        await connecting(conn, dsn, host="127.0.0.1"),
        await connecting(conn, dsn, host=f"{local},{local}", port=1, connect_timeout=1),
    ]


@scenario
async def connecting_by_name(conn: Connection, dsn: str) -> object:
    """A name that has several addresses is several attempts."""
    return [
        await connecting(conn, dsn, host="localhost"),
        await connecting(conn, dsn, host="localhost", port=1),
    ]


@scenario
async def connecting_with_attributes(conn: Connection, dsn: str) -> object:
    """The kind of server that is wanted, on a primary."""
    seen: list[object] = []
    port = conn.info.port
    for wanted in ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"):
        seen += [wanted, await connecting(conn, dsn, target_session_attrs=wanted)]
        hosts = {"host": "127.0.0.1,127.0.0.1", "port": f"1,{port}"}
        seen += [await connecting(conn, dsn, target_session_attrs=wanted, **hosts)]
    seen += [await connecting(conn, dsn, target_session_attrs="prefer-standby", port=1)]
    return seen


@scenario_if(LIBPQ >= 16)
async def connecting_with_load_balancing(conn: Connection, dsn: str) -> object:
    """Hosts are tried in their order, or by chance."""
    hosts: dict[str, Any] = {"host": "127.0.0.1,127.0.0.1", "port": f"1,{conn.info.port}"}
    return [
        await connecting(conn, dsn, load_balance_hosts="disable", **hosts),
        await connecting(conn, dsn, load_balance_hosts="random", **hosts),
        await connecting(conn, dsn, load_balance_hosts="sometimes", **hosts),
    ]


# The comparison


@pytest.fixture
def laboratory(dsn: str) -> Iterator[str]:
    """A connection string whose schema is empty, but for the table `notes`."""
    yield make_conninfo(dsn, options="-c search_path=laboratory,public -c lock_timeout=5s")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS laboratory CASCADE")


def prepare(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS laboratory CASCADE")
        connection.execute("CREATE SCHEMA laboratory")
        connection.execute("CREATE TABLE laboratory.notes (id int PRIMARY KEY, note text)")
        connection.execute("INSERT INTO laboratory.notes VALUES (1, 'one'), (2, NULL), (3, 'three')")


async def conduct(scenario: Scenario, dsn: str, kind: type[Connection]) -> tuple[object, ...]:
    """Run a scenario, and say what came of it, and of its connection."""
    prepare(dsn)
    conn = await kind.connect(dsn)
    try:
        found = await attempt(scenario(conn, dsn))
        return found, state(conn)
    finally:
        await conn.close()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_same_as_asyncio(scenario: Scenario, laboratory: str) -> None:
    """On Trio it goes as it does on asyncio."""

    async def on_asyncio() -> object:
        return await asyncio.wait_for(conduct(scenario, laboratory, psycopg.AsyncConnection), TIMEOUT)

    async def on_trio() -> object:
        with trio.fail_after(TIMEOUT):
            return await conduct(scenario, laboratory, TrioConnection)

    expected = asyncio.run(on_asyncio())
    assert trio.run(on_trio) == expected


@asynccontextmanager
async def pooled(dsn: str) -> AsyncIterator[TrioConnection[Any]]:
    async with open_pool(dsn, pool_size=1) as pool, pool.worker() as connection:
        yield connection


@pytest.mark.parametrize("scenario", TYPES, ids=lambda scenario: scenario.__name__)
def test_same_through_the_pool(scenario: Scenario, laboratory: str) -> None:
    """A pooled connection adapts as one of asyncio does."""

    async def on_trio() -> object:
        with trio.fail_after(TIMEOUT):
            async with pooled(laboratory) as connection:
                return await attempt(scenario(connection, laboratory)), state(connection)

    expected = asyncio.run(conduct(scenario, laboratory, psycopg.AsyncConnection))
    prepare(laboratory)
    assert trio.run(on_trio) == expected
