"""Connections know the type of their rows, where they are told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from psycopg import AsyncCursor
from psycopg.rows import DictRow, TupleRow, class_row, dict_row
from typing_extensions import assert_type

import whitepool
from whitepool.postgres import (
    PostgresManager,
    PostgresSession,
    TrioConnection,
    connect,
    open_pool,
)
from whitepool.telemetry import instrument

Session = whitepool.Session


@dataclass
class Account:
    id: int


async def one_connection() -> None:
    connection = await connect("dbname=shop", autocommit=True)
    assert_type(connection, TrioConnection[TupleRow])
    assert_type(await (await connection.execute("SELECT 1")).fetchone(), TupleRow | None)
    # pyright wants to be told beforehand, as with psycopg's own classes.
    dicts = await TrioConnection[DictRow].connect("dbname=shop", row_factory=dict_row)
    assert_type(dicts, TrioConnection[DictRow])
    assert_type(dicts.cursor(row_factory=class_row(Account)), AsyncCursor[Account])


async def pools() -> None:
    # Its row factory is one of many keywords: the rows may be anything.
    async with open_pool("dbname=shop", pool_size=2, row_factory=dict_row) as session:
        assert_type(session, PostgresSession[TrioConnection[Any]])
        async with session.worker() as connection:
            cursor = connection.cursor(row_factory=class_row(Account))
            assert_type(await cursor.fetchall(), list[Account])
        async with instrument(session).connection(timeout=1) as committing:
            assert_type(committing, TrioConnection[Any])
    async with whitepool.open_pool(PostgresManager("dbname=shop")) as plain:
        assert_type(plain, Session[TrioConnection[Any]])


async def a_service(nursery: trio.Nursery) -> None:
    # Trio does not know what a task reports, so it has to be said.
    pool = whitepool.Pool(PostgresManager("dbname=shop"))
    session: PostgresSession[TrioConnection[Any]] = await nursery.start(pool.run_service)
    async with session.connection() as connection:
        assert_type(connection, TrioConnection[Any])


def credentials() -> str:
    return "dbname=shop password=fresh"


async def slow_credentials() -> str:
    return credentials()


class Vault:
    async def __call__(self) -> str:
        return credentials()

    def ask(self, role: str) -> str:
        return role


async def pools_that_ask_for_their_conninfo() -> None:
    async with open_pool(credentials, autocommit=True) as session:
        assert_type(session, PostgresSession[TrioConnection[Any]])
    async with open_pool(slow_credentials) as session:
        assert_type(session, PostgresSession[TrioConnection[Any]])
    open_pool(Vault())
    open_pool(lambda: "dbname=shop")
    open_pool(lambda: slow_credentials())
    open_pool(partial(Vault().ask, "keeper"))
    PostgresManager(credentials)
    PostgresManager(conninfo=slow_credentials)


async def pools_of_typed_connections() -> None:
    async with whitepool.open_pool(lambda: connect("dbname=shop")) as tuples:
        assert_type(tuples, Session[TrioConnection[TupleRow]])
    rows_are_accounts = partial(
        TrioConnection[Account].connect, "dbname=shop", row_factory=class_row(Account)
    )
    async with whitepool.open_pool(rows_are_accounts) as accounts:
        assert_type(accounts, Session[TrioConnection[Account]])
        async with accounts.worker() as connection:
            assert_type(await (await connection.execute("TABLE account")).fetchone(), Account | None)


def mistakes() -> None:
    open_pool(1)  # type: ignore[arg-type]
    open_pool(reset="maybe")  # type: ignore[arg-type]
    open_pool(configure=print)  # type: ignore[arg-type]  # not async
    open_pool(Vault().ask)  # type: ignore[arg-type]  # wants an argument
    open_pool(Vault)  # type: ignore[arg-type]  # returns no str
    open_pool(slow_credentials())  # type: ignore[arg-type]  # is no callable
    PostgresManager(lambda: 5432)  # type: ignore[arg-type]
