"""Two-phase commit."""

from __future__ import annotations

from functools import partial

from .laboratory import Connection, See, attempt, attempt_now, rows, scenario, state


@scenario
async def two_phase_commit(conn: Connection, dsn: str, see: See) -> None:
    """Begun, prepared, committed or rolled back, and the same without being prepared."""
    for end in ("commit", "rollback"):
        for prepare in (True, False):
            where = f"{end}, prepared {prepare}"
            await conn.tpc_begin(conn.xid(1, f"{end}-{prepare}", "b"))
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            see(where, begun=state(conn))
            if prepare:
                await conn.tpc_prepare()
                see(where, prepared=state(conn))
            await (conn.tpc_commit() if end == "commit" else conn.tpc_rollback())
            see(where, finished=state(conn), notes=await rows(conn))
            await conn.execute("DELETE FROM notes WHERE id > 3")
            await conn.commit()


@scenario
async def two_phase_recovery(conn: Connection, dsn: str, see: See) -> None:
    """Prepared transactions are found again, and finished by another connection."""
    await conn.tpc_begin("left behind")
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    await conn.tpc_prepare()
    await conn.close()
    async with await type(conn).connect(dsn) as other:
        (xid,) = await other.tpc_recover()
        see(gtrid=xid.gtrid, format_id=xid.format_id, bqual=xid.bqual, owner=xid.owner)
        see(database=xid.database, xid=str(xid), state=state(other))
        see("a wrong xid", commit=await attempt(other.tpc_commit("wrong")), state=state(other))
        await other.rollback()
        await other.tpc_commit(xid)
        see("committed", notes=await rows(other), left=await other.tpc_recover())


@scenario
async def two_phase_wrong_states(conn: Connection, dsn: str, see: See) -> None:
    """What is not possible at each stage of a two-phase commit."""
    see("not begun", prepare=await attempt(conn.tpc_prepare()), commit=await attempt(conn.tpc_commit()))
    see("not begun", rollback=await attempt(conn.tpc_rollback()), state=state(conn))
    await conn.set_autocommit(True)
    see("in autocommit", begin=await attempt(conn.tpc_begin("x")))
    await conn.set_autocommit(False)
    await conn.execute("SELECT 1")
    see("in a transaction", begin=await attempt(conn.tpc_begin("x")))
    await conn.rollback()
    await conn.tpc_begin("wrong states")
    see("begun", plain_commit=await attempt(conn.commit()))
    see("begun", plain_rollback=await attempt(conn.rollback()))
    see("begun", begin=await attempt(conn.tpc_begin("y")))
    see("begun", commit_by_xid=await attempt(conn.tpc_commit("wrong states")))
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    await conn.tpc_prepare()
    see("prepared", prepare=await attempt(conn.tpc_prepare()))
    see("prepared", plain_commit=await attempt(conn.commit()))
    see("prepared", cancel_safe=await attempt(conn.cancel_safe()), cancel=attempt_now(conn.cancel))
    see("prepared", state=state(conn))
    see("prepared", query=await attempt(conn.execute("SELECT 1")), state_then=state(conn))
    await attempt(conn.execute("ROLLBACK"))
    see("after ROLLBACK", rollback=await attempt(conn.tpc_rollback()), state=state(conn))
    await conn.tpc_begin("fails")
    see("failed", query=await attempt(conn.execute("SELECT 1/0")))
    see("failed", prepare=await attempt(conn.tpc_prepare()), state=state(conn))
    see("failed", rollback=await attempt(conn.tpc_rollback()), state_then=state(conn))
    for xid in ((-1, "a", "b"), (1, "", "b"), (1, "x" * 100, "b"), (1, "a", "ü")):
        see(repr(xid), made=str(attempt_now(partial(conn.xid, *xid))))
