"""Quart-Trio, with a pool of PostgreSQL connections.

pip install quart-trio
cd examples && DATABASE_URL=dbname=shop hypercorn -k trio -w 2 quart_service:app
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from typing import Any

import psycopg
import trio
from psycopg.rows import dict_row
from quart_trio import QuartTrio

import whitepool.postgres

REQUEST_TIMEOUT = 5


class Shop(QuartTrio):
    session: whitepool.postgres.PostgresSession[dict[str, Any]]


app = Shop(__name__)


@app.while_serving
async def lifespan() -> AsyncGenerator[None]:
    """Open the pool before the first request is accepted, and close it after the last is answered."""
    async with whitepool.postgres.open_pool(
        os.environ["DATABASE_URL"], name="shop", pool_size=2, row_factory=dict_row
    ) as app.session:
        yield


@app.get("/items/<name>")
async def get_item(name: str) -> tuple[dict[str, Any], int]:
    with trio.fail_after(REQUEST_TIMEOUT):
        async with app.session.connection(timeout=REQUEST_TIMEOUT / 2) as connection:
            select = "SELECT name, price FROM item WHERE name = %s"
            row = await (await connection.execute(select, (name,))).fetchone()
    return (row, 200) if row else ({"error": "there is none"}, 404)


@app.errorhandler(trio.TooSlowError)
@app.errorhandler(psycopg.OperationalError)
async def unavailable(error: Exception) -> tuple[dict[str, str], int, dict[str, str]]:
    return {"error": "try again"}, 503, {"Retry-After": "1"}
