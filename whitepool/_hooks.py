"""Functions of the application that the pool calls in the life of a worker."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from typing import Any, Union

from ._checks import can_call, check_call

HOOK_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "on_create": ("worker",),
    "before_acquire": (),
    "on_checkout": ("worker",),
    "on_checkin": ("worker",),
    "after_release": (),
    "on_destroy": ("reason",),
}
"""What each hook is called with; see `takes_last_words` for one that may get more."""

Hook = Union[Callable[..., None], Callable[..., Awaitable[None]]]


@dataclass(frozen=True)
class Hooks:
    """Functions that the pool calls in the life of a worker, each plain or async.

    `before_acquire` and `on_checkout` run in the task that checks out, without a timeout of the pool's.
    The others run in the worker's own task, and are bounded by `start_timeout`, `reset_timeout` or
    `close_timeout`.
    """

    on_create: Hook | None = None
    """Called with each new worker, in its own task. One that raises makes it a failed start."""

    before_acquire: Hook | None = None
    """Called without arguments before each checkout, in the caller's task. One that raises, raises
    to the caller, who gets no worker."""

    on_checkout: Hook | None = None
    """Called with the worker after each checkout, in the caller's task. One that raises, or is
    cancelled, returns the worker to the pool, and raises to the caller."""

    on_checkin: Hook | None = None
    """Called with each returned worker, in its own task, before it is reset; within `reset_timeout`.
    One that raises destroys the worker. If it is a connection to PostgreSQL, a transaction that its
    client has left open is rolled back first."""

    after_release: Hook | None = None
    """Called without arguments when a returned worker may be used again, in the worker's task, within
    `reset_timeout`. One that raises is logged."""

    on_destroy: Hook | None = None
    """Called with the reason (see `Reason`) when a worker has been closed, in the worker's task, within
    `close_timeout`. One that takes a second argument, or names it `last_words`, is also told what the
    worker's peer said last (a str, empty if it said nothing). One that raises is logged."""

    def __post_init__(self) -> None:
        for hook in fields(self):
            value = getattr(self, hook.name)
            if value is not None and not callable(value):
                raise TypeError(f"hooks.{hook.name} must be callable, not {value!r}")
            if value is not None:
                arguments = HOOK_ARGUMENTS[hook.name]
                if hook.name == "on_destroy" and takes_last_words(value):
                    arguments = (*arguments, "last_words")
                check_call(f"hooks.{hook.name}", value, *arguments)


def takes_last_words(on_destroy: Hook) -> bool:
    """Return whether the hook has a second parameter that is meant for the last words of a worker.

    One that it needs is; and so is one named `last_words`, also under a decorator. Any other that has a
    default, or ``*arguments``, may be there for something else.
    """
    try:
        if "last_words" in inspect.signature(on_destroy).parameters:
            return True
    except Exception:
        return False  # see `check_call`
    return not can_call(on_destroy, "reason") and can_call(on_destroy, "reason", "last_words")


async def call(hook: Hook | None, *arguments: Any) -> None:
    """Call a hook, if there is one, and wait for it, if it is async."""
    if hook is not None:
        result = hook(*arguments)
        if inspect.isawaitable(result):
            await result


def call_now(name: str, hook: Hook | None, *arguments: Any) -> None:
    """Call a hook, if there is one, from a plain function. Raises `TypeError` if the hook is async."""
    if hook is not None:
        result = hook(*arguments)
        if inspect.iscoroutine(result):
            result.close()
        if inspect.isawaitable(result):
            raise TypeError(f"checkout_nowait can't wait for the async hook {name}")
