"""`PostgresSession.connection`: a block that commits, or says why it has not."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import pytest
import trio
from connections import IDLE, Connection, backend, check_usable, status
from embedded_postgres import EmbeddedPostgres
from keyboard import listening_to_ctrl_c, press_ctrl_c
from onlooker import Onlooker, freeze, slow_commits, thaw
from timing import until
from workshop import check_books

import whitepool
from whitepool.postgres import PostgresManager, PostgresSession, open_pool

Notes = Callable[[], int]
Session = PostgresSession[Any]

INSERT = "INSERT INTO notes VALUES ('a')"


@asynccontextmanager
async def a_pool(dsn: str, **options: Any) -> AsyncIterator[Session]:
    """A pool of a single connection, which is idle, and usable, when the test is done with it."""
    async with open_pool(dsn, pool_size=1, max_overflow=0, **options) as session:
        yield session
        async with session.worker() as connection:
            await check_usable(connection)
        check_books(session.statistics())


@pytest.fixture
async def session(dsn: str) -> AsyncIterator[Session]:
    async with a_pool(dsn) as session:
        yield session


def check_returned(session: Session, connection: Connection) -> None:
    """It has been left in order by its client: the pool has nothing to do."""
    now = session.statistics()
    assert (now.idle, now.resetting, now.in_use, now.started) == (1, 0, 0, 1)
    assert status(connection) is IDLE


# -- What the block does --------------------------------------------------------------------------


async def test_a_block_that_ends_well_commits(session: Session, notes: Notes) -> None:
    """What it wrote is there when it has ended, and the connection is ready for the next client."""
    async with session.connection() as connection:
        await connection.execute(INSERT)
        assert notes() == 0
    assert notes() == 1
    check_returned(session, connection)


async def test_a_block_that_raises_rolls_back(
    session: Session, notes: Notes, onlooker: Onlooker
) -> None:
    """When the error leaves the block, nothing is left in the table, nor locked."""
    with pytest.raises(LookupError):
        async with session.connection() as connection:
            await connection.execute(INSERT)
            raise LookupError
    check_returned(session, connection)
    onlooker.do("BEGIN; LOCK TABLE notes NOWAIT; ROLLBACK")
    assert notes() == 0


async def test_a_failed_statement_rolls_back(session: Session, notes: Notes) -> None:
    """Its error is what the block raises."""
    with pytest.raises(psycopg.errors.DivisionByZero):
        async with session.connection() as connection:
            await connection.execute(INSERT)
            await connection.execute("SELECT 1/0")
    check_returned(session, connection)
    assert notes() == 0


async def test_a_cancelled_block_rolls_back(session: Session, notes: Notes) -> None:
    """In the middle of a query, and of something else."""
    for wait in ("pg_sleep(30)", None):
        with trio.move_on_after(0.05) as scope:
            async with session.connection() as connection:
                await connection.execute(INSERT)
                if wait is not None:
                    await connection.execute(f"SELECT {wait}".encode())
                await trio.sleep_forever()
        assert scope.cancelled_caught
        check_returned(session, connection)
    assert notes() == 0


async def test_autocommit_is_left_alone(dsn: str, notes: Notes, onlooker: Onlooker) -> None:
    """Nothing is sent at the end of the block."""
    async with a_pool(dsn, autocommit=True) as session:
        async with session.connection() as connection:
            await connection.execute(INSERT)
        assert notes() == 1
        query = "SELECT query FROM pg_stat_activity WHERE pid = %s"
        assert onlooker.ask(query, backend(connection)) == INSERT
        with pytest.raises(LookupError):
            async with session.connection() as connection:
                await connection.execute(INSERT)
                raise LookupError
        assert notes() == 2
        assert onlooker.ask(query, backend(connection)) == INSERT
        check_returned(session, connection)


async def test_a_transaction_begun_by_hand_is_committed(dsn: str, notes: Notes) -> None:
    """As by psycopg: what counts is that a transaction is open, not the mode."""
    async with a_pool(dsn, autocommit=True) as session:
        async with session.connection() as connection:
            await connection.execute("BEGIN")
            await connection.execute(INSERT)
        check_returned(session, connection)
    assert notes() == 1


async def test_blocks_of_your_own_inside(session: Session, notes: Notes) -> None:
    """`transaction()`, `commit` and `rollback` do what they do, and the rest is committed."""
    async with session.connection() as connection:
        async with connection.transaction():
            await connection.execute(INSERT)
        await connection.execute(INSERT)
        await connection.commit()
        assert notes() == 2
        await connection.execute(INSERT)
        await connection.rollback()
        with suppress(psycopg.errors.DivisionByZero):
            async with connection.transaction():
                await connection.execute(INSERT)
                await connection.execute("SELECT 1/0")
        await connection.execute(INSERT)
    check_returned(session, connection)
    assert notes() == 3


async def test_it_waits_as_long_as_it_may(session: Session) -> None:
    """`timeout` is that of the checkout."""
    async with session.connection():
        with pytest.raises(whitepool.CheckoutTimeout):
            async with session.connection(timeout=0.01):
                raise AssertionError("there is only one")


async def test_it_waits_as_long_as_the_pool_says(dsn: str) -> None:
    """Where it names no timeout, `checkout_timeout` holds."""
    async with a_pool(dsn, checkout_timeout=0.01) as session, session.connection():
        with trio.fail_after(3), pytest.raises(whitepool.CheckoutTimeout, match=r"within 0\.01 s"):
            async with session.connection():
                raise AssertionError("there is only one")


@pytest.mark.parametrize("how", ["instrumented", "service"])
async def test_every_session_of_the_pool_has_it(dsn: str, notes: Notes, how: str) -> None:
    """Also one that is measured, and one of a service."""
    async with trio.open_nursery() as nursery:
        pool = whitepool.Pool(PostgresManager(dsn), pool_size=1)
        session: Session = await nursery.start(pool.run_service)
        assert type(session) is PostgresSession
        if how == "instrumented":
            telemetry = pytest.importorskip("whitepool.telemetry")
            session = telemetry.instrument(telemetry.instrument(session))
            assert isinstance(session, PostgresSession)
        async with session.connection() as connection:
            await connection.execute(INSERT)
        await session.safe_shutdown()
    assert notes() == 1


# -- A commit that does not happen ----------------------------------------------------------------


async def test_a_commit_that_fails_raises(session: Session, onlooker: Onlooker, notes: Notes) -> None:
    """Where a constraint is deferred, the commit may fail."""
    onlooker.do("ALTER TABLE notes ADD UNIQUE (note) DEFERRABLE INITIALLY DEFERRED")
    with pytest.raises(psycopg.errors.UniqueViolation):
        async with session.connection() as connection:
            await connection.execute(INSERT)
            await connection.execute(INSERT)
    check_returned(session, connection)
    assert notes() == 0


async def test_no_commit_in_a_task_that_is_cancelled(session: Session, notes: Notes) -> None:
    """It ends as cancelled, so there must be nothing to see of it."""
    with trio.CancelScope() as scope:
        async with session.connection() as connection:
            await connection.execute(INSERT)
            scope.cancel()
    assert scope.cancelled_caught
    check_returned(session, connection)
    assert notes() == 0


async def test_a_cancelled_task_is_only_told_that(session: Session, notes: Notes) -> None:
    """Where it could not have committed anyhow, the cancellation is what ends the block."""
    with trio.CancelScope() as scope:
        async with session.connection() as connection:
            await connection.execute(INSERT)
            with suppress(psycopg.errors.DivisionByZero):
                await connection.execute("SELECT 1/0")
            scope.cancel()
    assert scope.cancelled_caught
    check_returned(session, connection)


async def test_a_commit_that_is_cancelled_on_its_way(session: Session, onlooker: Onlooker) -> None:
    """It is cancelled on the server, and the connection is as good as before."""
    pid: list[int] = []
    with slow_commits(onlooker):
        with trio.fail_after(3), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def cancel() -> None:
                    await until(lambda: bool(pid) and onlooker.state(pid[0]) == "active")
                    scope.cancel()

                async with session.connection() as connection:
                    await connection.execute("INSERT INTO slow VALUES (1)")
                    pid.append(backend(connection))
        assert scope.cancelled_caught
        check_returned(session, connection)
        assert onlooker.ask("SELECT count(*) FROM slow") == 0


async def test_a_commit_of_which_nothing_is_known(dsn: str, notes: Notes) -> None:
    """Where the server does not answer any more, the connection is closed, and not used again."""
    async with a_pool(dsn, cleanup_timeout=0.2) as session:
        with trio.move_on_after(0.2) as scope:
            async with session.connection() as connection:
                await connection.execute(INSERT)
                mine = backend(connection)
                freeze(mine)
        assert scope.cancelled_caught
        assert connection.closed
        assert session.statistics().lost == 1
        thaw(mine)


@pytest.mark.parametrize("how", ["caught", "cancelled"])
async def test_a_transaction_that_failed_is_not_lost_in_silence(
    session: Session, notes: Notes, how: str
) -> None:
    """psycopg would send a COMMIT, to which the server answers ROLLBACK, and no one is told."""
    with pytest.raises(psycopg.errors.InFailedSqlTransaction, match="rolled back, not committed"):
        async with session.connection() as connection:
            await connection.execute(INSERT)
            if how == "caught":
                with suppress(psycopg.errors.DivisionByZero):
                    await connection.execute("SELECT 1/0")
            else:
                with trio.move_on_after(0.05):
                    await connection.execute("SELECT pg_sleep(30)")
    check_returned(session, connection)
    assert notes() == 0


async def in_a_pipeline(connection: Connection) -> None:
    block = connection.pipeline()
    await block.__aenter__()
    leftovers.append(block)
    await connection.execute(INSERT)


async def in_a_copy(connection: Connection) -> None:
    copy = connection.cursor().copy("COPY notes FROM STDIN")
    await (await copy.__aenter__()).write("a\n")
    leftovers.append(copy)


async def in_a_stream(connection: Connection) -> None:
    await connection.execute(INSERT)
    stream = connection.cursor().stream("SELECT generate_series(1, 1000000)")
    await anext(stream)
    leftovers.append(stream)


async def in_a_transaction_block(connection: Connection) -> None:
    block = connection.transaction()
    await block.__aenter__()
    leftovers.append(block)
    await connection.execute(INSERT)


async def in_a_two_phase_transaction(connection: Connection) -> None:
    await connection.tpc_begin(connection.xid(1, "a", "b"))
    await connection.execute(INSERT)


async def behind_a_generator(connection: Connection) -> None:
    await connection.execute(INSERT)
    await connection.lock.__aenter__()  # as a stream does


leftovers: list[Any] = []
"""Generators that Trio would close if they were not kept."""


@pytest.mark.parametrize(
    "leave",
    [
        in_a_pipeline,
        in_a_copy,
        in_a_stream,
        in_a_transaction_block,
        in_a_two_phase_transaction,
        behind_a_generator,
    ],
)
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
async def test_a_block_that_ends_in_the_middle_of_something(
    dsn: str, notes: Notes, leave: Callable[[Connection], Awaitable[None]]
) -> None:
    """It can't be committed: that is an error, and another connection takes its place."""
    async with a_pool(dsn, reset_timeout=0.2) as session:
        with trio.fail_after(2), pytest.raises(psycopg.ProgrammingError, match="in use"):
            async with session.connection() as connection:
                await leave(connection)
        async with session.worker() as another:
            assert another is not connection
        now = session.statistics()
        assert now.lost + now.destroyed == 1
    leftovers.clear()
    assert notes() == 0


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
async def test_an_error_that_leaves_a_stream_is_not_hidden(dsn: str) -> None:
    """The stream is not closed yet, and has the connection's lock. There is no waiting for it."""
    async with a_pool(dsn) as session:
        with trio.fail_after(2), pytest.raises(LookupError):
            async with session.connection() as connection:
                await in_a_stream_without_insert(connection)
                raise LookupError
        assert session.statistics().lost == 1
    leftovers.clear()


async def in_a_stream_without_insert(connection: Connection) -> None:
    stream = connection.cursor().stream("SELECT generate_series(1, 1000000)")
    await anext(stream)
    leftovers.append(stream)


async def test_a_block_that_is_awaited(dsn: str) -> None:
    """The error says what to write, and no connection is checked out."""
    async with a_pool(dsn) as session:
        block: Any = session.connection()
        with pytest.raises(TypeError, match=r"write `async with session\.connection\(\) as c"):
            await block
        assert session.statistics().checkouts == 0


async def test_nothing_to_commit_is_no_error(dsn: str) -> None:
    """With autocommit, a task that still waits for notifications loses nothing."""
    async with a_pool(dsn, autocommit=True, reset_timeout=0.2) as session:
        async with session.connection() as connection:
            await connection.lock.__aenter__()
        async with session.worker() as another:
            assert another is not connection


# -- A connection that is lost --------------------------------------------------------------------


async def test_a_server_that_hung_up_before_the_commit(
    dsn: str, onlooker: Onlooker, notes: Notes
) -> None:
    """The commit fails, and says so."""
    async with a_pool(dsn) as session:
        with pytest.raises(psycopg.OperationalError):
            async with session.connection() as connection:
                await connection.execute(INSERT)
                onlooker.ask("SELECT pg_terminate_backend(%s)", backend(connection))
                await onlooker.until_gone(backend(connection))
        assert session.statistics().lost == 1
    assert notes() == 0


async def test_a_loss_that_the_block_has_caught(dsn: str, onlooker: Onlooker, notes: Notes) -> None:
    """The block may have written something before: it can't end well."""
    async with a_pool(dsn) as session:
        with pytest.raises(psycopg.OperationalError, match="closed before the end of its block"):
            async with session.connection() as connection:
                await connection.execute(INSERT)
                onlooker.ask("SELECT pg_terminate_backend(%s)", backend(connection))
                with suppress(psycopg.OperationalError):
                    await connection.execute("SELECT 1")
        assert session.statistics().lost == 1
    assert notes() == 0


async def test_an_error_is_not_hidden_by_a_rollback_that_fails(dsn: str, onlooker: Onlooker) -> None:
    """What the block raised is what counts."""
    async with a_pool(dsn) as session:
        with pytest.raises(LookupError):
            async with session.connection() as connection:
                await connection.execute("SELECT 1")
                onlooker.ask("SELECT pg_terminate_backend(%s)", backend(connection))
                await onlooker.until_gone(backend(connection))
                raise LookupError
        assert session.statistics().lost == 1


async def test_a_connection_that_its_client_closes(dsn: str, notes: Notes) -> None:
    """As with psycopg's pool, that is a way to have it replaced, and no error."""
    async with a_pool(dsn) as session:
        async with session.connection() as connection:
            await connection.execute(INSERT)
            await connection.close()
        assert session.statistics().lost == 1
    assert notes() == 0


async def test_a_shutdown_waits_for_the_commit(dsn: str, notes: Notes) -> None:
    """A graceful one, that is."""
    async with (
        open_pool(dsn, pool_size=1) as session,
        trio.open_nursery() as nursery,
        session.connection() as connection,
    ):
        await connection.execute(INSERT)
        nursery.start_soon(session.safe_shutdown)
        await until(lambda: session.statistics().state == "draining")
    assert notes() == 1


async def test_a_shutdown_that_does_not_wait_is_told_of(dsn: str, notes: Notes) -> None:
    """The pool has closed the connection: the block can't end well."""
    async with open_pool(dsn, pool_size=1) as session:
        with pytest.raises(psycopg.OperationalError, match="closed before the end of its block"):
            async with session.connection() as connection:
                await connection.execute(INSERT)
                await session.safe_shutdown(timeout=0)
    assert notes() == 0


# -- Ctrl-C ---------------------------------------------------------------------------------------


@trio.lowlevel.enable_ki_protection
def press_protected() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("where", ["in the block", "in the commit", "at its end"])
def test_ctrl_c(server: EmbeddedPostgres, onlooker: Onlooker, where: str) -> None:
    """It is raised, nothing is committed, and the connection is returned."""
    seen: list[whitepool.PoolStatistics] = []

    async def main() -> None:
        async with open_pool(server.dsn, pool_size=1, max_overflow=0) as session:
            try:
                async with session.connection() as connection:
                    await connection.execute("INSERT INTO slow VALUES (1)")
                    mine = backend(connection)
                    if where == "in the commit":
                        press_ctrl_c(lambda: onlooker.until_active(mine))
                    elif where == "in the block":
                        press_ctrl_c(lambda: until(lambda: bool(waiting)))
                        waiting.append(True)
                        await trio.sleep_forever()
                    else:
                        # It is delivered at the next checkpoint, which is the commit's.
                        press_protected()
            finally:
                assert status(connection) is IDLE
                seen.append(session.statistics())

    waiting: list[bool] = []
    with slow_commits(onlooker), listening_to_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            trio.run(main)
        assert onlooker.ask("SELECT count(*) FROM slow") == 0
    (now,) = seen
    assert (now.in_use, now.idle, now.resetting) == (0, 1, 0)


def test_ctrl_c_does_not_come_between_the_end_and_the_return(
    server: EmbeddedPostgres, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C just before the connection is returned is raised when it has been."""
    checkin = PostgresSession.checkin

    def press_and_check_in(session: Session, resource: whitepool.Resource[Connection]) -> None:
        press()
        checkin(session, resource)

    async def main() -> None:
        async with a_pool(server.dsn) as session:
            monkeypatch.setattr(PostgresSession, "checkin", press_and_check_in)
            try:
                async with session.connection() as connection:
                    await connection.execute(INSERT)
                await trio.lowlevel.checkpoint()
            finally:
                monkeypatch.undo()
                assert session.statistics().in_use == 0

    with listening_to_ctrl_c(), pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert notes() == 1


# -- At every instant -----------------------------------------------------------------------------


class AfterStep(trio.abc.Instrument):
    """Does something after a number of steps of the main task, counted from `start` on."""

    def __init__(self, number: int, do: Callable[[], object]) -> None:
        self.remaining = number
        self.do = do
        self.task: trio.lowlevel.Task | None = None

    def start(self) -> None:
        self.task = trio.lowlevel.current_task()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.remaining -= 1
            if self.remaining == 0:
                self.do()


@pytest.mark.parametrize("by", ["cancellation", "Ctrl-C"])
def test_at_every_step(server: EmbeddedPostgres, notes: Notes, by: str) -> None:
    """Cancelled after any of its steps, the block commits if it ends well, and is never half done.

    It may also have committed if the cancellation came during the commit. But the pool has its
    connection, in order, and no write is called discarded.
    """
    outcomes: set[tuple[bool, int]] = set()
    for number in range(1, 200):
        before = notes()
        ended_well: list[bool] = []

        async def main() -> None:
            async with a_pool(server.dsn) as session:
                scope = trio.CancelScope()
                do = scope.cancel if by == "cancellation" else press
                steps = AfterStep(number, do)  # noqa: B023
                trio.lowlevel.add_instrument(steps)
                steps.start()
                try:
                    with scope:
                        async with session.connection() as connection:
                            await connection.execute(INSERT)
                            await trio.lowlevel.checkpoint()
                            await connection.execute(INSERT)
                        ended_well.append(True)  # noqa: B023
                except KeyboardInterrupt:
                    pass
                finally:
                    trio.lowlevel.remove_instrument(steps)
                    was_reached.append(steps.remaining <= 0)  # noqa: B023
                with trio.fail_after(3):
                    await until(lambda: session.statistics().idle == 1)
                now = session.statistics()
                assert (now.started, now.in_use, now.discarded) == (1, 0, 0)

        was_reached: list[bool] = []
        with listening_to_ctrl_c(), suppress(KeyboardInterrupt):
            trio.run(main)
        written = notes() - before
        assert written == 2 if ended_well else written in (0, 2)
        outcomes.add((bool(ended_well), written))
        if was_reached == [False]:
            break
    else:
        raise AssertionError("it has no end")
    assert {(False, 0), (True, 2)} <= outcomes
    assert number > 3


def press() -> None:
    signal.raise_signal(signal.SIGINT)
