"""Ctrl-C at any instant of any operation: it leaves the program, and leaves nothing behind.

The signals are real ones, in a child process, which is this file:
``python test_ctrl_c.py OPERATION DSN SEED INSTANTS``. `make fuzz` tries more instants.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import psycopg
import pytest
import trio
from trio.lowlevel import enable_ki_protection

from whitepool.postgres import TrioConnection, connect

INSTANTS = int(os.environ.get("CTRL_C_INSTANTS", "25"))
"""How many instants to try, for each operation."""

BOUND = 10
"""Seconds after which a program is taken for hanging."""

Connection = TrioConnection[Any]


async def execute(connection: Connection) -> None:
    for _ in range(3):
        await connection.execute("SELECT pg_sleep(0.0005)")


async def executemany(connection: Connection) -> None:
    await connection.cursor().executemany("SELECT %s", [(i,) for i in range(20)])


async def executemany_returning(connection: Connection) -> None:
    cursor = connection.cursor()
    await cursor.executemany("SELECT %s", [(i,) for i in range(20)], returning=True)
    await cursor.fetchall()


async def stream(connection: Connection) -> None:
    rows: Any = connection.cursor().stream("SELECT repeat('x', 1000) FROM generate_series(1, 50)")
    async with aclosing(rows):
        async for _ in rows:
            pass


async def copy_in(connection: Connection) -> None:
    await connection.execute("CREATE TEMP TABLE copied (x text)")
    async with connection.cursor().copy("COPY copied FROM STDIN") as copy:
        for _ in range(10):
            await copy.write_row(("x" * 1000,))


async def copy_out(connection: Connection) -> None:
    query = "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 50)) TO STDOUT"
    async with connection.cursor().copy(query) as copy:
        async for _ in copy.rows():
            pass


async def pipeline(connection: Connection) -> None:
    async with connection.pipeline() as pipeline:
        for _ in range(5):
            await connection.execute("SELECT pg_sleep(0.0002)")
        await pipeline.sync()
        await connection.execute("SELECT 1")


async def transaction(connection: Connection) -> None:
    async with connection.transaction():
        await connection.execute("SELECT 1")


async def nested_transactions(connection: Connection) -> None:
    async with connection.transaction():
        for _ in range(2):
            async with connection.transaction():
                await connection.execute("SELECT 1")


async def transaction_in_a_pipeline(connection: Connection) -> None:
    async with connection.pipeline(), connection.transaction(), connection.transaction():
        await connection.execute("SELECT 1")


async def server_cursor(connection: Connection) -> None:
    async with connection.cursor("named") as cursor:
        await cursor.execute("SELECT generate_series(1, 100)")
        await cursor.fetchmany(10)


async def notifies(connection: Connection) -> None:
    await connection.set_autocommit(True)
    await connection.execute("LISTEN channel")
    await connection.execute("NOTIFY channel")
    async with aclosing(connection.notifies(timeout=0.01, stop_after=1)) as notifications:
        async for _ in notifications:
            pass


# A Ctrl-C between a nursery and its block would leave tasks behind: that is Python's doing, and Trio's.
@enable_ki_protection
async def in_a_task(connection: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transaction, connection)
        nursery.start_soon(execute, connection)


OPERATIONS: dict[str, Callable[[Connection], Awaitable[None]]] = {
    operation.__name__: operation
    for operation in [
        execute,
        executemany,
        executemany_returning,
        stream,
        copy_in,
        copy_out,
        pipeline,
        transaction,
        nested_transactions,
        transaction_in_a_pipeline,
        server_cursor,
        notifies,
        in_a_task,
    ]
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_ctrl_c_at_any_instant(dsn: str, operation: str) -> None:
    """The KeyboardInterrupt leaves, and not an error it has caused; no backend is left busy."""
    command = [sys.executable, "-W", "ignore", __file__, operation, dsn, "1", str(INSTANTS)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]


# -- The child -----------------------------------------------------------------------------------------


def only_interrupts(error: BaseException) -> bool:
    """Say whether this is a Ctrl-C, and nothing else; nurseries put groups around it."""
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return all(map(only_interrupts, inner)) if inner else isinstance(error, KeyboardInterrupt)


def measure(operation: Callable[[Connection], Awaitable[None]], dsn: str) -> float:
    """Return for how long an operation takes, connecting included."""
    begun = time.perf_counter()
    for _ in range(3):
        trio.run(program, operation, dsn, [])
    return (time.perf_counter() - begun) / 3


async def program(
    operation: Callable[[Connection], Awaitable[None]],
    dsn: str,
    backends: list[int],
    moment: float = 0,
) -> None:
    # Within trio.run, which can be interrupted while it starts and ends, and is not to be tested.
    signal.setitimer(signal.ITIMER_REAL, moment)
    try:
        async with await connect(dsn, cleanup_timeout=2) as connection:
            backends.append(connection.pgconn.backend_pid)
            await operation(connection)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def press(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def try_instants(operation_name: str, dsn: str, seed: str, instants: str) -> int:
    """Press Ctrl-C once in each of many runs; return how many ended otherwise than they should."""
    operation = OPERATIONS[operation_name]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    duration = measure(operation, dsn)
    signal.signal(signal.SIGALRM, press)
    moments = random.Random(int(seed))
    wrong = 0
    with psycopg.connect(dsn, autocommit=True) as onlooker:
        for number in range(int(instants)):
            faulthandler.dump_traceback_later(BOUND, exit=True)
            backends: list[int] = []
            moment = moments.uniform(0.1, 1.05) * duration
            problem = None
            begun = time.perf_counter()
            try:
                trio.run(program, operation, dsn, backends, moment)
            except BaseException as error:
                if not only_interrupts(error):
                    problem = traceback.format_exc()
            if time.perf_counter() - begun > moment + 1:
                problem = f"it took {time.perf_counter() - begun:.1f} s {problem or ''}"
            query = "SELECT query FROM pg_stat_activity WHERE pid = any(%s) AND state = 'active'"
            for _ in range(100):
                busy = onlooker.execute(query, [backends]).fetchall()
                if not busy:
                    break
                time.sleep(0.01)
            else:
                problem = f"the server is left with {busy} {problem or ''}"
            if problem:
                wrong += 1
                print(
                    f"{operation_name}, instant {number}, after {moment:.6f} s: {problem}", flush=True
                )
    faulthandler.cancel_dump_traceback_later()
    return wrong


if __name__ == "__main__":
    sys.exit(try_instants(*sys.argv[1:]) > 0)
