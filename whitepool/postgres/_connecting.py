"""Connecting: what may be asked for, one attempt, several attempts, and what their failures mean."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import psycopg
import trio
from psycopg import errors, pq
from psycopg.abc import ConnDict
from psycopg.conninfo import (
    conninfo_attempts,
    conninfo_to_dict,
    make_conninfo,
    timeout_from_conninfo,
)

from .._checks import check_runs_on_trio, check_seconds, did_you_mean
from .._options import Options
from ._keywords import LibpqKeywords
from ._waiting import poll, ungrouped

SILENCE = 0.5
"""Seconds without an answer from a host after which the next one is tried as well. It counts from what
the host sent last, so a host that is far away, and needs many round trips, is not taken for silent."""

# The keywords of `connect` that are psycopg's, or our own. All others are libpq's.
_NOT_OF_LIBPQ = (
    "autocommit",
    "prepare_threshold",
    "context",
    "row_factory",
    "cursor_factory",
    "cleanup_timeout",
)

# Refusals that the server, or libpq, repeats however often it is asked. There is no code to know them
# by: a connection that is not open yet has no SQLSTATE, and libpq gives nothing but the text.
_FINAL = re.compile(
    r"password authentication failed|no password supplied|authentication failed for user"
    r"|SASL authentication failed|unsupported (options )?startup parameter"  # both are PgBouncer's
    r"|no pg_hba\.conf entry|pg_hba\.conf rejects connection"
    r"|(database|role) \".*\" does not exist|no such (database|user)"
    r"|permission denied for database|is not permitted to log in"
    r"|certificate verify failed|server certificate for .* does not match host name"
    r"|server does not support SSL|root certificate file \".*\" does not exist"
    r"|invalid \w+ value",  # of an option such as sslmode
    re.DOTALL,
)

# Refusals of a server, or of a PgBouncer, that has as many connections as it may have: of all clients,
# or of this role or this database. They have no SQLSTATE here either.
_FULL = re.compile(
    r"sorry, too many clients already|remaining connection slots are reserved"
    r"|too many connections for (role|database)"
    r"|no more connections allowed|client connections exceeded"
)


def validate(conninfo: str, keywords: dict[str, Any]) -> None:
    """Raise `ValueError` or `TypeError` for what `connect` would refuse before it connects.

    The message quotes no value, because it may be a password, or a part of one.
    """
    libpq_keywords = {key: keywords[key] for key in keywords if key not in _NOT_OF_LIBPQ}
    if "cleanup_timeout" in keywords:
        check_seconds("cleanup_timeout", keywords["cleanup_timeout"])
    problem = None
    try:
        make_conninfo(**libpq_keywords)
    except psycopg.ProgrammingError as error:
        # libpq quotes the name of the keyword here, and not its value.
        raise ValueError(
            f"a keyword for connecting is not valid: {str(error).strip()}{_meant(libpq_keywords)}"
        ) from None
    try:
        make_conninfo(conninfo)
        params = conninfo_to_dict(conninfo, **libpq_keywords)
        timeout_from_conninfo(params)
        # If an @ or a / in a password is not escaped in a URL, the rest of the password looks like a
        # host or a port. A host that begins with @ is an abstract socket, and a path may have an @.
        if re.search(r"(^|,)[^/,][^,]*@", str(params.get("host") or "")):
            problem = "a host can't have an @ in it (in a URL, write that of a password as %40)"
        elif not re.fullmatch(r"[\d,\s]*", str(params.get("port") or "")):
            problem = "port must be a number (in a URL, write the / of a password as %2F)"
    except psycopg.ProgrammingError as error:
        # libpq quotes what it can't parse, and that may be a part of a password.
        timeout = re.match(r"bad value for connect_timeout", str(error))
        problem = timeout[0] if timeout else "it can't be parsed, or has an unknown option"
    if problem is not None:
        raise ValueError(f"conninfo is not valid: {problem}")


def _meant(keywords: Iterable[str]) -> str:
    """Return a question that names what was meant by a keyword that does not exist, or nothing."""
    of_libpq = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    known = {
        *of_libpq,
        *_NOT_OF_LIBPQ,
        *(option.name for option in fields(Options)),
        "configure",
        "reset",
    }
    return "".join(did_you_mean(keyword, known) for keyword in keywords if keyword not in known)


async def connect_to_first(conninfo: str, keywords: LibpqKeywords) -> pq.abc.PGconn:
    """Return a connection to the first of the hosts, and of their addresses, that accepts one.

    They are tried in their order, each when the one before it has failed, or has been silent for
    `SILENCE`; see `_connect_to_any`. Each attempt may take `connect_timeout`. If that is not given, it
    may take an equal share of the time until the task's deadline, because psycopg's default is longer
    than most deadlines: a host that does not answer must leave time for the others. Raises
    `psycopg.OperationalError`.
    """
    check_runs_on_trio("a TrioConnection")
    params = _with_host_of_service(conninfo_to_dict(conninfo, **keywords))
    timeout: float = timeout_from_conninfo(params)
    timeout_is_given = params.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT")
    if _has_names_to_resolve(params):
        # A resolver may take minutes: a task that is cancelled does not wait for it.
        attempts = await trio.to_thread.run_sync(conninfo_attempts, params, abandon_on_cancel=True)
    else:
        attempts = conninfo_attempts(params)

    def seconds_for_one_of(attempts_left: int) -> float:
        if timeout_is_given:
            return timeout
        remaining = trio.current_effective_deadline() - trio.current_time()
        return min(timeout, max(0, remaining) / attempts_left)

    # psycopg has made one attempt of each host and each of its addresses, in the order in which libpq
    # would try them.
    if len(attempts) == 1:
        return await _connect_within(seconds_for_one_of(1), make_conninfo("", **attempts[0]))
    return await _connect_to_any(attempts, seconds_for_one_of)


async def _connect_to_any(
    attempts: list[ConnDict], seconds_for_one_of: Callable[[int], float]
) -> pq.abc.PGconn:
    """Return the connection of the first attempt that succeeds, and give up the others.

    An attempt that has been silent for `SILENCE` goes on, and the next begins beside it, as in Happy
    Eyeballs (RFC 8305). If two succeed at the same moment, the one that comes first in the order
    counts. Each attempt may take `seconds_for_one_of` those that are left when it begins. Raises
    `psycopg.OperationalError` when all have failed.
    """
    connected: dict[int, pq.abc.PGconn] = {}
    failures: dict[int, psycopg.Error] = {}

    async def attempt_one(number: int, seconds: float, patience: trio.CancelScope) -> None:
        def on_answer() -> None:
            patience.deadline = trio.current_time() + SILENCE

        try:
            conninfo = make_conninfo("", **attempts[number])
            connected[number] = await _connect_within(seconds, conninfo, on_answer)
            nursery.cancel_scope.cancel()
        except psycopg.Error as error:
            failures[number] = error
            patience.cancel()

    try:
        with ungrouped():
            async with trio.open_nursery() as nursery:
                for number in range(len(attempts)):
                    seconds = seconds_for_one_of(len(attempts) - number)
                    with trio.CancelScope(deadline=trio.current_time() + SILENCE) as patience:
                        nursery.start_soon(attempt_one, number, seconds, patience)
                        await trio.sleep_forever()
        if not connected:
            raise _all_failed(
                [(_where(attempts[number]), failures[number]) for number in sorted(failures)]
            )
        return connected.pop(min(connected))
    finally:
        # Those that came second; or all, if this was cancelled meanwhile.
        for pgconn in connected.values():
            pgconn.finish()


def _where(attempt: ConnDict) -> str:
    return ", ".join(f"{key}: {attempt.get(key)!r}" for key in ("host", "port", "hostaddr"))


def _with_host_of_service(params: ConnDict) -> ConnDict:
    """Return `params` with the host that libpq would take from a service file, if there is one.

    Only libpq reads that file, and it would resolve the host's name in Trio's thread. It can be asked
    for the options of a connection that has failed, as this one does before it connects to anything:
    there is no such `sslmode`. The other options are left to libpq.
    """
    if not (params.get("service") or os.environ.get("PGSERVICE")):
        return params
    pgconn = pq.PGconn.connect_start(make_conninfo("", **{**params, "sslmode": "none"}).encode())
    found = {option.keyword.decode(): option.val for option in pgconn.info}
    pgconn.finish()
    hosts = {key: found.get(key) for key in ("host", "hostaddr", "port")}
    return {**params, **{key: value.decode() for key, value in hosts.items() if value}}


async def _connect_within(
    seconds: float, conninfo: str, on_answer: Callable[[], None] | None = None
) -> pq.abc.PGconn:
    """Make one attempt, and return a connection in non-blocking mode, as psycopg wants it.

    `on_answer` is called at each sign of life of the host. An attempt that fails or is cancelled leaves
    no socket open.
    """
    # Only this one attempt is cancelled, and the next host gets its turn. A deadline of the task itself
    # cancels what is outside, too, and ends the attempts.
    with trio.move_on_after(seconds):
        return await _connect_once(conninfo, on_answer)
    raise errors.ConnectionTimeout("connection timeout expired")


async def _connect_once(conninfo: str, on_answer: Callable[[], None] | None) -> pq.abc.PGconn:
    pgconn = pq.PGconn.connect_start(conninfo.encode())

    def step() -> int:
        if on_answer is not None:
            on_answer()
        return pgconn.connect_poll()

    try:
        if pgconn.status == pq.ConnStatus.BAD:
            raise psycopg.OperationalError(
                f"connection is bad: {pgconn.get_error_message()}", pgconn=pgconn
            )
        if not await poll(step, lambda: pgconn.socket):
            # The error keeps what is known about the connection, and not the connection itself.
            raise psycopg.OperationalError(
                f"connection failed: {pgconn.get_error_message()}",
                pgconn=errors.finish_pgconn(pgconn),
            )
    except BaseException:
        pgconn.finish()
        raise
    pgconn.nonblocking = 1
    return pgconn


def _all_failed(failures: list[tuple[str, psycopg.Error]]) -> psycopg.Error:
    """Return the error of the last attempt, with the errors of all attempts in its message.

    The message is psycopg's own, line by line; `is_final` reads it.
    """
    last = failures[-1][1]
    if len(failures) == 1:
        return last
    lines = [
        str(last),
        "Multiple connection attempts failed. All failures were:",
        *(f"- {where}: {error}" for where, error in failures),
    ]
    return type(last)("\n".join(lines), pgconn=last.pgconn)


def is_final(error: psycopg.OperationalError) -> bool:
    """Return whether every host refused for a reason that another attempt would only repeat.

    `error` is one that `connect_to_first` raised. A host has refused for good if one of its addresses
    has: ``localhost`` has two, and a server often listens on one of them only.
    """
    hosts: dict[str, bool] = {}
    for line in str(error).splitlines():
        if line.startswith("- host"):
            host = line.partition(", hostaddr: ")[0]
            hosts[host] = hosts.get(host, False) or bool(_FINAL.search(line))
    return all(hosts.values()) if hosts else bool(_FINAL.search(str(error)))


def is_full(error: Exception) -> bool:
    """Return whether a host refused because it has as many connections as it may have.

    `error` is one that `connect_to_first` raised. Of several hosts, one is enough: without its limit it
    would have accepted, whatever the others had against it, as a standby has that is no primary.
    """
    return isinstance(error, psycopg.OperationalError) and bool(_FULL.search(str(error)))


def _has_names_to_resolve(params: ConnDict) -> bool:
    """Return whether psycopg would look up the name of a host, which blocks.

    It does not if there is an address for each host, or if each host is a socket or an address.
    """
    hosts = str(params.get("host") or os.environ.get("PGHOST", "")).split(",")
    addresses = str(params.get("hostaddr") or os.environ.get("PGHOSTADDR", "")).split(",")
    if len(addresses) == len(hosts) and all(addresses):
        return False
    return any(not (_is_path(host) or _is_address(host)) for host in hosts if host)


def _is_path(host: str) -> bool:
    """Return whether a host is the folder of a Unix socket; a drive letter counts, as for psycopg."""
    return host.startswith("/") or host[1:2] == ":"


def _is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
