"""How a pool treats a Postgres connection: opens, checks, resets and configures it.

The pool calls `is_alive` and `needs_reset` at each checkin, so they read what libpq knows already.
The rest happens in the worker's own task. If it takes too long there, the pool cancels it, and closes
the connection.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Generic, get_origin, overload

import psycopg
from psycopg import pq
from psycopg.rows import AsyncRowFactory, Row

from .._checks import check_call
from .._errors import PoolStartError
from .._manager import WorkerManager, created_by, on_discarded
from ._cancelling import closing_if_cancelled
from ._connecting import is_final, is_full, validate
from ._connection import TrioConnection
from ._keywords import C, Configure, ConnectKeywords, Conninfo, K, R, Reset
from ._last_words import last_words, why_read_only
from ._resetting import ServerSessions, forget_client, note_as_new, roll_back, run
from ._session import PostgresSession
from ._waiting import drive

if TYPE_CHECKING:
    from typing_extensions import Unpack

Connection = TrioConnection[Any]

# Plain numbers, because they are compared at each checkin, and comparing enums costs more.
_IDLE = int(pq.TransactionStatus.IDLE)
_INTRANS = int(pq.TransactionStatus.INTRANS)
_INERROR = int(pq.TransactionStatus.INERROR)
_NO_PIPELINE = int(pq.PipelineStatus.OFF)


class ConnectionManager(WorkerManager[K]):
    """What every connection needs, also one that a bare factory has opened."""

    _suspect_timeout = 1.0

    def is_alive(self, worker: K) -> bool:
        """Return whether the connection is open, and no query, copy or pipeline is under way.

        A two-phase transaction counts as one that is: only its client knows how it should end. And so
        does a request to cancel that may still arrive: it would hit the next client.

        A connection with ``target_session_attrs`` of ``read-write`` or ``primary`` that has learnt that
        it is read-only is dead, too. In a transaction that may have written something it is rolled back
        first, so that this can be told.
        """
        pgconn = worker.pgconn
        status = pgconn.transaction_status
        if status != _IDLE and status != _INTRANS and status != _INERROR:
            return False
        if worker._read_only_parameters and status != _INTRANS:
            for name in worker._read_only_parameters:
                if pgconn.parameter_status(name) == b"on":
                    return False
        return (
            pgconn.pipeline_status == _NO_PIPELINE
            and worker._tpc is None
            and not worker._unconfirmed_requests
        )

    def needs_reset(self, worker: K) -> bool:
        """Return whether the connection is in a transaction, or is still being used.

        It may be, after its checkin, by a `transaction()` block that was not left, or by a generator
        that was not closed, such as `notifies`, which holds the lock.
        """
        return bool(
            worker.pgconn.transaction_status != _IDLE
            or worker._num_transactions
            or worker.lock.locked()
        )

    async def reset(self, worker: K) -> None:
        """Roll back, once no other task uses the connection any more.

        If that throws away what the client has written, the statistics count it, and a warning says so.
        Raises `psycopg.ProgrammingError` if a block has not been left: its task could still run
        statements, and they would be part of the next client's transaction.
        """
        if worker._num_transactions:
            raise psycopg.ProgrammingError("a transaction() block has not been left")
        async with worker.lock:
            pass
        if worker.pgconn.transaction_status == _IDLE:
            return
        if await roll_back(worker):
            on_discarded.get()()
        # As psycopg does at a rollback: statements may have been prepared in the transaction, or for
        # tables that were created in it.
        worker._prepared.clear()
        async with worker.lock:
            await drive(worker._prepared.maintain_gen(worker), worker.pgconn.socket)

    async def _before_on_checkin(self, worker: K) -> None:
        """End the client's transaction: what the hook does in it would be rolled back with it."""
        if ConnectionManager.needs_reset(self, worker):
            await ConnectionManager.reset(self, worker)

    def _after_hook(self, worker: K, hook: str) -> None:
        """Raise an error if the hook has left a transaction open. Its effect would be rolled back.

        That is `psycopg.ProgrammingError`, and for a new connection `whitepool.PoolStartError`, because
        trying again would not help.
        """
        try:
            _demand_no_transaction(worker, f"the hook {hook}")
        except _Misused as error:
            if hook == "on_create":
                raise PoolStartError(str(error)) from error
            raise

    def _is_full(self, error: Exception) -> bool:
        """Return whether the server, or a PgBouncer, takes no more connections."""
        return is_full(error)

    async def check(self, worker: K) -> None:
        """Send an empty query, which starts no transaction, and wait for the answer.

        Raises `psycopg.errors.ReadOnlySqlTransaction` if the answer tells that the server is read-only,
        and the connection must not be; see `is_alive`.
        """
        await run(worker, b"")
        _demand_writable(worker)

    def _last_words(self, worker: K) -> str:
        """Return what the server said when it ended the session, or that it is read-only."""
        return last_words(worker)


class PostgresManager(ConnectionManager[C], Generic[Row, C]):
    """Opens connections to PostgreSQL for a pool, and makes them ready for their next client.

    A refusal that would only be repeated (a wrong password, a database or a role that does not
    exist, a certificate that does not verify) ends the opening of a pool at once.

    Args:
      conninfo: the connection string, as for `connect`. Or a callable, plain or async, that returns
          one and takes no arguments. It is called before each connection is opened, in the
          connection's own task, and has `start_timeout` together with the connecting. An exception
          that it raises is a failed attempt to connect. Anything but a valid connection string ends
          the opening of a pool at once, as a wrong password does. The keywords have precedence over
          what it returns.
      connection_class: the class of the connections: `TrioConnection`, or a subclass of your own.
      configure: an async callable that gets each new connection once, before any client does. It
          must leave no transaction open: without ``autocommit=True``, end it with a commit.
      reset: what happens to a connection between two clients. ``"rollback"`` (default) ends a
          transaction, if there is one. ``"session"`` makes the connection indistinguishable from a
          new one: it resets everything that ``DISCARD ALL`` discards, the role, and what can be set on
          the connection object, and then configures the connection again. Or an async callable, which
          gets the connection outside a transaction, and must leave it so.
      connect_keywords: as for `connect`, `row_factory` among them.

    Raises `TypeError` for an argument of the wrong type, and `ValueError` for a connection string or a
    keyword that libpq would refuse. The message quotes no value, because it may be a password.
    """

    _session_class = PostgresSession

    @overload
    def __init__(
        self: PostgresManager[R, TrioConnection[R]],
        conninfo: Conninfo = "",
        *,
        row_factory: AsyncRowFactory[R] | None = None,
        configure: Configure[TrioConnection[R]] | None = None,
        reset: Reset[TrioConnection[R]] = "rollback",
        **connect_keywords: Unpack[ConnectKeywords],
    ) -> None: ...

    @overload
    def __init__(
        self: PostgresManager[Any, K],
        conninfo: Conninfo = "",
        *,
        connection_class: type[K],
        row_factory: AsyncRowFactory[Any] | None = None,
        configure: Configure[K] | None = None,
        reset: Reset[K] = "rollback",
        **connect_keywords: Unpack[ConnectKeywords],
    ) -> None: ...

    def __init__(
        self,
        conninfo: Conninfo = "",
        *,
        connection_class: Any = TrioConnection,
        configure: Configure[Any] | None = None,
        reset: Reset[Any] = "rollback",
        **connect_keywords: Any,
    ) -> None:
        if not isinstance(conninfo, str) and not callable(conninfo):
            raise TypeError(f"conninfo must be a str or a callable, not {type(conninfo).__name__}")
        if callable(conninfo):
            check_call("conninfo", conninfo)
        if configure is not None and not callable(configure):
            raise TypeError(f"configure must be an async callable, not {configure!r}")
        if configure is not None:
            check_call("configure", configure, "connection")
        if isinstance(reset, str) and reset not in ("rollback", "session"):
            raise ValueError(f"reset must be 'rollback', 'session' or a callable, not {reset!r}")
        if not isinstance(reset, str) and not callable(reset):
            raise TypeError(f"reset must be 'rollback', 'session' or a callable, not {reset!r}")
        if callable(reset):
            check_call("reset", reset, "connection")
        # What a callable returns is checked when it has done so; the keywords are known now.
        validate(conninfo if isinstance(conninfo, str) else "", connect_keywords)
        kind = get_origin(connection_class) or connection_class
        if not (isinstance(kind, type) and issubclass(kind, TrioConnection)):
            raise TypeError(f"connection_class must be a TrioConnection, not {connection_class!r}")
        self._conninfo = conninfo
        self._connection_class = connection_class
        self._configure = configure
        self._reset = reset
        self._keywords: dict[str, Any] = connect_keywords
        self._server_sessions = ServerSessions()

    def __repr__(self) -> str:
        return "<whitepool.postgres.PostgresManager>"  # the conninfo may hold a password

    async def create(self) -> C:
        """Connect.

        Override it to connect in another way, for example with keywords that change. (For a password
        that changes, `conninfo` may be a callable.) It must leave no transaction open. The connection
        that it returns is configured and reset like any other, and a refusal that would only be
        repeated ends the opening of a pool like any other.
        """
        conninfo = await self._ask_for_conninfo()
        connection: C = await self._connection_class.connect(conninfo, **self._keywords)
        return connection

    async def _ask_for_conninfo(self) -> str:
        """Return the connection string for one connection, which a callable may return each time.

        Raises `whitepool.PoolStartError` if it is none: that is a mistake in the program, and trying
        again would not help.
        """
        if isinstance(self._conninfo, str):
            return self._conninfo
        answer: object = self._conninfo()
        if inspect.isawaitable(answer):
            answer = await answer
        try:
            if not isinstance(answer, str):
                raise TypeError(f"conninfo must return a str, not {type(answer).__name__}")
            validate(answer, self._keywords)
        except (TypeError, ValueError) as error:
            raise PoolStartError(str(error)) from error
        return answer

    async def _create_ready(self) -> C:
        """Connect by `create`, whoever wrote it.

        Raises `whitepool.PoolStartError` if another attempt could only fail as well, because every host
        refuses for a reason that will not go away by itself.
        """
        try:
            return await created_by(self)
        except psycopg.OperationalError as error:
            if is_final(error):
                raise PoolStartError(str(error)) from error
            raise

    async def _on_open(self, worker: C) -> None:
        """Configure a new connection, whoever opened it.

        Raises `whitepool.PoolStartError` if a callable of the user's leaves a transaction open, or is
        not async: another attempt would only do so again.
        """
        try:
            _demand_no_transaction(worker, "create")
            await self._set_up(worker)
            _demand_writable(worker)
        except _Misused as error:
            raise PoolStartError(str(error)) from error

    def needs_reset(self, worker: C) -> bool:
        """Return whether the connection has to be reset: with a `reset` beyond a rollback, always."""
        return self._reset != "rollback" or super().needs_reset(worker)

    async def reset(self, worker: C) -> None:
        """Make the connection ready for its next client, as `reset` of the constructor says."""
        if super().needs_reset(worker):
            await super().reset(worker)
        if self._reset == "session":
            await self._server_sessions.discard_traces(worker)
            forget_client(worker)
            await self._set_up(worker)
        elif callable(self._reset):
            await _call(self._reset, worker, "reset")
            _demand_no_transaction(worker, "reset")

    async def _set_up(self, connection: C) -> None:
        """Configure a connection that is new, or as good as new.

        Its attributes are noted before: what `configure` sets on it, it will set again.
        """
        if self._reset == "session":
            note_as_new(connection)
        if self._configure is not None:
            await _call(self._configure, connection, "configure")
            _demand_no_transaction(connection, "configure")


# A bare factory of connections is enough for a pool: it asks their class how to treat them. Set here,
# because the connection itself knows nothing of pools.
TrioConnection.__worker_manager__ = ConnectionManager[Connection]()


class _Misused(psycopg.ProgrammingError):
    """A callable of the user's does what it must not do: trying again would not help."""


async def _call(function: Configure[Any], connection: Connection, name: str) -> None:
    """Call a callable of the user's with a connection for which there is no use unless it succeeds."""
    made: object = function(connection)
    if not inspect.isawaitable(made):
        raise _Misused(f"{name} must be async: it returned {type(made).__name__}, not an awaitable")
    with closing_if_cancelled(connection):
        await made


def _demand_no_transaction(connection: Connection, culprit: str) -> None:
    """Raise `psycopg.ProgrammingError` if the user's callable has left the connection in use."""
    if connection.closed:
        raise psycopg.ProgrammingError(f"{culprit} closed the connection")
    if TrioConnection.__worker_manager__.needs_reset(connection):
        raise _Misused(
            f"{culprit} left a transaction open: end it with commit(), or connect with autocommit=True"
        )


def _demand_writable(connection: Connection) -> None:
    """Raise `psycopg.errors.ReadOnlySqlTransaction` if the connection can't write, and should."""
    reason = why_read_only(connection)
    if reason:
        raise psycopg.errors.ReadOnlySqlTransaction(reason)
