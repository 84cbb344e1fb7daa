"""Errors that the server reports, on a connection that goes on."""

from __future__ import annotations

import psycopg

from .laboratory import Connection, See, attempt, describe, scenario, state


@scenario
async def errors_of_the_server(conn: Connection, dsn: str, see: See) -> None:
    """Errors have their class, their state and their details; the transaction has failed."""
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
                see(
                    f"{query!r}, autocommit {autocommit}",
                    error=describe(error),
                    state=state(conn),
                    constraint=diag.constraint_name,
                    detail=diag.message_detail,
                    severity=diag.severity,
                    position=diag.statement_position,
                    has_result=error.pgresult is not None,
                )
            await conn.rollback()


@scenario
async def statement_timeout(conn: Connection, dsn: str, see: See) -> None:
    """A statement's own timeout is an error like others."""
    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        await conn.execute("SET statement_timeout = 50")
        await conn.commit()
        where = f"autocommit {autocommit}"
        see(where, query=await attempt(conn.execute("SELECT pg_sleep(10)")), state=state(conn))
        await conn.rollback()


@scenario
async def lock_timeout(conn: Connection, dsn: str, see: See) -> None:
    """A lock that can't be had in time is an error like others."""
    await conn.execute("SET lock_timeout = 50")
    with psycopg.connect(dsn) as other:
        other.execute("LOCK TABLE notes")
        see(query=await attempt(conn.execute("SELECT * FROM notes")), state=state(conn))
