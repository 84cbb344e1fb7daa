"""Pipelines."""

from __future__ import annotations

import psycopg

from .laboratory import Connection, See, attempt, describe, rows, scenario, state


@scenario
async def pipeline(conn: Connection, dsn: str, see: See) -> None:
    """A pipeline sends first and fetches later."""
    async with conn.pipeline() as pipeline:
        see(pipeline_status=conn.info.pipeline_status.name)
        first = await conn.execute("SELECT 1")
        second = await conn.execute("INSERT INTO notes VALUES (10, 'x') RETURNING id")
        third = conn.cursor()
        await third.execute("SELECT %s", (3,))
        see(first=await first.fetchall(), second=await second.fetchone())
        see("before the sync", status=conn.info.transaction_status.name)
        await pipeline.sync()
        see(third=await third.fetchall())
        see("after the sync", status=conn.info.transaction_status.name)
        await conn.commit()
        see("after the commit", status=conn.info.transaction_status.name)
    see("after its block", state=state(conn), notes=await rows(conn))


@scenario
async def pipeline_nested(conn: Connection, dsn: str, see: See) -> None:
    """A pipeline in a pipeline syncs, and only the outer one ends it."""
    await conn.set_autocommit(True)
    async with conn.pipeline() as outer:
        first = await conn.execute("SELECT 1")
        async with conn.pipeline() as inner:
            second = await conn.execute("SELECT 2")
            see("inside", same_object=inner is outer, first=await first.fetchall())
        see("outside", status=conn.info.pipeline_status.name, second=await second.fetchall())
    see(state=state(conn))


@scenario
async def pipeline_errors(conn: Connection, dsn: str, see: See) -> None:
    """An error in a pipeline aborts what follows, until it is synced."""
    await conn.set_autocommit(True)

    # Which of several calls brings the error is up to chance: it depends on when the answer arrives.
    async def failing() -> None:
        await conn.execute("SELECT 1/0")
        await (await conn.execute("SELECT 3")).fetchall()

    async with conn.pipeline() as pipeline:
        first = await conn.execute("SELECT 1")
        await pipeline.sync()
        see(failing=await attempt(failing()))
        await attempt(pipeline.sync())
        see("after the sync", status=conn.info.pipeline_status.name)
        fifth = await conn.execute("SELECT 5")
        see("after the sync", fifth=await fifth.fetchall(), first=await first.fetchall())
    see(state=state(conn))


@scenario
async def pipeline_error_at_its_end(conn: Connection, dsn: str, see: See) -> None:
    """An error that was not fetched is raised where the block ends."""

    async def work() -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1/0")
            await conn.execute("SELECT 2")

    async def work_nested() -> None:
        async with conn.pipeline():
            async with conn.pipeline():
                await conn.execute("SELECT 1/0")
            await conn.execute("SELECT 2")

    async def work_hidden() -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1/0")
            raise LookupError("the block's own")

    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        for block in (work, work_nested, work_hidden):
            where = f"{block.__name__}, autocommit {autocommit}"
            see(where, pipeline=await attempt(block()), state=state(conn))
            await conn.rollback()


@scenario
async def pipeline_in_a_transaction_and_reverse(conn: Connection, dsn: str, see: See) -> None:
    """Transactions in pipelines, pipelines in transactions, and errors in both."""

    async def inside(query: bytes) -> None:
        async with conn.transaction(), conn.pipeline():
            await conn.execute("INSERT INTO notes VALUES (10, 'x')")
            await conn.execute(query)

    async def outside(query: bytes) -> None:
        async with conn.pipeline(), conn.transaction():
            await conn.execute("INSERT INTO notes VALUES (11, 'x')")
            await conn.execute(query)

    async def nested(query: bytes) -> None:
        async with conn.pipeline(), conn.transaction():
            await conn.execute("INSERT INTO notes VALUES (12, 'x')")
            try:
                async with conn.transaction("inner"):
                    await conn.execute(query)
            except psycopg.Error as error:
                see("nested", caught=describe(error))
            await conn.execute("INSERT INTO notes VALUES (13, 'x')")

    for autocommit in (False, True):
        await conn.set_autocommit(autocommit)
        for block in (inside, outside, nested):
            for query in (b"SELECT 1", b"SELECT 1/0"):
                where = f"{block.__name__}, {query!r}, autocommit {autocommit}"
                see(where, block=await attempt(block(query)), state=state(conn))
                see(where, notes=await rows(conn))
                await conn.execute("DELETE FROM notes WHERE id > 3")
                await conn.commit()


@scenario
async def pipeline_with_rollback_and_commit(conn: Connection, dsn: str, see: See) -> None:
    """commit and rollback in a pipeline, also where it is aborted."""
    async with conn.pipeline() as pipeline:
        await conn.execute("INSERT INTO notes VALUES (10, 'x')")
        await conn.commit()
        await conn.execute("INSERT INTO notes VALUES (11, 'x')")
        await conn.rollback()
        await conn.execute("SELECT 1/0")
        see(sync=await attempt(pipeline.sync()), rollback=await attempt(conn.rollback()))
        see(set_read_only=await attempt(conn.set_read_only(True)))
        see(status=conn.info.transaction_status.name)
        cursor = await conn.execute("SHOW transaction_read_only")
        see(read_only=await cursor.fetchall())
    see("after its block", state=state(conn), notes=await rows(conn))


@scenario
async def pipeline_of_much_data(conn: Connection, dsn: str, see: See) -> None:
    """Far more in both directions than fits between the client and the server."""
    async with conn.pipeline():
        cursors = [await conn.execute("SELECT %s::text", ("x" * 10_000,)) for _ in range(300)]
        lengths = {len((await cursor.fetchone())[0]) for cursor in cursors}  # type: ignore[index]
    see(lengths=lengths, state=state(conn))


@scenario
async def pipeline_refusals(conn: Connection, dsn: str, see: See) -> None:
    """What can't be done in a pipeline."""

    async def several() -> None:
        async with conn.pipeline():
            await conn.execute("SELECT 1; SELECT 2")

    async def server_side() -> None:
        async with conn.pipeline(), conn.cursor("named") as cursor:
            await cursor.execute("SELECT generate_series(1, 3)")
            see("server side", rows=await cursor.fetchall())

    for work in (several, server_side):
        see(work.__name__, pipeline=await attempt(work()), state=state(conn))
        await conn.rollback()
