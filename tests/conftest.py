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
def dsn(server: EmbeddedPostgres) -> str:
    return server.dsn
