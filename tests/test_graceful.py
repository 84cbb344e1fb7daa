"""The server in plain Trio ends as it should."""

from __future__ import annotations

from pathlib import Path
from signal import SIGTERM

import trio
from embedded_postgres import EmbeddedPostgres
from program import Errors, everything_was_closed, open_database, refuses, run_example, until
from proxy import open_proxy
from psycopg.conninfo import make_conninfo

BOUND = 20
"""Seconds that the test may take. It needs much less, also on a busy machine."""


async def test_sigterm(server: EmbeddedPostgres, tmp_path: Path) -> None:
    """What was asked is answered. Silent clients are hung up on, late ones are refused."""
    errors = Errors(tmp_path / "errors")
    with trio.fail_after(BOUND):
        async with (
            open_database(server) as (dsn, onlooker),
            open_proxy("127.0.0.1", server.port) as proxy,
            run_example(
                "graceful.py", errors=errors, DATABASE_URL=make_conninfo(dsn, **proxy.address)
            ) as (process, line),
        ):
            host, port = line.split()
            address = host, int(port)
            async with (
                await trio.open_tcp_stream(*address) as silent,
                await trio.open_tcp_stream(*address) as stream,
            ):
                for client in silent, stream:
                    await client.send_all(b"hello")
                    assert await client.receive_some() == b"HELLO"
                proxy.stall()
                await stream.send_all(b"still there?")
                process.send_signal(SIGTERM)
                await until(lambda: refuses(address))
                assert await silent.receive_some() == b""
                assert process.poll() is None
                proxy.resume()
                assert await stream.receive_some() == b"STILL THERE?"
                assert await stream.receive_some() == b""
            assert await process.wait() == 0
            await everything_was_closed(onlooker)
            assert errors.read() == ""
