"""What can go wrong, by name."""

from __future__ import annotations

import sys

import trio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


class PoolError(Exception):
    """Everything that a pool raises of its own accord."""


class PoolClosed(PoolError):
    """The pool is shutting down, or has shut down: it hands out no more workers."""


class PoolFull(PoolError):
    """Every worker that may exist is held by a client, or promised to a task that waits
    (`Session.nonblock_checkout`)."""


class PoolStartError(PoolError):
    """The pool could not start its workers, or not in time.

    `__cause__` is the last error of the factory. A `WorkerManager.create` may raise this error itself
    to say that trying again is pointless: opening the pool then fails at once.
    """


class WorkerLost(PoolError):
    """The worker has left while its client had it (`Resource.get`).

    It has crashed: a task in its own nursery has raised, and `__cause__` is that error, once the worker
    has been closed. Or the pool has reclaimed it, because the task that checked it out has ended.
    """


class NotCheckedOut(PoolError):
    """The resource has been returned already, or it belongs to another pool."""


class CheckoutTimeout(PoolError, trio.TooSlowError):
    """No worker came free in time.

    The message says how the pool stood. When workers cannot be started, `__cause__` is the last
    error of the factory. It is a `trio.TooSlowError` too, so code that guards a block with
    `trio.fail_after` needs one `except` for both.
    """


class PoolUnavailable(CheckoutTimeout):
    """A `CheckoutTimeout` that comes early, because the pool is down.

    No worker is alive and none can be started, and that for longer than the checkout would wait.
    `__cause__` is the last error of the factory. The pool goes on trying.
    """


class PoolOverloaded(CheckoutTimeout):
    """A `CheckoutTimeout` that comes early, because the wait queue grows, or is full.

    The tasks that are served then have time left for their work.
    """


def describe(error: BaseException) -> str:
    """Name an error by its type and message, on one line; of a group, each of its errors."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(describe(inner) for inner in error.exceptions)
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = ""  # a class of the user's may fail in this, and must not take the pool down
    name = type(error).__name__
    return f"{name}: {message}" if message else name


def unwrapped(error: Exception) -> Exception:
    """Take off the groups that nurseries put around a single error: they hide what it says."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
