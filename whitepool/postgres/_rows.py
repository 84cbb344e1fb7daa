"""Rows one by one: those of a COPY TO STDOUT, and of a stream.

For each row, psycopg runs a generator in a wait, which takes longer than the row itself. But most rows
have arrived together with the one before. Those are taken from libpq here as they are, until it is time
to let other tasks run, which is up to the connection's `wait`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import AsyncCopy, AsyncCursor, pq
from psycopg.abc import Buffer, Params, PQGen, Query
from psycopg.copy import AsyncWriter
from psycopg.generators import fetch, fetch_many
from psycopg.rows import Row
from trio.lowlevel import enable_ki_protection

from ._cancelling import skip_results
from ._waiting import uninterrupted_block

if TYPE_CHECKING:
    from ._connection import TrioConnection

_ROWS = (pq.ExecStatus.SINGLE_TUPLE, pq.ExecStatus.TUPLES_CHUNK)
_ENDS = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)


class TrioCopy(AsyncCopy):
    """A COPY that takes rows as they are when they have arrived."""

    connection: TrioConnection[Any]

    # Ctrl-C must not strike between taking a row and returning it.
    @enable_ki_protection
    async def read(self) -> Buffer:
        """Read a row that is not parsed; see `psycopg.AsyncCopy.read`."""
        if not (self._finished or self.connection._time_slice.is_over()):
            try:
                length, row = self._pgconn.get_copy_data(1)
            except psycopg.Error:
                pass  # the wait says what is wrong
            else:
                if length > 0:
                    await self.connection._checkpoint_between_rows()
                    return row
                if length < 0:
                    return await self.connection.wait(self._end_gen())
        return await super().read()

    @enable_ki_protection
    async def read_row(self) -> tuple[Any, ...] | None:
        """Read a row, and parse it; see `psycopg.AsyncCopy.read_row`."""
        if not (data := await self.read()):
            return None
        row = self.formatter.parse_row(data)
        if row is None:
            await self.read()  # in the binary format, there is an end before the end
        return row

    def _end_gen(self) -> PQGen[Buffer]:
        """Fetch the result of the COPY, which comes after the last row."""
        results = yield from fetch_many(self._pgconn)
        if not results:
            raise psycopg.InterfaceError("the COPY has no result")
        result, *others = results
        if others:
            raise psycopg.ProgrammingError("you cannot mix COPY with other operations")
        if result.status != pq.ExecStatus.COMMAND_OK:
            self.cursor._raise_for_result(result)
        self._finished = True
        self.cursor._rowcount = -1 if result.command_tuples is None else result.command_tuples
        return memoryview(b"")


class TrioCursor(AsyncCursor[Row]):
    """A cursor whose COPY is left in order also after a Ctrl-C, and whose rows one by one are fast."""

    _conn: TrioConnection[Any]

    @uninterrupted_block
    async def copy(
        self, statement: Query, params: Params | None = None, *, writer: AsyncWriter | None = None
    ) -> AsyncIterator[AsyncCopy]:
        """Run a COPY; see `psycopg.AsyncCursor.copy`."""
        connection = self._conn
        async with connection.lock:
            await connection.wait(self._start_copy_gen(statement, params))
            async with TrioCopy(self, writer=writer) as copy:
                yield copy
        self._select_current_result(0)  # that of the end, which has the count of rows

    @enable_ki_protection
    async def stream(
        self,
        query: Query,
        params: Params | None = None,
        *,
        binary: bool | None = None,
        size: int = 1,
    ) -> AsyncIterator[Row]:
        """Run a query, and iterate over its rows as they arrive; see `psycopg.AsyncCursor.stream`."""
        connection, pgconn = self._conn, self._pgconn
        if pgconn.pipeline_status:
            raise psycopg.ProgrammingError("stream() cannot be used in pipeline mode")
        async with connection.lock:
            try:
                send = self._stream_send_gen(query, params, binary=binary, size=size)
                await connection.wait(send)
                result = await connection.wait(self._next_rows_gen())
                is_first = True
                while result is not None:
                    self.pgresult = result
                    self._tx.set_pgresult(result, set_loaders=is_first)
                    if is_first:
                        self._make_row = self._make_row_maker()
                        is_first = False
                    for number in range(result.ntuples):
                        yield self._tx.load_row(number, self._make_row)
                    result = None
                    if not (pgconn.is_busy() or connection._time_slice.is_over()):
                        result = pgconn.get_result()
                        if result is not None and result.status in _ROWS:
                            await connection._checkpoint_between_rows()
                            continue
                    # There is a wait, or this is the end, or the connection was closed meanwhile.
                    result = await connection.wait(self._next_rows_gen(result))
            finally:
                if pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                    # The caller has left early, or the query can't be streamed.
                    await connection._try_cancel()
                    with suppress(Exception):
                        await connection.wait(skip_results(pgconn))

    def _next_rows_gen(self, result: pq.abc.PGresult | None = None) -> PQGen[pq.abc.PGresult | None]:
        """Fetch the next rows; None at the end. If the next `result` is there, begin with that."""
        if result is None:
            result = yield from fetch(self._pgconn)
        if result is None or result.status in _ROWS:
            return result
        if result.status == pq.ExecStatus.FATAL_ERROR:
            with suppress(psycopg.Error):
                yield from skip_results(self._pgconn)
        elif result.status in _ENDS:
            yield from skip_results(self._pgconn)
        if result.status not in _ENDS:
            self._raise_for_result(result)
        if result.status == pq.ExecStatus.COMMAND_OK:
            raise psycopg.ProgrammingError("the operation in stream() didn't produce a result")
        return None
