"""Readers and a writer: two pools, and a rule that lets a client read what it has just written.

export WRITER='host=db1,db2 dbname=shop target_session_attrs=read-write'
export READERS='host=db2,db1 dbname=shop target_session_attrs=prefer-standby'
python examples/readers.py
"""

from __future__ import annotations

import os
from typing import Any

import trio

import whitepool
import whitepool.postgres

Session = whitepool.postgres.PostgresSession[Any]

PATIENCE = 1.0
"""Seconds that a client waits for a replica to catch up, before it reads from the primary."""

CAUGHT_UP = "SELECT NOT pg_is_in_recovery() OR pg_last_wal_replay_lsn() >= %s::pg_lsn"


async def write(writer: Session, text: str) -> str:
    """Write a post, and return a token: how far the primary's log had come when it was committed."""
    async with writer.connection() as connection:
        await connection.execute("INSERT INTO post VALUES (%s)", (text,))
        await connection.commit()
        cursor = await connection.execute("SELECT pg_current_wal_insert_lsn()")
        (token,) = await cursor.fetchone() or ("",)
        return str(token)


async def read(session: Session, text: str, token: str | None = None) -> str | None:
    """Return where a post was read, or None if it is not there, or the server is behind the token."""
    async with session.connection() as connection:
        while token is not None:
            cursor = await connection.execute(CAUGHT_UP, (token,))
            if await cursor.fetchone() == (True,):
                break
            await connection.commit()
            await trio.sleep(0.01)
        cursor = await connection.execute(
            "SELECT pg_is_in_recovery() FROM post WHERE text = %s", (text,)
        )
        row = await cursor.fetchone()
        return None if row is None else "a replica" if row[0] else "the primary"


async def read_own(readers: Session, writer: Session, text: str, token: str) -> str | None:
    """Read what this client has written: from a replica that has it by now, else from the primary."""
    try:
        with trio.fail_after(PATIENCE):
            return await read(readers, text, token)
    except (trio.TooSlowError, whitepool.CheckoutTimeout):
        return await read(writer, text)


async def main(writer_url: str, readers_url: str) -> None:
    async with (
        whitepool.postgres.open_pool(writer_url, name="writer", pool_size=2) as writer,
        whitepool.postgres.open_pool(readers_url, name="readers", pool_size=4, lazy=True) as readers,
    ):
        async with writer.connection() as connection:
            await connection.execute("CREATE TABLE IF NOT EXISTS post (text text)")
        for number in range(3):
            text = f"post {number}"
            token = await write(writer, text)
            print(f"{text}: its author reads it from {await read_own(readers, writer, text, token)}")
        print(f"post 0: others read it from {await read(readers, 'post 0') or 'nowhere yet'}")
        async with writer.connection() as connection:
            await connection.execute("DROP TABLE post")


if __name__ == "__main__":
    trio.run(main, os.environ["WRITER"], os.environ["READERS"])
