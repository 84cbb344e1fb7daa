"""What all tests share."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from connections import Connection, backend
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from strict import StrictPostgres
from timing import alarm

from whitepool.postgres import connect


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedPostgres]:
    """A real PostgreSQL. Tests that stop it start one of their own."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
def no_hanging() -> Iterator[None]:
    """A pool that hangs fails its test, instead of keeping the others from running."""
    with alarm():
        yield


@pytest.fixture
def dsn(server: EmbeddedPostgres) -> str:
    return server.dsn


@pytest.fixture
def onlooker(dsn: str) -> Iterator[Onlooker]:
    onlooker = Onlooker(dsn)
    yield onlooker
    onlooker.close()


@pytest.fixture(scope="module")
def strict() -> Iterator[StrictPostgres]:
    """A server that asks for passwords."""
    with StrictPostgres() as server:
        yield server


@pytest.fixture(scope="module")
def superuser(strict: StrictPostgres) -> Iterator[Onlooker]:
    """Looks at that server, and changes the password of the role `keeper`."""
    onlooker = Onlooker(strict.unix_dsn)
    onlooker.do("CREATE ROLE keeper LOGIN")
    yield onlooker
    onlooker.close()


@pytest.fixture
def notes(onlooker: Onlooker) -> Iterator[Callable[[], int]]:
    """A table `notes`; call it for the number of its rows."""
    onlooker.do("DROP TABLE IF EXISTS notes")
    onlooker.do("CREATE TABLE notes (note text)")
    yield lambda: int(onlooker.ask("SELECT count(*) FROM notes"))
    onlooker.do("DROP TABLE notes")


@pytest.fixture
async def connection(dsn: str, onlooker: Onlooker) -> AsyncIterator[Connection]:
    """A connection that is not in a pool."""
    connection: Connection = await connect(dsn)
    yield connection
    mine = backend(connection) if not connection.closed else None
    await connection.close()
    if mine is not None:
        await onlooker.until_gone(mine)


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """A port on which no server listens, and which no other program can take."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A host that accepts connections, and never says a word: it is frozen, or its network is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need PostgreSQL."""
    for item in items:
        uses_server = {"server", "strict"}.intersection(getattr(item, "fixturenames", ()))
        if uses_server or hasattr(getattr(item, "module", None), "EmbeddedPostgres"):
            item.add_marker(pytest.mark.postgres)
