"""Notifications and notices."""

from __future__ import annotations

import select
import time
from contextlib import aclosing
from typing import Any

import psycopg

from .laboratory import (
    Connection,
    See,
    attempt,
    attempt_now,
    rows,
    scenario,
    server_says,
    state,
)


@scenario
async def notifies(conn: Connection, dsn: str, see: See) -> None:
    """notifies ends at its timeout, or after a number of notifications."""
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    see(without_waiting=[n async for n in conn.notifies(timeout=0)])
    started = time.monotonic()
    see("with a timeout", notifications=[n async for n in conn.notifies(timeout=0.2)])
    see("with a timeout", waited=time.monotonic() - started >= 0.19)
    server_says(dsn, "SELECT pg_notify('news', 'a'), pg_notify('news', 'ü')")
    found = [note async for note in conn.notifies(timeout=5, stop_after=2)]
    see(two=[note[:2] for note in found], state=state(conn))
    await conn.execute("SELECT pg_notify('news', 'own')")
    found = [note async for note in conn.notifies(timeout=0.2, stop_after=1)]
    see(own=[(*note[:2], note.pid == conn.info.backend_pid) for note in found])
    async with aclosing(conn.notifies()) as generator:
        server_says(dsn, "SELECT pg_notify('news', 'b')")
        async for note in generator:
            see("left early", notification=note[:2])
            break
    see("left early", notes=await rows(conn), state=state(conn))


@scenario
async def notifies_without_waiting(conn: Connection, dsn: str, see: See) -> None:
    """A timeout of 0 still takes what is there."""
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    server_says(dsn, "SELECT pg_notify('news', 'a')")
    select.select([conn.fileno()], [], [], 5)  # it has arrived
    see(notifications=[note[:2] async for note in conn.notifies(timeout=0)], state=state(conn))


@scenario
async def notify_handlers(conn: Connection, dsn: str, see: See) -> None:
    """Handlers are called for what arrives with a query's answer, until they are removed."""
    called: list[object] = []

    def first(note: psycopg.Notify) -> None:
        called.append(("first", *note[:2]))

    def second(note: psycopg.Notify) -> None:
        called.append(("second", *note[:2]))

    conn.add_notify_handler(first)
    conn.add_notify_handler(second)
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    await conn.execute("SELECT pg_notify('news', 'a')")
    see("both added", called=[*called])
    conn.remove_notify_handler(first)
    await conn.execute("SELECT pg_notify('news', 'b')")
    see("one removed", called=[*called])
    see(removing_it_again=attempt_now(lambda: conn.remove_notify_handler(first)))
    await conn.execute("UNLISTEN news")
    await conn.execute("SELECT pg_notify('news', 'c')")
    see("not listening", called=[*called])


@scenario
async def notify_handler_that_fails(conn: Connection, dsn: str, see: See) -> None:
    """A handler that raises."""

    def handler(note: psycopg.Notify) -> None:
        raise LookupError("no such news")

    conn.add_notify_handler(handler)
    await conn.set_autocommit(True)
    await conn.execute("LISTEN news")
    see(execute=await attempt(conn.execute("SELECT pg_notify('news', 'a')")), closed=conn.closed)


@scenario
async def notifies_and_handlers_together(conn: Connection, dsn: str, see: See) -> None:
    """psycopg warns of using both (and a warning is an error here), or it does not."""
    conn.add_notify_handler(lambda note: None)

    async def work() -> list[Any]:
        return [note async for note in conn.notifies(timeout=0)]

    see(notifies=await attempt(work()))


@scenario
async def notices(conn: Connection, dsn: str, see: See) -> None:
    """Notices go to the handlers, with all fields; a handler that fails disturbs nothing."""
    called: list[object] = []

    def first(notice: psycopg.errors.Diagnostic) -> None:
        called.append((notice.severity, notice.sqlstate, notice.message_primary, notice.message_hint))

    def second(notice: psycopg.errors.Diagnostic) -> None:
        raise LookupError("ignored")

    conn.add_notice_handler(first)
    conn.add_notice_handler(second)
    raising = "DO $$ BEGIN RAISE WARNING 'hot' USING HINT = 'ümlaut', ERRCODE = '01000'; END $$"
    await conn.execute(raising)
    await conn.execute("DROP TABLE IF EXISTS nowhere")
    see("both added", called=[*called])
    conn.remove_notice_handler(first)
    await conn.execute(raising)
    see("one removed", called=[*called])
    see(removing_it_again=attempt_now(lambda: conn.remove_notice_handler(first)), state=state(conn))
