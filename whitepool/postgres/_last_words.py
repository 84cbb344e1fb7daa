"""What a server says when it ends a session, and whether it has turned out to be read-only, or silent.

libpq reads the first two from what the server sends without being asked; the third is noted after a
wait that was in vain. Nothing here waits.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import psycopg
from psycopg import pq
from psycopg.pq import DiagnosticField
from psycopg.waiting import Wait

from ._waiting import ready_now

if TYPE_CHECKING:
    from ._connection import TrioConnection

_ACTIVE = pq.TransactionStatus.ACTIVE

SILENT = "08006: the server did not answer a request to cancel"
"""The last words of a connection whose server says nothing any more. The SQLSTATE is ours."""

MOST_READS = 64
"""How often to read, 16 kB each time, for last words that come behind unread notifications."""

# What must not be "on", by the `target_session_attrs` of a connection.
_READ_ONLY_IF = {
    b"primary": (b"in_hot_standby",),
    b"read-write": (b"in_hot_standby", b"default_transaction_read_only"),
}


def read_only_parameters(pgconn: pq.abc.PGconn) -> tuple[bytes, ...]:
    """Return the parameters of which each, if it is "on", makes this connection useless.

    There are some if `target_session_attrs` is ``primary`` or ``read-write``, be it by the connection
    string, the environment or a service file. Servers before PostgreSQL 14 don't report them.
    """
    if pgconn.status != pq.ConnStatus.OK:
        return ()
    wanted = {option.keyword: option.val for option in pgconn.info}.get(b"target_session_attrs")
    return _READ_ONLY_IF.get(wanted or b"", ())


def why_read_only(connection: TrioConnection[Any]) -> str:
    """Return why a connection that must be able to write is not, as far as it has learnt that yet.

    Empty: it can write, or it need not. A server reports a change with the answer to the next query.
    """
    if not connection.closed:
        for name in connection._read_only_parameters:
            if connection.pgconn.parameter_status(name) == b"on":
                return f"the server is read-only: {name.decode()} is on"
    return ""


def listen_for_last_words(connection: TrioConnection[Any]) -> None:
    """Note in the connection what its server says last, where libpq takes it for a notice.

    It does while no query is under way, as for a client that waits for notifications.
    """
    pgconn = connection.pgconn
    pgconn.notice_handler = partial(_on_notice, ref(connection), pgconn.notice_handler)


def note_last_words(connection: TrioConnection[Any], error: BaseException) -> None:
    """Note in the connection what an error says, if the server has ended the session by it."""
    if isinstance(error, psycopg.Error) and error.sqlstate:
        diag = error.diag
        severity = diag.severity_nonlocalized or diag.severity or ""
        _note(connection, error.sqlstate, severity, diag.message_primary or "")


def note_silence(connection: TrioConnection[Any]) -> None:
    """Note in the connection that its server does not answer, which may go for others of a pool."""
    connection._last_words = connection._last_words or SILENT


def is_silent(connection: TrioConnection[Any]) -> bool:
    """Return whether it was noted that the server does not answer."""
    return connection._last_words == SILENT


def last_words(connection: TrioConnection[Any]) -> str:
    """Return what the server said when it ended the session, or why the connection is of no use.

    That may be that the server says nothing any more, or that it is read-only.

    It is one line that begins with an SQLSTATE; empty if nothing is known. The connection is about to
    be closed: what it has not read yet is read, and no handler of the client's sees it.
    """
    if not connection._last_words:
        with suppress(psycopg.Error, OSError):
            _read_the_rest(connection)
    reason = why_read_only(connection)
    return connection._last_words or (reason and f"25006: {reason}")


def _read_the_rest(connection: TrioConnection[Any]) -> None:
    """Read what an idle session has been sent, up to its last words."""
    pgconn = connection.pgconn
    # Where an operation is under way, its answer comes first, and may be long.
    if connection.closed or connection.lock.locked() or pgconn.transaction_status == _ACTIVE:
        return
    pgconn.notice_handler = partial(_on_notice, ref(connection), None)
    for _ in range(MOST_READS):
        if connection._last_words or not ready_now(pgconn.socket, Wait.R):
            return
        pgconn.consume_input()  # raises at the end of what there is
        pgconn.is_busy()  # parses it


def _on_notice(connection_ref: ref[TrioConnection[Any]], handler: Any, notice: pq.abc.PGresult) -> None:
    """Note a notice if it is the last, and pass it on to psycopg's handler."""
    connection = connection_ref()
    if connection is not None:
        fields = (
            DiagnosticField.SQLSTATE,
            DiagnosticField.SEVERITY_NONLOCALIZED,
            DiagnosticField.MESSAGE_PRIMARY,
        )
        values = [(notice.error_field(field) or b"").decode(errors="replace") for field in fields]
        _note(connection, *values)
    if handler is not None:
        handler(notice)


def _note(connection: TrioConnection[Any], sqlstate: str, severity: str, text: str) -> None:
    """Note a message if it ends the session: a fatal one, or the warning of a server that crashes.

    A client's own ``RAISE`` may have any SQLSTATE, and does not end its session. Servers before
    PostgreSQL 9.6 report no severity that can be read in every language.
    """
    if severity in ("FATAL", "PANIC") or (severity in ("WARNING", "") and sqlstate.startswith("57P")):
        connection._last_words = f"{sqlstate}: {' '.join(text.split())}"
