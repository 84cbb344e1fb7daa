"""A manager whose `create` is the user's own keeps everything else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
import trio
from connections import Connection, ask
from psycopg.adapt import AdaptersMap
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader
from timing import until

import whitepool
from whitepool.postgres import PostgresManager, TrioConnection, connect

Create = Callable[[PostgresManager], Awaitable[Connection]]


class Rotating(PostgresManager):
    """Asks for a password at each attempt, and connects as the default does, or in a way of its own."""

    def __init__(self, dsn: str, *, by_super: bool, **keywords: Any) -> None:
        super().__init__(dsn, **keywords)
        self._by_super = by_super
        self._dsn = dsn
        self.asked = 0

    async def create(self) -> Connection:
        self.asked += 1
        if self._by_super:
            self._keywords["password"] = f"the {self.asked}th"
            return await super().create()
        connection: Connection = await connect(
            self._dsn, password=f"the {self.asked}th", row_factory=dict_row
        )
        return connection


both_ways = pytest.mark.parametrize("by_super", [True, False], ids=["super", "connect"])


@both_ways
@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_a_create_of_your_own_keeps_configure_and_reset(
    dsn: str, by_super: bool, reset: Any
) -> None:
    """`configure` runs once for each new connection, and once after each reset of the session."""
    configured: list[Connection] = []

    async def configure(connection: Connection) -> None:
        configured.append(connection)
        await connection.set_autocommit(True)
        await connection.execute("SET work_mem = '5MB'")

    manager = Rotating(dsn, by_super=by_super, configure=configure, reset=reset)
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0) as session:
        assert len(configured) == 1
        for _ in range(3):
            async with session.worker() as connection:
                assert connection is configured[0]
                assert connection.autocommit
                assert await ask(connection, "SHOW work_mem") == "5MB"
                await connection.execute("LISTEN news")
        await until(lambda: session.statistics().idle == 1)
        assert len(configured) == (1 if reset == "rollback" else 4)
        async with session.worker() as connection:
            left = await ask(connection, "SELECT count(*) FROM pg_listening_channels()")
            assert left == (1 if reset == "rollback" else 0)
            row_factory: Any = connection.row_factory
            assert (row_factory is dict_row) is not by_super
        session.destroyed(
            session.checkout_nowait() if reset == "rollback" else await session.block_checkout()
        )
        await until(lambda: session.statistics().idle == 1)
        assert (manager.asked, session.statistics().destroyed) == (2, 1)


@both_ways
async def test_a_refusal_is_final_whoever_connects(dsn: str, by_super: bool) -> None:
    """A database that does not exist ends the opening of the pool at the first attempt."""
    manager = Rotating(dsn.replace("dbname=", "dbname=no"), by_super=by_super)
    with trio.fail_after(3), pytest.raises(whitepool.PoolStartError, match="does not exist") as caught:
        async with whitepool.open_pool(manager, pool_size=1):
            raise AssertionError("opened")
    assert manager.asked == 1
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)


async def test_a_create_that_leaves_a_transaction_open(dsn: str) -> None:
    """That is a mistake which trying again would only repeat: the pool does not open, and says why."""

    class Forgetful(PostgresManager):
        async def create(self) -> Connection:
            connection = await super().create()
            await connection.execute("SET work_mem = '5MB'")
            return connection

    with (
        trio.fail_after(3),
        pytest.raises(
            whitepool.PoolStartError, match=r"create left a transaction open: .*autocommit=True"
        ),
    ):
        async with whitepool.open_pool(Forgetful(dsn), pool_size=1):
            raise AssertionError("opened")


async def test_a_configure_that_leaves_a_transaction_open_is_final(dsn: str) -> None:
    """The pool does not try for `start_timeout` what can't succeed."""
    attempts: list[Connection] = []

    async def configure(connection: Connection) -> None:
        attempts.append(connection)
        await connection.execute("SET work_mem = '5MB'")

    manager = PostgresManager(dsn, configure=configure)
    with (
        trio.fail_after(3),
        pytest.raises(
            whitepool.PoolStartError, match=r"configure left a transaction open: .*autocommit=True"
        ),
    ):
        async with whitepool.open_pool(manager, pool_size=1):
            raise AssertionError("opened")
    assert len(attempts) == 1
    assert attempts[0].closed


async def test_a_context_of_your_own_holds_again_after_a_reset(dsn: str) -> None:
    """The adapters that `create` gave to a connection are there for each client, and no others."""

    class Loader(TextLoader):
        def load(self, data: Any) -> Any:
            return f"<{super().load(data)!s}>"

    class Context:
        connection = None
        adapters = AdaptersMap(psycopg.adapters)

    Context.adapters.register_loader("text", Loader)

    class Adapting(PostgresManager):
        async def create(self) -> Connection:
            connection: Connection = await TrioConnection.connect(dsn, context=Context())
            return connection

    manager = Adapting(reset="session")
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0) as session:
        for _ in range(3):
            async with session.worker() as connection:
                assert await ask(connection, "SELECT 'mine'::text") == "<mine>"
                connection.adapters.register_loader("text", TextLoader)
                assert await ask(connection, "SELECT 'mine'::text") == "mine"


class OwnLifespan(PostgresManager):
    """Opens and closes in a way of its own."""

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[Connection]:
        connection = await self.create()
        try:
            yield connection
        finally:
            await connection.close()


@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_a_lifespan_of_your_own_keeps_configure_and_reset(dsn: str, reset: Any) -> None:
    """Whichever way a connection was opened, it is configured and reset like any other."""
    configured: list[Connection] = []

    async def configure(connection: Connection) -> None:
        configured.append(connection)
        await connection.execute("SET work_mem = '5MB'")
        await connection.commit()

    manager = OwnLifespan(dsn, configure=configure, reset=reset)
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0) as session:
        for _ in range(3):
            async with session.worker() as connection:
                assert connection is configured[0]
                assert await ask(connection, "SHOW work_mem") == "5MB"
        assert session.statistics().destroyed == 0
