"""What a pool of Postgres connections adds for its clients: a block that commits."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import Any, Generic

import psycopg
import trio
from psycopg import pq
from psycopg.rows import Row
from trio.lowlevel import checkpoint_if_cancelled, enable_ki_protection

from .._entry import Entry, State
from .._session import Session, _Lease
from ._cancelling import shielded_cleanup
from ._connection import TrioConnection
from ._keywords import C, K

_IDLE = pq.TransactionStatus.IDLE
_ACTIVE = pq.TransactionStatus.ACTIVE
_INTRANS = pq.TransactionStatus.INTRANS
_INERROR = pq.TransactionStatus.INERROR


class PostgresSession(Session[C], Generic[Row, C]):
    """A `whitepool.Session` of a pool of connections to PostgreSQL. It adds `connection`.

    For type checkers it is ``PostgresSession[Row]``, of the type of the rows; with a connection class
    of your own, ``PostgresSession[Any, MyConnection]``.
    """

    def connection(self, timeout: float | None = None) -> AbstractAsyncContextManager[C]:
        """Check out a connection for an ``async with`` block that commits.

        When the block ends well, the transaction that is open then is committed; when the block raises,
        or is cancelled, it is rolled back. If there is none, as with ``autocommit=True``, nothing is
        sent. Then the connection is returned, whatever happened. Entering raises what `block_checkout`
        raises.

        This is what ``connection()`` of psycopg_pool does, but nothing is lost in silence. The end of
        the block raises an error, and what was not committed is rolled back, in these cases:

        - The commit fails: what the server says.
        - The task has been cancelled by then: `trio.Cancelled`. (If the cancellation comes while the
          server commits, only the server knows whether it has.)
        - A statement has failed, and the block has caught the error:
          `psycopg.errors.InFailedSqlTransaction`. PostgreSQL can only roll back such a transaction. Put
          a statement that may fail into a block of ``connection.transaction()``.
        - The connection is in the middle of a query, a copy, a pipeline or a ``transaction()`` block:
          `psycopg.ProgrammingError`.
        - The connection was lost, or the pool has closed it in a shutdown, and it was not in autocommit
          mode: `psycopg.OperationalError`.
        """
        return _CommittingLease(self, timeout)


class _CommittingLease(_Lease[K]):
    """`PostgresSession.connection`."""

    _usage = "session.connection() as connection"

    @enable_ki_protection
    async def __aexit__(  # type: ignore[override]  # leaving takes time here
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        resource, self._resource = self._resource, None
        assert resource is not None
        entry = resource._entry
        assert entry is not None  # only this block has the resource, to return it
        connection = entry.worker
        try:
            if error is not None:
                await _roll_back(connection)
                return
            try:
                # A task that is cancelled by now would never learn of a commit.
                await checkpoint_if_cancelled()
                _check_can_commit(entry)
                if connection.pgconn.transaction_status == _INTRANS:
                    await connection.commit()
            except BaseException:
                await _roll_back(connection)
                raise
        finally:
            self._session.checkin(resource)


def _check_can_commit(entry: Entry[Any]) -> None:
    """Raise an error if a commit would lose what was written, or would never end."""
    connection = entry.worker
    if connection.closed:
        # A client may close its connection on purpose, as with psycopg_pool.
        by_the_pool = entry.state is not State.IN_USE
        if (connection.broken or by_the_pool) and not connection.autocommit:
            raise psycopg.OperationalError(
                "the connection was closed before the end of its block: "
                "what the block had not committed itself is rolled back"
            )
    elif _is_busy(connection):
        raise psycopg.ProgrammingError(
            "the block ended while its connection was in use, by a query, a copy, a pipeline, "
            "a transaction, or a generator that was not closed: what had not been committed is "
            "rolled back"
        )
    elif connection.pgconn.transaction_status == _INERROR:
        raise psycopg.errors.InFailedSqlTransaction(
            "a statement of the block failed, so its transaction is rolled back, not committed: "
            "put a statement that may fail into a block of connection.transaction()"
        )


def _is_busy(connection: TrioConnection[Any]) -> bool:
    """Return whether the connection is in the middle of something that only its client can end."""
    status = connection.pgconn.transaction_status
    return bool(
        status == _ACTIVE
        or connection.pgconn.pipeline_status
        or connection._num_transactions
        or connection._tpc
        # Without a transaction it does no harm: `notifies`, for example, may still be waiting.
        or (status != _IDLE and connection.lock.locked())
    )


async def _roll_back(connection: TrioConnection[Any]) -> None:
    """End the transaction, if there is one, also in a task that is being cancelled.

    What can't be rolled back, the pool discards when the connection is returned.
    """
    if connection.pgconn.transaction_status in (_INTRANS, _INERROR) and not _is_busy(connection):
        with (
            suppress(psycopg.Error),
            shielded_cleanup(connection),
            trio.move_on_after(connection.cleanup_timeout),
        ):
            await connection.rollback()
