"""What a stream leaves to the pipelines after it: nothing."""

from __future__ import annotations

from contextlib import suppress

import psycopg
import pytest
import trio
from connections import Connection, check_usable, closing, read_all
from psycopg import AsyncClientCursor, AsyncCursor, AsyncRawCursor

from whitepool.postgres import connect, open_pool


async def stream(connection: Connection) -> None:
    async with closing(connection.cursor().stream("SELECT generate_series(1, 3)")) as rows:
        await read_all(rows)


async def stream_left_early(connection: Connection) -> None:
    async with closing(connection.cursor().stream("SELECT generate_series(1, 3)")) as rows:
        await anext(rows)


async def failing_stream(connection: Connection) -> None:
    with suppress(psycopg.Error):
        async with closing(connection.cursor().stream("SELECT 1 / 0")) as rows:
            await read_all(rows)


async def cancelled_stream(connection: Connection) -> None:
    with trio.move_on_after(0.05):
        async with closing(connection.cursor().stream("SELECT pg_sleep(30)")) as rows:
            await read_all(rows)


STREAMS = [stream, stream_left_early, failing_stream, cancelled_stream]


async def pipeline(connection: Connection) -> None:
    async with connection.pipeline():
        first = await connection.execute("SELECT generate_series(1, 3)")
        second = await connection.execute("SELECT 4")
        assert await first.fetchall() == [(1,), (2,), (3,)]
        assert await second.fetchall() == [(4,)]


async def executemany(connection: Connection) -> None:
    cursor = connection.cursor()
    await cursor.executemany("SELECT generate_series(1, %s)", [(2,), (1,)], returning=True)
    assert await cursor.fetchall() == [(1,), (2,)]
    assert cursor.nextset()
    assert await cursor.fetchall() == [(1,)]


@pytest.mark.parametrize("autocommit", [True, False], ids=["autocommit", "in a transaction"])
@pytest.mark.parametrize("after", [pipeline, executemany])
@pytest.mark.parametrize("before", STREAMS)
async def test_a_pipeline_after_a_stream(
    dsn: str, before: object, after: object, autocommit: bool
) -> None:
    """libpq still returns single rows then, which a pipeline does not expect."""
    assert callable(before)
    assert callable(after)
    async with await connect(dsn, autocommit=autocommit) as connection:
        for _ in range(2):
            await before(connection)
            if connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR:
                await connection.rollback()
            await after(connection)
        await connection.rollback()
        await check_usable(connection)


async def test_a_pipeline_of_the_next_client(dsn: str) -> None:
    """The stream may have been another client's."""
    async with open_pool(dsn, pool_size=1, max_overflow=0, autocommit=True) as session:
        async with session.worker() as connection:
            await stream(connection)
        async with session.worker() as connection:
            await pipeline(connection)


@pytest.mark.parametrize("factory", [AsyncCursor, AsyncClientCursor, AsyncRawCursor])
async def test_a_stream_of_any_kind_of_cursor(dsn: str, factory: type[AsyncCursor[object]]) -> None:
    """Whatever `cursor_factory` made the cursor that streams."""
    async with await connect(dsn, autocommit=True, cursor_factory=factory) as connection:
        await stream(connection)
        connection.cursor_factory = AsyncCursor
        await pipeline(connection)


async def test_only_the_first_pipeline_after_a_stream_asks_the_server(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode is left once, and only where there was a stream."""
    async with await connect(dsn, autocommit=True) as connection:
        waits = 0
        wait = connection.wait

        async def counted(*arguments: object, **keywords: object) -> object:
            nonlocal waits
            waits += 1
            return await wait(*arguments, **keywords)  # type: ignore[arg-type]

        monkeypatch.setattr(connection, "wait", counted)
        counts = []
        for before in [None, stream, None]:
            if before is not None:
                await before(connection)
            waits = 0
            await pipeline(connection)
            counts.append(waits)
        assert counts == [counts[0], counts[0] + 1, counts[0]]
