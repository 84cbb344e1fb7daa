"""Connections know the type of their rows, where they are told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from psycopg import AsyncCursor
from psycopg.rows import DictRow, Row, TupleRow, class_row, dict_row
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
    dicts = await connect("dbname=shop", row_factory=dict_row)
    assert_type(dicts, TrioConnection[DictRow])
    # For the class method, pyright wants to be told beforehand, as with psycopg's own classes.
    assert_type(
        await TrioConnection[DictRow].connect("dbname=shop", row_factory=dict_row),
        TrioConnection[DictRow],
    )
    assert_type(dicts.cursor(row_factory=class_row(Account)), AsyncCursor[Account])


async def pools() -> None:
    async with open_pool("dbname=shop", pool_size=2, autocommit=True) as session:
        assert_type(session, PostgresSession[TupleRow])
        async with session.worker() as connection:
            assert_type(await (await connection.execute("SELECT 1")).fetchone(), TupleRow | None)
            cursor = connection.cursor(row_factory=class_row(Account))
            assert_type(await cursor.fetchall(), list[Account])
    async with open_pool("dbname=shop", row_factory=dict_row) as dicts:
        assert_type(dicts, PostgresSession[dict[str, Any]])
        async with instrument(dicts).connection(timeout=1) as committing:
            assert_type(committing, TrioConnection[dict[str, Any]])
            row = await (await committing.execute("TABLE account")).fetchone()
            assert_type(row, dict[str, Any] | None)
    async with open_pool("dbname=shop", row_factory=class_row(Account)) as accounts:
        assert_type(accounts, PostgresSession[Account])
        resource = await accounts.block_checkout()
        assert_type(resource.get(), TrioConnection[Account])
        async for account in await resource.get().execute("TABLE account"):
            assert_type(account, Account)
    async with whitepool.open_pool(PostgresManager("dbname=shop", row_factory=dict_row)) as plain:
        assert_type(plain, Session[TrioConnection[DictRow]])


class Traced(TrioConnection[Row]):
    trace: str


async def pools_of_a_class_of_their_own() -> None:
    async with open_pool("dbname=shop", connection_class=Traced[TupleRow]) as session:
        assert_type(session, PostgresSession[Any, Traced[TupleRow]])
        async with session.connection() as connection:
            assert_type(connection.trace, str)
            assert_type(await (await connection.execute("SELECT 1")).fetchone(), TupleRow | None)
    manager = PostgresManager("", connection_class=Traced[DictRow], row_factory=dict_row)
    async with whitepool.open_pool(manager) as dicts:
        assert_type(dicts, Session[Traced[DictRow]])


async def greet(connection: TrioConnection[Any]) -> None: ...


async def greet_traced(connection: Traced[TupleRow]) -> None: ...


def callables_for_connections() -> None:
    open_pool(configure=greet, reset=greet)
    open_pool(configure=greet, row_factory=dict_row)
    open_pool(configure=greet_traced, connection_class=Traced[TupleRow])


async def a_service(nursery: trio.Nursery) -> None:
    # Trio does not know what a task reports, so it has to be said.
    pool = whitepool.Pool(PostgresManager("dbname=shop"))
    session: PostgresSession[Any] = await nursery.start(pool.run_service)
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
        assert_type(session, PostgresSession[TupleRow])
    async with open_pool(slow_credentials) as session:
        assert_type(session, PostgresSession[TupleRow])
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


async def mistakes() -> None:
    open_pool(1)  # type: ignore[call-overload]
    open_pool(reset="maybe")  # type: ignore[call-overload]
    open_pool(configure=print)  # type: ignore[arg-type]  # not async
    open_pool(configure=greet_traced)  # type: ignore[arg-type]  # wants another class
    open_pool(connection_class=Vault)  # type: ignore[type-var]  # no connection
    open_pool(Vault().ask)  # type: ignore[arg-type]  # wants an argument
    open_pool(Vault)  # type: ignore[arg-type]  # returns no str
    open_pool(slow_credentials())  # type: ignore[call-overload]  # is no callable
    open_pool(pool_sise=2)  # type: ignore[call-overload]
    open_pool(pool_size="2")  # type: ignore[call-overload]
    open_pool(strategy="random")  # type: ignore[call-overload]
    open_pool(pasword="x")  # type: ignore[call-overload]
    open_pool(port=5432.0)  # type: ignore[call-overload]
    open_pool(autocommit="no")  # type: ignore[call-overload]
    PostgresManager(lambda: 5432)  # type: ignore[arg-type]
    PostgresManager(pool_size=2)  # type: ignore[call-overload]  # is for open_pool
    await connect(pasword="x")  # type: ignore[call-arg]
    await connect(port=5432.0)  # type: ignore[arg-type]
    await connect(row_factory=dict)  # type: ignore[arg-type]
