"""Requests to cancel what a connection is doing: how one is made, and whether it has been processed.

The request goes over a connection of its own. The server answers nothing, but it closes that connection
when it has processed the request. Until that has been seen, the request may still arrive, and cancel
whatever the connection is doing by then.
"""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg import capabilities, errors, pq

from ._waiting import poll

if TYPE_CHECKING:
    from ._connection import TrioConnection

# How libpq's PQcancel begins its message if it has sent nothing. It does not translate these.
_NOT_SENT = ("PQcancel() -- socket() failed", "PQcancel() -- connect() failed")

# How OpenSSL says that a connection was closed in good order by TCP, but without a goodbye of TLS. Some
# proxies do that. OpenSSL 3 says the first, older ones the second.
_CLOSED_WITHIN_TLS = ("unexpected eof while reading", "EOF detected")


async def request_cancel(connection: TrioConnection[Any], timeout: float) -> None:
    """Ask the server, through a connection of its own, to cancel the operation that is running.

    Returns when the server has processed the request, which it may still ignore. Raises
    `CancellationTimeout` after `timeout` seconds (0: never), and `OperationalError` if the server
    can't be reached. A request that was sent, and whose end was not seen, stays counted in
    `connection._unconfirmed_requests`: the connection must not be handed to another client.
    """
    with trio.move_on_after(timeout or math.inf):
        if capabilities.has_cancel_safe():
            await _request(connection)
        else:
            await _request_in_thread(connection)
        return
    raise errors.CancellationTimeout("cancellation timeout expired")


async def _request(connection: TrioConnection[Any]) -> None:
    """Make the request with libpq 17 or newer, which need not block."""
    request = connection.pgconn.cancel_conn()
    sent = False

    def step() -> int:
        nonlocal sent
        status = request.poll()
        if not sent and request.status == pq.ConnStatus.AWAITING_RESPONSE:
            sent = True
            connection._unconfirmed_requests += 1
        return status

    try:
        request.start()
        if not await poll(step, lambda: request.socket):
            message = request.get_error_message()
            if not (sent and any(phrase in message for phrase in _CLOSED_WITHIN_TLS)):
                raise psycopg.OperationalError(f"cancellation failed: {message}")
        connection._unconfirmed_requests -= sent
    finally:
        request.finish()


async def _request_in_thread(connection: TrioConnection[Any]) -> None:
    """Make the request with a libpq older than 17, which can only block.

    The thread may be abandoned: what it uses is a copy of the server's address and of the key, which
    outlives the connection. This libpq does not tell a connection that was reset from one that the
    server has closed.
    """
    cancel = _blocking_cancel(connection.pgconn)
    connection._unconfirmed_requests += 1
    try:
        await trio.to_thread.run_sync(cancel, abandon_on_cancel=True)
    except psycopg.OperationalError as error:
        if any(phrase in str(error) for phrase in _NOT_SENT):
            connection._unconfirmed_requests -= 1
        raise
    connection._unconfirmed_requests -= 1


def _blocking_cancel(pgconn: pq.abc.PGconn) -> Callable[[], None]:
    """Return a function that makes the request, and that lets other threads run meanwhile.

    psycopg's own `PGcancel.cancel` does not, if it is compiled: it holds the GIL for as long as the
    server is silent. `ctypes` releases it.
    """
    libpq = _libpq(type(pgconn).__module__) if is_compiled() else None
    if libpq is None:
        return pgconn.get_cancel().cancel
    # This copies the address and the key from the connection, so it has to happen in this thread.
    handle = libpq.PQgetCancel(pgconn.pgconn_ptr)  # type: ignore[attr-defined]  # not in the protocol
    if not handle:
        raise psycopg.OperationalError("couldn't create a cancel object: the connection is closed")

    def cancel() -> None:
        message = ctypes.create_string_buffer(256)
        try:
            if not libpq.PQcancel(handle, message, len(message)):
                text = message.value.decode("utf-8", "replace")
                raise psycopg.OperationalError(f"cancel failed: {text}")
        finally:
            libpq.PQfreeCancel(handle)

    return cancel


def is_compiled() -> bool:
    """Return whether psycopg calls libpq from compiled code, and not through `ctypes`."""
    return pq.__impl__ != "python"


@lru_cache
def _libpq(module: str) -> ctypes.CDLL | None:
    """Return the libpq that psycopg's compiled `module` is linked to, or None.

    A symbol that is looked up in a shared library is also looked for in the libraries on which that
    one depends, so this finds the very libpq that made the connection, a bundled one included.
    """
    try:
        library = ctypes.CDLL(str(sys.modules[module].__file__))
        library.PQgetCancel.argtypes = [ctypes.c_void_p]
        library.PQgetCancel.restype = ctypes.c_void_p
        library.PQcancel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
        library.PQfreeCancel.argtypes = [ctypes.c_void_p]
        library.PQfreeCancel.restype = None
        if library.PQlibVersion() != pq.version():
            return None
    except (AttributeError, KeyError, OSError):
        return None
    return library


@lru_cache
def warn_if_cancelling_freezes(module: str) -> None:
    """Warn, once, if a request to cancel will hold the GIL for as long as the server is silent.

    `module` is the one of psycopg's `PGconn`. Call it where `stacklevel` 3 is the user's code.
    """
    if is_compiled() and not capabilities.has_cancel_safe() and _libpq(module) is None:
        warnings.warn(
            "a cancelled query will stop the whole process for as long as the server is silent, because"
            f" psycopg uses libpq {pq.version() // 10000}; install psycopg[binary] 3.2.13 or newer,"
            " which brings a libpq of 17 or newer",
            RuntimeWarning,
            stacklevel=3,
        )
