"""Types of a database, registered with the connections of a pool."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

import psycopg
import pytest
import trio
from connections import Connection, ask
from onlooker import Onlooker
from pgvector import Vector
from pgvector.psycopg import register_vector_async
from psycopg.adapt import AdaptersMap
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.enum import EnumInfo, register_enum
from timing import until

import whitepool
from whitepool.postgres import connect, open_pool


class Mood(Enum):
    SAD = 1
    HAPPY = 2


class Lookups:
    """Counts the queries that look for types."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = TypeInfo._fetch_async.__func__  # type: ignore[attr-defined]

        async def fetch(cls: Any, connection: Any, name: str) -> Any:
            self.count += 1
            return await original(cls, connection, name)

        monkeypatch.setattr(TypeInfo, "_fetch_async", classmethod(fetch))


@pytest.fixture(autouse=True)
def types(onlooker: Onlooker) -> Iterator[None]:
    onlooker.do("CREATE EXTENSION IF NOT EXISTS vector")
    onlooker.do("CREATE TYPE mood AS ENUM ('SAD', 'HAPPY'); CREATE TYPE spot AS (x int, y text)")
    yield
    onlooker.do("DROP TYPE IF EXISTS mood; DROP TYPE spot; DROP EXTENSION vector")


async def learn_types(connection: Connection) -> None:
    mood = await EnumInfo.fetch(connection, "mood")
    spot = await CompositeInfo.fetch(connection, "spot")
    assert mood is not None and spot is not None
    register_enum(mood, connection, Mood)
    register_composite(spot, connection)
    await register_vector_async(connection)


async def check_types(connection: Connection) -> None:
    """Values of each type go to the server, and come back."""
    cursor = connection.cursor(row_factory=dict_row)
    for binary in (False, True):
        query = "SELECT %s AS mood, ARRAY['SAD'::mood] AS moods, (1, 'a')::spot AS spot, %s AS vector"
        await cursor.execute(query, (Mood.HAPPY, Vector([1, 2])), binary=binary)
        row = await cursor.fetchone()
        assert row is not None
        assert (row["mood"], row["moods"]) == (Mood.HAPPY, [Mood.SAD])
        assert (row["spot"].x, row["spot"].y) == (1, "a")
        assert row["vector"] == Vector([1, 2])


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("reset", ["rollback", "session"])
@pytest.mark.parametrize("rows", [None, dict_row])
async def test_types_in_configure(
    dsn: str, autocommit: bool, reset: Literal["rollback", "session"], rows: Any
) -> None:
    """They are there for each client, and what looks for them leaves no transaction open."""
    async with open_pool(
        dsn,
        pool_size=1,
        max_overflow=0,
        autocommit=autocommit,
        reset=reset,
        row_factory=rows,
        configure=learn_types,
    ) as session:
        for _ in range(3):
            async with session.connection() as connection:
                await check_types(connection)
        assert session.statistics().started == 1


async def test_types_that_are_shared(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection asks for them, and those of the pool, new or reset, have them without asking."""
    async with await connect(dsn, autocommit=True) as connection:
        await learn_types(connection)
        shared = connection.adapters
    lookups = Lookups(monkeypatch)
    async with open_pool(dsn, pool_size=2, context=shared, reset="session") as session:
        for _ in range(3):
            async with session.connection() as one, session.connection() as other:
                await check_types(one)
                await check_types(other)
    assert lookups.count == 0


async def test_a_map_of_adapters_is_shared_and_not_written_to(dsn: str) -> None:
    """What a client registers with its connection, no other connection has."""
    shared = AdaptersMap(psycopg.adapters)
    async with open_pool(dsn, pool_size=2, context=shared, reset="session") as session:
        async with session.connection() as one, session.connection() as other:
            await learn_types(one)
            assert await ask(one, "SELECT 'SAD'::mood") is Mood.SAD
            assert await ask(other, "SELECT 'SAD'::mood") == "SAD"
        async with session.connection() as one, session.connection() as other:
            assert await ask(one, "SELECT 'SAD'::mood") == "SAD"
            assert await ask(other, "SELECT 'SAD'::mood") == "SAD"
    assert "mood" not in [info.name for info in shared.types]


async def test_a_type_that_is_made_anew(dsn: str, onlooker: Onlooker) -> None:
    """Open connections don't know it; new ones do, which `retire_all` brings."""
    async with open_pool(dsn, pool_size=1, max_overflow=0, configure=learn_types) as session:
        onlooker.do("DROP TYPE mood; CREATE TYPE mood AS ENUM ('SAD', 'HAPPY')")
        async with session.connection() as connection:
            assert await ask(connection, "SELECT 'SAD'::mood") == "SAD"
        session.retire_all()
        await until(lambda: session.statistics().started == 2)
        async with session.connection() as connection:
            assert await ask(connection, "SELECT 'SAD'::mood") is Mood.SAD


@pytest.mark.parametrize(
    ("missing", "said"),
    [("mood", "Is the requested enum available"), ("vector", "vector type not found")],
)
async def test_a_type_that_does_not_exist(
    dsn: str, onlooker: Onlooker, missing: str, said: str
) -> None:
    """The error is quoted after `start_timeout`. A type that is created until then is found."""
    kind = "EXTENSION" if missing == "vector" else "TYPE"
    onlooker.do(f"DROP {kind} {missing}")

    async def learn(connection: Connection) -> None:
        if missing == "vector":
            await register_vector_async(connection)
        else:
            register_enum(await EnumInfo.fetch(connection, "mood"), connection, Mood)  # type: ignore[arg-type]

    with pytest.raises(whitepool.PoolStartError, match=said):
        async with open_pool(dsn, configure=learn, start_timeout=1):
            pass
    async with trio.open_nursery() as nursery:

        async def create() -> None:
            await trio.sleep(0.1)
            how = " AS ENUM ('SAD', 'HAPPY')" if missing == "mood" else ""
            onlooker.do(f"CREATE {kind} {missing}{how}")

        nursery.start_soon(create)
        async with open_pool(dsn, configure=learn, pool_size=1) as session:
            assert session.statistics().start_failures > 0
