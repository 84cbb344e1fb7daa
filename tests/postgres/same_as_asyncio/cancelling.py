"""Cancelling by request, which ends what is under way with an error."""

from __future__ import annotations

from connections import closing

from .laboratory import (
    MUCH_MORE_THAN_FITS,
    Connection,
    See,
    attempt,
    rows,
    scenario,
    state,
    wait_until,
    when_active,
)


@scenario
async def cancel(conn: Connection, dsn: str, see: See) -> None:
    """cancel and cancel_safe with nothing under way do nothing; a thread's cancel ends a query."""
    conn.cancel()
    await conn.cancel_safe()
    await conn.cancel_safe(timeout=0)
    see("nothing under way", notes=await rows(conn))
    thread = when_active(dsn, conn.info.backend_pid, conn.cancel)
    see("by a thread", query=await attempt(conn.execute("SELECT pg_sleep(10)")), state=state(conn))
    thread.join()


@scenario
async def cancel_safe_in_a_pipeline(conn: Connection, dsn: str, see: See) -> None:
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

    see(pipeline=await attempt(work()), state=state(conn))
    see(next_query=await attempt(conn.execute("SELECT 1")))


@scenario
async def cancel_safe_in_a_copy_and_a_stream(conn: Connection, dsn: str, see: See) -> None:
    """cancel_safe ends a COPY and a stream from inside their blocks."""

    async def copy() -> None:
        async with conn.cursor().copy(f"COPY ({MUCH_MORE_THAN_FITS}) TO STDOUT") as copy:
            await copy.read()
            await conn.cancel_safe()
            while await copy.read():
                pass

    async def stream() -> None:
        async with closing(conn.cursor().stream(MUCH_MORE_THAN_FITS)) as stream:
            cancelled = False
            async for _row in stream:
                if not cancelled:
                    await conn.cancel_safe()
                    cancelled = True

    for work in (copy, stream):
        see(work.__name__, block=await attempt(work()), state=state(conn))
        await conn.rollback()
