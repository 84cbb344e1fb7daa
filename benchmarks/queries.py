"""Queries through each pool, as many tasks as connections.

All pools take part in `SELECT 1` on a few connections; only the fastest in what has more rounds.
"""

from __future__ import annotations

from functools import partial

import psycopg

from .case import Case, Figure, at_least
from .peers import (
    ASYNCPG,
    ASYNCPG_BARE,
    ASYNCPG_BARE_UVLOOP,
    NO_POOL,
    POOLS,
    PSYCOPG,
    PSYCOPG_UVLOOP,
    TRIOPG,
    WHITEPOOL,
    Peer,
    counted,
    throughput,
)

SIZES = (1, 16, 64, 256)
SELECT_1000 = "SELECT n, 'row number ' || n FROM generate_series(1, 1000) AS n"

FASTEST = {ASYNCPG_BARE_UVLOOP: at_least(1), PSYCOPG_UVLOOP: at_least(1.5)}
ALONE = FASTEST | {PSYCOPG: at_least(1)}
MANY = FASTEST | {
    PSYCOPG: at_least(1.8),
    ASYNCPG: at_least(1.1),
    ASYNCPG_BARE: at_least(1.1),
    TRIOPG: at_least(5),
    NO_POOL: at_least(0.9),
}


def fetch(
    peer: Peer, dsn: str, size: int, query: str, parameters: tuple[int, ...] = ()
) -> tuple[float, float]:
    """Return queries a second, and the microseconds of the client's CPU that each takes."""
    if peer in (ASYNCPG, ASYNCPG_BARE, ASYNCPG_BARE_UVLOOP, TRIOPG):
        query = query.replace("%s", "$1")

    figures: tuple[float, float] = peer.loop.run(
        throughput, peer, dsn, size, lambda pool: partial(pool.fetch, query, *parameters), size
    )
    return figures


def create_items(dsn: str) -> None:
    """Make the table from which rows are fetched by their keys."""
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS items (id int PRIMARY KEY, name text)")
        connection.execute(
            "INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 1000) n"
            " ON CONFLICT DO NOTHING"
        )


def on(size: int) -> str:
    return counted(size, "connection")


def _select_1(size: int) -> Case:
    everyone = size < 256
    bounds = FASTEST if not everyone else ALONE if size == 1 else MANY
    return Case(
        "query",
        (
            Figure(f"`SELECT 1`, {on(size)}", "/s", bounds, "query" if size == 16 else "", of=max),
            Figure(f"… the client's CPU, {on(size)}", "µs CPU", of=min),
        ),
        (*POOLS, NO_POOL) if everyone else (WHITEPOOL, *FASTEST),
        partial(fetch, size=size, query="SELECT 1"),
        rounds=5,
    )


def _by_key(size: int) -> Case:
    return Case(
        "query",
        (
            Figure(f"one row by its key, {on(size)}", "/s", FASTEST, of=max),
            Figure(f"… the client's CPU for one row, {on(size)}", "µs CPU", of=min),
        ),
        (WHITEPOOL, *FASTEST),
        partial(fetch, size=size, query="SELECT name FROM items WHERE id = %s", parameters=(500,)),
        rounds=6,
        prepare=create_items,
    )


CASES = (
    *map(_select_1, SIZES),
    *map(_by_key, SIZES),
    Case(
        "query",
        (Figure("1,000 rows, 16 connections", "/s", {PSYCOPG: at_least(1.2)}, of=max),),
        (*POOLS, NO_POOL),
        lambda peer, dsn: fetch(peer, dsn, 16, SELECT_1000)[:1],
    ),
)
