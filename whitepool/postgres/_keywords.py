"""The types of the keywords that `connect`, `PostgresManager` and `open_pool` pass on.

Only type checkers and editors use them. `tests/postgres/test_connect_keywords.py` compares them with
what libpq knows, and with the options of a pool.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union

import psycopg
from psycopg.abc import AdaptContext
from psycopg.rows import Row, TupleRow

from .._hooks import Hooks
from .._options import Strategy

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar  # comes with psycopg

if TYPE_CHECKING:
    from ._connection import TrioConnection

# Of classes: the rows of a connection, as its `row_factory` makes them, and the connections of a pool.
# The row's own name and default are psycopg's.
C = TypeVar("C", bound="TrioConnection[Any]", default="TrioConnection[Row]")

# Of functions, as those can't refer to a class's.
R = TypeVar("R", default=TupleRow)
K = TypeVar("K", bound="TrioConnection[Any]")
K_contra = TypeVar("K_contra", bound="TrioConnection[Any]", contravariant=True)

Conninfo = Union[str, Callable[[], str], Callable[[], Awaitable[str]]]
Configure = Callable[[K_contra], Awaitable[None]]
Reset = Union[Literal["rollback", "session"], Configure[K_contra]]

Text = str | None
Number = int | str | None


class LibpqKeywords(TypedDict, total=False):
    """What a connection string may have, as keywords. PostgreSQL's documentation explains them."""

    application_name: Text
    channel_binding: Text
    client_encoding: Text
    connect_timeout: Number
    dbname: Text
    fallback_application_name: Text
    gssdelegation: Number
    gssencmode: Text
    gsslib: Text
    host: Text
    hostaddr: Text
    keepalives: Number
    keepalives_count: Number
    keepalives_idle: Number
    keepalives_interval: Number
    krbsrvname: Text
    load_balance_hosts: Text
    max_protocol_version: Text
    min_protocol_version: Text
    oauth_client_id: Text
    oauth_client_secret: Text
    oauth_issuer: Text
    oauth_scope: Text
    options: Text
    passfile: Text
    password: Text
    port: Number
    replication: Text
    require_auth: Text
    requirepeer: Text
    scram_client_key: Text
    scram_server_key: Text
    service: Text
    servicefile: Text
    ssl_max_protocol_version: Text
    ssl_min_protocol_version: Text
    sslcert: Text
    sslcertmode: Text
    sslcompression: Number
    sslcrl: Text
    sslcrldir: Text
    sslkey: Text
    sslkeylogfile: Text
    sslmode: Text
    sslnegotiation: Text
    sslpassword: Text
    sslrootcert: Text
    sslsni: Number
    target_session_attrs: Text
    tcp_user_timeout: Number
    user: Text


class ConnectKeywords(LibpqKeywords, total=False):
    """What `connect` takes besides the `row_factory`."""

    autocommit: bool
    prepare_threshold: int | None
    context: AdaptContext | None
    cursor_factory: type[psycopg.AsyncCursor[Any]] | None
    cleanup_timeout: float


class PoolKeywords(ConnectKeywords, total=False):
    """What `open_pool` takes besides, the `Options`."""

    pool_size: int
    max_overflow: int
    strategy: Strategy
    name: str | None
    lazy: bool
    min_ready: int | None
    overflow_ttl: float
    idle_timeout: float
    max_lifetime: float
    check_interval: float
    checkout_timeout: float
    start_timeout: float
    reset_timeout: float
    close_timeout: float
    shutdown_timeout: float
    max_starting: int
    max_waiting: float
    patience: float
    held_warning: float
    hooks: Hooks
