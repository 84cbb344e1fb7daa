"""psycopg's AsyncConnection on Trio.

psycopg keeps its protocol apart from the waiting. Only the waiting is replaced here: connecting, the
lock, the wait for an operation, cancelling, and closing. Everything else is psycopg's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import psycopg
import trio
from psycopg import AsyncPipeline, pq
from psycopg.abc import RV, AdaptContext, ConnParam, PQGen
from psycopg.adapt import AdaptersMap
from psycopg.rows import AsyncRowFactory, Row
from psycopg.transaction import AsyncTransaction
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from .._manager import WorkerManager
from .._scheduling import TimeSlice
from ._blocks import TrioPipeline, TrioServerCursor, TrioTransaction
from ._cancelling import (
    CLEANUP_TIMEOUT,
    cancel_operation,
    checkpoint_before_commit,
    cleanup_scope,
    refuse_rest_of_copy,
    request_cancel,
    shielded_cleanup,
)
from ._connecting import connect_to_first
from ._waiting import Lock, drive, drive_for

if TYPE_CHECKING:
    from typing_extensions import Self

BUSY_TIME = 0.0001
"""Seconds for which operations that never have to wait, on one connection, may keep the event loop.
It is short because many connections may be read at once, and they share the event loop in turns."""

_ACTIVE = pq.TransactionStatus.ACTIVE


class TrioConnection(psycopg.AsyncConnection[Row]):
    """A connection to PostgreSQL: `psycopg.AsyncConnection`, for Trio.

    A cancelled operation is cancelled on the server as well, and raises `trio.Cancelled` when the
    connection is usable again, or closed.
    """

    __worker_manager__: ClassVar[WorkerManager[TrioConnection[Any]]]
    """How a pool treats connections that come from a bare factory; `_manager.py` sets it."""

    def __init__(
        self,
        pgconn: pq.abc.PGconn,
        row_factory: AsyncRowFactory[Row] | None = None,
    ) -> None:
        super().__init__(pgconn)
        self.server_cursor_factory = TrioServerCursor
        # Whether a cancellation has ended a COPY FROM STDIN whose block has not been left yet.
        self._copy_was_ended = False
        self._time_slice = TimeSlice(BUSY_TIME)
        if row_factory is not None:
            self.row_factory = row_factory
        self.lock = Lock()  # type: ignore[assignment]  # declared as asyncio's

    @classmethod
    async def connect(
        cls,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: AdaptContext | None = None,
        row_factory: AsyncRowFactory[Row] | None = None,
        cursor_factory: type[psycopg.AsyncCursor[Row]] | None = None,
        **kwargs: ConnParam,
    ) -> Self:
        """Connect to a server; see `psycopg.AsyncConnection.connect`.

        Host names are resolved in a thread. Every host, and every address of a host, is one attempt,
        for which `connect_timeout` counts. If that is not given, and there is a deadline, the attempts
        share the time that is left. Raises `psycopg.OperationalError`.
        """
        connection = cls(await connect_to_first(conninfo, kwargs))
        connection._autocommit = bool(autocommit)
        if row_factory:
            connection.row_factory = row_factory
        if cursor_factory:
            connection.cursor_factory = cursor_factory
        if context:
            connection._adapters = AdaptersMap(context.adapters)
        connection.prepare_threshold = prepare_threshold
        return connection

    async def wait(
        self, gen: PQGen[RV], interval: float | None = None, timeout: float | None = None
    ) -> RV:
        """Run one of psycopg's generators to its end; psycopg calls this for each operation.

        Only `notifies` sets a limit: as `timeout` in new releases of psycopg, as `interval` in old
        ones. Raises `psycopg.OperationalError` if the connection is closed meanwhile.
        """
        if self._copy_was_ended:
            await refuse_rest_of_copy(self, gen)
        socket = self.pgconn.socket
        limit = timeout if timeout is not None else interval
        try:
            if limit is None:
                return await drive(gen, socket, self._checkpoint)
            return await drive_for(limit, gen, socket, self._checkpoint, or_raise=timeout is not None)
        except (trio.ClosedResourceError, OSError) as error:
            raise psycopg.OperationalError("the connection is closed") from error
        except Exception:
            # The operation itself has failed, so it is over.
            raise
        except BaseException:
            # A cancellation, or a Ctrl-C.
            try:
                await cancel_operation(self, gen)
            except BaseException:
                # A second Ctrl-C: the user does not want to wait for the server.
                self._finish()
                raise
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

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Cancel the running operation on the server; see `psycopg.AsyncConnection.cancel_safe`.

        `timeout` is in seconds; after it, `psycopg.errors.CancellationTimeout` is raised. With a libpq
        older than 17 the request needs a thread.
        """
        if self._should_cancel():
            await request_cancel(self.pgconn, timeout)

    async def _try_cancel(self, *, timeout: float = CLEANUP_TIMEOUT) -> None:
        """Cancel as well as possible; psycopg calls this when a copy or a stream is left early.

        It is shielded, because psycopg then reads to the end of the operation, which comes soon only
        if the server has cancelled it.
        """
        with trio.CancelScope(shield=True), suppress(Exception):
            await self.cancel_safe(timeout=timeout)

    @asynccontextmanager
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

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[AsyncPipeline]:
        """Run a block in pipeline mode; see `psycopg.AsyncConnection.pipeline`.

        If the block is left by a cancellation, what it sent is cancelled on the server.
        """
        async with self.lock:
            self._check_connection_ok()
            if self._pipeline is None:
                self._pipeline = TrioPipeline(self)
            pipeline = self._pipeline
        try:
            async with pipeline:
                yield pipeline
        finally:
            if pipeline.level == 0:
                if self.pgconn.pipeline_status:
                    # A cancellation kept psycopg from leaving the mode, and nothing else leaves it.
                    self._finish()
                with cleanup_scope():
                    async with self.lock:
                        self._pipeline = None

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                await checkpoint_before_commit(self.__aexit__)
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
            trio.lowlevel.notify_closing(self.pgconn.socket)
            self.pgconn.finish()


connect = TrioConnection.connect
