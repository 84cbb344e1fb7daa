"""TrioConnection does what psycopg's AsyncConnection does: each scenario runs on both.

The scenarios are in `same_as_asyncio/`. What they see on asyncio is what they have to see on Trio; a
failure lists what they saw differently.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import psycopg
import pytest
import same_as_asyncio
import trio
from psycopg.conninfo import make_conninfo
from same_as_asyncio.laboratory import (
    SCENARIOS,
    TYPES,
    Connection,
    Scenario,
    See,
    conduct,
    differences,
    fill,
)

from whitepool.postgres import TrioConnection, open_pool

for module in iter_modules(same_as_asyncio.__path__):
    import_module(f"same_as_asyncio.{module.name}")

TIMEOUT = 20
"""Seconds after which a scenario is taken to hang."""


@pytest.fixture
def laboratory(dsn: str) -> Iterator[str]:
    """A connection string whose schema is empty, but for the table `notes`."""
    yield make_conninfo(dsn, options="-c search_path=laboratory,public -c lock_timeout=5s")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS laboratory CASCADE")


async def run(scenario: Scenario, dsn: str, kind: type[Connection]) -> See:
    """Run a scenario on a new connection."""
    fill(dsn)
    connection = await kind.connect(dsn)
    try:
        return await conduct(scenario, connection, dsn)
    finally:
        await connection.close()


def run_on_asyncio(scenario: Scenario, dsn: str) -> See:
    see = asyncio.run(asyncio.wait_for(run(scenario, dsn, psycopg.AsyncConnection), TIMEOUT))
    if see.error:
        raise see.error  # else it might end in the same way on Trio, and show nothing
    return see


def check_same(expected: See, found: See) -> None:
    if differing := differences(expected, found):
        pytest.fail("\n".join(["Trio differs from asyncio in", *differing]), pytrace=False)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_same_as_asyncio(scenario: Scenario, laboratory: str) -> None:
    """What a scenario sees on Trio is what it sees on asyncio."""

    async def on_trio() -> See:
        with trio.fail_after(TIMEOUT):
            return await run(scenario, laboratory, TrioConnection)

    check_same(run_on_asyncio(scenario, laboratory), trio.run(on_trio))


@asynccontextmanager
async def pooled(dsn: str) -> AsyncIterator[TrioConnection[Any]]:
    async with open_pool(dsn, pool_size=1) as pool, pool.worker() as connection:
        yield connection


@pytest.mark.parametrize("scenario", TYPES, ids=lambda scenario: scenario.__name__)
def test_same_through_the_pool(scenario: Scenario, laboratory: str) -> None:
    """What a scenario of types sees on a pooled connection is what it sees on asyncio."""

    async def on_trio() -> See:
        with trio.fail_after(TIMEOUT):
            async with pooled(laboratory) as connection:
                return await conduct(scenario, connection, laboratory)

    expected = run_on_asyncio(scenario, laboratory)
    fill(laboratory)
    check_same(expected, trio.run(on_trio))
