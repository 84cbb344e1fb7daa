"""Whether a task that waits for a worker holds one already: a likely deadlock, which its error names.

A checkout does not note which task it is for, as that would cost each of them something. So this looks
where a task mostly has its worker, once its time is up: among the local variables of its coroutines,
and what their ``async with`` blocks will leave. It finds resources and blocks, and not the worker
itself: a variable may still refer to that when it has been returned.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import CoroutineType, FrameType, MethodType
from typing import Any, Generic, TypeVar

from trio.lowlevel import Task

from ._entry import Entry, State
from ._roster import Roster

T = TypeVar("T")


class Holder(Generic[T]):
    """What a client may have in place of a worker: a resource, or the context of a block."""

    __slots__ = ()

    def _held(self) -> Entry[T] | None:
        """Return the entry of the worker; None if it has been returned."""
        raise NotImplementedError


def holds_one_of(task: Task, roster: Roster[Any]) -> bool:
    """Say whether a coroutine of a waiting task refers to the holder of a worker of this roster."""
    for thing in _referents(task):
        # The type, not isinstance: that asks the object, which may be anything of the user's.
        if issubclass(type(thing), Holder):
            entry = thing._held()
            if entry in roster.entries and entry.state is State.IN_USE:
                return True
    return False


def _referents(task: Task) -> Iterator[Any]:
    """Yield what the coroutines of a task refer to, each of which awaits the next."""
    coroutine: Any = task.coro
    while type(coroutine) is CoroutineType:
        referents = gc.get_referents(coroutine)
        # Until Python 3.10 the coroutine refers to its frame, and only that to the variables.
        for frame in [thing for thing in referents if type(thing) is FrameType]:
            referents += gc.get_referents(frame)
        for thing in referents:
            yield thing.__self__ if type(thing) is MethodType else thing
        coroutine = coroutine.cr_await
