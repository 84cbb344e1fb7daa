"""Leaving the block of a connection, closing it, and what is left to do with it then."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from connections import closing

from .laboratory import (
    Connection,
    See,
    attempt,
    attempt_now,
    rows,
    scenario,
    server_says,
    state,
    terminate,
)


@scenario
async def left_in_peace(conn: Connection, dsn: str, see: See) -> None:
    """`async with` commits and closes."""
    async with conn as entered:
        await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    see(same_object=entered is conn, state=state(conn))
    async with await type(conn).connect(dsn) as other:
        see("another", notes=await rows(other))
        await other.close()
    see("another, closed inside", state=state(other))


@scenario
async def left_by_an_exception(conn: Connection, dsn: str, see: See) -> None:
    """`async with` rolls back, and closes, at an exception."""

    async def work(conn: Connection, query: bytes) -> None:
        async with conn:
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            await conn.execute(query)
            raise LookupError("wrong")

    for query in (b"SELECT 1", b"SELECT 1/0"):
        other = await type(conn).connect(dsn)
        see(repr(query), block=await attempt(work(other, query)), state=state(other))
        see(repr(query), last_note=server_says(dsn, "SELECT max(id) FROM notes"))


@scenario
async def left_when_it_is_gone(conn: Connection, dsn: str, see: See) -> None:
    """`async with` on a connection that the server has closed meanwhile."""

    async def work(conn: Connection, error: Exception | None) -> None:
        async with conn:
            await conn.execute("SELECT 1")
            terminate(dsn, conn.info.backend_pid)
            if error:
                raise error

    for error in (None, LookupError("wrong")):
        other = await type(conn).connect(dsn)
        see(f"left by {error!r}", block=await attempt(work(other, error)), closed=other.closed)


@scenario
async def use_after_close(conn: Connection, dsn: str, see: See) -> None:
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

    see(
        state=state(conn),
        execute=await attempt(conn.execute("SELECT 1")),
        commit=await attempt(conn.commit()),
        rollback=await attempt(conn.rollback()),
        cursor=attempt_now(conn.cursor),
        cursor_execute=await attempt(cursor.execute("SELECT 1")),
        executemany=await attempt(cursor.executemany("SELECT 1", [()])),
        fetchone=await attempt(cursor.fetchone()),
        stream=await attempt(loop(lambda: cursor.stream("SELECT 1"))),
        copy=await attempt(block(lambda: cursor.copy("COPY notes FROM STDIN"))),
        named_execute=await attempt(named.execute("SELECT 1")),
        named_close=await attempt(named.close()),
        transaction=await attempt(block(conn.transaction)),
        pipeline=await attempt(block(conn.pipeline)),
        connection_block=await attempt(block(lambda: conn)),
        notifies=await attempt(loop(lambda: conn.notifies(timeout=0.1))),
        set_autocommit=await attempt(conn.set_autocommit(True)),
        set_read_only=await attempt(conn.set_read_only(True)),
        tpc_begin=await attempt(conn.tpc_begin("x")),
        tpc_prepare=await attempt(conn.tpc_prepare()),
        tpc_recover=await attempt(conn.tpc_recover()),
        cancel_safe=await attempt(conn.cancel_safe()),
        cancel=attempt_now(conn.cancel),
        fileno=attempt_now(conn.fileno),
        state_then=state(conn),
    )


@scenario
async def closed_in_the_middle(conn: Connection, dsn: str, see: See) -> None:
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

    for work in (transaction, pipeline, copy, stream):
        async with await type(conn).connect(dsn) as other:
            see(work.__name__, block=await attempt(work(other)), state=state(other))


@scenario
async def broken_stays_broken(conn: Connection, dsn: str, see: See) -> None:
    """A connection that was lost is still called broken when it has been closed as well."""
    await attempt(conn.execute("SELECT pg_terminate_backend(pg_backend_pid())"))
    see(broken=conn.broken)
    await conn.close()
    see("closed", broken=conn.broken)
