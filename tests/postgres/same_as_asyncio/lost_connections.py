"""Connections that the server ends, at all kinds of moments."""

from __future__ import annotations

import threading

import psycopg
from connections import closing

from .laboratory import (
    MUCH_MORE_THAN_FITS,
    Connection,
    See,
    attempt,
    block_status,
    scenario,
    state,
    terminate,
    wait_until,
    when_active,
)


@scenario
async def idle_in_transaction_timeout(conn: Connection, dsn: str, see: See) -> None:
    """The server hangs up on a transaction that does nothing, which is noticed at the next query."""
    await conn.execute("SET idle_in_transaction_session_timeout = 30")
    pid = conn.info.backend_pid
    wait_until(dsn, "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = %s)", pid)
    see("at first", closed=conn.closed, query=await attempt(conn.execute("SELECT 1")))
    see("at first", state=state(conn))
    see("then", query=await attempt(conn.execute("SELECT 1")))
    see("then", rollback=await attempt(conn.rollback()), state=state(conn))


@scenario
async def terminated_in_a_query(conn: Connection, dsn: str, see: See) -> None:
    """The backend is ended in the middle of a query."""
    query = "SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(5)"
    see(query=await attempt(conn.execute(query)), state=state(conn))
    see("then", query=await attempt(conn.execute("SELECT 1")), commit=await attempt(conn.commit()))


@scenario
async def terminated_by_another_in_a_query(conn: Connection, dsn: str, see: See) -> None:
    """The backend is ended by another connection in the middle of a query."""
    pid = conn.info.backend_pid
    await conn.set_autocommit(True)
    thread = when_active(dsn, pid, lambda: terminate(dsn, pid))
    see(query=await attempt(conn.execute("SELECT pg_sleep(10)")), state=state(conn))
    thread.join()


@scenario
async def terminated_while_idle(conn: Connection, dsn: str, see: See) -> None:
    """The backend is ended while nothing happens; the next operation notices."""
    await conn.set_autocommit(True)
    terminate(dsn, conn.info.backend_pid)
    see("before the next query", state=state(conn))
    see("the next query", query=await attempt(conn.execute("SELECT 1")), state=state(conn))
    await conn.close()
    see("closed", state=state(conn))


@scenario
async def terminated_in_a_transaction(conn: Connection, dsn: str, see: See) -> None:
    """The backend is ended inside a block."""
    blocks: list[psycopg.AsyncTransaction] = []

    async def after_a_query(conn: Connection) -> None:
        async with conn.transaction() as block:
            blocks.append(block)
            await conn.execute("SELECT 1")
            terminate(dsn, conn.info.backend_pid)

    async def before_a_query(conn: Connection) -> None:
        async with conn.transaction() as block:
            blocks.append(block)
            terminate(dsn, conn.info.backend_pid)
            await conn.execute("SELECT 1")

    for work in (after_a_query, before_a_query):
        async with await type(conn).connect(dsn) as other:
            see(work.__name__, block=await attempt(work(other)), state=state(other))
            see(work.__name__, statuses=[block_status(block) for block in blocks])


@scenario
async def terminated_in_a_pipeline(conn: Connection, dsn: str, see: See) -> None:
    """The backend is ended inside a pipeline."""

    async def work() -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1")
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(5)")

    found = await attempt(work())
    # How much of the last words is read, and thus which error it is, is up to chance in both.
    see(pipeline_failed=isinstance(found, tuple), state=state(conn)[:2])
    see(next_query=await attempt(conn.execute("SELECT 1")))


@scenario
async def terminated_in_a_copy(conn: Connection, dsn: str, see: See) -> None:
    """The backend is ended inside a COPY."""

    async def into(conn: Connection) -> None:
        async with conn.cursor().copy("COPY notes FROM STDIN") as copy:
            await copy.write_row((10, "x"))
            terminate(dsn, conn.info.backend_pid)

    async def out(conn: Connection) -> None:
        async with conn.cursor().copy(f"COPY ({MUCH_MORE_THAN_FITS}) TO STDOUT") as copy:
            await copy.read()
            terminate(dsn, conn.info.backend_pid)
            while await copy.read():
                pass

    for work in (into, out):
        async with await type(conn).connect(dsn) as other:
            see(work.__name__, copy=await attempt(work(other)), state=state(other))


@scenario
async def terminated_in_a_stream(conn: Connection, dsn: str, see: See) -> None:
    """The backend is ended while it streams."""

    async def work() -> None:
        async with closing(conn.cursor().stream(MUCH_MORE_THAN_FITS)) as stream:
            async for _row in stream:
                terminate(dsn, conn.info.backend_pid)
                break
            async for _row in stream:
                pass

    see(stream=await attempt(work()), state=state(conn))


@scenario
async def terminated_while_listening(conn: Connection, dsn: str, see: See) -> None:
    """The backend is ended while a task waits for notifications."""
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    pid = conn.info.backend_pid
    thread = threading.Timer(0.1, terminate, (dsn, pid))
    thread.start()

    async def work() -> None:
        async for _note in conn.notifies(timeout=10):
            pass

    see(notifies=await attempt(work()), state=state(conn))
    thread.join()
