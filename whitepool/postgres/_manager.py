"""How a pool treats a Postgres connection: opens, checks, resets and configures it.

The pool calls `is_alive` and `needs_reset` at each checkin, so they read what libpq knows already.
The rest happens in the worker's own task. If it takes too long there, the pool cancels it, and closes
the connection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Union

import psycopg
from psycopg import pq
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap
from psycopg.generators import execute

from .._errors import PoolStartError
from .._manager import WorkerManager
from ._cancelling import closing_if_cancelled
from ._connecting import is_final, validate
from ._connection import TrioConnection
from ._waiting import drive

Connection = TrioConnection[Any]
Configure = Callable[[Connection], Awaitable[None]]
Reset = Union[Literal["rollback", "session"], Configure]

# Plain numbers, because they are compared at each checkin, and comparing enums costs more.
_IDLE = int(pq.TransactionStatus.IDLE)
_ACTIVE = int(pq.TransactionStatus.ACTIVE)
_UNKNOWN = int(pq.TransactionStatus.UNKNOWN)
_NO_PIPELINE = int(pq.PipelineStatus.OFF)

# What DISCARD ALL does, and RESET ROLE. DISCARD ALL has to be sent alone; its parts can be sent in one
# message with the rest. The transaction does not take its properties from the session's defaults, as
# the client may have changed those: a deferrable one may have to wait for others to end. Don't set READ
# WRITE: it fails on a standby.
_DISCARD_SESSION = b"""
    BEGIN ISOLATION LEVEL READ COMMITTED NOT DEFERRABLE;
    CLOSE ALL;
    SET SESSION AUTHORIZATION DEFAULT;
    RESET ROLE;
    RESET ALL;
    DEALLOCATE ALL;
    UNLISTEN *;
    SELECT pg_catalog.pg_advisory_unlock_all();
    DISCARD PLANS;
    DISCARD TEMP;
    DISCARD SEQUENCES;
    COMMIT
"""

# What a client can set on a connection: as an attribute, or by a method such as `set_autocommit`.
_CLIENT_SIDE = (
    "_autocommit",
    "_isolation_level",
    "_read_only",
    "_deferrable",
    "_begin_statement",
    "row_factory",
    "cursor_factory",
    "server_cursor_factory",
    "prepare_threshold",
    "prepared_max",
)


class ConnectionManager(WorkerManager[Connection]):
    """What every connection needs, also one that a bare factory has opened."""

    def is_alive(self, worker: Connection) -> bool:
        """Return whether the connection is open, and no query, copy or pipeline is under way.

        A two-phase transaction counts as one that is: only its client knows how it should end.
        """
        pgconn = worker.pgconn
        status = pgconn.transaction_status
        return (
            status != _ACTIVE
            and status != _UNKNOWN
            and pgconn.pipeline_status == _NO_PIPELINE
            and worker._tpc is None
        )

    def needs_reset(self, worker: Connection) -> bool:
        """Return whether the connection is in a transaction, or is still being used.

        It may be, after its checkin, by a `transaction()` block that was not left, or by a generator
        that was not closed, such as `notifies`, which holds the lock.
        """
        return bool(
            worker.pgconn.transaction_status != _IDLE
            or worker._num_transactions
            or worker.lock.locked()
        )

    async def reset(self, worker: Connection) -> None:
        """Roll back, once no other task uses the connection any more.

        Raises `psycopg.ProgrammingError` if a block has not been left: its task could still run
        statements, and they would be part of the next client's transaction.
        """
        if worker._num_transactions:
            raise psycopg.ProgrammingError("a transaction() block has not been left")
        async with worker.lock:
            pass
        if worker.pgconn.transaction_status == _IDLE:
            return
        await _run(worker, b"ROLLBACK")
        # As psycopg does at a rollback: statements may have been prepared in the transaction, or for
        # tables that were created in it.
        worker._prepared.clear()
        async with worker.lock:
            await drive(worker._prepared.maintain_gen(worker), worker.pgconn.socket)

    async def check(self, worker: Connection) -> None:
        """Send an empty query, which starts no transaction, and wait for the answer."""
        await _run(worker, b"")


class PostgresManager(ConnectionManager):
    """Opens connections to PostgreSQL for a pool, and makes them ready for their next client.

    A refusal that would only be repeated (a wrong password, a database or a role that does not
    exist, a certificate that does not verify) ends the opening of a pool at once.

    Args:
      conninfo: the connection string, as for `connect`.
      configure: an async callable that gets each new connection once, before any client does. It
          must leave no transaction open: without ``autocommit=True``, end it with a commit.
      reset: what happens to a connection between two clients. ``"rollback"`` (default) ends a
          transaction, if there is one. ``"session"`` makes the connection indistinguishable from a
          new one: it resets everything that ``DISCARD ALL`` discards, the role, and what can be set on
          the connection object, and then configures the connection again. Or an async callable, which
          gets the connection outside a transaction, and must leave it so.
      connect_keywords: as for `connect`.

    Raises `TypeError` for an argument of the wrong type, and `ValueError` for a connection string or a
    keyword that libpq would refuse. The message quotes no value, because it may be a password.
    """

    def __init__(
        self,
        conninfo: str = "",
        *,
        configure: Configure | None = None,
        reset: Reset = "rollback",
        **connect_keywords: Any,
    ) -> None:
        if not isinstance(conninfo, str):
            raise TypeError(f"conninfo must be a str, not {type(conninfo).__name__}")
        if configure is not None and not callable(configure):
            raise TypeError(f"configure must be an async callable, not {configure!r}")
        if isinstance(reset, str) and reset not in ("rollback", "session"):
            raise ValueError(f"reset must be 'rollback', 'session' or a callable, not {reset!r}")
        if not isinstance(reset, str) and not callable(reset):
            raise TypeError(f"reset must be 'rollback', 'session' or a callable, not {reset!r}")
        validate(conninfo, connect_keywords)
        self._conninfo = conninfo
        self._configure = configure
        self._reset = reset
        self._keywords: dict[str, Any] = connect_keywords

    def __repr__(self) -> str:
        return "<whitepool.postgres.PostgresManager>"  # the conninfo may hold a password

    async def create(self) -> Connection:
        """Connect, and configure the connection.

        Raises `whitepool.PoolStartError` if every host refuses for a reason that will not go away by
        itself.
        """
        try:
            connection: Connection = await TrioConnection.connect(self._conninfo, **self._keywords)
        except psycopg.OperationalError as error:
            if is_final(error):
                raise PoolStartError(str(error)) from error
            raise
        try:
            await self._set_up(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    def needs_reset(self, worker: Connection) -> bool:
        """Return whether the connection has to be reset: with a `reset` beyond a rollback, always."""
        return self._reset != "rollback" or super().needs_reset(worker)

    async def reset(self, worker: Connection) -> None:
        """Make the connection ready for its next client, as `reset` of the constructor says."""
        if super().needs_reset(worker):
            await super().reset(worker)
        if self._reset == "session":
            await _run(worker, _DISCARD_SESSION)
            _forget_client(worker, self._new, self._keywords.get("context"))
            await self._set_up(worker)
        elif callable(self._reset):
            with closing_if_cancelled(worker):
                await self._reset(worker)
            self._demand_no_transaction(worker, "reset")

    async def _set_up(self, connection: Connection) -> None:
        """Configure a connection that is new, or as good as new.

        Its attributes are noted before: what `configure` sets on it, it will set again.
        """
        if self._reset == "session":
            self._new = {name: getattr(connection, name) for name in _CLIENT_SIDE}
        if self._configure is not None:
            with closing_if_cancelled(connection):
                await self._configure(connection)
            self._demand_no_transaction(connection, "configure")

    def _demand_no_transaction(self, connection: Connection, culprit: str) -> None:
        """Raise `psycopg.ProgrammingError` if the user's callable has left the connection in use."""
        if super().needs_reset(connection):
            raise psycopg.ProgrammingError(f"{culprit} left a transaction open")


# A bare factory of connections is enough for a pool: it asks their class how to treat them. Set here,
# because the connection itself knows nothing of pools.
TrioConnection.__worker_manager__ = ConnectionManager()


async def _run(connection: Connection, command: bytes) -> None:
    """Run a command of the pool's own, without a cursor, and without a transaction around it.

    It does not go through the connection's `wait`, which would cancel a command that takes too long on
    the server, and save the connection. The pool closes the connection instead, which is quicker.
    """
    pgconn = connection.pgconn
    async with connection.lock:
        pgconn.send_query(command)
        for result in await drive(execute(pgconn), pgconn.socket):
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(result)


def _forget_client(connection: Connection, new: dict[str, Any], context: AdaptContext | None) -> None:
    """Restore what a client may have changed on the client's side of the session.

    Call it when the server has discarded its side, prepared statements included.
    """
    for name, value in new.items():
        setattr(connection, name, value)
    connection._adapters = AdaptersMap(context.adapters) if context else None
    connection._notice_handlers.clear()
    connection._notify_handlers.clear()
    backlog = getattr(connection, "_notifies_backlog", None)  # new in psycopg 3.2.4
    if backlog:
        backlog.clear()
    connection._prepared.clear()
    connection._prepared._to_flush.clear()  # clear() alone would have them deallocated once more
