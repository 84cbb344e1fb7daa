"""A supervised worker pool for Trio, and psycopg 3 on Trio to fill it with."""

from ._entry import Reason
from ._errors import (
    CheckoutTimeout,
    NotCheckedOut,
    PoolClosed,
    PoolError,
    PoolFull,
    PoolOverloaded,
    PoolStartError,
    PoolUnavailable,
    WorkerLost,
)
from ._hooks import Hooks
from ._manager import WorkerManager
from ._pool import Pool, open_pool
from ._session import Resource, Session
from ._statistics import PoolStatistics

__all__ = [
    "CheckoutTimeout",
    "Hooks",
    "NotCheckedOut",
    "Pool",
    "PoolClosed",
    "PoolError",
    "PoolFull",
    "PoolOverloaded",
    "PoolStartError",
    "PoolStatistics",
    "PoolUnavailable",
    "Reason",
    "Resource",
    "Session",
    "WorkerLost",
    "WorkerManager",
    "open_pool",
]

__version__ = "1.0.0rc1"

# Public things say where they are imported from, not in which room they live.
for _name in set(__all__) - {"Reason"}:
    globals()[_name].__module__ = __name__
