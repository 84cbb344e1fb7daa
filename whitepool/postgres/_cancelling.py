"""Cancelling: on the server as well, and with the connection in order afterwards, or closed.

A cancelled task must not leave the server working for it, nor half of an answer on the connection.
So whatever is interrupted is cancelled on the server and read to its end, and a block that is left is
rolled back or synchronised. All this has to wait for the server, so it happens in scopes that are
shielded from the cancellation, and that last `CLEANUP_TIMEOUT` at most. A connection that is not in
order by then is closed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg import capabilities, errors, generators, pq
from psycopg.abc import PQGen
from psycopg.waiting import Wait
from trio.lowlevel import checkpoint_if_cancelled

from ._waiting import drive, poll

if TYPE_CHECKING:
    from ._connection import TrioConnection

CLEANUP_TIMEOUT = 5.0
"""Seconds that a cancelled operation may take to leave the connection, and the server, in order."""

FIRST_PAUSE = 0.1
"""Seconds from the first request to cancel an operation to the second. Each pause is twice the last."""

MAX_REFUSALS = 3
"""Failed requests to cancel one operation after which no more are made."""

_ACTIVE = pq.TransactionStatus.ACTIVE
_UNKNOWN = pq.TransactionStatus.UNKNOWN

# The two generators that psycopg runs inside a COPY FROM STDIN: one sends data, one ends the COPY.
_COPYING_IN = (generators.copy_to.__code__, generators.copy_end.__code__)

# The connection for which the current task is inside `closing_if_cancelled`.
_closed_if_cancelled: ContextVar[TrioConnection[Any] | None] = ContextVar(
    "closed_if_cancelled", default=None
)


async def checkpoint_before_commit(
    leave: Callable[[type[BaseException], BaseException, TracebackType | None], Awaitable[object]],
) -> None:
    """Leave a block as cancelled, if its task is being cancelled; else do nothing.

    Await it before anything is committed. A task that is cancelled by then never learns of a commit,
    so there must be none: `leave`, which is or resembles the block's ``__aexit__``, gets the
    cancellation as if it had been raised in the block, and then the cancellation is raised.
    """
    try:
        await checkpoint_if_cancelled()
    except trio.Cancelled as cancelled:
        await leave(type(cancelled), cancelled, cancelled.__traceback__)
        raise


@contextmanager
def shielded_cleanup(connection: TrioConnection[Any]) -> Iterator[trio.CancelScope]:
    """Leave a block in order, also if its task is being cancelled.

    If so, the code within is shielded, and lasts `CLEANUP_TIMEOUT` at most: an operation that takes
    longer closes the connection. If not, the code runs as it would without this, and may be cancelled.
    The `shield` of the scope that is yielded tells the two cases apart.
    """
    if trio.current_effective_deadline() > -math.inf:
        yield trio.CancelScope()
    else:
        with cleanup_scope() as scope, closing_if_cancelled(connection):
            yield scope


def cleanup_scope() -> trio.CancelScope:
    """Return a scope that is shielded, and that is cancelled `CLEANUP_TIMEOUT` from now."""
    return trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANUP_TIMEOUT)


@contextmanager
def closing_if_cancelled(connection: TrioConnection[Any]) -> Iterator[None]:
    """Within this, an operation of this task that is cancelled closes the connection at once.

    For a task that has no use for the connection unless that operation succeeds: cancelling on the
    server first would only take more time.
    """
    token = _closed_if_cancelled.set(connection)
    try:
        yield
    finally:
        _closed_if_cancelled.reset(token)


async def cancel_operation(connection: TrioConnection[Any], generator: PQGen[Any]) -> None:
    """Cancel the running operation on the server, and read to the end of it.

    Call it when `drive` was interrupted on `generator`; it may be called although the connection is
    closed, or idle. Afterwards the connection is usable, or closed. In a pipeline, only what was
    interrupted has ended: the rest is up to the pipeline's block, which the task is about to leave.
    """
    pgconn = connection.pgconn
    if pgconn.transaction_status != _ACTIVE:
        return
    if _closed_if_cancelled.get() is connection:
        connection._finish()
        return

    async def run_to_end() -> None:
        # What goes wrong here is most likely QueryCanceled, as wanted. What counts is the state in
        # which this leaves the connection.
        with suppress(Exception):
            await drive(generator, pgconn.socket, resumed=True)

    with cleanup_scope() as scope:
        if not await cancel_until(connection, run_to_end):
            # Nothing else ends the operation before its time.
            connection._finish()
            return
        if pgconn.pipeline_status:
            return
        with suppress(Exception):
            if _is_copying_in(pgconn):
                connection._copy_was_ended = True
                await drive(generators.copy_end(pgconn, b"cancelled"), pgconn.socket)
        with suppress(Exception):
            await drive(_skip_results(pgconn), pgconn.socket)
    if scope.cancelled_caught or pgconn.transaction_status in (_ACTIVE, _UNKNOWN):
        connection._finish()


async def cancel_until(
    connection: TrioConnection[Any], has_ended: Callable[[], Awaitable[object]]
) -> bool:
    """Cancel what the server does for a connection, again and again, until `has_ended` returns.

    The server ignores a request that overtakes its query, so one request is not enough. Between two
    requests, `has_ended` is awaited; it is cancelled when it is time for the next one, and called
    again after it. Returns whether it has returned: not if `MAX_REFUSALS` requests have failed. Call
    this within `cleanup_scope`, as there is no other limit to it.
    """
    pause, refusals = FIRST_PAUSE, 0
    while True:
        try:
            await connection.cancel_safe()
        except psycopg.ProgrammingError:
            pass  # a prepared two-phase transaction can't be cancelled: wait for its end
        except Exception:
            # The server may have received the request all the same, so one failure says little. After
            # several, it is plain that the server can't be reached.
            refusals += 1
            if refusals == MAX_REFUSALS:
                return False
        with trio.move_on_after(pause):
            await has_ended()
            return True
        pause *= 2


async def request_cancel(pgconn: pq.abc.PGconn, timeout: float) -> None:
    """Ask the server, through a connection of its own, to cancel the operation that `pgconn` runs.

    Returns when the server has received the request, which it may still ignore. Raises
    `CancellationTimeout` after `timeout` seconds (0: never), and `OperationalError` if the server
    can't be reached.
    """
    with trio.move_on_after(timeout or math.inf):
        if capabilities.has_cancel_safe():
            request = pgconn.cancel_conn()
            request.start()
            if not await poll(request.poll, lambda: request.socket):
                raise psycopg.OperationalError(f"cancellation failed: {request.get_error_message()}")
        else:
            # A libpq older than 17 can only block. The thread may be abandoned: what it uses is a
            # copy of the server's address and the key, which outlives the connection.
            cancel = pgconn.get_cancel().cancel
            await trio.to_thread.run_sync(cancel, abandon_on_cancel=True)
        return
    raise errors.CancellationTimeout("cancellation timeout expired")


def _skip_results(pgconn: pq.abc.PGconn) -> PQGen[None]:
    """Read to the end of an operation's results, and keep none of them.

    The server may have sent some hundred thousand rows before it received the request to cancel.
    """
    while True:
        while pgconn.is_busy():
            yield Wait.R
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            return
        if result.status == pq.ExecStatus.COPY_OUT:
            with suppress(psycopg.Error):  # the server reports the cancellation at the end of the data
                while (length := pgconn.get_copy_data(1)[0]) >= 0:
                    if length == 0:
                        yield Wait.R
                        pgconn.consume_input()


def _is_copying_in(pgconn: pq.abc.PGconn) -> bool:
    """Return whether the connection is in a COPY FROM STDIN: only then libpq takes data, even none."""
    try:
        pgconn.put_copy_data(b"")
    except psycopg.Error:
        return False
    return True


async def refuse_rest_of_copy(connection: TrioConnection[Any], generator: PQGen[Any]) -> None:
    """Raise `QueryCanceled`, if `generator` belongs to a COPY that a cancellation has ended.

    Call it before an operation when `_copy_was_ended` is set. The block of that COPY still wants to
    send the rest of the data, or the end of it, which would be a violation of the protocol by now. Any
    other operation means that the block has been left: it clears `_copy_was_ended`, and may go on.
    """
    if getattr(generator, "gi_code", None) in _COPYING_IN:
        generator.close()
        await checkpoint_if_cancelled()  # the usual case: the cancellation is leaving the block
        raise errors.QueryCanceled("the COPY has ended: a cancellation came between")
    connection._copy_was_ended = False
