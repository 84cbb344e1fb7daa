"""How a pool treats a Postgres connection: opens, checks, resets and configures it.

The pool calls `is_alive` and `needs_reset` at each checkin, so they read what libpq knows already.
The rest happens in the worker's own task. If it takes too long there, the pool cancels it, and closes
the connection.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Generic, Union, get_origin, overload
from weakref import WeakKeyDictionary, WeakValueDictionary

import psycopg
from psycopg import pq
from psycopg.adapt import AdaptersMap
from psycopg.generators import execute
from psycopg.rows import AsyncRowFactory, Row
from psycopg.waiting import Wait

from .._checks import check_call
from .._errors import PoolStartError
from .._manager import WorkerManager, created_by, on_discarded, on_misconfigured
from ._cancelling import closing_if_cancelled
from ._connecting import is_final, is_full, validate
from ._connection import TrioConnection
from ._keywords import C, Configure, ConnectKeywords, Conninfo, K, R, Reset
from ._last_words import last_words, note_last_words, why_read_only
from ._session import PostgresSession
from ._waiting import drive, ready_now

if TYPE_CHECKING:
    from typing_extensions import Unpack

Connection = TrioConnection[Any]

# The process of a session, and since when its server runs.
ServerSession = tuple[Union[bytes, None], Union[bytes, None]]

# Plain numbers, because they are compared at each checkin, and comparing enums costs more.
_IDLE = int(pq.TransactionStatus.IDLE)
_INTRANS = int(pq.TransactionStatus.INTRANS)
_INERROR = int(pq.TransactionStatus.INERROR)
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

LARGEST_PID = 2**22
"""The largest number of a process on Linux. PgBouncer tells a random one of 32 bits."""

_WHICH_SESSION = b"SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_postmaster_start_time()"

_SHARED = (
    'reset="session" has no effect: connections share server sessions, as behind a PgBouncer in '
    "transaction mode"
)

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
    "cleanup_timeout",
    "_is_instrumented_by_opentelemetry",
)


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
        if await _roll_back(worker):
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
        await _run(worker, b"")
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
        # For `_note_server_session`: which connection was last in which session, and the reverse.
        self._session_of = WeakKeyDictionary[Connection, ServerSession]()
        self._last_in = WeakValueDictionary[ServerSession, Connection]()

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
            await self._discard_session(worker)
            _forget_client(worker)
            await self._set_up(worker)
        elif callable(self._reset):
            await _call(self._reset, worker, "reset")
            _demand_no_transaction(worker, "reset")

    async def _discard_session(self, worker: C) -> None:
        """Reset the server's side. If PgBouncer may be between, ask in the same message which it is."""
        if 0 < worker.pgconn.backend_pid <= LARGEST_PID:
            await _run(worker, _DISCARD_SESSION)
        else:
            *_, answer = await _run(worker, _DISCARD_SESSION + b";" + _WHICH_SESSION)
            self._note_server_session(worker, (answer.get_value(0, 0), answer.get_value(0, 1)))

    def _note_server_session(self, worker: C, session: ServerSession) -> None:
        """Say that ``reset="session"`` can't work, if connections turn out to share server sessions.

        Behind a PgBouncer in session mode, a connection keeps its session as long as it is open. This
        can't be asked when it is opened: the question would take a session, and none may be free.
        """
        other = self._last_in.get(session, worker)
        is_shared = other is not worker and not other.closed
        # If the other one has ended, it may be that this has not been noticed yet.
        if is_shared and ready_now(other.pgconn.socket, Wait.R):
            is_shared = False
        if is_shared or self._session_of.get(worker, session) != session:
            on_misconfigured.get()(_SHARED)
        self._session_of[worker] = session
        self._last_in[session] = worker

    async def _set_up(self, connection: C) -> None:
        """Configure a connection that is new, or as good as new.

        Its attributes are noted before: what `configure` sets on it, it will set again.
        """
        if self._reset == "session":
            connection._as_new = {name: getattr(connection, name) for name in _CLIENT_SIDE}
            connection._as_new["_adapters"] = _copied(connection._adapters)
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


def _copied(adapters: AdaptersMap | None) -> AdaptersMap | None:
    """Return a copy of a connection's own adapters. None: it has none, and uses psycopg's."""
    return None if adapters is None else AdaptersMap(adapters)


async def _roll_back(connection: Connection) -> bool:
    """Roll back, and return whether that throws away what the transaction has written.

    In a transaction that has failed there is no asking: its client has had the error.
    """
    pgconn = connection.pgconn
    question = _has_written(pgconn.server_version)
    if question and pgconn.transaction_status == _INTRANS:
        try:
            # One message, so the question costs no round trip.
            answer, *_ = await _run(connection, question + b"; ROLLBACK")
            return answer.get_value(0, 0) is not None
        except psycopg.Error:
            # A server that is not quite PostgreSQL may not know the function.
            if pgconn.transaction_status != _INERROR:
                raise
    await _run(connection, b"ROLLBACK")
    return False


def _has_written(server_version: int) -> bytes:
    """Return a query for the number of the current transaction; empty: the server knows none.

    A transaction gets its number when it first writes anything, or locks a row. Its result is NULL as
    long as it has none.
    """
    if server_version >= 130000:
        return b"SELECT pg_catalog.pg_current_xact_id_if_assigned()"
    if server_version >= 100000:
        return b"SELECT pg_catalog.txid_current_if_assigned()"
    return b""


async def _run(connection: Connection, command: bytes) -> list[pq.abc.PGresult]:
    """Run a command of the pool's own, without a cursor, and without a transaction around it.

    It does not go through the connection's `wait`, which would cancel a command that takes too long on
    the server, and save the connection. The pool closes the connection instead, which is quicker.
    """
    pgconn = connection.pgconn
    async with connection.lock:
        pgconn.send_query(command)
        results: list[pq.abc.PGresult] = await drive(execute(pgconn), pgconn.socket)
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            error = psycopg.errors.error_from_result(result)
            note_last_words(connection, error)
            raise error
    return results


def _forget_client(connection: Connection) -> None:
    """Restore what a client may have changed on the client's side of the session.

    Call it when the server has discarded its side, prepared statements included.
    """
    for name, value in connection._as_new.items():
        setattr(connection, name, value)
    connection._notice_handlers.clear()
    connection._notify_handlers.clear()
    backlog = getattr(connection, "_notifies_backlog", None)  # new in psycopg 3.2.4
    if backlog:
        backlog.clear()
    connection._prepared.clear()
    connection._prepared._to_flush.clear()  # clear() alone would have them deallocated once more
