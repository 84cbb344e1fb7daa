"""Executing queries, and fetching what they return."""

from __future__ import annotations

import datetime as dt
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import class_row, dict_row, kwargs_row, namedtuple_row, scalar_row, tuple_row

from .laboratory import PSYCOPG, Connection, See, attempt, scenario, scenario_if, state


@scenario
async def client_cursor(conn: Connection, dsn: str, see: See) -> None:
    """A cursor fetches, scrolls, iterates, and describes what it got."""
    async with conn.cursor() as cursor:
        await cursor.execute("SELECT id, note FROM notes ORDER BY id")
        see(one=await cursor.fetchone(), many=await cursor.fetchmany(1), rownumber=cursor.rownumber)
        await cursor.scroll(-2)
        see(scrolling_too_far=await attempt(cursor.scroll(100)))
        see(scrolling_in_a_wrong_mode=await attempt(cursor.scroll(0, "wrong")))
        see(iterated=[row async for row in cursor])
        see("at the end", one=await cursor.fetchone(), many=await cursor.fetchmany(5))
        await cursor.scroll(1, "absolute")
        see("scrolled back", rest=await cursor.fetchall(), rowcount=cursor.rowcount)
        see(statusmessage=cursor.statusmessage, arraysize=cursor.arraysize)
        see(description=[str(column) for column in cursor.description or ()], closed=cursor.closed)
    see("after its block", closed=cursor.closed, one=await attempt(cursor.fetchone()))
    see("after its block", state=state(conn))


@scenario
async def nothing_to_fetch(conn: Connection, dsn: str, see: See) -> None:
    """Fetching where nothing was executed, and where the statement returned no rows, is an error."""
    cursor = conn.cursor()
    see("nothing executed", one=await attempt(cursor.fetchone()))
    await cursor.execute("UPDATE notes SET note = 'x'")
    see("an update", one=await attempt(cursor.fetchone()), all=await attempt(cursor.fetchall()))
    see("an update", rowcount=cursor.rowcount)
    await cursor.execute("")
    see("an empty query", all=await attempt(cursor.fetchall()), statusmessage=cursor.statusmessage)
    see("an empty query", rowcount=cursor.rowcount)


@scenario
async def parameters(conn: Connection, dsn: str, see: See) -> None:
    """Parameters go by position, by name, in binary, and wrong ones are refused."""
    see(
        by_position=await (await conn.execute("SELECT %s, %s::text", (1, "a"))).fetchall(),
        by_name=await (await conn.execute("SELECT %(a)s::int", {"a": 1})).fetchall(),
        in_binary=await (await conn.execute("SELECT %b::int, 1", (1,), binary=True)).fetchall(),
        too_few=await attempt(conn.execute("SELECT %s, %s", (1,))),
        another_name=await attempt(conn.execute("SELECT %(a)s", {"b": 1})),
        with_a_zero_byte=await attempt(conn.execute("SELECT %s", ("nul\0",))),
        not_adaptable=await attempt(conn.execute("SELECT %s", (object,))),
        state=state(conn),
    )


@scenario
async def several_results(conn: Connection, dsn: str, see: See) -> None:
    """Several statements in one query give several results."""
    cursor = await conn.execute("SELECT 1; SELECT 2, 3; UPDATE notes SET note = ''")
    see("first", rows=await cursor.fetchall(), another=cursor.nextset())
    see("second", rows=await cursor.fetchall(), another=cursor.nextset())
    see("third", rowcount=cursor.rowcount, status=cursor.statusmessage, another=cursor.nextset())
    see(an_error_among_them=await attempt(conn.execute("SELECT 1; SELECT 1/0; SELECT 3")))
    see(state=state(conn))


@scenario_if(PSYCOPG >= (3, 3))
async def results_one_by_one(conn: Connection, dsn: str, see: See) -> None:
    """`results` and `set_result` go from one result to another."""
    cursor = await conn.execute("SELECT 1; SELECT 2; SELECT 3")
    see(results=[await result.fetchall() async for result in cursor.results()])
    await cursor.set_result(-2)
    see(last_but_one=await cursor.fetchall(), no_such_result=await attempt(cursor.set_result(7)))


@scenario
async def row_factories(conn: Connection, dsn: str, see: See) -> None:
    """Rows come as the connection's factory, or the cursor's, makes them."""

    class Note(NamedTuple):
        id: int
        note: str

    query = "SELECT id, note FROM notes ORDER BY id"
    factories: dict[str, Any] = {
        "dict_row": dict_row,
        "namedtuple_row": namedtuple_row,
        "class_row": class_row(Note),
        "kwargs_row": kwargs_row(dict),
        "tuple_row": tuple_row,
        "scalar_row": scalar_row,
    }
    for name, factory in factories.items():
        async with conn.cursor(row_factory=factory) as cursor:
            await cursor.execute(query)
            see(name, rows=str(await cursor.fetchall()))
    conn.row_factory = dict_row
    cursor = conn.cursor()
    await cursor.execute(query)
    see(by_the_connection=await cursor.fetchone())
    cursor.row_factory = scalar_row
    see(changed_on_the_cursor=await cursor.fetchone())
    see(unchanged_on_the_connection=await (await conn.execute(query)).fetchone())


@scenario
async def raw_and_client_binding_cursors(conn: Connection, dsn: str, see: See) -> None:
    """Cursors of other classes take their own placeholders."""
    conn.cursor_factory = psycopg.AsyncRawCursor
    see("raw", own=await (await conn.execute("SELECT $1::int + $2::int", (1, 2))).fetchall())
    see("raw", of_others=await attempt(conn.execute("SELECT %s", (1,))))
    await conn.rollback()
    conn.cursor_factory = psycopg.AsyncClientCursor
    see("client", own=await (await conn.execute("SELECT %s, %s; SELECT 3", (1, "it's"))).fetchall())
    cursor = psycopg.AsyncClientCursor(conn)
    see("client", mogrified=cursor.mogrify("SELECT %s, %s", ("a'b", dt.date(2020, 1, 1))))
    await cursor.execute("CREATE TABLE made (x int DEFAULT %s)", (7,))


@scenario
async def wrong_arguments(conn: Connection, dsn: str, see: See) -> None:
    """Arguments that are not queries, parameters or options are refused."""
    see(
        no_query=await attempt(conn.execute(7)),  # type: ignore[call-overload]
        no_parameters=await attempt(conn.execute("SELECT %s", 7)),  # type: ignore[call-overload]
        no_placeholder=await attempt(conn.execute("SELECT %x", (1,))),
        state=state(conn),
    )
