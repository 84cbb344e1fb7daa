"""FastAPI, with a connection for each request. Each of Hypercorn's processes has a pool of its own.

pip install fastapi
cd examples && DATABASE_URL=dbname=shop hypercorn -k trio -w 2 fastapi_service:app
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import psycopg
import trio
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from psycopg.rows import dict_row
from pydantic import BaseModel

import whitepool.postgres

REQUEST_TIMEOUT = 5


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Open the pool before the first request is accepted, and close it after the last is answered."""
    async with whitepool.postgres.open_pool(
        os.environ["DATABASE_URL"], name="shop", pool_size=2, row_factory=dict_row
    ) as session:
        yield {"session": session}


async def get_connection(
    request: Request,
) -> AsyncIterator[whitepool.postgres.TrioConnection[dict[str, Any]]]:
    """Check out a connection for one request, which has REQUEST_TIMEOUT for all that it does."""
    with trio.fail_after(REQUEST_TIMEOUT):
        async with request.state.session.connection(timeout=REQUEST_TIMEOUT / 2) as connection:
            yield connection


# scope="function": commit before the answer is sent, so that a commit that fails is no 200.
Connection = Annotated[
    whitepool.postgres.TrioConnection[dict[str, Any]], Depends(get_connection, scope="function")
]


async def unavailable(request: Request, error: Exception) -> JSONResponse:
    """There was no connection in time, the request took too long, or the database is away."""
    return JSONResponse({"error": "try again"}, 503, {"Retry-After": str(random.randint(1, 3))})


app = FastAPI(
    lifespan=lifespan,
    exception_handlers={trio.TooSlowError: unavailable, psycopg.OperationalError: unavailable},
)


class Item(BaseModel):
    name: str
    price: int


@app.put("/items")
async def put_item(item: Item, connection: Connection) -> Item:
    upsert = (
        "INSERT INTO item VALUES (%(name)s, %(price)s)"
        " ON CONFLICT (name) DO UPDATE SET price = excluded.price"
    )
    await connection.execute(upsert, item.model_dump())
    return item


@app.get("/items/{name}")
async def get_item(name: str, connection: Connection) -> Item:
    cursor = await connection.execute("SELECT name, price FROM item WHERE name = %s", (name,))
    row = await cursor.fetchone()
    if row is None:
        raise HTTPException(404)
    return Item(**row)


@app.get("/process")
async def get_process(connection: Connection) -> dict[str, int]:
    """Say which process has answered, and on which connection."""
    return {"process": os.getpid(), "connection": connection.info.backend_pid}
