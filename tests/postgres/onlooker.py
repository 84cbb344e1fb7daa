"""A look at the server from outside, and what can be done to it from there."""

from __future__ import annotations

import os
import signal
from typing import Any

import psycopg
from timing import until


class Onlooker:
    """Looks at the server over a connection of its own, which has nothing to do with Trio."""

    def __init__(self, dsn: str) -> None:
        # What a test has left locked makes the next one fail, and not hang.
        self._connection = psycopg.connect(dsn, autocommit=True, options="-c lock_timeout=5s")

    def ask(self, query: str, *parameters: object) -> Any:
        """Return the first column of the first row, or None."""
        row = self._connection.execute(query, parameters or None).fetchone()
        return None if row is None else row[0]

    def do(self, statement: str) -> None:
        self._connection.execute(statement)

    def state(self, backend: int) -> str | None:
        """What a backend is doing, in the words of pg_stat_activity; None: it is gone."""
        state: str | None = self.ask("SELECT state FROM pg_stat_activity WHERE pid = %s", backend)
        return state

    def backends(self, application: str) -> int:
        count: int = self.ask(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", application
        )
        return count

    def active(self, application: str) -> int:
        count: int = self.ask(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND state = 'active'",
            application,
        )
        return count

    async def until_active(self, backend: int) -> None:
        await until(lambda: self.state(backend) == "active")

    async def until_gone(self, backend: int) -> None:
        """Wait until a backend is not listed, and has ended: it hangs up in between."""
        await until(lambda: self.state(backend) is None and not _is_process(backend))

    def close(self) -> None:
        self._connection.close()


def _is_process(backend: int) -> bool:
    try:
        os.kill(backend, 0)
    except ProcessLookupError:
        return False
    return True


def freeze(backend: int) -> None:
    """Stop the process that serves a connection: it reads nothing and writes nothing."""
    os.kill(backend, signal.SIGSTOP)


def thaw(backend: int) -> None:
    os.kill(backend, signal.SIGCONT)


class slow_commits:
    """A table `slow`; to commit a row in it takes half a minute."""

    def __init__(self, onlooker: Onlooker) -> None:
        self._onlooker = onlooker

    def __enter__(self) -> None:
        self.__exit__()
        self._onlooker.do(
            "CREATE TABLE slow (i int);"
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_sleep(30); RETURN NULL; END';"
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slow()"
        )

    def __exit__(self, *_: object) -> None:
        self._onlooker.do("DROP TABLE IF EXISTS slow; DROP FUNCTION IF EXISTS slow")
