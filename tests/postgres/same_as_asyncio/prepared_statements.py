"""Prepared statements."""

from __future__ import annotations

from typing import Any

from .laboratory import Connection, See, attempt, rows, scenario, state


async def prepared(conn: Connection) -> list[Any]:
    return await rows(
        conn, "SELECT statement FROM pg_prepared_statements WHERE from_sql = false ORDER BY 1"
    )


@scenario
async def prepared_statements(conn: Connection, dsn: str, see: See) -> None:
    """A query is prepared at its threshold, at once if asked to, never if asked not to."""
    await conn.set_autocommit(True)
    see(threshold=conn.prepare_threshold, maximum=conn.prepared_max)
    conn.prepare_threshold = 2
    for number in range(4):
        await conn.execute("SELECT %s::int + 1", (1,))
        await conn.execute("SELECT 2", prepare=False)
        see(f"after execution {number + 1}", prepared=await prepared(conn))
    await conn.execute("SELECT %s::int + 3", (1,), prepare=True)
    see("prepared when asked", prepared=await prepared(conn))
    conn.prepare_threshold = None
    for _ in range(8):
        await conn.execute("SELECT 4")
    see(two_at_once=await attempt(conn.execute("SELECT 5; SELECT 6", prepare=True)))
    see("without a threshold", prepared=await prepared(conn))


@scenario
async def prepared_max(conn: Connection, dsn: str, see: See) -> None:
    """Statements beyond the maximum are forgotten, by the server too."""
    await conn.set_autocommit(True)
    conn.prepare_threshold = 0
    conn.prepared_max = 2
    for number in range(5):
        await conn.execute(f"SELECT {number}, 'many'".encode(), prepare=True)
    conn.prepare_threshold = None
    see(prepared=await prepared(conn), maximum=conn.prepared_max)
    conn.prepared_max = None
    see("set to None", maximum=conn.prepared_max)
    await conn.execute("DEALLOCATE ALL")
    see("after DEALLOCATE ALL", prepared=await prepared(conn))


@scenario
async def prepared_statements_and_rollback(conn: Connection, dsn: str, see: See) -> None:
    """A statement prepared in a transaction that is rolled back is prepared again."""
    conn.prepare_threshold = 0
    for _ in range(3):
        await conn.execute("CREATE TABLE made (x int)")
        await conn.execute("SELECT * FROM made")
        await conn.rollback()
        see(after_a_rollback=await (await conn.execute("SELECT %s::int", (1,))).fetchall())
    await conn.execute("CREATE TABLE changing (x int)")
    await conn.execute("SELECT * FROM changing")
    await conn.commit()
    await conn.execute("ALTER TABLE changing ADD y int")
    see(after_a_change=await attempt(conn.execute("SELECT * FROM changing")), state=state(conn))
    await conn.rollback()
    async with conn.pipeline():
        for _ in range(3):
            await conn.execute("SELECT 'in a pipeline'")
    await conn.rollback()
    see(state_at_last=state(conn))
