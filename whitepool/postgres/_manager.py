"""How the pool treats a Postgres connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import psycopg
from psycopg import pq
from psycopg.generators import execute

from .._manager import WorkerManager
from .._options import PoolOptions
from .._pool import Pool
from .._session import Session
from ._connection import TrioConnection
from ._waiting import drive

Connection = TrioConnection[Any]

# Plain numbers: these are asked at each checkin, and an enum costs more than the question.
_IDLE = int(pq.TransactionStatus.IDLE)
_BUSY = int(pq.TransactionStatus.ACTIVE)
_GONE = int(pq.TransactionStatus.UNKNOWN)
_NO_PIPELINE = int(pq.PipelineStatus.OFF)


class ConnectionManager(WorkerManager[Connection]):
    """What goes for every connection, whoever opened it."""

    def is_alive(self, worker: Connection) -> bool:
        """Say whether the connection is open, with nothing under way: no query, copy or pipeline."""
        pgconn = worker.pgconn
        status = pgconn.transaction_status
        return status != _BUSY and status != _GONE and pgconn.pipeline_status == _NO_PIPELINE

    def needs_reset(self, worker: Connection) -> bool:
        """Say whether the connection is inside a transaction."""
        return worker.pgconn.transaction_status != _IDLE

    async def reset(self, worker: Connection) -> None:
        """Roll back."""
        await worker.rollback()

    async def check(self, worker: Connection) -> None:
        """Send an empty query, outside any transaction, and wait for the answer."""
        worker.pgconn.send_query(b"")
        # Not through the connection: where there is no answer, there is no query to cancel either.
        await drive(execute(worker.pgconn), worker.pgconn.socket)


class PostgresManager(ConnectionManager):
    """Opens connections to PostgreSQL for a pool.

    Args:
      conninfo: the connection string, as for `connect`.
      configure: an async callable that gets each new connection once, before anybody else. It must
          leave no transaction open.
      connect_keywords: as for `connect`.
    """

    def __init__(
        self,
        conninfo: str = "",
        *,
        configure: Callable[[Connection], Awaitable[None]] | None = None,
        **connect_keywords: Any,
    ) -> None:
        if not isinstance(conninfo, str):
            raise TypeError(f"conninfo must be a str, not {type(conninfo).__name__}")
        if configure is not None and not callable(configure):
            raise TypeError(f"configure must be an async callable, not {configure!r}")
        self._conninfo = conninfo
        self._configure = configure
        self._keywords: dict[str, Any] = connect_keywords

    async def create(self) -> Connection:
        connection: Connection = await TrioConnection.connect(self._conninfo, **self._keywords)
        if self._configure is not None:
            try:
                await self._configure(connection)
                if self.needs_reset(connection):
                    raise psycopg.ProgrammingError("configure left a transaction open")
            except BaseException:
                await connection.close()
                raise
        return connection


# A bare factory of connections is enough: the pool asks their class how to treat them.
TrioConnection.__worker_manager__ = ConnectionManager()


def open_pool(
    conninfo: str = "",
    *,
    configure: Callable[[Connection], Awaitable[None]] | None = None,
    **keywords: Any,
) -> AbstractAsyncContextManager[Session[Connection]]:
    """Open a pool of connections: `whitepool.open_pool` with a `PostgresManager`.

    The keywords are the options of `whitepool.Pool`, and those of `connect`.
    """
    options = {key: keywords.pop(key) for key in PoolOptions.__annotations__ if key in keywords}
    manager = PostgresManager(conninfo, configure=configure, **keywords)
    return Pool(manager, **options)._open(grace=0)
