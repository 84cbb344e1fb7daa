"""Server-side cursors."""

from __future__ import annotations

from .laboratory import Connection, See, attempt, scenario, state


@scenario
async def server_cursor(conn: Connection, dsn: str, see: See) -> None:
    """A server-side cursor fetches in steps, scrolls and iterates."""
    async with conn.cursor("steps", scrollable=True) as cursor:
        cursor.itersize = 3
        await cursor.execute("SELECT generate_series(1, %s)", (10,))
        see(repr=repr(cursor).split(" at ")[0].split(".")[-1], name=cursor.name)
        see(scrollable=cursor.scrollable)
        see(one=await cursor.fetchone(), many=await cursor.fetchmany(2), rownumber=cursor.rownumber)
        await cursor.scroll(-2)
        see("scrolled back", one=await cursor.fetchone())
        await cursor.scroll(8, "absolute")
        see("scrolled on", rest=await cursor.fetchall(), then=await cursor.fetchone())
        see("scrolled on", rownumber=cursor.rownumber)
        see(
            scrolling_too_far=await attempt(cursor.scroll(1000)),
            executemany=await attempt(cursor.executemany("SELECT 1", [()])),
        )
        await cursor.scroll(0, "absolute")
        see(iterated=[row async for row in cursor])
        see(description=cursor.description and cursor.description[0].name)
    see("after its block", one=await attempt(cursor.fetchone()), state=state(conn))


@scenario
async def server_cursor_not_scrollable(conn: Connection, dsn: str, see: See) -> None:
    """A server-side cursor that was declared not to scroll does not."""
    cursor = conn.cursor("forward", scrollable=False)
    await cursor.execute("SELECT generate_series(1, 10)")
    see(many=await cursor.fetchmany(2), back=await attempt(cursor.scroll(-1)), state=state(conn))
    await conn.rollback()
    see("after the rollback", closing=await attempt(cursor.close()), state=state(conn))


@scenario
async def server_cursor_with_hold(conn: Connection, dsn: str, see: See) -> None:
    """A cursor WITH HOLD survives the commit, another one does not."""
    held, plain = conn.cursor("held", withhold=True), conn.cursor("plain")
    for cursor in (held, plain):
        await cursor.execute("SELECT generate_series(1, 5)")
    await conn.commit()
    see("after the commit", held=await held.fetchmany(2), state=state(conn))
    see("after the commit", plain=await attempt(plain.fetchone()), state_then=state(conn))
    await conn.rollback()
    see("after the rollback", held=await held.fetchall())
    await held.close()
    see("closing", plain=await attempt(plain.close()), held=await attempt(held.fetchone()))
    see("closing", state=state(conn))


@scenario
async def server_cursor_in_autocommit(conn: Connection, dsn: str, see: See) -> None:
    """Without a transaction only a cursor WITH HOLD can be declared."""
    await conn.set_autocommit(True)
    plain = conn.cursor("plain")
    see("plain", execute=await attempt(plain.execute("SELECT 1")), close=await attempt(plain.close()))
    see("plain", state=state(conn))
    held = conn.cursor("held", withhold=True)
    await held.execute("SELECT generate_series(1, 5)")
    see("held", rows=await held.fetchall())
    await held.close()
    async with conn.transaction(), conn.cursor("inside") as cursor:
        await cursor.execute("SELECT 1")
        see("in a transaction", rows=await cursor.fetchall())


@scenario
async def server_cursor_errors(conn: Connection, dsn: str, see: See) -> None:
    """Errors of a server-side cursor: at declaring, at fetching, a name that is taken, reuse."""
    cursor = conn.cursor("one")
    see("declaring", execute=await attempt(cursor.execute("SELEKT")))
    see("declaring", close=await attempt(cursor.close()), state=state(conn))
    await conn.rollback()
    cursor = conn.cursor("two")
    await cursor.execute("SELECT 1 / (3 - x) FROM generate_series(1, 5) x")
    see("fetching", one=await cursor.fetchone(), all=await attempt(cursor.fetchall()))
    see("fetching", state=state(conn), close=await attempt(cursor.close()))
    await conn.rollback()
    taken, other = conn.cursor("three"), conn.cursor("three")
    await taken.execute("SELECT 1")
    see("a name that is taken", execute=await attempt(other.execute("SELECT 2")), state=state(conn))
    await conn.rollback()
    see("a name that is taken", close=await attempt(taken.close()))
    see("a name that is taken", close_the_other=await attempt(other.close()))
    see("a name that is taken", state_at_last=state(conn))
    await conn.rollback()
    async with conn.cursor("four") as cursor:
        await cursor.execute("SELECT 1")
        await cursor.execute("SELECT 2")
        see("executed twice", rows=await cursor.fetchall())
    async with conn.cursor("five") as cursor:
        see("not executed", one=await attempt(cursor.fetchone()))


@scenario
async def server_cursor_ended_by_its_block(conn: Connection, dsn: str, see: See) -> None:
    """A block that is left by an error in the transaction does not hide the error."""

    async def work() -> None:
        async with conn.transaction(), conn.cursor("inner") as cursor:
            await cursor.execute("SELECT 1 / (3 - x) FROM generate_series(1, 5) x")
            await cursor.fetchall()

    see(block=await attempt(work()), state=state(conn))
