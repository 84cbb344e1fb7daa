"""A second server that follows a first one, and can take its place."""

from __future__ import annotations

import shutil

from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from timing import until

REPLICATING = {"wal_level": "replica", "max_wal_senders": "10", "hot_standby": "on"}
"""Settings for a server that is to have a standby. (They are the defaults today.)"""


class Standby(EmbeddedPostgres):
    """A streaming standby of a server that is running."""

    def __init__(self, primary: EmbeddedPostgres) -> None:
        self._primary = primary
        super().__init__(**REPLICATING)

    def _fill(self) -> None:
        """Copy the files of the primary."""
        self._data.chmod(0o700)  # initdb would see to this
        if self._server.system_user is not None:
            shutil.chown(self._data, self._server.system_user)
        source = ("-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres")
        # -R has the copy start as a standby; the fast checkpoint saves the wait for the next one.
        options = ("-R", "--checkpoint=fast", "--no-sync")
        self._run("pg_basebackup", (*source, "-D", str(self._data), *options))

    def promote(self) -> None:
        """Make it a primary, and return when it takes writes."""
        self._pg_ctl("promote")


async def replicate_synchronously(primary: Onlooker) -> None:
    """From now on, the primary acknowledges nothing that its standby does not have.

    To be called when there is a standby: the setting is none of those that it copies.
    """
    primary.do("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.do("SELECT pg_reload_conf()")
    states = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
    await until(lambda: primary.ask(states) == 1, within=10)
