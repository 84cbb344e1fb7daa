"""psycopg's AsyncConnection on Trio.

psycopg keeps its protocol apart from the waiting. Only the waiting is replaced here: connecting, the
lock, the wait for an operation, cancelling, and closing. Everything else is psycopg's own.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import psycopg
import trio
from psycopg import AsyncPipeline, pq
from psycopg.abc import RV, AdaptContext, PQGen
from psycopg.adapt import AdaptersMap
from psycopg.generators import execute
from psycopg.rows import AsyncRowFactory, Row
from psycopg.transaction import AsyncTransaction
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
)

from .._checks import check_seconds
from .._manager import WorkerManager
from .._scheduling import TimeSlice
from ._blocks import TrioPipeline, TrioServerCursor, TrioTransaction
from ._cancel_requests import request_cancel, warn_if_cancelling_freezes
from ._cancelling import (
    SILENCE,
    after_cleanup,
    cancel_operation,
    checkpoint_before_commit,
    cleanup_scope,
    refuse_rest_of_copy,
    shielded_cleanup,
)
from ._connecting import connect_to_first
from ._keywords import LibpqKeywords, R
from ._last_words import (
    is_silent,
    listen_for_last_words,
    note_last_words,
    note_silence,
    read_only_parameters,
)
from ._readiness import notify_closing
from ._rows import TrioCursor
from ._waiting import Lock, drive, drive_for, uninterrupted_block

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

BUSY_TIME = 0.0001
"""Seconds for which operations that never have to wait, on one connection, may keep the event loop.
It is short because many connections may be read at once, and they share the event loop in turns."""

_ACTIVE = pq.TransactionStatus.ACTIVE

# The generator that psycopg runs to begin a `stream()`.
_STREAMING = psycopg.AsyncCursor._stream_send_gen.__code__


class TrioConnection(psycopg.AsyncConnection[Row]):
    """A connection to PostgreSQL: `psycopg.AsyncConnection`, for Trio.

    A cancelled operation is cancelled on the server as well, and raises `trio.Cancelled` when the
    connection is usable again, or closed.
    """

    __worker_manager__: ClassVar[WorkerManager[TrioConnection[Any]]]
    """How a pool treats connections that come from a bare factory; `_manager.py` sets it."""

    cleanup_timeout: float = 5.0
    """Seconds that a cancelled operation, and all blocks that the cancellation leaves, may take
    together to leave the connection, and the server, in order. After that the connection is closed."""

    # `PsycopgInstrumentor.instrument_connection` of OpenTelemetry notes here what it has done. It is
    # declared because a reset of the session takes the instrumentation off, and the note with it.
    _is_instrumented_by_opentelemetry: bool = False

    def __init__(
        self,
        pgconn: pq.abc.PGconn,
        row_factory: AsyncRowFactory[Row] | None = None,
    ) -> None:
        super().__init__(pgconn)
        self.cursor_factory = TrioCursor
        self.server_cursor_factory = TrioServerCursor
        # Whether a cancellation has ended a COPY FROM STDIN whose block has not been left yet.
        self._copy_was_ended = False
        # For `cleanup_scope`: how many are entered, since when and until when, and what earlier ones
        # have used up.
        self._cleanups = 0
        self._cleanup_begun = 0.0
        self._cleanup_deadline = 0.0
        self._cleanup_used = 0.0
        # Whether one of the above has to be looked at before the next operation.
        self._needs_care = False
        # Requests to cancel that were sent, and whose end has not been seen. One of
        # them might still arrive, and cancel what the connection does by then.
        self._unconfirmed_requests = 0
        # Whether libpq may still return single rows, which it does to the end of a pipeline's first
        # query, too.
        self._has_streamed = False
        # What `reset="session"` of a pool restores. Each connection has its own, because the cursor
        # factory of one that is instrumented knows its server.
        self._as_new: dict[str, Any] = {}
        self._time_slice = TimeSlice(BUSY_TIME)
        self._read_only_parameters = read_only_parameters(pgconn)
        self._last_words = ""
        listen_for_last_words(self)
        if row_factory is not None:
            self.row_factory = row_factory
        self.lock = Lock()  # type: ignore[assignment]  # declared as asyncio's

    @classmethod
    async def connect(  # type: ignore[override]  # psycopg's has any keyword
        cls,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: AdaptContext | None = None,
        row_factory: AsyncRowFactory[Row] | None = None,
        cursor_factory: type[psycopg.AsyncCursor[Row]] | None = None,
        cleanup_timeout: float = 5.0,
        **kwargs: Unpack[LibpqKeywords],
    ) -> Self:
        """Connect to a server; see `psycopg.AsyncConnection.connect`.

        Host names are resolved in a thread. Every host, and every address of a host, is one attempt,
        for which `connect_timeout` counts. The next one begins when the one before has failed, or has
        been silent for half a second; the first that succeeds ends the others. If `connect_timeout` is
        not given, and there is a deadline, the attempts share the time that is left. `cleanup_timeout`
        is kept as the attribute of that name. Raises `psycopg.OperationalError`.
        """
        check_seconds("cleanup_timeout", cleanup_timeout)
        pgconn = await connect_to_first(conninfo, kwargs)
        warn_if_cancelling_freezes(type(pgconn).__module__)
        connection = cls(pgconn)
        connection.cleanup_timeout = cleanup_timeout
        connection._autocommit = bool(autocommit)
        if row_factory:
            connection.row_factory = row_factory
        if cursor_factory:
            connection.cursor_factory = cursor_factory
        if context:
            connection._adapters = AdaptersMap(context.adapters)
        connection.prepare_threshold = prepare_threshold
        try:
            await connection._instrument()
        except BaseException:
            connection._finish(on_purpose=True)  # the caller never gets it
            raise
        return connection

    async def _instrument(self) -> None:
        """Let OpenTelemetry instrument this connection, and others that wrap psycopg's `connect`.

        It replaces the cursor factory of a new connection there, but psycopg's own
        `AsyncConnection.connect` is not called for this one. The wrapper is one of wrapt's. It is
        called around a function that only takes the cursor factory, as the connection is open by now.
        What it returns is not used: some libraries return a proxy, which is no connection to a pool.
        """

        async def connected(*_: object, cursor_factory: Any, **__: object) -> TrioConnection[Row]:
            self.cursor_factory = cursor_factory
            return self

        # Looked up each time, as a wrapper may come, and go, at any time.
        method = vars(psycopg.AsyncConnection)["connect"]
        while (wrapper := getattr(method, "_self_wrapper", None)) is not None:
            await wrapper(connected, type(self), (), {"cursor_factory": self.cursor_factory})
            method = method.__wrapped__

    @enable_ki_protection
    async def wait(
        self, gen: PQGen[RV], interval: float | None = None, timeout: float | None = None
    ) -> RV:
        """Run one of psycopg's generators to its end; psycopg calls this for each operation.

        Only `notifies` sets a limit: as `timeout` in new releases of psycopg, as `interval` in old
        ones. Raises `psycopg.OperationalError` if the connection is closed meanwhile. A Ctrl-C is
        raised where this waits, as a cancellation is, and not in the middle of psycopg's code.
        """
        if getattr(gen, "gi_code", None) is _STREAMING:
            self._has_streamed = True
        if self._needs_care:
            if self._copy_was_ended:
                await refuse_rest_of_copy(self, gen)
            after_cleanup(self)
        socket = self.pgconn.socket
        limit = timeout if timeout is not None else interval
        try:
            if limit is not None:
                or_raise = timeout is not None
                return await drive_for(limit, gen, socket, self._checkpoint, or_raise=or_raise)
            try:
                wanted = next(gen)
            except StopIteration as end:
                # What it needed had arrived before, as the results of a pipeline often have. This is
                # what each of them costs, so it calls no more than it has to.
                if perf_counter() > self._time_slice.ends:
                    await self._checkpoint()
                elif self.pgconn.transaction_status == _ACTIVE:
                    await checkpoint_if_cancelled()
                return end.value  # type: ignore[no-any-return]  # StopIteration is not generic
            return await drive(gen, socket, self._checkpoint, wanted=wanted)
        except (trio.ClosedResourceError, OSError) as error:
            raise psycopg.OperationalError("the connection is closed") from error
        except Exception as error:
            # The operation itself has failed, so it is over.
            note_last_words(self, error)
            raise
        except BaseException:
            # A cancellation, or a Ctrl-C.
            await self._cancel_operation(gen)
            raise

    async def _cancel_operation(self, gen: PQGen[Any] | None) -> None:
        """Leave the connection usable, or closed, after an interruption; see `cancel_operation`."""
        try:
            await cancel_operation(self, gen)
        except BaseException:
            # A second Ctrl-C: the user does not want to wait for the server.
            self._finish()
            raise

    async def _checkpoint_between_rows(self) -> None:
        """Raise a cancellation, or a Ctrl-C, if there is one, in the middle of a stream or a COPY."""
        try:
            await checkpoint_if_cancelled()
        except BaseException:
            await self._cancel_operation(None)
            raise

    async def _checkpoint(self) -> None:
        """Let other tasks run, from time to time, after operations that did not have to wait.

        An operation has been done when this is called, so it is too late to cancel it, unless it is
        one of many: in a stream, a copy or a pipeline.
        """
        is_one_of_many = self.pgconn.transaction_status == _ACTIVE
        if self._time_slice.is_over():
            await (trio.lowlevel.checkpoint if is_one_of_many else cancel_shielded_checkpoint)()
            self._time_slice.restart()
        elif is_one_of_many:
            await checkpoint_if_cancelled()

    @enable_ki_protection
    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Cancel the running operation on the server; see `psycopg.AsyncConnection.cancel_safe`.

        `timeout` is in seconds; after it, `psycopg.errors.CancellationTimeout` is raised. With a libpq
        older than 17 the request needs a thread.
        """
        if self._should_cancel():
            await request_cancel(self, timeout)

    @enable_ki_protection
    async def _try_cancel(self, *, timeout: float | None = None) -> None:
        """Cancel as well as possible; psycopg calls this when a copy or a stream is left early.

        It is shielded, because psycopg then reads to the end of the operation, which comes soon only
        if the server has cancelled it. If the server does not answer the request, or the request may
        still arrive later, the connection is closed.
        """
        with cleanup_scope(self):
            try:
                await self.cancel_safe(timeout=min(timeout or math.inf, SILENCE))
            except psycopg.errors.CancellationTimeout:
                note_silence(self)
            except Exception:
                pass
        if self._unconfirmed_requests or is_silent(self):
            self._finish()

    @uninterrupted_block
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[AsyncTransaction]:
        """Run a block in a transaction, or in a savepoint; see `psycopg.AsyncConnection.transaction`.

        A block that is left by a cancellation is rolled back, shielded from it.
        """
        transaction = TrioTransaction(self, savepoint_name, force_rollback)
        if self._pipeline:
            async with self.pipeline(), transaction, self.pipeline():
                yield transaction
        else:
            async with transaction:
                yield transaction

    @uninterrupted_block
    async def pipeline(self) -> AsyncIterator[AsyncPipeline]:
        """Run a block in pipeline mode; see `psycopg.AsyncConnection.pipeline`.

        If the block is left by a cancellation, what it sent is cancelled on the server.
        """
        async with self.lock:
            self._check_connection_ok()
            if self._pipeline is None:
                await self._leave_single_row_mode()
                self._pipeline = TrioPipeline(self)
            pipeline = self._pipeline
        try:
            async with pipeline:
                yield pipeline
        finally:
            if pipeline.level == 0:
                self._leave_pipeline_mode()
                if self.lock.locked():
                    with cleanup_scope(self) as scope:
                        async with self.lock:
                            pass
                    if scope.cancelled_caught:
                        self._finish()
                self._pipeline = None

    @uninterrupted_block
    async def _pipeline_nolock(self) -> AsyncIterator[AsyncPipeline]:
        """Run a block in pipeline mode, with the lock; psycopg's `executemany` does."""
        await self._leave_single_row_mode()
        pipeline = self._pipeline = TrioPipeline(self, _no_lock=True)
        try:
            async with pipeline:
                yield pipeline
        finally:
            self._leave_pipeline_mode()
            self._pipeline = None

    async def _leave_single_row_mode(self) -> None:
        """Make libpq forget that a stream asked for single rows.

        It would return those to the first query of a pipeline, which psycopg takes for an error, be it
        that of another client. Any query outside a pipeline, an empty one, too, ends that.
        """
        if self._has_streamed:
            self.pgconn.send_query(b"")
            await self.wait(execute(self.pgconn))
            self._has_streamed = False

    def _leave_pipeline_mode(self) -> None:
        """Close the connection if psycopg was kept from leaving the mode, as nothing else leaves it."""
        if self.pgconn.pipeline_status:
            self._finish()

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                await checkpoint_before_commit(self.__aexit__)
            if self.lock.locked() and not isinstance(exc_val, (Exception, type(None))):
                # A Ctrl-C has left an operation that holds the lock, and nothing may release it. To
                # close the connection rolls back, too, but does not stop what the server does for it.
                if self.pgconn.transaction_status == _ACTIVE:
                    await self._try_cancel()
                return
            with shielded_cleanup(self):
                await super().__aexit__(exc_type, exc_val, exc_tb)
        finally:
            self._finish(on_purpose=True)

    async def close(self) -> None:
        """Close the connection. A task that waits for it gets `psycopg.OperationalError`."""
        self._finish(on_purpose=True)
        await trio.lowlevel.checkpoint()

    def _finish(self, *, on_purpose: bool = False) -> None:
        """Close the connection, without a checkpoint; do nothing if it is closed.

        It is `broken` afterwards, unless that was `on_purpose`. Trio is told before the socket is
        closed, so that a task that waits for the socket is woken.
        """
        if not self.closed:
            self._closed = on_purpose
            notify_closing(self.pgconn.socket)
            self.pgconn.finish()


async def connect(
    conninfo: str = "",
    *,
    autocommit: bool = False,
    prepare_threshold: int | None = 5,
    context: AdaptContext | None = None,
    row_factory: AsyncRowFactory[R] | None = None,
    cursor_factory: type[psycopg.AsyncCursor[Any]] | None = None,
    cleanup_timeout: float = 5.0,
    **kwargs: Unpack[LibpqKeywords],
) -> TrioConnection[R]:
    """Connect to a server: `TrioConnection.connect`, as a function."""
    warn_if_cancelling_freezes(pq.PGconn.__module__)  # here, too, as it names the line that called it
    return await TrioConnection[R].connect(
        conninfo,
        autocommit=autocommit,
        prepare_threshold=prepare_threshold,
        context=context,
        row_factory=row_factory,
        cursor_factory=cursor_factory,
        cleanup_timeout=cleanup_timeout,
        **kwargs,
    )
