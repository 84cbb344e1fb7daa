"""Transactions: implicit ones, blocks, and what is set for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import psycopg

from .laboratory import (
    Connection,
    See,
    attempt,
    attempt_now,
    block_status,
    rows,
    scenario,
    state,
)


@scenario
async def implicit_transactions(conn: Connection, dsn: str, see: See) -> None:
    """Without autocommit the first query begins a transaction."""
    see("at first", state=state(conn))
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    see("after a query", state=state(conn))
    await conn.rollback()
    see("after the rollback", state=state(conn), notes=await rows(conn))
    await conn.commit()
    await conn.commit()
    await conn.rollback()
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    await conn.commit()
    await attempt(conn.execute("SELECT 1/0"))
    see("after an error", state=state(conn), query=await attempt(conn.execute("SELECT 1")))
    see("after an error", commit=await attempt(conn.commit()))
    see("after the commit", state=state(conn), notes=await rows(conn))


@scenario
async def transactions(conn: Connection, dsn: str, see: See) -> None:
    """Blocks commit, roll back at exceptions, nest, and can be forced to roll back."""
    for autocommit in (True, False):
        where = f"autocommit {autocommit}"
        await conn.set_autocommit(autocommit)
        async with conn.transaction() as outer:
            see(where, status=block_status(outer), savepoint=outer.savepoint_name)
            see(where, state_inside=state(conn))
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            async with conn.transaction() as inner:
                see(where, inner_savepoint=inner.savepoint_name)
                see(where, connection=inner.connection is conn)
                await conn.execute("INSERT INTO notes VALUES (11, 'x')")
                async with conn.transaction("named", force_rollback=True) as forced:
                    see(where, forced_savepoint=forced.savepoint_name)
                    await conn.execute("INSERT INTO notes VALUES (12, 'x')")
            see(where, inner_status=block_status(inner), forced_status=block_status(forced))
            see(where, outer_status=block_status(outer))
        see(where, status_then=block_status(outer), state_then=state(conn), notes=await rows(conn))
        await conn.rollback()
        async with conn.transaction():
            await conn.execute("DELETE FROM notes WHERE id > 3")


@scenario
async def transactions_left_by_exceptions(conn: Connection, dsn: str, see: See) -> None:
    """An exception rolls back and goes through; Rollback ends the block it names."""
    made: list[psycopg.AsyncTransaction] = []

    async def fail(where: str, error: Callable[[], Exception]) -> None:
        made.clear()
        async with conn.transaction() as outer:
            made.append(outer)
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            async with conn.transaction() as inner:
                made.append(inner)
                await conn.execute("INSERT INTO notes VALUES (11, 'x')")
                raise error()
            see(where, after_the_inner_block=True)

    exceptions: dict[str, Callable[[], Exception]] = {
        "LookupError": lambda: LookupError("wrong"),
        "Rollback": lambda: psycopg.Rollback(),
        "Rollback of the inner block": lambda: psycopg.Rollback(made[1]),
        "Rollback of the outer block": lambda: psycopg.Rollback(made[0]),
    }
    for where, error in exceptions.items():
        see(where, block=await attempt(fail(where, error)))
        see(where, statuses=[block_status(block) for block in made], state=state(conn))
        see(where, notes=await rows(conn))
        await conn.execute("DELETE FROM notes WHERE id > 3")
        await conn.commit()
    for query in (b"SELECT 1/0", b"COMMIT"):
        see(repr(query), block=await attempt(_execute_in_a_block(conn, query)), state=state(conn))


async def _execute_in_a_block(conn: Connection, query: bytes) -> None:
    async with conn.transaction():
        await conn.execute(query)


@scenario
async def an_error_caught_in_a_savepoint(conn: Connection, dsn: str, see: See) -> None:
    """The outer block goes on after an error in an inner one, and not without an inner one."""

    async def caught_inside() -> None:
        async with conn.transaction():
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            see("caught in the block", query=await attempt(conn.execute("SELECT 1/0")))

    async with conn.transaction():
        await conn.execute("INSERT INTO notes VALUES (9, 'x')")
        see("in an inner block", block=await attempt(_execute_in_a_block(conn, b"SELECT 1/0")))
        see("in an inner block", state=state(conn))
        await conn.execute("INSERT INTO notes VALUES (11, 'x')")
    see("caught in the block", block=await attempt(caught_inside()), state=state(conn))
    see(notes=await rows(conn))


@scenario
async def transactions_out_of_order(conn: Connection, dsn: str, see: See) -> None:
    """Blocks that are left in the wrong order are an error."""
    for error in (None, LookupError("wrong")):
        first, second = conn.transaction(), conn.transaction("second")
        await first.__aenter__()
        await second.__aenter__()
        how = (type(error) if error else None, error, None)
        where = f"left by {error!r}"
        see(where, first=await attempt(first.__aexit__(*how)), state=state(conn))
        see(where, second=await attempt(second.__aexit__(*how)), state_then=state(conn))
        see(where, rollback=await attempt(conn.rollback()), state_at_last=state(conn))


@scenario
async def what_is_forbidden_in_a_transaction(conn: Connection, dsn: str, see: See) -> None:
    """commit, rollback and the attributes are forbidden inside, and a block is used once."""
    async with conn.transaction() as block:
        see(commit=await attempt(conn.commit()), rollback=await attempt(conn.rollback()))
        see(set_autocommit=await attempt(conn.set_autocommit(True)))
        see(set_read_only=await attempt(conn.set_read_only(True)))
        see(tpc_begin=await attempt(conn.tpc_begin("x")), state=state(conn))
    see("entered again", block=await attempt(block.__aenter__()), state=state(conn))


@scenario
async def a_block_in_an_open_transaction(conn: Connection, dsn: str, see: See) -> None:
    """A block inside an implicit transaction is a savepoint only."""
    await conn.execute("INSERT INTO notes VALUES (10, 'x')")
    async with conn.transaction() as block:
        await conn.execute("INSERT INTO notes VALUES (11, 'x')")
    see(savepoint=block.savepoint_name, state=state(conn), notes=await rows(conn))
    await conn.rollback()
    see("after the rollback", notes=await rows(conn))


@scenario
async def a_commit_that_fails(conn: Connection, dsn: str, see: See) -> None:
    """A deferred constraint fails at the commit, of all kinds."""
    await conn.execute("CREATE TABLE late (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    await conn.commit()
    insert = b"INSERT INTO late VALUES (1), (1)"
    await conn.execute(insert)
    see("by method", commit=await attempt(conn.commit()), state=state(conn))
    see("by a block", block=await attempt(_execute_in_a_block(conn, insert)), state=state(conn))
    see(late=await rows(conn, "SELECT * FROM late"))


@scenario
async def a_block_on_a_failed_transaction(conn: Connection, dsn: str, see: See) -> None:
    """A block can't be entered in a transaction that has failed."""
    await attempt(conn.execute("SELECT 1/0"))
    see(block=await attempt(_execute_in_a_block(conn, b"SELECT 1")), state=state(conn))
    # Old releases of psycopg take themselves to be inside the block.
    see("then", rollback=await attempt(conn.rollback()), notes=await attempt(rows(conn)))
    see("then", state=state(conn))


@scenario
async def isolation(conn: Connection, dsn: str, see: See) -> None:
    """The attributes of transactions are used for each, and only between them changed."""
    await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    await conn.set_read_only(True)
    await conn.set_deferrable(True)
    see(isolation_level=conn.isolation_level, read_only=conn.read_only)
    see(deferrable=conn.deferrable, autocommit=conn.autocommit)
    shown = "SELECT current_setting('transaction_' || x) FROM unnest(%s::text[]) x"
    names = ["isolation", "read_only", "deferrable"]
    see(on_the_server=await (await conn.execute(shown, (names,))).fetchall())
    for set_it in (conn.set_autocommit, conn.set_read_only, conn.set_deferrable):
        see("in a transaction", **{set_it.__name__: await attempt(set_it(False))})
    see("in a transaction", set_isolation_level=await attempt(conn.set_isolation_level(None)))
    see(writing=await attempt(conn.execute("INSERT INTO notes VALUES (10, 'x')")))
    await conn.rollback()
    see(no_such_level=await attempt(conn.set_isolation_level(99)))  # type: ignore[arg-type]
    await conn.set_isolation_level(None)
    await conn.set_read_only(None)
    await conn.set_deferrable(None)
    async with conn.transaction():
        see("the defaults", on_the_server=await (await conn.execute(shown, (names,))).fetchall())
    see(state=state(conn))


@scenario
async def attributes_are_set_by_methods(conn: Connection, dsn: str, see: See) -> None:
    """Setting an attribute directly is refused, as that may have to wait."""
    for name in ("autocommit", "isolation_level", "read_only", "deferrable"):
        see(name, set=attempt_now(partial(setattr, conn, name, True)), value=getattr(conn, name))
