"""COPY in both directions."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql
from psycopg.copy import AsyncLibpqWriter, AsyncWriter

from .laboratory import (
    MUCH_MORE_THAN_FITS,
    PSYCOPG,
    Connection,
    See,
    attempt,
    rows,
    scenario,
    state,
)

# Into the server


@scenario
async def copy_in_by_row_and_block(conn: Connection, dsn: str, see: See) -> None:
    """COPY FROM by row, by block of text, of bytes, of more than fits into one message."""
    async with conn.cursor() as cursor:
        async with cursor.copy("COPY notes FROM STDIN") as copy:
            await copy.write_row((10, "a\tb\n\\"))
            await copy.write_row([11, None])
        see(rowcount=cursor.rowcount, statusmessage=cursor.statusmessage, state=state(conn))
        async with cursor.copy("COPY notes FROM STDIN") as copy:
            await copy.write("12\ttwelve\n13\t")
            await copy.write(b"thirteen\n")
        async with cursor.copy("COPY notes FROM STDIN (FORMAT csv)") as copy:
            await copy.write('14,"a, b"\n')
        async with cursor.copy("COPY notes FROM STDIN") as copy:
            await copy.write(b"15\t" + b"x" * 3_000_000 + b"\n")
        async with cursor.copy("COPY notes FROM STDIN"):
            pass
        see("nothing written", rowcount=cursor.rowcount, state=state(conn))
    query = "SELECT id, left(note, 10), length(note) FROM notes ORDER BY id"
    see(notes=await rows(conn, query))


@scenario
async def copy_in_binary(conn: Connection, dsn: str, see: See) -> None:
    """COPY FROM in binary, with and without types, and with wrong ones."""

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
        see(f"{row} as {types}", copy=await attempt(work(types, row)), state=state(conn))
        await conn.rollback()


@scenario
async def copy_in_errors(conn: Connection, dsn: str, see: See) -> None:
    """COPY FROM ends at a row that the server refuses, at an exception, at a wrong statement."""

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
            where = f"{work.__name__}, autocommit {autocommit}"
            async with await type(conn).connect(dsn, autocommit=autocommit) as other:
                see(where, copy=await attempt(work(other)), state=state(other))
                see(where, rollback=await attempt(other.rollback()))
        for wrong in (b"SELECT 1", b"COPY nowhere FROM STDIN", b"KOPY", b"", b"COPY notes TO STDOUT"):
            where = f"{wrong!r}, autocommit {autocommit}"
            other = await type(conn).connect(dsn, autocommit=autocommit)
            see(where, copy=await attempt(statement(other, wrong)), state=state(other))
            see(where, rollback=await attempt(other.rollback()), state_then=state(other))
            await other.close()
        for direction in (b"FROM STDIN", b"TO STDOUT"):
            where = f"executing COPY {direction!r}, autocommit {autocommit}"
            other = await type(conn).connect(dsn, autocommit=autocommit)
            see(where, execute=await attempt(other.execute(b"COPY notes " + direction)))
            see(where, state=state(other))
            see(where, rollback=await attempt(other.rollback()), state_then=state(other))
            await other.close()
    see(notes=await rows(conn))


@scenario
async def copy_in_bad_row_early_in_much_data(conn: Connection, dsn: str, see: See) -> None:
    """The server refuses the first of many rows: the rest is thrown away."""

    async def work() -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write("no number\tx\n")
            for number in range(2000):
                await copy.write_row((number, "x" * 1000))

    see(copy=await attempt(work()), state=state(conn))


# Out of the server


@scenario
async def copy_out(conn: Connection, dsn: str, see: See) -> None:
    """COPY TO by block, by read, by row, with types, in binary, with parameters."""
    cursor = conn.cursor()
    async with cursor.copy("COPY (SELECT * FROM notes ORDER BY id) TO STDOUT") as copy:
        see(blocks=[bytes(block) async for block in copy], rowcount=cursor.rowcount)
    async with cursor.copy("COPY (SELECT * FROM notes ORDER BY id) TO STDOUT") as copy:
        see("mixed", read=bytes(await copy.read()), row=await copy.read_row())
        see("mixed", rest=[row async for row in copy.rows()], end=bytes(await copy.read()))
    async with cursor.copy("COPY (SELECT 1) TO STDOUT") as copy:
        see(types=[type(await copy.read()) for _ in range(3)])
    for format in ("text", "binary"):
        async with cursor.copy(
            sql.SQL("COPY (SELECT * FROM notes ORDER BY id) TO STDOUT (FORMAT {})").format(
                sql.Identifier(format)
            )
        ) as copy:
            copy.set_types(["int4", "text"])
            see(format, with_types=[row async for row in copy.rows()])
        async with cursor.copy(
            sql.SQL("COPY (SELECT 1::int4, 'x') TO STDOUT (FORMAT {})").format(sql.Identifier(format))
        ) as copy:
            see(format, without_types=[row async for row in copy.rows()])
    async with cursor.copy("COPY (SELECT * FROM notes WHERE id = %s) TO STDOUT", (2,)) as copy:
        see("with parameters", rows=[row async for row in copy.rows()], end=await copy.read_row())
    see(state=state(conn))


@scenario
async def copy_out_left_early(conn: Connection, dsn: str, see: See) -> None:
    """COPY TO that is left by an exception, early and after the end."""

    async def exception() -> None:
        async with conn.cursor().copy(f"COPY ({MUCH_MORE_THAN_FITS}) TO STDOUT") as copy:
            await copy.read_row()
            raise LookupError("enough")

    async def exception_after_the_end() -> None:
        async with conn.cursor().copy("COPY (SELECT 1) TO STDOUT") as copy:
            while await copy.read():
                pass
            raise LookupError("enough")

    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        for work in (exception, exception_after_the_end):
            where = f"{work.__name__}, autocommit {autocommit}"
            see(where, copy=await attempt(work()), state=state(conn))
            await conn.rollback()


@scenario
async def copy_out_not_read_to_its_end(conn: Connection, dsn: str, see: See) -> None:
    """A block of COPY TO that is left without an exception, but too early."""

    async def work() -> None:
        async with conn.cursor().copy("COPY (SELECT generate_series(1, 100000)) TO STDOUT") as copy:
            await copy.read_row()

    see(copy=await attempt(work()), state=state(conn))
    see(next_query=await attempt(conn.execute("SELECT 1")))


@scenario
async def copy_out_errors(conn: Connection, dsn: str, see: See) -> None:
    """COPY TO that fails in the middle."""

    async def read() -> None:
        query = "COPY (SELECT 1 / (3 - x) FROM generate_series(1, 5) x) TO STDOUT"
        async with conn.cursor().copy(query) as copy:
            async for row in copy.rows():
                see(row=row)

    async def write() -> None:
        async with conn.cursor().copy("COPY notes TO STDOUT") as copy:
            await copy.write("1\tx\n")

    for work in (read, write):
        see(work.__name__, copy=await attempt(work()), state=state(conn))
        await conn.rollback()


# Elsewhere


class Collect(AsyncWriter):
    """A writer that is not psycopg's, and writes to nowhere."""

    def __init__(self) -> None:
        self.written: list[object] = []

    async def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    async def finish(self, exc: BaseException | None = None) -> None:
        self.written.append(exc and type(exc).__name__)


@scenario
async def copy_with_a_writer(conn: Connection, dsn: str, see: See) -> None:
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
    see(notes=await rows(conn), written=collect.written, state=state(conn))


@scenario
async def copy_in_a_pipeline(conn: Connection, dsn: str, see: See) -> None:
    """There is no COPY in a pipeline."""

    async def work() -> None:
        async with conn.pipeline(), conn.cursor().copy("COPY notes TO STDOUT"):
            pass

    see(copy=await attempt(work()), state=state(conn))


@scenario
async def copy_to_another_connection(conn: Connection, dsn: str, see: See) -> None:
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
    see(target=await rows(conn, "SELECT * FROM target ORDER BY id"), closed=other.closed)
