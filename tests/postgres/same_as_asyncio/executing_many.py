"""`executemany`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .laboratory import Connection, See, attempt, rows, scenario, state


@scenario
async def executemany(conn: Connection, dsn: str, see: See) -> None:
    """executemany with and without returning, with nothing, with a generator."""
    cursor = conn.cursor()
    insert = "INSERT INTO notes VALUES (%s, %s) RETURNING id"
    await cursor.executemany(insert, [(10, "a"), (11, "b")])
    see(rowcount=cursor.rowcount, one=await attempt(cursor.fetchone()), state=state(conn))
    await cursor.executemany(insert, ((number, "c") for number in range(20, 23)), returning=True)
    while True:
        see("returning", rowcount=cursor.rowcount, rows=await cursor.fetchall())
        if not cursor.nextset():
            break
    await cursor.executemany(insert, [])
    see("with nothing", rowcount=cursor.rowcount, one=await attempt(cursor.fetchone()))
    await cursor.executemany(insert, [], returning=True)
    see("returning nothing", rowcount=cursor.rowcount, one=await attempt(cursor.fetchone()))
    see(notes=await rows(conn), state_then=state(conn))


@scenario
async def executemany_errors(conn: Connection, dsn: str, see: See) -> None:
    """executemany stops at a row that the server refuses, and at one that can't be adapted."""
    insert = "INSERT INTO notes VALUES (%s, %s)"

    def broken() -> Iterator[tuple[object, ...]]:
        yield 60, "x"
        raise LookupError("the source ran dry")

    for autocommit in (False, True):
        await conn.rollback()
        await conn.set_autocommit(autocommit)
        sources: dict[str, Iterable[tuple[object, ...]]] = {
            "a row that is refused": [(50, "x"), (1, "taken"), (51, "y")],
            "a row that is not adaptable": [(52, "x"), (53, object), (54, "y")],
            "a row that is too short": [(55, "x"), (56,)],
            "a source that fails": broken(),
        }
        for name, source in sources.items():
            where = f"{name}, autocommit {autocommit}"
            see(where, executemany=await attempt(conn.cursor().executemany(insert, source)))
            see(where, state=state(conn))
            await conn.rollback()
        where = f"wrong statement, autocommit {autocommit}"
        see(where, executemany=await attempt(conn.cursor().executemany("SELEKT", [()])))
        see(where, state=state(conn))
        await conn.rollback()
        see(f"autocommit {autocommit}", notes=await rows(conn))


@scenario
async def executemany_of_many(conn: Connection, dsn: str, see: See) -> None:
    """executemany of more than what fits between the client and the server."""
    cursor = conn.cursor()
    await cursor.executemany(
        "INSERT INTO notes VALUES (%s, %s)", [(number, "x" * 3000) for number in range(100, 1100)]
    )
    see(inserted=await rows(conn, "SELECT count(*), sum(length(note)) FROM notes"))
    await cursor.executemany(
        "SELECT %s::text", [("y" * 3000,) for number in range(1000)], returning=True
    )
    total = 0
    while True:
        total += len((await cursor.fetchone())[0])  # type: ignore[index]
        if not cursor.nextset():
            break
    see(total=total, state=state(conn))


@scenario
async def executemany_in_a_pipeline(conn: Connection, dsn: str, see: See) -> None:
    """executemany uses a pipeline that is there already."""
    async with conn.pipeline() as pipeline, conn.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO notes VALUES (%s, 'p') RETURNING id", [(10,), (11,)], returning=True
        )
        see(first=await cursor.fetchall(), another=cursor.nextset(), second=await cursor.fetchall())
        await cursor.executemany("INSERT INTO notes VALUES (%s, 'p')", [(12,), (10,)])
        see(sync=await attempt(pipeline.sync()))
    see(state=state(conn))  # inside, it depends on how much of the answer has arrived
    await conn.rollback()
    see(notes=await rows(conn))
