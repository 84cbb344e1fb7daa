"""Connecting: one attempt, and what to know and to say about several."""

from __future__ import annotations

import ipaddress
import os

import psycopg
from psycopg import errors, pq
from psycopg.abc import ConnDict

from ._waiting import poll


async def connect_once(conninfo: str) -> pq.abc.PGconn:
    """Make one attempt to connect."""
    pgconn = pq.PGconn.connect_start(conninfo.encode())
    try:
        if pgconn.status == pq.ConnStatus.BAD:
            raise psycopg.OperationalError(
                f"connection is bad: {pgconn.get_error_message()}", pgconn=pgconn
            )
        if not await poll(pgconn.connect_poll, lambda: pgconn.socket):
            raise psycopg.OperationalError(
                f"connection failed: {pgconn.get_error_message()}",
                pgconn=errors.finish_pgconn(pgconn),
            )
    except BaseException:
        pgconn.finish()
        raise
    pgconn.nonblocking = 1
    return pgconn


def all_failed(failures: list[tuple[str, psycopg.Error]]) -> psycopg.Error:
    """Make one error of those of all attempts, with the class of the last."""
    last = failures[-1][1]
    if len(failures) == 1:
        return last
    lines = [
        str(last),
        "Multiple connection attempts failed. All failures were:",
        *(f"- {where}: {error}" for where, error in failures),
    ]
    return type(last)("\n".join(lines), pgconn=last.pgconn)


def has_names_to_resolve(params: ConnDict) -> bool:
    """Say whether psycopg would look up a host, which blocks."""
    hosts = str(params.get("host") or os.environ.get("PGHOST", "")).split(",")
    addresses = str(params.get("hostaddr") or os.environ.get("PGHOSTADDR", "")).split(",")
    if len(addresses) == len(hosts) and all(addresses):
        return False
    return any(not (_is_path(host) or _is_address(host)) for host in hosts if host)


def _is_path(host: str) -> bool:
    return host.startswith("/") or host[1:2] == ":"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
