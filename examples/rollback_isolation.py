"""For tests: a pool whose clients commit as always, and that leaves nothing in the database.

It has one connection, in a transaction that is never committed. What a client commits becomes a
savepoint of it. When the pool is closed, the server rolls everything back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import psycopg

import whitepool
from whitepool.postgres import PostgresManager, PostgresSession, TrioConnection


@asynccontextmanager
async def open_isolated_pool(dsn: str, **keywords: Any) -> AsyncIterator[PostgresSession[Any]]:
    """Open such a pool. The keywords are those of `whitepool.postgres.PostgresManager`."""
    manager = IsolatedManager(dsn, connection_class=IsolatedConnection, **keywords)
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0) as session:
        async with session.worker() as connection:
            await connection.begin()
        yield cast("PostgresSession[Any]", session)


class IsolatedConnection(TrioConnection[Any]):
    """A connection on which a commit sets a new savepoint, and a rollback returns to the last one."""

    _in_transaction = False  # as the client sees it

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.cursor_factory = type("Cursor", (IsolatedCursor, self.cursor_factory), {})

    async def begin(self) -> None:
        if self.autocommit:  # without it, psycopg begins the transaction
            await self._send("BEGIN")
        await self._send("SAVEPOINT test")

    async def commit(self) -> None:
        await self._send("RELEASE test; SAVEPOINT test")
        self._in_transaction = False

    async def rollback(self) -> None:
        await self._send("ROLLBACK TO test")
        self._in_transaction = False

    async def _send(self, command: str) -> None:
        await psycopg.AsyncCursor(self).execute(command.encode())

    @asynccontextmanager
    async def transaction(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        is_inner, self._in_transaction = self._in_transaction, True
        try:
            async with super().transaction(*arguments, **keywords) as transaction:
                yield transaction
        finally:
            self._in_transaction = is_inner
        if not is_inner:
            await self.commit()

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[None]:
        """With autocommit, a statement is a transaction. Without, the first one begins it."""
        if self._in_transaction or not self.autocommit:
            self._in_transaction = True
            yield
        else:
            async with self.transaction():
                yield


class IsolatedCursor(psycopg.AsyncCursor[Any]):
    _conn: IsolatedConnection

    async def execute(self, *arguments: Any, **keywords: Any) -> Any:
        async with self._conn.statement():
            return await super().execute(*arguments, **keywords)

    async def executemany(self, *arguments: Any, **keywords: Any) -> None:
        async with self._conn.statement():
            await super().executemany(*arguments, **keywords)

    @asynccontextmanager
    async def copy(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        async with self._conn.statement(), super().copy(*arguments, **keywords) as copy:
            yield copy


class IsolatedManager(PostgresManager[Any, IsolatedConnection]):
    """Opens one connection, and no other: what is committed on a second one would stay."""

    _is_open = False

    async def create(self) -> IsolatedConnection:
        if self._is_open:
            raise RuntimeError("the connection of this test was lost, and what the test has written")
        self._is_open = True
        return await super().create()

    async def reset(self, worker: IsolatedConnection) -> None:
        await worker.rollback()
