"""Cancelling: on the server as well, and with the connection in order afterwards, or closed.

A cancelled task must not leave the server working for it, nor half of an answer on the connection.
So whatever is interrupted is cancelled on the server and read to its end, and a block that is left is
rolled back or synchronised. All this has to wait for the server, so it happens in scopes that are
shielded from the cancellation, and that last `cleanup_timeout` at most, all of them together. A
connection that is not in order by then is closed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg import errors, generators, pq
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait
from trio.lowlevel import checkpoint_if_cancelled

from ._last_words import note_silence
from ._waiting import drive

if TYPE_CHECKING:
    from ._connection import TrioConnection

FIRST_PAUSE = 0.1
"""Seconds from the first request to cancel an operation to the second. Each pause is twice the last."""

MAX_REFUSALS = 3
"""Failed requests to cancel one operation after which no more are made."""

SILENCE = 1.25
"""Seconds after which a server that has not processed a request to cancel is taken for frozen, or cut
off: what a clean-up could still wait for will not come. A live one needs milliseconds; but if the first
packet gets lost, TCP repeats it after a second."""

RESULTS_AT_ONCE = 100
"""Results, or rows of a COPY, that are skipped before other tasks may have their turn."""

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
    """Leave a block as cancelled, if its task is being cancelled or interrupted; else do nothing.

    Await it before anything is committed. A task that is cancelled by then never learns of a commit,
    so there must be none: `leave`, which is or resembles the block's ``__aexit__``, gets the
    cancellation as if it had been raised in the block, and then the cancellation is raised. So it is
    with a Ctrl-C that has been held back until now.
    """
    try:
        await checkpoint_if_cancelled()
    except (trio.Cancelled, KeyboardInterrupt) as interrupt:
        await leave(type(interrupt), interrupt, interrupt.__traceback__)
        raise


@contextmanager
def shielded_cleanup(connection: TrioConnection[Any]) -> Iterator[trio.CancelScope]:
    """Leave a block in order, also if its task is being cancelled.

    If so, the code within is shielded, for the time that `cleanup_scope` gives it: an operation that
    takes longer closes the connection. If not, the code runs as it would without this, and may be
    cancelled. The `shield` of the scope that is yielded tells the two cases apart.
    """
    if trio.current_effective_deadline() > -math.inf:
        yield trio.CancelScope()
    else:
        with cleanup_scope(connection) as scope, closing_if_cancelled(connection):
            yield scope


@contextmanager
def cleanup_scope(connection: TrioConnection[Any]) -> Iterator[trio.CancelScope]:
    """Shield what puts a connection in order, for as long as its `cleanup_timeout` allows.

    One cancellation may leave many blocks, one after the other or one within the other. They share
    the time: what one of them has used is missing for the next, until the connection is used by a task
    that is not being cancelled; see `after_cleanup`.
    """
    connection._needs_care = True
    if connection._cleanups == 0:
        begun = connection._cleanup_begun = trio.current_time()
        connection._cleanup_deadline = begun + connection.cleanup_timeout - connection._cleanup_used
    connection._cleanups += 1
    try:
        with trio.CancelScope(shield=True, deadline=connection._cleanup_deadline) as scope:
            yield scope
    finally:
        connection._cleanups -= 1
        if connection._cleanups == 0:
            connection._cleanup_used += trio.current_time() - connection._cleanup_begun


def after_cleanup(connection: TrioConnection[Any]) -> None:
    """Begin anew to count the time for cleaning up, if a cancellation is over.

    Call it before an operation.
    """
    if connection._cleanups == 0 and trio.current_effective_deadline() > -math.inf:
        connection._cleanup_used = 0.0
        connection._needs_care = False


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


async def cancel_operation(connection: TrioConnection[Any], generator: PQGen[Any] | None) -> None:
    """Cancel the running operation on the server, and read to the end of it.

    Call it when `drive` was interrupted on `generator`, or, with None, between two rows. It may be
    called although the connection is closed, or idle. Afterwards the connection is usable, or closed.
    In a pipeline, only what was interrupted has ended: the rest is up to the pipeline's block, which
    the task is about to leave.
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
            if generator is not None:
                await drive(generator, pgconn.socket, resumed=True)
            else:
                await drive(skip_results(pgconn), pgconn.socket)

    with cleanup_scope(connection) as scope:
        if not await cancel_until(connection, run_to_end):
            # Nothing else ends the operation before its time.
            connection._finish()
            return
        if not pgconn.pipeline_status:
            with suppress(Exception):
                connection._copy_was_ended |= await drive(skip_results(pgconn), pgconn.socket)
    if (
        scope.cancelled_caught
        or connection._unconfirmed_requests
        or (not pgconn.pipeline_status and pgconn.transaction_status in (_ACTIVE, _UNKNOWN))
    ):
        connection._finish()


async def cancel_until(
    connection: TrioConnection[Any], has_ended: Callable[[], Awaitable[object]]
) -> bool:
    """Cancel what the server does for a connection, again and again, until `has_ended` returns.

    The server ignores a request that overtakes its query, so one request is not enough. Between two
    requests, `has_ended` is awaited; it is cancelled when it is time for the next one, and called
    again after it. Returns whether it has returned: not if `MAX_REFUSALS` requests have failed, nor if
    the server is silent for `SILENCE`. Call this within `cleanup_scope`, as there is no other limit.
    """
    pause, refusals = FIRST_PAUSE, 0
    while True:
        asked_at = trio.current_time()
        try:
            await connection.cancel_safe(timeout=SILENCE)
        except psycopg.ProgrammingError:
            pass  # a prepared two-phase transaction can't be cancelled: wait for its end
        except errors.CancellationTimeout:
            note_silence(connection)
            return False
        except trio.Cancelled:
            # A `cleanup_timeout` that is shorter than `SILENCE`. It may tell all the same.
            if trio.current_time() - asked_at >= FIRST_PAUSE:
                note_silence(connection)
            raise
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


def skip_results(pgconn: pq.abc.PGconn) -> PQGen[bool]:
    """Read to the end of an operation's results, and keep none; return whether a COPY was ended.

    The server may have sent some hundred thousand rows before it received the request to cancel. While
    a COPY is under way, libpq repeats its result for as long as it is asked, so the COPY is ended, or
    read to its end, first. Whatever else a server sends, other tasks get their turn: this waits, at
    least until the socket is writable, after every `RESULTS_AT_ONCE` results.

    Raises `psycopg.Error` if there is no way out of the state but to close the connection.
    """
    has_ended_copy = False
    for number in count(1):
        if number % RESULTS_AT_ONCE == 0:
            yield Wait.W
        result = yield from generators.fetch(pgconn)
        if result is None:
            break
        if result.status == pq.ExecStatus.COPY_OUT:
            yield from _skip_copy_data(pgconn)
        elif result.status == pq.ExecStatus.COPY_IN:
            has_ended_copy = True
            yield from _end_copy(pgconn)
        elif result.status == pq.ExecStatus.COPY_BOTH:
            raise psycopg.InterfaceError("a replication can't be ended")
    return has_ended_copy


def _skip_copy_data(pgconn: pq.abc.PGconn) -> PQGen[None]:
    """Read to the end of the data of a COPY TO STDOUT; the result of the COPY comes after it."""
    for number in count(1):
        if number % RESULTS_AT_ONCE == 0:
            yield Wait.W
        try:
            length, _ = pgconn.get_copy_data(1)
        except psycopg.Error:
            return  # the result that comes next says why
        if length < 0:
            return
        if length == 0:
            yield Wait.R
            pgconn.consume_input()


def _end_copy(pgconn: pq.abc.PGconn) -> PQGen[None]:
    """Make a COPY FROM STDIN fail; the result of the COPY comes after it."""
    while pgconn.put_copy_end(b"cancelled") == 0:
        yield Wait.W
    while pgconn.flush() != 0:
        if (yield Wait.RW) & Ready.R:
            pgconn.consume_input()


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
