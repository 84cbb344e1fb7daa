"""What a task enters and leaves on a connection: transactions, pipelines, cursors on the server.

Each is psycopg's own, and is left in order also when its task is being cancelled.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg import AsyncCursor, AsyncPipeline, AsyncServerCursor, pq
from psycopg.rows import Row
from psycopg.transaction import AsyncTransaction

from ._waiting import ungrouped

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._connection import TrioConnection


class TrioTransaction(AsyncTransaction):
    """A transaction that is rolled back also when its task is being cancelled."""

    _conn: TrioConnection[Any]

    async def __aenter__(self) -> Self:
        try:
            return await super().__aenter__()
        except trio.Cancelled as cancelled:
            if self._is_on_stack():  # psycopg 3.2 stays half-way inside
                await self._roll_back(cancelled)
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            return await super().__aexit__(exc_type, exc_val, exc_tb)
        except trio.Cancelled as cancelled:
            if self._is_on_stack():  # it has not come to committing, or rolling back
                await self._roll_back(cancelled)
            raise

    def _is_on_stack(self) -> bool:
        return 0 <= self._stack_index < self._conn._num_transactions

    async def _roll_back(self, cancelled: trio.Cancelled) -> None:
        with self._conn._tidying():
            await super().__aexit__(type(cancelled), cancelled, cancelled.__traceback__)
        if self._is_on_stack():
            await self._conn.close()  # there was no answer within the time


class TrioPipeline(AsyncPipeline):
    """A pipeline that is left in order also when its task is being cancelled."""

    _conn: TrioConnection[Any]

    async def __aenter__(self) -> Self:
        level = self.level
        try:
            return await super().__aenter__()
        except BaseException as error:
            if self.level > level:  # it was cancelled too late not to be inside
                await self.__aexit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_val is None:
            try:
                await trio.lowlevel.checkpoint_if_cancelled()
            except trio.Cancelled as cancelled:
                await self.__aexit__(type(cancelled), cancelled, cancelled.__traceback__)
                raise
        with self._conn._tidying() as scope:
            if scope.shield and self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                await self._cancel_and_leave(exc_type, exc_val, exc_tb)
            else:
                await self._leave(exc_type, exc_val, exc_tb)
        if scope.cancelled_caught:
            await self._conn.close()

    async def _leave(self, *exception: Any) -> None:
        try:
            await super().__aexit__(*exception)
        except psycopg.OperationalError as error:
            # psycopg can't leave the mode in the middle of what a Ctrl-C has interrupted.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise

    async def _cancel_and_leave(self, *exception: Any) -> None:
        """Cancel on the server what it is at, until there is an end of it."""
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_cancelling)
                await self._leave(*exception)
                nursery.cancel_scope.cancel()

    async def _keep_cancelling(self) -> None:
        """Ask the server again and again: a request that overtakes its query is ignored."""
        pause = 0.1
        while True:
            await self._conn._try_cancel()
            await trio.sleep(pause)
            pause *= 2


class TrioServerCursor(AsyncServerCursor[Row]):
    """A server-side cursor that is closed also when its task is being cancelled."""

    _conn: TrioConnection[Any]

    async def close(self) -> None:
        try:
            with self._conn._tidying():
                await super().close()
        except trio.Cancelled:
            # On the server it is closed, or will be with the transaction.
            await AsyncCursor.close(self)
            raise
