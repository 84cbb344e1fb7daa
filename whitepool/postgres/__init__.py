"""psycopg 3 on Trio, with and without the pool. Needs the extra ``postgres``."""

try:
    import psycopg as _psycopg  # noqa: F401  # asked for here, where the error can say what to do
except ImportError as error:
    raise ImportError(
        f"whitepool.postgres needs psycopg: pip install 'whitepool[postgres]' ({error})"
    ) from error

from ._connection import TrioConnection, connect
from ._manager import PostgresManager
from ._pool import open_pool
from ._session import PostgresSession

__all__ = ["PostgresManager", "PostgresSession", "TrioConnection", "connect", "open_pool"]

# Classes say where they are imported from, not in which room they live.
for _class in (PostgresManager, PostgresSession, TrioConnection):
    _class.__module__ = __name__
