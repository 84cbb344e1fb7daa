"""Opening a pool of Postgres connections."""

from __future__ import annotations

import math
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, overload

from psycopg.rows import AsyncRowFactory

from .._hooks import Hooks
from .._options import NO_HOOKS, Strategy
from .._pool import Opening, Pool
from ._connection import TrioConnection
from ._keywords import Configure, Conninfo, K, PoolKeywords, R, Reset
from ._manager import PostgresManager
from ._session import PostgresSession

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The options are listed one by one, so that an editor, `help` and a type checker know them, and that
# whatever is left is for connecting. Their types and defaults are those of `Options`.


@overload
def open_pool(
    conninfo: Conninfo = "",
    *,
    row_factory: AsyncRowFactory[R] | None = None,
    configure: Configure[TrioConnection[R]] | None = None,
    reset: Reset[TrioConnection[R]] = "rollback",
    **options: Unpack[PoolKeywords],
) -> AbstractAsyncContextManager[PostgresSession[R]]: ...


@overload
def open_pool(
    conninfo: Conninfo = "",
    *,
    connection_class: type[K],
    row_factory: AsyncRowFactory[Any] | None = None,
    configure: Configure[K] | None = None,
    reset: Reset[K] = "rollback",
    **options: Unpack[PoolKeywords],
) -> AbstractAsyncContextManager[PostgresSession[Any, K]]: ...


def open_pool(
    conninfo: Conninfo = "",
    *,
    connection_class: Any = TrioConnection,
    configure: Configure[Any] | None = None,
    reset: Reset[Any] = "rollback",
    pool_size: int = 5,
    max_overflow: int = 10,
    strategy: Strategy = "lifo",
    name: str | None = None,
    lazy: bool = False,
    min_ready: int | None = None,
    overflow_ttl: float = 10.0,
    idle_timeout: float = math.inf,
    max_lifetime: float = math.inf,
    check_interval: float = 30.0,
    checkout_timeout: float = 5.0,
    start_timeout: float = 30.0,
    reset_timeout: float = 5.0,
    close_timeout: float = 5.0,
    shutdown_timeout: float = 30.0,
    max_starting: int = 4,
    max_waiting: float = math.inf,
    patience: float = 0.4,
    held_warning: float = math.inf,
    hooks: Hooks = NO_HOOKS,
    **connect_keywords: Any,
) -> AbstractAsyncContextManager[Any]:
    """Open a pool of connections to PostgreSQL for the length of an ``async with`` block.

    This is `whitepool.open_pool` with a `PostgresManager`, and the block gets a `PostgresSession`.
    `PostgresManager` explains the arguments up to `reset`. `options` are those of `whitepool.Pool`,
    and the keywords of `connect`; times are in seconds. Type checkers know each of them, and the type
    of the rows: with ``row_factory=dict_row`` the block gets a ``PostgresSession[dict[str, Any]]``.

    Wrong arguments raise `TypeError` or `ValueError` here. Entering the block connects. It raises
    `whitepool.PoolStartError` if that has not succeeded within `start_timeout`, and at once if every
    server refuses for a reason that will not go away, such as a wrong password.
    """
    manager: PostgresManager[Any, Any] = PostgresManager(
        conninfo,
        connection_class=connection_class,
        configure=configure,
        reset=reset,
        **connect_keywords,
    )
    pool = Pool(
        manager,
        pool_size=pool_size,
        max_overflow=max_overflow,
        strategy=strategy,
        name=name,
        lazy=lazy,
        min_ready=min_ready,
        overflow_ttl=overflow_ttl,
        idle_timeout=idle_timeout,
        max_lifetime=max_lifetime,
        check_interval=check_interval,
        checkout_timeout=checkout_timeout,
        start_timeout=start_timeout,
        reset_timeout=reset_timeout,
        close_timeout=close_timeout,
        shutdown_timeout=shutdown_timeout,
        max_starting=max_starting,
        max_waiting=max_waiting,
        patience=patience,
        held_warning=held_warning,
        hooks=hooks,
    )
    return Opening(pool)
