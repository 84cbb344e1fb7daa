"""Whether a task that waits for a worker holds one already: a likely deadlock, which its error names.

A checkout does not note which task it is for, as that would cost each of them something. So this looks
where the task must have its worker, once its time is up: among the local variables of its coroutines,
and what their ``async with`` blocks will leave.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from types import FrameType, MethodType
from typing import Any, Generic, TypeVar

from trio.lowlevel import Task

from ._entry import Entry

T = TypeVar("T")


class Holder(Generic[T]):
    """What a client may have in place of a worker: a resource, or the context of a block."""

    __slots__ = ()

    def _held(self) -> Entry[T] | None:
        """Return the entry of the worker; None if it has been returned."""
        raise NotImplementedError


def holds_one_of(task: Task, entries: Iterable[Entry[Any]]) -> bool:
    """Say whether a coroutine of a waiting task refers to one of the workers, or to its holder."""
    wanted = set()
    for entry in entries:
        wanted |= {id(entry), id(entry.worker)}
    return any(
        id(thing._held() if isinstance(thing, Holder) else thing) in wanted
        for thing in _referents(task)
    )


def _referents(task: Task) -> Iterator[object]:
    """Yield what the coroutines of a task refer to, each of which awaits the next."""
    coroutine: Any = task.coro
    while coroutine is not None:
        referents = gc.get_referents(coroutine)
        # Until Python 3.10 the coroutine refers to its frame, and only that to the variables.
        for frame in [thing for thing in referents if isinstance(thing, FrameType)]:
            referents += gc.get_referents(frame)
        for thing in referents:
            yield thing.__self__ if isinstance(thing, MethodType) else thing
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
