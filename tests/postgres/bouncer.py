"""A PgBouncer in front of a server, and what it does to its clients."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import psycopg
import pytest
import trio
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker

Mode = Literal["session", "transaction"]

ROLE = "bouncer"
"""The role as which PgBouncer's own connections log in, so that tests can tell them."""

CONFIG = """
[databases]
postgres = host=127.0.0.1 port={server_port} user={role} dbname=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
admin_users = postgres
"""


@cache
def program() -> str:
    path = shutil.which("pgbouncer", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
    if path is None:
        pytest.fail("there is no pgbouncer; on Debian and its kin: apt-get install pgbouncer")
    return path


@cache
def version() -> tuple[int, int]:
    said = subprocess.run([program(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


class PgBouncer:
    """A PgBouncer on a port of its own, in front of a server."""

    def __init__(
        self, server: EmbeddedPostgres, folder: Path, mode: Mode = "transaction", **settings: object
    ) -> None:
        self.mode = mode
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        config, users = folder / "pgbouncer.ini", folder / "users"
        users.write_text('"postgres" "secret"\n')
        settings = {"pool_mode": mode, "server_login_retry": 1, **settings}
        text = CONFIG.format(server_port=server.port, port=self.port, users=users, role=ROLE)
        config.write_text(text + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        # It refuses to run as root, but starts as root and steps down.
        as_nobody = ("-u", "nobody") if os.geteuid() == 0 else ()
        self._command = (program(), "-q", *as_nobody, str(config))
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    async def start(self) -> None:
        """Start it, and return when it accepts connections."""
        process = self._process = self._launch()
        with trio.fail_after(5):
            while True:
                assert process.poll() is None, self._log.read_text()
                try:
                    stream = await trio.open_tcp_stream("127.0.0.1", self.port)
                except OSError:
                    await trio.sleep(0.01)
                else:
                    await stream.aclose()
                    return

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        """Make it crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def stop(self) -> None:
        """Have it stop when the transactions that are under way have ended (SIGINT)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        await trio.to_thread.run_sync(self._process.wait)
        self._process = None

    async def command(self, command: str) -> None:
        """Give a command on its admin console, and return when it has been carried out."""

        def give() -> None:
            console = f"{self.dsn} dbname=pgbouncer"
            with psycopg.connect(console, autocommit=True, prepare_threshold=None) as connection:
                connection.execute(command.encode())

        await trio.to_thread.run_sync(give, abandon_on_cancel=True)


@asynccontextmanager
async def running(
    server: EmbeddedPostgres, folder: Path, mode: Mode = "transaction", **settings: object
) -> AsyncIterator[PgBouncer]:
    """Run a PgBouncer for the length of a block."""
    bouncer = PgBouncer(server, folder, mode, **settings)
    try:
        await bouncer.start()
        yield bouncer
    finally:
        bouncer.kill()


def add_role(onlooker: Onlooker) -> None:
    """Add the role, and a table that it may fill."""
    remove_role(onlooker)
    onlooker.do(f"CREATE ROLE {ROLE} LOGIN")
    onlooker.do("CREATE TABLE visits (client int)")
    onlooker.do(f"GRANT ALL ON visits TO {ROLE}")


def remove_role(onlooker: Onlooker) -> None:
    # The role can't be dropped before its sessions have ended, and their temporary tables have gone.
    sessions = f"FROM pg_stat_activity WHERE usename = '{ROLE}'"
    onlooker.do(f"SELECT pg_terminate_backend(pid, 5000) {sessions}")
    onlooker.do("DROP TABLE IF EXISTS visits")
    onlooker.do(f"DROP ROLE IF EXISTS {ROLE}")
