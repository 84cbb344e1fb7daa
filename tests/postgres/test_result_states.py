"""Whatever reads results to their end comes to an end itself, in each state that libpq can be in."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any, cast

import psycopg
import pytest
import trio
from connections import Connection, check_usable_after_rollback
from keyboard import listening_to_ctrl_c
from psycopg import AsyncCursor, generators, pq
from psycopg.pq import ExecStatus
from psycopg.waiting import Ready, Wait
from timing import alarm

from whitepool.postgres import connect
from whitepool.postgres._cancelling import cancel_operation, skip_results

MIXED = "COPY (SELECT generate_series(1, 100000)) TO STDOUT; COPY notes FROM STDIN"


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A test that spins fails, and does not hang."""
    with alarm(10):
        yield


async def test_a_copy_out_followed_by_a_copy_in_is_cancelled(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """Two COPY in one query, cancelled while the rows of the first are read, come to an end."""
    with trio.move_on_after(0.1) as scope:
        async with connection.cursor().copy(MIXED) as copy:
            await copy.read()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    if not connection.closed:
        await check_usable_after_rollback(connection)


async def test_a_copy_out_followed_by_a_copy_in_is_read_to_its_end(
    connection: Connection, notes: Callable[[], int]
) -> None:
    """psycopg refuses it then, and leaves the server waiting for data: no pool takes that for idle."""
    with pytest.raises(psycopg.Error, match=r"mix COPY|no COPY in progress"):
        async with connection.cursor().copy(MIXED) as copy:
            async for _ in copy:
                pass
    with pytest.raises(psycopg.Error):
        await connection.rollback()
    assert not connection.__worker_manager__.is_alive(connection)


class InterruptedCursor(AsyncCursor[Any]):
    """Ctrl-C strikes just after a COPY was sent."""

    def _execute_send(self, *args: Any, **keywords: Any) -> None:
        super()._execute_send(*args, **keywords)
        signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_just_after_a_copy_in_was_sent(dsn: str) -> None:
    """It leaves the block, and one Ctrl-C is enough."""

    async def main() -> None:
        async with await connect(dsn, cursor_factory=InterruptedCursor) as connection:
            plain: AsyncCursor[Any] = AsyncCursor(connection)
            await plain.execute("CREATE TEMP TABLE copied (x text)")
            async with connection.cursor().copy("COPY copied FROM STDIN"):
                raise AssertionError("it was interrupted")

    with listening_to_ctrl_c(), pytest.raises(KeyboardInterrupt):
        trio.run(main)


@pytest.mark.parametrize(
    "query",
    [
        "COPY notes FROM STDIN",
        "COPY (SELECT generate_series(1, 100000)) TO STDOUT",
        MIXED,
        "COPY notes FROM STDIN; COPY notes FROM STDIN",
        "COPY notes FROM STDIN; SELECT pg_sleep(30)",
        "SELECT generate_series(1, 100000); SELECT pg_sleep(30)",
        "SELECT 1/0; COPY notes FROM STDIN",
    ],
)
async def test_a_query_of_which_no_result_was_read(
    connection: Connection, notes: Callable[[], int], query: str
) -> None:
    """An operation whose generator has been destroyed is skipped from its first result on."""

    def destroyed() -> Any:
        return
        yield

    connection.pgconn.send_query(query.encode())
    generator = destroyed()
    generator.close()
    with trio.CancelScope() as scope:
        scope.cancel()
        await cancel_operation(connection, generator)
    if not connection.closed:
        await check_usable_after_rollback(connection)
    assert notes() == 0


class Script:
    """A PGconn of which the results are prescribed, and whose socket is always ready."""

    def __init__(self, *results: ExecStatus | None) -> None:
        self.results: Iterator[ExecStatus | None] = iter(results)
        self.copy_data = iter([5, 5, -1])
        self.ended = 0
        self.taken = 0

    def is_busy(self) -> int:
        return 0

    def consume_input(self) -> None: ...

    def notifies(self) -> None: ...

    def flush(self) -> int:
        return 0

    def get_copy_data(self, _: int) -> tuple[int, memoryview]:
        return next(self.copy_data), memoryview(b"")

    def put_copy_end(self, error: bytes | None = None) -> int:
        self.ended += 1
        return 1

    def get_result(self) -> Any:
        self.taken += 1
        status = next(self.results)
        return None if status is None else Result(status)


class Result:
    def __init__(self, status: ExecStatus) -> None:
        self.status = status


def run_to_end(script: Script, limit: int = 1000) -> bool:
    """Skip the results as if the socket was always ready; at most `limit` waits."""
    generator = skip_results(cast(pq.abc.PGconn, script))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generators, "fetch", generators._fetch)  # the one that takes any object
        try:
            wanted = next(generator)
            for _ in range(limit):
                wanted = generator.send(Ready.W if wanted == Wait.W else Ready.RW)
        except StopIteration as end:
            return cast(bool, end.value)
    raise TimeoutError


@pytest.mark.parametrize("status", [s for s in ExecStatus if s != ExecStatus.COPY_BOTH])
def test_every_result_is_skipped(status: ExecStatus) -> None:
    """One result of each kind, and then the end."""
    script = Script(status, ExecStatus.COMMAND_OK, None)
    assert run_to_end(script) == (status == ExecStatus.COPY_IN)
    assert script.taken == 3
    assert script.ended == (status == ExecStatus.COPY_IN)


def test_nothing_but_closing_ends_a_replication() -> None:
    """COPY_BOTH is a state of its own protocol: it raises, and the connection is closed."""
    with pytest.raises(psycopg.InterfaceError):
        run_to_end(Script(ExecStatus.COPY_BOTH))


@pytest.mark.parametrize("status", [s for s in ExecStatus if s != ExecStatus.COPY_BOTH])
def test_a_result_that_repeats_lets_other_tasks_run(status: ExecStatus) -> None:
    """Where libpq gives the same result again and again, without input, there still are waits."""
    script = Script(*chain([status], repeat(status, 1_000_000)))
    script.copy_data = chain.from_iterable(repeat([5, -1]))
    with pytest.raises(TimeoutError):
        run_to_end(script, limit=100)
    assert script.taken < 100_000


def test_copy_data_without_end_lets_other_tasks_run() -> None:
    """The same for the rows of a COPY TO."""
    script = Script(ExecStatus.COPY_OUT, None)
    script.copy_data = chain(repeat(5, 1_000_000), [-1])
    with pytest.raises(TimeoutError):
        run_to_end(script, limit=100)
