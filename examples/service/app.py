"""Accounts, and transfers between them, over HTTP."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import trio
from psycopg.rows import dict_row
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import whitepool.postgres

Connection = whitepool.postgres.TrioConnection[Any]
Session = whitepool.Session[Connection]

POOL_SIZE = int(os.environ.get("POOL_SIZE", "5"))
REQUEST_TIMEOUT = float(os.environ.get("REQUEST_TIMEOUT", "5"))
CHECKOUT_TIMEOUT = (
    REQUEST_TIMEOUT / 2
)  # so that a request that gets a connection has time left to use it

SCHEMA = (Path(__file__).parent / "schema.sql").read_bytes()

log = logging.getLogger(__package__)


class Account(BaseModel):
    owner: str
    balance: int


class Transfer(BaseModel):
    payer: int
    payee: int
    amount: int


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Session]]:
    """Open the pool before the first request is accepted, and close it after the last is answered.

    With `min_ready=0` the service starts although the database is away, and says that it is not ready.
    """
    app.state.draining = False
    async with whitepool.postgres.open_pool(
        os.environ["DATABASE_URL"],
        pool_size=POOL_SIZE,
        max_overflow=POOL_SIZE,
        min_ready=0,
        max_waiting=20 * POOL_SIZE,
        shutdown_timeout=1,  # by then no request is left that could hold a connection
        configure=table_maker(),
        autocommit=True,
        row_factory=dict_row,
        fallback_application_name="accounts",
    ) as session:
        yield {"session": session}  # as request.state.session


def table_maker() -> Callable[[Connection], Awaitable[None]]:
    """Make a function that creates the tables with the first connection, before a request gets any."""
    lock = trio.Lock()
    is_done = False

    async def make_tables(connection: Connection) -> None:
        nonlocal is_done
        async with lock:
            if not is_done:
                await connection.execute(SCHEMA)
                is_done = True

    return make_tables


async def open_account(request: Request) -> Response:
    """POST /accounts {"owner": "Ada", "balance": 100}"""
    with trio.fail_after(REQUEST_TIMEOUT):
        opened = Account.model_validate_json(await request.body())
        session: Session = request.state.session
        async with session.worker(CHECKOUT_TIMEOUT) as connection:
            insert = "INSERT INTO account (owner, balance) VALUES (%(owner)s, %(balance)s) RETURNING *"
            account = await (await connection.execute(insert, opened.model_dump())).fetchone()
    return JSONResponse(account, 201)


async def show_account(request: Request) -> Response:
    """GET /accounts/1"""
    session: Session = request.state.session
    with trio.fail_after(REQUEST_TIMEOUT):
        async with session.worker(CHECKOUT_TIMEOUT) as connection:
            select = "SELECT * FROM account WHERE id = %s"
            cursor = await connection.execute(select, (request.path_params["id"],))
            account = await cursor.fetchone()
    if account is None:
        raise HTTPException(404)
    return JSONResponse(account)


async def make_transfer(request: Request) -> Response:
    """PUT /transfers/5a1c… {"payer": 1, "payee": 2, "amount": 10}

    The client chooses the id: where it gets no answer, or a 503, it may safely say the same again.
    """
    with trio.fail_after(REQUEST_TIMEOUT):
        order = Transfer.model_validate_json(await request.body())
        session: Session = request.state.session
        resource = await session.block_checkout(CHECKOUT_TIMEOUT)
        try:
            made = await transfer(resource.get(), request.path_params["id"], order)
        except psycopg.errors.ReadOnlySqlTransaction:
            # A primary that was demoted keeps its sessions. The pool can't see that they have become
            # useless, so tell it; a new connection finds the new primary.
            session.destroyed(resource)
            raise
        except BaseException:
            session.checkin(resource)
            raise
        else:
            session.checkin(resource)
    return JSONResponse({"made": made}, 201 if made else 200)


async def transfer(connection: Connection, id: UUID, order: Transfer) -> bool:
    """Move money in one transaction; return False where this transfer was made before."""
    async with connection.transaction():
        insert = "INSERT INTO transfer VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING"
        values = (id, order.payer, order.payee, order.amount)
        if not (await connection.execute(insert, values)).rowcount:
            return False
        changes = [(order.payer, -order.amount), (order.payee, order.amount)]
        for account, change in sorted(changes):  # sorted: no deadlocks
            update = "UPDATE account SET balance = balance + %s WHERE id = %s"
            await connection.execute(update, (change, account))
    return True


async def healthz(request: Request) -> Response:
    """Say that the process is alive. It says nothing of the database: a restart would not mend that."""
    return PlainTextResponse("alive")


async def readyz(request: Request) -> Response:
    """Say whether to send requests here.

    Not while draining, and not while the pool has no connection. A full pool is ready: its requests
    would only fill the next one.
    """
    session: Session = request.state.session
    now = session.statistics()
    ready = not request.app.state.draining and now.idle + now.in_use + now.resetting > 0
    return JSONResponse({"ready": ready, **asdict(now)}, 200 if ready else 503)


async def unavailable(request: Request, error: Exception) -> Response:
    """Too much is asked, or the database is away. Not all clients should come back at the same time.

    Once the database has been away for CHECKOUT_TIMEOUT, the pool says so at once (`PoolUnavailable`).
    """
    log.warning("503: %r", error)
    return JSONResponse({"error": "try again"}, 503, {"Retry-After": str(random.randint(1, 3))})


async def refused(request: Request, error: Exception) -> Response:
    """The database refuses it: there is no such account, or not that much money on it."""
    return JSONResponse({"error": "refused"}, 422)


async def invalid(request: Request, error: Exception) -> Response:
    """The body is not what it has to be."""
    assert isinstance(error, ValidationError)
    return Response(error.json(include_url=False), 422, media_type="application/json")


app = Starlette(
    routes=[
        Route("/accounts", open_account, methods=["POST"]),
        Route("/accounts/{id:int}", show_account),
        Route("/transfers/{id:uuid}", make_transfer, methods=["PUT"]),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
    ],
    exception_handlers={
        # A CheckoutTimeout, of whichever kind, is a TooSlowError, as what trio.fail_after raises.
        trio.TooSlowError: unavailable,
        psycopg.OperationalError: unavailable,
        psycopg.errors.ReadOnlySqlTransaction: unavailable,
        psycopg.IntegrityError: refused,
        psycopg.DataError: refused,
        ValidationError: invalid,
    },
    lifespan=lifespan,
)
