"""psycopg's AsyncConnection, native on Trio.

psycopg keeps protocol and waiting apart. All that is replaced here is the waiting: connecting, the
lock, the wait for a query, cancelling and closing. The rest is psycopg's own.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import psycopg
import trio
from psycopg import AsyncPipeline, capabilities, errors, generators, pq
from psycopg.abc import RV, AdaptContext, ConnParam, PQGen
from psycopg.adapt import AdaptersMap
from psycopg.rows import AsyncRowFactory, Row
from psycopg.transaction import AsyncTransaction
from psycopg.waiting import Wait
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled, enable_ki_protection

from .._manager import WorkerManager
from .._scheduling import NOOP, NoopAwaitable, TimeSlice
from ._blocks import TrioPipeline, TrioServerCursor, TrioTransaction
from ._connecting import connect_to_first
from ._waiting import drive, poll, ready_now

if TYPE_CHECKING:
    from typing_extensions import Self

_ACTIVE = pq.TransactionStatus.ACTIVE
_UNKNOWN = pq.TransactionStatus.UNKNOWN

_COPYING_IN = (generators.copy_to.__code__, generators.copy_end.__code__)

# The connection on which the current task has no use for operations that do not succeed.
_expendable: ContextVar[TrioConnection[Any] | None] = ContextVar("expendable", default=None)

BUSY_TIME = 0.0001
"""Seconds for which operations that never have to wait, on one connection, may keep the event loop.
That is not long, as many connections may be read at once, and each has its turn."""

CLEANUP_TIMEOUT = 5.0
"""Seconds that a cancelled operation may take to leave the connection, and the server, in order."""


class Lock:
    """A lock that does not go through the scheduler when it is free.

    Psycopg takes it for each operation, and the operation is a checkpoint itself. It has no owner,
    as an asynchronous generator may be closed by another task than the one that started it.
    """

    def __init__(self) -> None:
        self._free = trio.Semaphore(1, max_value=1)

    def locked(self) -> bool:
        return not self._free.value

    @enable_ki_protection
    async def __aenter__(self) -> None:
        await checkpoint_if_cancelled()
        try:
            self._free.acquire_nowait()
        except trio.WouldBlock:
            await self._free.acquire()

    @enable_ki_protection
    def __aexit__(self, *_: object) -> NoopAwaitable:
        self._free.release()
        return NOOP


def _skip_results(pgconn: pq.abc.PGconn) -> PQGen[None]:
    """Read to the end of a query's results, and keep none of them.

    The server may have sent some hundred thousand rows before it heard that nobody wants them.
    """
    while True:
        while pgconn.is_busy():
            yield Wait.R
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            return
        if result.status == pq.ExecStatus.COPY_OUT:
            with suppress(psycopg.Error):  # the cancellation itself
                while (length := pgconn.get_copy_data(1)[0]) >= 0:
                    if length == 0:
                        yield Wait.R
                        pgconn.consume_input()


class TrioConnection(psycopg.AsyncConnection[Row]):
    """A connection to PostgreSQL: `psycopg.AsyncConnection`, for Trio.

    A cancelled operation is cancelled on the server as well, and raises `trio.Cancelled` when the
    connection is usable again, or closed.
    """

    __worker_manager__: ClassVar[WorkerManager[TrioConnection[Any]]]
    """How a pool treats connections, also those of a bare factory."""

    def __init__(
        self,
        pgconn: pq.abc.PGconn,
        row_factory: AsyncRowFactory[Row] | None = None,
    ) -> None:
        super().__init__(pgconn)
        self.server_cursor_factory = TrioServerCursor
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
        for which `connect_timeout` counts. Where that is not given, and there is a deadline, the
        attempts share the time that is left. Raises `psycopg.OperationalError`.
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
        """Run one of psycopg's generators to its end. (psycopg calls this.)

        psycopg's asyncio looks up from its wait at an `interval` to notice Ctrl-C; Trio needs none.
        Only `notifies` sets a limit: as `timeout` in new releases, as `interval` in old ones.
        """
        if self._has_ended_already(gen):
            gen.close()
            await checkpoint_if_cancelled()  # the block is being left
            raise errors.QueryCanceled("the COPY has ended: a cancellation came between")
        socket = self.pgconn.socket
        limit = timeout if timeout is not None else interval
        try:
            if limit is None:
                return await drive(gen, socket, self._checkpoint)
            with trio.move_on_after(max(0, limit)):
                return await drive(gen, socket, self._checkpoint)
            ready = ready_now(socket, Wait.R)  # what has arrived counts, also with a limit of 0
            if not ready and timeout is not None:
                raise errors._WaitTimeout("wait timeout expired")
            try:
                gen.send(ready)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            raise psycopg.InternalError("the operation has no limit")
        except (trio.ClosedResourceError, OSError) as error:
            raise psycopg.OperationalError("the connection is closed") from error
        except Exception:
            raise
        except BaseException:
            try:
                await self._stop(gen)
            except BaseException:  # another Ctrl-C
                self._finish()
                raise
            raise

    async def _checkpoint(self) -> None:
        """Give way to others, from time to time, after operations that did not have to wait.

        It is too late to cancel one, unless it is one of many: in a stream, a copy or a pipeline.
        """
        is_one_of_many = self.pgconn.transaction_status == _ACTIVE
        if self._time_slice.is_over():
            await (trio.lowlevel.checkpoint if is_one_of_many else cancel_shielded_checkpoint)()
            self._time_slice.restart()
        elif is_one_of_many:
            await checkpoint_if_cancelled()

    async def _stop(self, gen: PQGen[Any]) -> None:
        """Cancel the running query on the server, and read to the end of it."""
        pgconn = self.pgconn
        if pgconn.transaction_status != _ACTIVE:
            return
        if _expendable.get() is self:
            self._finish()
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANUP_TIMEOUT) as scope:
            pause, refusals = 0.1, 0
            while True:
                try:
                    await self.cancel_safe()
                except psycopg.ProgrammingError:
                    pass  # a prepared transaction can't be cancelled: wait for it
                except Exception:
                    # It may have been heard all the same, but somebody has to be there.
                    refusals += 1
                    if refusals > 2:
                        self._finish()
                        return
                # A request that overtakes its query is ignored by the server: ask again.
                with trio.move_on_after(pause):
                    # What goes wrong is most likely QueryCanceled, as wanted. It is the state that
                    # counts in which this leaves the connection.
                    with suppress(Exception):
                        await drive(gen, pgconn.socket, resumed=True)
                    break
                pause *= 2
            if pgconn.pipeline_status:
                return  # the block that the task is about to leave does the rest
            with suppress(Exception):
                if self._is_copying_in():
                    self._copy_was_ended = True
                    await drive(generators.copy_end(pgconn, b"cancelled"), pgconn.socket)
            with suppress(Exception):
                await drive(_skip_results(pgconn), pgconn.socket)
        if scope.cancelled_caught or pgconn.transaction_status in (_ACTIVE, _UNKNOWN):
            self._finish()

    @contextmanager
    def _tidying(self) -> Iterator[trio.CancelScope]:
        """Leave a block in order: where the task is being cancelled, shielded and bounded."""
        if trio.current_effective_deadline() > -math.inf:
            yield trio.CancelScope()
            return
        deadline = trio.current_time() + CLEANUP_TIMEOUT
        with trio.CancelScope(shield=True, deadline=deadline) as scope, self._expendable():
            yield scope

    @contextmanager
    def _expendable(self) -> Iterator[None]:
        """Within this, an operation of this task that is cancelled closes the connection, at once.

        For whoever has no use for a connection on which that operation did not succeed.
        """
        token = _expendable.set(self)
        try:
            yield
        finally:
            _expendable.reset(token)

    def _has_ended_already(self, gen: PQGen[Any]) -> bool:
        """Say whether this is the rest, or the end, of a COPY that a cancellation has ended before."""
        if getattr(gen, "gi_code", None) not in _COPYING_IN:
            self._copy_was_ended = False
        return self._copy_was_ended

    def _is_copying_in(self) -> bool:
        """Say whether the connection is in the middle of a COPY FROM STDIN."""
        try:
            self.pgconn.put_copy_data(b"")
        except psycopg.Error:
            return False
        return True

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Cancel the running operation on the server; see `psycopg.AsyncConnection.cancel_safe`.

        With a libpq older than 17 it needs a thread.
        """
        if not self._should_cancel():
            return
        with trio.move_on_after(timeout or float("inf")):
            if capabilities.has_cancel_safe():
                request = self.pgconn.cancel_conn()
                request.start()
                if not await poll(request.poll, lambda: request.socket):
                    raise psycopg.OperationalError(
                        f"cancellation failed: {request.get_error_message()}"
                    )
            else:
                # It has all it needs, and may be left alone with it.
                cancel = self.pgconn.get_cancel().cancel
                await trio.to_thread.run_sync(cancel, abandon_on_cancel=True)
            return
        raise errors.CancellationTimeout("cancellation timeout expired")

    async def _try_cancel(self, *, timeout: float = CLEANUP_TIMEOUT) -> None:
        """Cancel as well as possible. (psycopg calls this where a copy or a stream is left early.)"""
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

        Where the block is left by a cancellation, what it sent is cancelled on the server.
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
                    self._finish()  # a cancellation has come between: it is not to be left any more
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANUP_TIMEOUT):
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
                try:
                    await checkpoint_if_cancelled()
                except trio.Cancelled as cancelled:  # too late to commit
                    await self.__aexit__(type(cancelled), cancelled, cancelled.__traceback__)
                    raise
            with self._tidying():
                await super().__aexit__(exc_type, exc_val, exc_tb)
        finally:
            self._finish(on_purpose=True)

    async def close(self) -> None:
        """Close the connection. A task that waits for it gets `psycopg.OperationalError`."""
        self._finish(on_purpose=True)
        await trio.lowlevel.checkpoint()

    def _finish(self, *, on_purpose: bool = False) -> None:
        if not self.closed:
            self._closed = on_purpose  # else it is `broken`
            trio.lowlevel.notify_closing(self.pgconn.socket)
            self.pgconn.finish()


connect = TrioConnection.connect
