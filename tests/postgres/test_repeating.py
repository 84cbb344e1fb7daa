"""`transact` of `examples/transactions.py` repeats a transaction after a conflict, in time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import transactions
import trio
import trio.testing
from connections import Connection, ask
from onlooker import Onlooker
from transactions import Session, transact

from whitepool.postgres import open_pool


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "random", SimpleNamespace(uniform=lambda low, high: 0))


@pytest.fixture(params=[False, True], ids=["transaction", "autocommit"])
async def session(dsn: str, request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with open_pool(dsn, pool_size=2, max_overflow=0, autocommit=request.param) as session:
        yield session


async def fail(connection: Connection) -> None:
    raise psycopg.errors.SerializationFailure


class Meeting:
    """Two transactions wait here for each other; later, when they are repeated, they don't."""

    def __init__(self) -> None:
        self.arrived = 0
        self.both = trio.Event()

    async def __call__(self) -> None:
        self.arrived += 1
        if self.arrived == 2:
            self.both.set()
        await self.both.wait()


async def test_a_serialization_failure(
    session: Session, notes: Callable[[], int], no_pauses: None
) -> None:
    """Of two transactions that write what the other one has read, one is repeated."""
    meeting = Meeting()
    read: list[int] = []

    async def count_and_add(connection: Connection) -> None:
        read.append(await ask(connection, "SELECT count(*) FROM notes"))
        await meeting()
        await connection.execute("INSERT INTO notes VALUES ('a')")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transact, session, count_and_add)
            nursery.start_soon(transact, session, count_and_add)
    assert read == [0, 0, 1]
    assert notes() == 2


async def test_a_deadlock(
    session: Session, onlooker: Onlooker, notes: Callable[[], int], no_pauses: None
) -> None:
    """Of two transactions that lock the same rows in another order, one is repeated."""
    onlooker.do("INSERT INTO notes VALUES ('a'), ('b')")
    meeting = Meeting()
    begun: list[str] = []
    committed = trio.Event()

    def lock_in_order(*names: str) -> Callable[[Connection], Awaitable[None]]:
        async def lock(connection: Connection) -> None:
            begun.append(names[0])
            if len(begun) > 2:
                # Before the server has woken the other one, it could lock its first row once more.
                await committed.wait()
            await connection.execute("SET LOCAL deadlock_timeout = '10ms'")
            for name in names:
                await connection.execute("SELECT 1 FROM notes WHERE note = %s FOR UPDATE", (name,))
                if name == names[0]:
                    await meeting()

        return lock

    async def run(*names: str) -> None:
        await transact(session, lock_in_order(*names))
        committed.set()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "a", "b")
            nursery.start_soon(run, "b", "a")
    assert len(begun) == 3


async def test_what_is_returned_and_what_is_rolled_back(
    session: Session, notes: Callable[[], int], no_pauses: None
) -> None:
    """The result is that of the attempt that committed, and nothing of the others remains."""
    attempts = 0

    async def work(connection: Connection) -> tuple[int, Any]:
        nonlocal attempts
        attempts += 1
        await connection.execute("INSERT INTO notes VALUES ('a')")
        if attempts < 3:
            await fail(connection)
        return attempts, await ask(connection, "SHOW transaction_isolation")

    assert await transact(session, work) == (3, "serializable")
    assert notes() == 1


async def test_other_errors_are_not_repeated(session: Session, notes: Callable[[], int]) -> None:
    """An error that is no conflict is raised at once, and the transaction is rolled back."""
    attempts = 0

    async def work(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute("INSERT INTO notes VALUES ('a')")
        await connection.execute("SELECT 1 / 0")

    with pytest.raises(psycopg.errors.DivisionByZero):
        await transact(session, work)
    assert attempts == 1
    assert notes() == 0


async def test_the_last_attempt_raises(session: Session, no_pauses: None) -> None:
    """After as many attempts as it may make, the conflict is raised."""
    attempts = 0

    async def work(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        await fail(connection)

    with pytest.raises(psycopg.errors.SerializationFailure):
        await transact(session, work, attempts=3)
    assert attempts == 3


async def test_the_deadline_raises_the_conflict(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the next attempt could only begin after the deadline, the conflict is raised, at once."""
    monkeypatch.setattr(transactions, "random", SimpleNamespace(uniform=lambda low, high: 5))
    begun = trio.current_time()
    with pytest.raises(psycopg.errors.SerializationFailure), trio.fail_after(3):
        await transact(session, fail)
    assert trio.current_time() - begun < 2


async def test_the_pauses_grow(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be twice as long as the one before, up to a second, and has chance in it."""
    longest: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0
        longest.append(high)
        return 0

    monkeypatch.setattr(transactions, "random", SimpleNamespace(uniform=uniform))
    with pytest.raises(psycopg.errors.SerializationFailure):
        await transact(session, fail, attempts=10)
    assert longest == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1, 1]


async def test_another_task_has_the_connection_in_a_pause(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that waits for its next attempt holds no connection."""
    monkeypatch.setattr(transactions, "random", SimpleNamespace(uniform=lambda low, high: 100))
    async with (
        open_pool(dsn, pool_size=1, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(transact, session, fail)
        await trio.testing.wait_all_tasks_blocked(0.05)
        async with session.connection(timeout=1) as connection:
            assert await ask(connection, "SELECT 1") == 1
        nursery.cancel_scope.cancel()
