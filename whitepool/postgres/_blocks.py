"""What a task enters and leaves on a connection: transactions, pipelines, server-side cursors.

Each is psycopg's own. What is added here is that it is left in order also if its task is being
cancelled, when each operation of psycopg's ``__aexit__`` would only raise the cancellation again.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg import AsyncCursor, AsyncPipeline, AsyncServerCursor, pq
from psycopg.rows import Row
from psycopg.transaction import AsyncTransaction

from ._cancelling import cancel_until, checkpoint_before_commit, shielded_cleanup
from ._last_words import is_silent
from ._waiting import ungrouped

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._connection import TrioConnection


class TrioTransaction(AsyncTransaction):
    """A transaction that is rolled back also if its task is being cancelled.

    psycopg's own ``__aexit__`` begins with the connection's lock, which is a checkpoint: in a task that
    is being cancelled it would never come to the ROLLBACK.
    """

    _conn: TrioConnection[Any]

    async def __aenter__(self) -> Self:
        try:
            return await super().__aenter__()
        except (trio.Cancelled, KeyboardInterrupt) as interrupt:
            # psycopg 3.2 does not undo what it has begun, and its block will not be left.
            await self._roll_back(type(interrupt), interrupt, interrupt.__traceback__)
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        await checkpoint_before_commit(self._roll_back)
        if self._is_on_stack() and not isinstance(exc_val, (Exception, trio.Cancelled, type(None))):
            # A Ctrl-C may have struck where an inner block was about to be left: it is rolled back with
            # this one. psycopg would raise an error, instead of the Ctrl-C.
            self._conn._num_transactions = self._stack_index + 1
        try:
            return await super().__aexit__(exc_type, exc_val, exc_tb)
        except (trio.Cancelled, KeyboardInterrupt) as interrupt:
            # If psycopg was still waiting for the connection's lock, nothing has been committed.
            await self._roll_back(type(interrupt), interrupt, interrupt.__traceback__)
            raise

    async def _roll_back(
        self,
        exc_type: type[BaseException],
        exc_val: BaseException,
        exc_tb: TracebackType | None,
    ) -> None:
        """Roll back, or close the connection, unless psycopg has ended the transaction already.

        Call it in a task that is being cancelled, or interrupted by Ctrl-C.
        """
        if self._is_on_stack():
            with shielded_cleanup(self._conn):
                await super().__aexit__(exc_type, exc_val, exc_tb)
        if self._is_on_stack():
            # psycopg has not begun to roll back: another task has held the lock all the time.
            await self._conn.close()

    def _is_on_stack(self) -> bool:
        """Return whether psycopg counts the transaction among those that were entered, and not left.

        psycopg takes it off that stack before it sends the COMMIT or the ROLLBACK.
        """
        return 0 <= self._stack_index < self._conn._num_transactions


class TrioPipeline(AsyncPipeline):
    """A pipeline that is left in order also if its task is being cancelled.

    Leaving the mode takes a round trip: everything that was sent has to be answered before.
    """

    _conn: TrioConnection[Any]

    async def __aenter__(self) -> Self:
        level = self.level
        try:
            return await super().__aenter__()
        except BaseException as error:
            if self.level > level:
                # psycopg has entered the mode: the exception came at the checkpoint after that.
                await self.__aexit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_val is None:
            await checkpoint_before_commit(self.__aexit__)
        with shielded_cleanup(self._conn) as scope:
            # No task waits any more for the results of what the server is still working on.
            if scope.shield and self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                await self._cancel_and_leave(scope, exc_type, exc_val, exc_tb)
            else:
                await self._leave(exc_type, exc_val, exc_tb)
        if scope.cancelled_caught:
            # There was no answer in time, and without it there is no way out of the mode.
            await self._conn.close()

    async def _leave(self, *exception: Any) -> None:
        """Send what has not been sent, read all results, and leave the pipeline mode.

        `exception` is what ``__aexit__`` got: psycopg raises its own errors only if there is none.
        """
        try:
            await super().__aexit__(*exception)
        except psycopg.OperationalError as error:
            # After a Ctrl-C, or a cancellation, in the middle of the results, psycopg fails to leave
            # the mode. What the user has to see is the interruption.
            interruption = error.__context__
            if interruption is None or isinstance(interruption, Exception):
                raise
        else:
            return
        raise interruption  # out here, so that its context stays what it was

    async def _cancel_and_leave(self, scope: trio.CancelScope, *exception: Any) -> None:
        """Leave while the server is working: cancel there whatever the pipeline has sent.

        Call it within `shielded_cleanup`, whose scope is `scope`, in a task that is being cancelled.
        """
        left = trio.Event()

        async def cancel() -> None:
            # If the requests are refused, the pipeline may still end by itself in time.
            if not await cancel_until(self._conn, left.wait) and is_silent(self._conn):
                scope.cancel()

        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel)
                await self._leave(*exception)
                left.set()


class TrioServerCursor(AsyncServerCursor[Row]):
    """A server-side cursor that is closed also if its task is being cancelled."""

    _conn: TrioConnection[Any]

    async def close(self) -> None:
        interrupted = True
        try:
            with shielded_cleanup(self._conn) as scope:
                await super().close()
            interrupted = scope.cancelled_caught
        except Exception:
            interrupted = False
            raise
        finally:
            if interrupted:
                # On the server it is closed, or will be at the end of the transaction, or of the
                # connection. Close the rest.
                await AsyncCursor.close(self)
