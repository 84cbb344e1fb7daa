"""What the scenarios share: how they say what they see, and what they need to see it.

A scenario knows nothing of its event loop. It gets a connection, the connection string, and a `See` to
report to, and labels everything it reports.
"""

from __future__ import annotations

import inspect
import re
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from psycopg import errors, pq

Connection = psycopg.AsyncConnection[Any]

PSYCOPG = tuple(int(part) for part in re.findall(r"\d+", psycopg.__version__)[:3])
LIBPQ = pq.version() // 10000

LISTS_FAILURES = "All failures were" in inspect.getsource(psycopg.AsyncConnection.connect)
"""Older releases of psycopg report only the last failure; on Trio all are listed."""

LAST_WORDS = (errors.AdminShutdown, errors.IdleInTransactionSessionTimeout)

MUCH_MORE_THAN_FITS = "SELECT i, repeat('x', 10000) FROM generate_series(1, 100000) i"
"""A query whose result (1 GB) is far larger than all buffers between the server and the client.

The server is still sending when a scenario has read the first row. The rows are long, so the buffers
hold some hundreds of them, not hundreds of thousands. They are soon read, also on a busy machine.
"""


class See:
    """Collects what a scenario sees, each observation under a label.

    `see("after the rollback", state=..., rows=...)` sees "after the rollback: state" and "after the
    rollback: rows". A label that is used again is numbered.
    """

    def __init__(self) -> None:
        self.seen: dict[str, object] = {}
        self.error: Exception | None = None
        """What ended the scenario. A scenario catches what it expects, so there should be none."""

    def __call__(self, where: str = "", /, **observations: object) -> None:
        for name, value in observations.items():
            label = name.replace("_", " ")
            label = first = f"{where}: {label}" if where else label
            number = 1
            while label in self.seen:
                number += 1
                label = f"{first} ({number})"
            self.seen[label] = value


def differences(on_asyncio: See, on_trio: See) -> list[str]:
    """Say what was seen differently: each label, with what was seen on asyncio and on Trio."""
    expected, found = on_asyncio.seen, on_trio.seen
    lines: list[str] = []
    for label in dict.fromkeys([*expected, *found]):
        if label not in expected or label not in found or expected[label] != found[label]:
            lines.append(f"{label}:")
            for where, seen in {"asyncio": expected, "Trio": found}.items():
                lines.append(
                    f"    {where}: {seen[label]!r}" if label in seen else f"    {where}: not seen"
                )
    if not lines and list(expected) != list(found):
        lines += ["the order:", f"    asyncio: {list(expected)}", f"    Trio: {list(found)}"]
    return lines


Scenario = Callable[[Connection, str, See], Awaitable[None]]

SCENARIOS: list[Scenario] = []
TYPES: list[Scenario] = []
"""Those of `SCENARIOS` that are about types: they run on a pooled connection as well."""


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


def scenario_if(condition: bool) -> Callable[[Scenario], Scenario]:
    """A scenario of something that not every psycopg, or libpq, has."""
    return scenario if condition else lambda function: function


def scenario_of_types(function: Scenario) -> Scenario:
    TYPES.append(function)
    return scenario(function)


async def conduct(scenario: Scenario, conn: Connection, dsn: str) -> See:
    """Run a scenario, and return what it saw, how it ended, and what became of its connection."""
    see = See()
    try:
        await scenario(conn, dsn, see)
    except Exception as error:
        see.error = error
        see(raised_by_the_scenario=describe(error))
    see(state_at_the_end=state(conn))
    return see


def fill(dsn: str) -> None:
    """Make the table `notes`, with three rows, in a schema that contains nothing else."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS laboratory CASCADE")
        connection.execute("CREATE SCHEMA laboratory")
        connection.execute("CREATE TABLE laboratory.notes (id int PRIMARY KEY, note text)")
        connection.execute("INSERT INTO laboratory.notes VALUES (1, 'one'), (2, NULL), (3, 'three')")


def describe(error: BaseException) -> tuple[object, ...]:
    """An exception, without what must differ: addresses of objects, and numbers of processes."""
    # Whether the server's last words are read before the end is a matter of chance.
    if isinstance(error, LAST_WORDS) or "server closed the connection unexpectedly" in str(error):
        return ("the server hung up",)
    message = re.sub(r"0x[0-9a-f]+", "0x…", str(error))
    message = re.sub(r"(process|PID|pid) \d+", r"\1 …", message)
    # The class that appears in the repr of a transaction, say, is not the same.
    message = message.replace("whitepool.postgres._blocks.TrioTransaction", "AsyncTransaction")
    message = message.replace("psycopg.AsyncTransaction", "AsyncTransaction")
    if not LISTS_FAILURES:
        message = message.partition("\nMultiple connection attempts failed")[0]
    chain = error.__cause__ and describe(error.__cause__)
    return type(error).__name__, getattr(error, "sqlstate", None), message, chain


def block_status(block: psycopg.AsyncTransaction) -> object:
    """The status of a transaction block, where this psycopg has it."""
    return getattr(block, "status", None)


async def attempt(work: Awaitable[object]) -> object:
    """Return what an awaitable returns, or a description of what it raises."""
    try:
        result = await work
    except Exception as error:
        return describe(error)
    if isinstance(result, psycopg.AsyncCursor):
        return result.statusmessage, result.rowcount
    return result


def attempt_now(work: Callable[[], object]) -> object:
    """The same for a plain function."""
    try:
        return work()
    except Exception as error:
        return describe(error)


def state(conn: Connection) -> tuple[object, ...]:
    return (
        "closed" if conn.closed else "open",
        "broken" if conn.broken else "not broken",
        conn.info.transaction_status.name,
        None if conn.closed else conn.info.pipeline_status.name,
    )


async def rows(conn: Connection, query: str = "SELECT id, note FROM notes ORDER BY id") -> list[Any]:
    cursor = await conn.execute(query.encode())
    return await cursor.fetchall()


def server_says(dsn: str, query: str, *parameters: object) -> Any:
    """Ask over another connection, which has nothing to do with any event loop."""
    with psycopg.connect(dsn, autocommit=True) as other:
        row = other.execute(query.encode(), parameters or None).fetchone()
        return row and row[0]


def wait_until(dsn: str, query: str, *parameters: object) -> None:
    """Return when the server answers a query with true."""
    for _ in range(1000):
        if server_says(dsn, query, *parameters):
            return
        time.sleep(0.005)
    raise TimeoutError(query)


def terminate(dsn: str, pid: int) -> None:
    """End a backend, and return when it is gone."""
    assert server_says(dsn, "SELECT pg_terminate_backend(%s, 5000)", pid)


def when_active(dsn: str, pid: int, action: Callable[[], object]) -> threading.Thread:
    """Do something, in a thread, as soon as a backend is busy."""

    def run() -> None:
        with psycopg.connect(dsn, autocommit=True) as other:
            for _ in range(1000):
                found = other.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", [pid]
                )
                if found.fetchone():
                    break
                time.sleep(0.005)
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread
