"""psycopg 3 on Trio, with and without the pool. Needs the extra ``postgres``."""

from ._connection import TrioConnection, connect
from ._manager import PostgresManager
from ._pool import open_pool

__all__ = ["PostgresManager", "TrioConnection", "connect", "open_pool"]

# Classes say where they are imported from, not in which room they live.
for _class in (PostgresManager, TrioConnection):
    _class.__module__ = __name__
