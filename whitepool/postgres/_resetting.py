"""How what a client has left on a connection is removed: on the server, and on the client's side.

The commands are the pool's own. They do not go through the connection's `wait`; see `run`.
"""

from __future__ import annotations

from typing import Any, Union
from weakref import WeakKeyDictionary, WeakValueDictionary

import psycopg
from psycopg import pq
from psycopg.adapt import AdaptersMap
from psycopg.generators import execute
from psycopg.waiting import Wait

from .._manager import on_misconfigured
from ._connection import TrioConnection
from ._last_words import note_last_words
from ._waiting import drive, ready_now

Connection = TrioConnection[Any]

# The process of a session, and since when its server runs.
ServerSession = tuple[Union[bytes, None], Union[bytes, None]]

_INTRANS = pq.TransactionStatus.INTRANS
_INERROR = pq.TransactionStatus.INERROR

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


class ServerSessions:
    """The sessions of one pool on the server. It discards what clients have left in them.

    Behind a PgBouncer in transaction mode that can't work, because connections share sessions. It says
    so when it sees that.
    """

    def __init__(self) -> None:
        # Which connection was last in which session, and the reverse.
        self._session_of = WeakKeyDictionary[Connection, ServerSession]()
        self._last_in = WeakValueDictionary[ServerSession, Connection]()

    async def discard_traces(self, connection: Connection) -> None:
        """Discard all that `DISCARD ALL` does. If PgBouncer may be between, ask which session it is.

        That costs no round trip more, as it is asked in the same message.
        """
        if 0 < connection.pgconn.backend_pid <= LARGEST_PID:
            await run(connection, _DISCARD_SESSION)
        else:
            *_, answer = await run(connection, _DISCARD_SESSION + b";" + _WHICH_SESSION)
            self._note(connection, (answer.get_value(0, 0), answer.get_value(0, 1)))

    def _note(self, connection: Connection, session: ServerSession) -> None:
        """Say that ``reset="session"`` can't work, if connections turn out to share server sessions.

        Behind a PgBouncer in session mode, a connection keeps its session as long as it is open. This
        can't be asked when it is opened: the question would take a session, and none may be free.
        """
        other = self._last_in.get(session, connection)
        is_shared = other is not connection and not other.closed
        # If the other one has ended, it may be that this has not been noticed yet.
        if is_shared and ready_now(other.pgconn.socket, Wait.R):
            is_shared = False
        if is_shared or self._session_of.get(connection, session) != session:
            on_misconfigured.get()(_SHARED)
        self._session_of[connection] = session
        self._last_in[session] = connection


def note_as_new(connection: Connection) -> None:
    """Note what a client can set on a connection, for `forget_client`."""
    connection._as_new = {name: getattr(connection, name) for name in _CLIENT_SIDE}
    connection._as_new["_adapters"] = _copied(connection._adapters)


def forget_client(connection: Connection) -> None:
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


def _copied(adapters: AdaptersMap | None) -> AdaptersMap | None:
    """Return a copy of a connection's own adapters. None: it has none, and uses psycopg's."""
    return None if adapters is None else AdaptersMap(adapters)


async def roll_back(connection: Connection) -> bool:
    """Roll back, and return whether that throws away what the transaction has written.

    In a transaction that has failed there is no asking: its client has had the error.
    """
    pgconn = connection.pgconn
    question = _has_written(pgconn.server_version)
    if question and pgconn.transaction_status == _INTRANS:
        try:
            # One message, so the question costs no round trip.
            answer, *_ = await run(connection, question + b"; ROLLBACK")
            return answer.get_value(0, 0) is not None
        except psycopg.Error:
            # A server that is not quite PostgreSQL may not know the function.
            if pgconn.transaction_status != _INERROR:
                raise
    await run(connection, b"ROLLBACK")
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


async def run(connection: Connection, command: bytes) -> list[pq.abc.PGresult]:
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
