"""Cancelling on Trio, at every point of every operation: what is left, here and on the server."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from itertools import count

import psycopg
import pytest
import trio
from connections import SLOW, Connection, backend, check_usable, closing
from onlooker import Onlooker
from psycopg.pq import PipelineStatus, TransactionStatus
from same_as_asyncio.laboratory import PSYCOPG
from timing import until
from trio.lowlevel import Task
from trio.testing import wait_all_tasks_blocked

from whitepool.postgres import _connection, connect

Operation = Callable[[Connection], Awaitable[object]]

INSERT = "INSERT INTO log VALUES (1)"
MANY_SMALL_ROWS = "SELECT generate_series(1, 50000)"
ENDLESS = "SELECT repeat('x', 1000) FROM generate_series(1, 100000000)"


@pytest.fixture
def onlooker(onlooker: Onlooker) -> Iterator[Onlooker]:
    """It has a table `log`."""
    onlooker.do("DROP TABLE IF EXISTS log; CREATE TABLE log (x int)")
    yield onlooker
    for xid in iter(lambda: onlooker.ask("SELECT gid FROM pg_prepared_xacts"), None):
        onlooker.do(f"ROLLBACK PREPARED '{xid}'")
    onlooker.do("DROP TABLE log")


# Operations that last until they are cancelled


async def query(connection: Connection) -> None:
    await connection.execute(SLOW)


async def autocommitted_query(connection: Connection) -> None:
    await connection.set_autocommit(True)
    await connection.execute(SLOW)


async def transaction(connection: Connection) -> None:
    async with connection.transaction():
        await connection.execute(INSERT)
        await connection.execute(SLOW)


async def savepoint(connection: Connection) -> None:
    async with connection.transaction(), connection.transaction("inner"):
        await connection.execute(INSERT)
        await connection.execute(SLOW)


async def users_block_in_a_transaction(connection: Connection) -> None:
    async with connection.transaction(), connection.transaction():
        await connection.execute(INSERT)
        await trio.sleep(30)


async def pipeline(connection: Connection) -> None:
    async with connection.pipeline() as pipeline:
        await connection.execute(INSERT)
        await connection.execute(SLOW)
        await pipeline.sync()


async def pipeline_fetching(connection: Connection) -> None:
    async with connection.pipeline():
        cursor = await connection.execute(SLOW)
        await connection.execute("SELECT 1")
        await cursor.fetchone()


async def pipeline_at_its_end(connection: Connection) -> None:
    async with connection.pipeline():
        await connection.execute(SLOW)


async def users_block_in_a_pipeline(connection: Connection) -> None:
    async with connection.pipeline():
        await connection.execute(SLOW)
        await trio.sleep(30)


async def nested_pipeline(connection: Connection) -> None:
    async with connection.pipeline():
        await connection.execute("SELECT 1")
        async with connection.pipeline() as inner:
            await connection.execute(SLOW)
            await inner.sync()


async def pipeline_in_a_transaction(connection: Connection) -> None:
    async with connection.transaction(), connection.pipeline() as pipeline:
        await connection.execute(INSERT)
        await connection.execute(SLOW)
        await pipeline.sync()


async def transaction_in_a_pipeline(connection: Connection) -> None:
    async with connection.pipeline() as pipeline, connection.transaction():
        await connection.execute(INSERT)
        await connection.execute(SLOW)
        await pipeline.sync()


async def copy_in_the_users_block(connection: Connection) -> None:
    async with connection.cursor().copy("COPY log FROM STDIN") as copy:
        await copy.write_row((1,))
        await trio.sleep(30)


async def copy_in_at_writing(connection: Connection) -> None:
    async with connection.cursor().copy("COPY log FROM STDIN") as copy:
        for _ in range(300):
            await copy.write(b"1\n" * 100_000)
        await trio.sleep(30)  # psycopg 3.2 takes any amount, and never waits


async def copy_in_at_its_end(connection: Connection) -> None:
    await connection.execute("CREATE TEMP TABLE slow (x text CHECK (pg_sleep(30) IS NOT NULL))")
    async with connection.cursor().copy("COPY slow FROM STDIN") as copy:
        await copy.write("1\n")


async def copy_out_at_its_start(connection: Connection) -> None:
    async with connection.cursor().copy("COPY (SELECT pg_sleep(30)) TO STDOUT") as copy:
        await copy.read()


async def copy_out_at_reading(connection: Connection) -> None:
    query = "COPY (SELECT x, pg_sleep(x / 1000) FROM generate_series(990, 1000) x) TO STDOUT"
    async with connection.cursor().copy(query) as copy:
        while await copy.read():
            pass
        await trio.sleep(30)


async def copy_out_in_the_users_block(connection: Connection) -> None:
    async with connection.cursor().copy(f"COPY ({ENDLESS}) TO STDOUT".encode()) as copy:
        await copy.read()
        await trio.sleep(30)


async def stream(connection: Connection) -> None:
    query = "SELECT x, CASE WHEN x > 3 THEN pg_sleep(30) END FROM generate_series(1, 9) x"
    async with closing(connection.cursor().stream(query)) as stream:
        async for _row in stream:
            pass


async def stream_in_the_users_block(connection: Connection) -> None:
    async with closing(connection.cursor().stream(ENDLESS)) as stream:
        async for _row in stream:
            await trio.sleep(30)


async def executemany(connection: Connection) -> None:
    await connection.cursor().executemany("SELECT pg_sleep(%s)", [(0,), (30,), (30,)])


async def executemany_returning(connection: Connection) -> None:
    rows = [(0,), (30,), (30,)]
    await connection.cursor().executemany("SELECT pg_sleep(%s)", rows, returning=True)


async def server_cursor(connection: Connection) -> None:
    async with connection.cursor("steps") as cursor:
        await cursor.execute(
            "SELECT x, CASE WHEN x > 3 THEN pg_sleep(30) END FROM generate_series(1, 9) x"
        )
        await cursor.fetchmany(2)
        await cursor.fetchall()


async def notifies(connection: Connection) -> None:
    await connection.set_autocommit(True)
    await connection.execute("LISTEN news")
    async with aclosing(connection.notifies()) as generator:
        async for _note in generator:
            pass


async def commit(connection: Connection) -> None:
    await connection.execute("CREATE TEMP TABLE late (x int)")
    await connection.execute(
        "CREATE FUNCTION pg_temp.wait() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN PERFORM pg_sleep(30); RETURN NULL; END'"
    )
    await connection.execute(
        "CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION pg_temp.wait()"
    )
    await connection.execute("INSERT INTO late VALUES (1)")
    await connection.commit()


async def two_phase(connection: Connection) -> None:
    await connection.tpc_begin("interrupted")
    await connection.execute(INSERT)
    await connection.execute(SLOW)


LASTING = [
    query,
    autocommitted_query,
    transaction,
    savepoint,
    users_block_in_a_transaction,
    pipeline,
    pipeline_fetching,
    pipeline_at_its_end,
    users_block_in_a_pipeline,
    nested_pipeline,
    pipeline_in_a_transaction,
    transaction_in_a_pipeline,
    copy_in_the_users_block,
    copy_in_at_writing,
    copy_in_at_its_end,
    copy_out_at_its_start,
    copy_out_at_reading,
    copy_out_in_the_users_block,
    stream,
    stream_in_the_users_block,
    executemany,
    executemany_returning,
    server_cursor,
    notifies,
    commit,
    two_phase,
]


async def check_nothing_is_left(connection: Connection, onlooker: Onlooker, pid: int) -> None:
    """Nothing runs on the server any more, and nothing of it was committed."""
    await until(lambda: onlooker.state(pid) != "active")
    if not connection.closed:
        assert connection.pgconn.pipeline_status == PipelineStatus.OFF
        assert connection.info.transaction_status != TransactionStatus.ACTIVE


async def tidy_up(connection: Connection) -> None:
    """Leave the transaction, of whichever kind, that a cancelled task of psycopg's leaves open."""
    try:
        await connection.rollback()
    except psycopg.ProgrammingError:  # a two-phase one, which a block would not have left
        await connection.tpc_rollback()


@pytest.mark.parametrize("lasting", LASTING, ids=lambda operation: operation.__name__)
async def test_cancelled_while_it_lasts(dsn: str, onlooker: Onlooker, lasting: Operation) -> None:
    """A cancelled operation raises Cancelled, ends on the server, and leaves a usable connection."""
    connection = await connect(dsn)
    pid = backend(connection)
    with trio.fail_after(10), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lasting, connection)
            await trio.sleep(0.1)
            scope.cancel()
    assert scope.cancelled_caught
    await check_nothing_is_left(connection, onlooker, pid)
    assert not connection.closed
    await tidy_up(connection)
    await check_usable(connection)
    assert onlooker.ask("SELECT count(*) FROM log") == 0
    await connection.close()
    gc.collect()  # what was left open warns


async def test_rows_of_a_cancelled_stream_are_not_kept(dsn: str) -> None:
    """Rows that had been sent when a stream was cancelled take no memory, however many they are."""
    async with await connect(dsn) as connection:
        with trio.CancelScope() as scope:
            async with closing(connection.cursor().stream(MANY_SMALL_ROWS)) as stream:
                async for _row in stream:
                    await trio.sleep(0.1)  # for the server to fill all buffers
                    tracemalloc.start()
                    scope.cancel()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert scope.cancelled_caught
        assert peak < 300_000
        await connection.rollback()
        await check_usable(connection)


async def test_executemany_of_much_more_than_fits(dsn: str, onlooker: Onlooker) -> None:
    """A huge executemany may cost the connection: what libpq has buffered must be sent first."""
    connection = await connect(dsn)
    pid = backend(connection)
    rows = [("x" * 10_000,) for _ in range(5_000)]
    with trio.fail_after(20), trio.move_on_after(0.1) as scope:
        await connection.cursor().executemany("SELECT %s::text, pg_sleep(0.01)", rows)
    assert scope.cancelled_caught
    with trio.fail_after(10):
        await check_nothing_is_left(connection, onlooker, pid)
    if not connection.closed:
        await tidy_up(connection)
        await check_usable(connection)
        await connection.close()


# Operations that end by themselves, for cancelling them at each of their checkpoints


async def short_query(connection: Connection) -> None:
    await connection.execute("SELECT 1")
    await connection.commit()


async def short_savepoints(connection: Connection) -> None:
    async with connection.transaction():
        await connection.execute("SELECT 1")
        async with connection.transaction():
            await connection.execute("SELECT 2")
            await trio.lowlevel.checkpoint()


async def short_rollback(connection: Connection) -> None:
    await connection.execute("SELECT 1")
    await connection.rollback()


async def short_pipeline(connection: Connection) -> None:
    async with connection.pipeline() as pipeline:
        cursor = await connection.execute("SELECT 1")
        await connection.execute("SELECT 2")
        await cursor.fetchone()
        await pipeline.sync()
        await trio.lowlevel.checkpoint()
        await connection.execute("SELECT 3")


async def short_nested_pipeline(connection: Connection) -> None:
    async with connection.pipeline():
        await connection.execute("SELECT 1")
        async with connection.pipeline():
            await connection.execute("SELECT 2")


async def short_pipeline_in_a_transaction(connection: Connection) -> None:
    async with connection.transaction(), connection.pipeline():
        await connection.execute("SELECT 1")
        await connection.execute("SELECT 2")


async def short_transaction_in_a_pipeline(connection: Connection) -> None:
    async with connection.pipeline(), connection.transaction():
        await connection.execute("SELECT 1")
        async with connection.transaction():
            await connection.execute("SELECT 2")


async def short_copy_in(connection: Connection) -> None:
    await connection.execute("CREATE TEMP TABLE IF NOT EXISTS filled (x int)")
    async with connection.cursor().copy("COPY filled FROM STDIN") as copy:
        for number in range(3):
            await copy.write_row((number,))
            await trio.lowlevel.checkpoint()
        await copy.write(b"1\n" * 100_000)


async def short_copy_out(connection: Connection) -> None:
    query = "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 3000)) TO STDOUT"
    async with connection.cursor().copy(query) as copy:
        await copy.read_row()
        await trio.lowlevel.checkpoint()
        while await copy.read_row():
            pass


async def short_stream(connection: Connection) -> None:
    query = "SELECT generate_series(1, 5)"
    async with closing(connection.cursor().stream(query)) as stream:
        async for _row in stream:
            await trio.lowlevel.checkpoint()


async def short_executemany(connection: Connection) -> None:
    await connection.cursor().executemany("SELECT %s::int", [(number,) for number in range(5)])


async def short_executemany_returning(connection: Connection) -> None:
    cursor = connection.cursor()
    await cursor.executemany("SELECT %s::int", [(1,), (2,)], returning=True)
    await cursor.fetchone()


async def short_server_cursor(connection: Connection) -> None:
    async with connection.cursor("steps", scrollable=True) as cursor:
        await cursor.execute("SELECT generate_series(1, 5)")
        await cursor.fetchone()
        await cursor.scroll(-1)
        await cursor.fetchall()


async def short_notifies(connection: Connection) -> None:
    await connection.execute("LISTEN news")
    await connection.execute("NOTIFY news")
    await connection.commit()
    async with aclosing(connection.notifies(timeout=0.01)) as generator:
        async for _note in generator:
            await trio.lowlevel.checkpoint()


async def short_attributes(connection: Connection) -> None:
    await connection.set_read_only(True)
    await connection.set_read_only(None)
    await connection.cancel_safe()


async def short_two_phase(connection: Connection) -> None:
    await connection.tpc_begin("swept")
    await connection.execute("SELECT 1")
    await connection.tpc_prepare()
    await connection.tpc_commit()


SHORT = [
    short_query,
    short_savepoints,
    short_rollback,
    short_pipeline,
    short_nested_pipeline,
    short_pipeline_in_a_transaction,
    short_transaction_in_a_pipeline,
    short_copy_in,
    short_copy_out,
    short_stream,
    short_executemany,
    short_executemany_returning,
    short_server_cursor,
    short_notifies,
    short_attributes,
    short_two_phase,
]


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope when a task has made a number of steps: at its next checkpoint, that is."""

    def __init__(self, task: Task, scope: trio.CancelScope, step: int) -> None:
        self._task = task
        self._scope = scope
        self._left = step

    def after_task_step(self, task: Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()

    @property
    def was_late(self) -> bool:
        return self._left > 0


MOST_STEPS = 60
"""Enough for each operation to be cancelled in all its parts; some repeat themselves for long."""


@pytest.mark.parametrize("short", SHORT, ids=lambda operation: operation.__name__)
async def test_cancelled_at_every_checkpoint(
    dsn: str, onlooker: Onlooker, short: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever an operation is cancelled, the connection is usable, and the server is at rest."""
    monkeypatch.setattr(_connection, "BUSY_TIME", 0)  # each lets other tasks run, every time
    connection = await connect(dsn)
    pid = backend(connection)
    for step in count(1):
        with trio.fail_after(10), trio.CancelScope() as scope:
            instrument = CancelAtStep(trio.lowlevel.current_task(), scope, step)
            trio.lowlevel.add_instrument(instrument)
            try:
                await short(connection)
            finally:
                trio.lowlevel.remove_instrument(instrument)
        try:
            await check_nothing_is_left(connection, onlooker, pid)
        except (AssertionError, trio.TooSlowError):
            found = repr(connection)
            await connection.close()
            pytest.fail(f"{found} is not in order after a cancellation at step {step}")
        assert not connection.closed, f"closed, by a cancellation at step {step}"
        try:
            await tidy_up(connection)
        except psycopg.Error:
            # Cancelled in tpc_prepare: psycopg calls it prepared, the server may not. It is closed.
            assert short is short_two_phase
            await connection.close()
            connection = await connect(dsn)
            pid = backend(connection)
            for xid in await connection.tpc_recover():
                await connection.tpc_rollback(xid)
        await check_usable(connection)
        if instrument.was_late or step == MOST_STEPS:
            break
    assert step > 2
    await connection.close()
    gc.collect()


# Several tasks on one connection


NEIGHBOURS = [query, stream, copy_out_at_its_start, pipeline_fetching]
if tuple(int(part) for part in re.findall(r"\d+", psycopg.__version__)[:3]) >= (3, 3):
    # psycopg 3.2.0 takes the pipeline of another task's executemany for one that lasts.
    NEIGHBOURS.append(executemany)


@pytest.mark.parametrize("lasting", NEIGHBOURS, ids=lambda operation: operation.__name__)
async def test_the_next_task_is_not_disturbed(dsn: str, lasting: Operation) -> None:
    """Cancelling the task that uses the connection lets the one that waits for its turn go on."""
    async with await connect(dsn, autocommit=True) as connection:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def cancelled() -> None:
                with scope:
                    await lasting(connection)

            async def next_one() -> None:
                cursor = await connection.execute("SELECT 7, pg_sleep(0.05)")
                assert await cursor.fetchone() == (7, "")

            nursery.start_soon(cancelled)
            await trio.sleep(0.05)
            if lasting is not pipeline_fetching:  # two tasks in one pipeline share its fate
                nursery.start_soon(next_one)
                await trio.sleep(0.02)
            scope.cancel()
        assert scope.cancelled_caught
        await check_usable(connection)


async def test_a_task_that_waits_for_its_turn_can_be_cancelled(dsn: str) -> None:
    """Cancelling the task that waits for its turn does not cancel the query of the other."""
    async with await connect(dsn, autocommit=True) as connection:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def working() -> None:
                cursor = await connection.execute("SELECT 7 FROM pg_sleep(0.2)")
                assert await cursor.fetchone() == (7,)

            async def waiting() -> None:
                with scope:
                    await connection.execute("SELECT 8")

            nursery.start_soon(working)
            await trio.sleep(0.05)
            nursery.start_soon(waiting)
            await wait_all_tasks_blocked()
            scope.cancel()
        assert scope.cancelled_caught
        await check_usable(connection)


async def test_the_lock_is_taken_in_turn(dsn: str) -> None:
    """The lock is taken in turn, is left by errors and cancellations, and any task can leave it."""
    async with await connect(dsn) as connection:
        order: list[object] = []

        async def take(name: object) -> None:
            async with connection.lock:
                order.append(name)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            for name in range(5):
                nursery.start_soon(take, name)
                await wait_all_tasks_blocked(0.0001)
        assert order == list(range(5))
        with pytest.raises(LookupError):
            async with connection.lock:
                raise LookupError
        with trio.CancelScope() as scope:
            scope.cancel()
            async with connection.lock:
                pytest.fail("taken by a cancelled task")
        async with connection.lock:
            with trio.move_on_after(0.02) as scope:
                await connection.execute("SELECT 1")
            assert scope.cancelled_caught
        await check_usable(connection)


@pytest.mark.parametrize(
    "lasting",
    [
        query,
        transaction,
        pipeline_fetching,
        # Older releases of psycopg take any amount of data, and never wait.
        *([copy_in_at_writing] if PSYCOPG >= (3, 3) else []),
        copy_out_at_its_start,
        stream,
        executemany,
        server_cursor,
        notifies,
        commit,
    ],
    ids=lambda operation: operation.__name__,
)
async def test_closing_while_another_task_waits(
    dsn: str, onlooker: Onlooker, lasting: Operation
) -> None:
    """The task that waits gets an error, and so does each that waits for its turn."""
    connection = await connect(dsn)
    pid = backend(connection)

    async def fails(operation: Operation) -> None:
        with pytest.raises(psycopg.OperationalError):
            await operation(connection)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, lasting)
            await trio.sleep(0.1)
            if lasting is not pipeline_fetching:
                nursery.start_soon(fails, short_query)
                await wait_all_tasks_blocked(0.001)
            await connection.close()
    assert connection.closed
    assert not connection.broken
    # The server would notice when it next writes to the client; it was not asked to stop.
    onlooker.ask("SELECT pg_terminate_backend(%s)", pid)
