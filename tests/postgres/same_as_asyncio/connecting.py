"""Connecting, and what a connection says of itself."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import dict_row

from .laboratory import (
    LIBPQ,
    Connection,
    See,
    attempt,
    attempt_now,
    describe,
    scenario,
    scenario_if,
    state,
)


async def connecting(conn: Connection, dsn: str, **keywords: Any) -> object:
    """Connect another connection of the same kind, and say how it went."""
    try:
        other = await type(conn).connect(dsn, **keywords)
    except Exception as error:
        return describe(error)
    async with other:
        return [
            other.info.host,
            other.info.hostaddr,
            other.info.port == conn.info.port,
            other.autocommit,
        ]


@scenario
async def info(conn: Connection, dsn: str, see: See) -> None:
    """The connection describes itself."""
    about = conn.info
    see(
        vendor=about.vendor,
        host=about.host,
        port=about.port,
        dbname=about.dbname,
        user=about.user,
        status=about.status,
        options=about.options,
        encoding=about.encoding,
        server_version=about.server_version,
        hostaddr=about.hostaddr,
        error_message=about.error_message,
        password=about.password,
        server_encoding=about.parameter_status("server_encoding"),
        no_such_parameter=about.parameter_status("no"),
        has_backend_pid=about.backend_pid > 0,
        parameters=about.get_parameters(),
        dsn=about.dsn,
        timezone=about.timezone,
        has_fileno=conn.fileno() > 0,
        closed=conn.closed,
        broken=conn.broken,
        repr=repr(conn).split(" at ")[0].split(" ", 1)[1],
        nonblocking=conn.pgconn.nonblocking,
        errors=conn.Error is psycopg.Error,
    )
    await conn.close()
    see("closed", dbname=attempt_now(lambda: conn.info.dbname), fileno=attempt_now(conn.fileno))
    see("closed", state=state(conn), repr=repr(conn).split(" at ")[0].split(" ", 1)[1])


@scenario
async def client_encoding(conn: Connection, dsn: str, see: See) -> None:
    """Text goes in the encoding of the client."""
    await conn.execute("SET client_encoding TO latin1")
    see(encoding=conn.info.encoding)
    see(text=await (await conn.execute("SELECT %s::text", ("é",))).fetchall())
    see(not_encodable=await attempt(conn.execute("SELECT %s", ("€",))), state=state(conn))


@scenario
async def connect_keywords(conn: Connection, dsn: str, see: See) -> None:
    """What connect takes besides the connection string."""
    other = await type(conn).connect(
        dsn,
        autocommit=True,
        prepare_threshold=None,
        row_factory=dict_row,
        cursor_factory=psycopg.AsyncRawCursor,
        application_name="my application",
    )
    async with other:
        cursor = await other.execute("SELECT current_setting('application_name') AS name")
        see(rows=await cursor.fetchall(), cursor=type(cursor).__name__)
        see(autocommit=other.autocommit, state=state(other), threshold=other.prepare_threshold)
        see(made_cursor=type(other.cursor()).__name__)
    see(same_class=type(other) is type(conn))


@scenario
async def connecting_with_nonsense(conn: Connection, dsn: str, see: See) -> None:
    """Connection strings and options that can't be."""
    for string in ("nonsense", "host='unclosed"):
        see(repr(string), connect=await connecting(conn, string))
    several: list[dict[str, Any]] = [
        {"nonsense": 1},
        {"connect_timeout": "soon"},
        {"connect_timeout": -1},
        {"connect_timeout": 0},
        {"connect_timeout": "1"},
        {"port": "many"},
        {"port": 99999},
        {"port": "1,2,3"},
        {"sslmode": "perhaps"},
        {"target_session_attrs": "sometimes"},
        {"options": "-c nonsense=1"},
        {"client_encoding": "klingon"},
        {"service": "nowhere"},
    ]
    for keywords in several:
        see(repr(keywords), connect=await connecting(conn, dsn, **keywords))
    see("a password that is no string", connect=await connecting(conn, dsn, password=object()))


@scenario
async def connecting_to_nowhere(conn: Connection, dsn: str, see: See) -> None:
    """Hosts that don't exist, ports on which no server listens, sockets that aren't there."""
    several: list[dict[str, Any]] = [
        {"host": "host.invalid"},
        {"host": "host.invalid,also.invalid"},
        {"port": 1},
        {"host": "/nowhere"},
        {"host": "@nowhere"},
        {"hostaddr": "127.0.0.1", "port": 1},
        {"hostaddr": "nonsense"},
        {"dbname": "nowhere"},
        {"dbname": "nöwhere"},
        {"user": "nobody"},
    ]
    for keywords in several:
        see(repr(keywords), connect=await connecting(conn, dsn, **keywords))


@scenario
async def connecting_to_several_hosts(conn: Connection, dsn: str, see: See) -> None:
    """Several hosts are tried in their order, and the failures of all are listed."""
    port = conn.info.port
    local = "127.0.0.1"
    several: list[dict[str, Any]] = [
        {"host": f"{local},{local}", "port": f"1,{port}"},
        {"host": f"host.invalid,{local}", "port": port},
        {"host": f"{local},host.invalid", "port": f"1,{port}"},
        {"host": f"{local},{local},/nowhere", "port": "1,2,3"},
        {"host": f"{local},{local}", "port": f"1,{port}", "dbname": "nowhere"},
        {"host": f"{local},{local}", "port": f"{port},1", "dbname": "nowhere"},
        {"host": "a,b", "hostaddr": f"{local},{local}", "port": f"1,{port}"},
        {"host": "a", "hostaddr": f"{local},{local}", "port": f"1,{port}"},
        {"host": "a.invalid", "hostaddr": local},
        {"host": "localhost", "hostaddr": local},
        {"host": "127.0.0.1"},
        {"host": f"{local},{local}", "port": 1, "connect_timeout": 1},
    ]
    for keywords in several:
        see(repr(keywords), connect=await connecting(conn, dsn, **keywords))


@scenario
async def connecting_by_name(conn: Connection, dsn: str, see: See) -> None:
    """A name that has several addresses is several attempts."""
    see(the_servers_port=await connecting(conn, dsn, host="localhost"))
    see(another_port=await connecting(conn, dsn, host="localhost", port=1))


@scenario
async def connecting_with_attributes(conn: Connection, dsn: str, see: See) -> None:
    """The kind of server that is wanted, on a primary."""
    hosts = {"host": "127.0.0.1,127.0.0.1", "port": f"1,{conn.info.port}"}
    for wanted in ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"):
        see(wanted, one_host=await connecting(conn, dsn, target_session_attrs=wanted))
        see(wanted, two_hosts=await connecting(conn, dsn, target_session_attrs=wanted, **hosts))
    found = await connecting(conn, dsn, target_session_attrs="prefer-standby", port=1)
    see("prefer-standby", no_server=found)


@scenario_if(LIBPQ >= 16)
async def connecting_with_load_balancing(conn: Connection, dsn: str, see: See) -> None:
    """Hosts are tried in their order, or by chance."""
    hosts: dict[str, Any] = {"host": "127.0.0.1,127.0.0.1", "port": f"1,{conn.info.port}"}
    for balance in ("disable", "random", "sometimes"):
        see(balance, connect=await connecting(conn, dsn, load_balance_hosts=balance, **hosts))
