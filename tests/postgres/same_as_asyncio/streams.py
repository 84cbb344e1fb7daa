"""`stream`, which yields rows while the server sends them."""

from __future__ import annotations

from typing import Any

from connections import closing
from psycopg.rows import dict_row

from .laboratory import (
    LIBPQ,
    MUCH_MORE_THAN_FITS,
    Connection,
    See,
    attempt,
    rows,
    scenario,
    scenario_if,
    state,
)


@scenario
async def stream(conn: Connection, dsn: str, see: See) -> None:
    """stream yields row by row, and leaves the connection in order."""
    cursor = conn.cursor()
    see(rows=[row async for row in cursor.stream("SELECT generate_series(1, %s), 'x'", (5,))])
    see(rownumber=cursor.rownumber, statusmessage=cursor.statusmessage, state=state(conn))
    see(binary=[row async for row in cursor.stream("SELECT 1, 'a'::text", binary=True)])
    see(empty=[row async for row in cursor.stream("SELECT 1 WHERE false")])
    see(notes=await rows(conn), state_then=state(conn))


@scenario
async def what_a_cursor_says_of_a_stream(conn: Connection, dsn: str, see: See) -> None:
    """Between two rows, and behind the last one; with another row factory, too."""
    query = "SELECT x, x / 2.0 AS half FROM generate_series(1, 3) x"
    for cursor in (conn.cursor(), conn.cursor(row_factory=dict_row)):
        async for row in cursor.stream(query):
            assert cursor.pgresult
            tuples = [cursor.pgresult.get_value(number, 0) for number in range(cursor.pgresult.ntuples)]
            see(row=row, columns=[column.name for column in cursor.description or ()], tuples=tuples)
            see(rowcount=cursor.rowcount, rownumber=cursor.rownumber, status=cursor.statusmessage)
        see("at the end", rows=await attempt(cursor.fetchall()), rowcount=cursor.rowcount)


@scenario_if(LIBPQ >= 17)
async def stream_in_chunks(conn: Connection, dsn: str, see: See) -> None:
    """stream with a size fetches chunks, and still yields row by row."""
    cursor = conn.cursor()
    see(rows=[row async for row in cursor.stream("SELECT generate_series(1, 1000)", size=7)])
    async with closing(cursor.stream(MUCH_MORE_THAN_FITS, size=7)) as stream:
        async for row in stream:
            if row[0] == 20:
                break
    see("left early", state=state(conn), notes=await attempt(rows(conn)))


@scenario
async def stream_size_unsupported_or_wrong(conn: Connection, dsn: str, see: See) -> None:
    """A size that can't be is an error."""
    cursor = conn.cursor()

    async def consume(size: int) -> list[Any]:
        return [row async for row in cursor.stream("SELECT generate_series(1, 5)", size=size)]

    see(size_of_0=await attempt(consume(0)), size_below_0=await attempt(consume(-1)))
    # The query had been sent. Whether it was still there to be cancelled is a matter of chance.
    await conn.rollback()
    see(next_query=await attempt(conn.execute("SELECT 1")), state=state(conn))


@scenario
async def stream_left_early(conn: Connection, dsn: str, see: See) -> None:
    """A stream left early is cancelled, and its transaction has failed."""
    cursor = conn.cursor()
    for autocommit in (False, True):
        await conn.rollback()
        await conn.set_autocommit(autocommit)
        async with closing(cursor.stream(MUCH_MORE_THAN_FITS)) as stream:
            async for row in stream:
                see(f"autocommit {autocommit}", row=row[0])
                break
        see(f"autocommit {autocommit}", state=state(conn))
        see(f"autocommit {autocommit}", next_query=await attempt(conn.execute("SELECT 1")))


@scenario
async def stream_left_by_an_exception(conn: Connection, dsn: str, see: See) -> None:
    """An exception in the loop goes through."""

    async def work() -> None:
        async with closing(conn.cursor().stream(MUCH_MORE_THAN_FITS)) as stream:
            async for _row in stream:
                raise LookupError("enough")

    see(stream=await attempt(work()), state=state(conn))


@scenario
async def stream_errors(conn: Connection, dsn: str, see: See) -> None:
    """An error before the first row, one in the middle, a statement that can't be streamed."""

    async def consume(conn: Connection, query: bytes) -> None:
        async with closing(conn.cursor().stream(query)) as stream:
            async for row in stream:
                see(repr(query), row=row)

    for query in (
        b"SELEKT",
        b"SELECT 1 / (3 - x) FROM generate_series(1, 5) x",
        b"UPDATE notes SET note = 'x'",
        b"",
        b"SELECT 1; SELECT 2",
    ):
        other = await type(conn).connect(dsn)
        see(repr(query), stream=await attempt(consume(other, query)), state=state(other))
        see(repr(query), rollback=await attempt(other.rollback()))
        await other.close()
    async with conn.pipeline():
        see("in a pipeline", stream=await attempt(consume(conn, b"SELECT 1")))
    see(notes=await rows(conn))
