"""`Load` of `examples/bulk.py`, and what the how-to page says of COPY."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
import trio
from bulk import Load
from connections import backend, check_usable
from onlooker import Onlooker
from timing import alarm
from workshop import check_books

from whitepool.postgres import PostgresSession, open_pool

ROWS = [(number, number / 7) for number in range(50_000)]
PROGRESS = "SELECT tuples_processed FROM pg_stat_progress_copy WHERE pid = %s"


@pytest.fixture(autouse=True)
def table(onlooker: Onlooker) -> Iterator[None]:
    onlooker.do("CREATE TABLE reading (sensor int, value float)")
    yield
    onlooker.do("DROP TABLE reading")


async def check_only_connection(session: PostgresSession) -> int:
    """The one connection was not replaced, and is whole; returns its process on the server."""
    async with session.connection() as connection:
        await check_usable(connection)
    assert session.statistics().started == 1
    check_books(session)
    return backend(connection)


async def test_a_load_and_what_the_server_says_of_it(dsn: str, onlooker: Onlooker) -> None:
    """While a load waits for more rows, other tasks run, and the server says how far it is."""
    load = Load()
    async with open_pool(dsn, pool_size=1, max_overflow=0) as session:
        process = await check_only_connection(session)

        def rows() -> Iterator[tuple[int, float]]:
            for row in ROWS:
                if load.sent == 40_000:
                    with alarm(5):
                        while not (stored := onlooker.ask(PROGRESS, process)):
                            pass  # what has been sent is on its way
                    assert stored <= 40_000
                yield row

        seen = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run, session, rows())
            while load.sent < len(ROWS):
                seen.append(load.sent)
                await trio.lowlevel.checkpoint()
        assert load.sent == len(ROWS)
        assert len(set(seen)) > 3
        await check_only_connection(session)
    assert onlooker.ask("SELECT count(*) FROM reading") == len(ROWS)
    assert not load.scope.cancelled_caught


@pytest.mark.parametrize("by_deadline", [True, False])
async def test_a_load_that_is_cancelled(dsn: str, onlooker: Onlooker, by_deadline: bool) -> None:
    """The server keeps none of its rows, and the next client gets the same connection."""
    load = Load()
    async with open_pool(dsn, pool_size=1, max_overflow=0) as session:
        process = await check_only_connection(session)

        def rows() -> Iterator[tuple[int, float]]:
            for row in ROWS:
                if load.sent == 30_000:
                    if by_deadline:
                        load.scope.deadline = 0
                    else:
                        load.scope.cancel()
                yield row

        with trio.fail_after(5):
            await load.run(session, rows())
        assert load.scope.cancelled_caught
        assert 30_000 <= load.sent < len(ROWS)
        assert await check_only_connection(session) == process
    assert onlooker.ask("SELECT count(*) FROM reading") == 0


async def test_a_row_that_is_refused(dsn: str, onlooker: Onlooker) -> None:
    """The server's error is raised, which names the line, and nothing is kept."""
    load = Load()
    async with open_pool(dsn, pool_size=1, max_overflow=0) as session:
        process = await check_only_connection(session)
        bad = [*ROWS[:100], (2**40, 0.0), *ROWS]
        with pytest.raises(psycopg.errors.NumericValueOutOfRange) as caught:
            await load.run(session, bad)
        assert (caught.value.diag.context or "").startswith("COPY reading, line 101")
        assert await check_only_connection(session) == process
    assert onlooker.ask("SELECT count(*) FROM reading") == 0
