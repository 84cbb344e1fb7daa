"""Who holds a worker for too long: one report for each checkout that lasts longer than `held_warning`.

A checkout notes only its task. What that task is doing is looked up when the report is due, so that
checkouts that come back in time pay nothing for it.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import trio
from trio.lowlevel import Task

from . import _sizing as sizing
from ._entry import HANDED_OVER, Entry, Reason
from ._log import PoolLog
from ._roster import Roster

T = TypeVar("T")

MOST_FRAMES = 20
"""A report has at most so many frames, the innermost: the others are mostly those of a framework."""

_TRIO = os.path.join(os.path.dirname(trio.__file__), "")


class Holding(Generic[T]):
    """Looks at the checkouts of one pool that last for too long, and reclaims what ended tasks hold.

    Args:
      held_warning: the option; with `math.inf` it does nothing.
      evict: closes a worker for a reason.
    """

    def __init__(
        self,
        roster: Roster[T],
        log: PoolLog,
        held_warning: float,
        *,
        evict: Callable[[Entry[T], Reason], None],
    ) -> None:
        self._roster = roster
        self._log = log
        self._held_warning = held_warning
        self._evict = evict

    def look(self, now: float) -> float:
        """Report the checkouts that are due, and return when the next one is.

        Those that have been reported are looked at again: their tasks may have ended since.
        """
        if self._held_warning == math.inf:
            return math.inf
        found, next_due = sizing.held_too_long(self._roster.entries, self._held_warning, now)
        for entry in found:
            has_ended = _has_ended(entry.client)
            if entry.reported_at <= entry.in_use_since:
                entry.reported_at = now
                self._log.warning(
                    "held_too_long",
                    task=_name(entry.client),
                    seconds=round(now - entry.in_use_since, 3),
                    task_ended=has_ended,
                    frames=_await_frames(entry.client),
                )
            if has_ended:
                self._log.warning("worker_leaked", task=_name(entry.client))
                self._evict(entry, "leaked")
        return next_due

    def on_return(self, entry: Entry[T], now: float) -> None:
        """Say that a worker has come back whose checkout was reported."""
        self._log.warning(
            "returned_late",
            task=_name(entry.client),
            seconds=round(now - entry.in_use_since, 3),
        )


def _name(client: Task | str | None) -> str:
    return client.name if isinstance(client, Task) else HANDED_OVER


def _has_ended(client: Task | str | None) -> bool:
    """Say whether a task has ended. Then its coroutine has no frame, which Trio sees to that it had.

    `inspect.getcoroutinestate` would raise an error for the coroutine of a compiled function. That may
    keep its frame, so a task of that kind never counts as ended.
    """
    if not isinstance(client, Task):
        return False
    coroutine: Any = client.coro
    return coroutine.cr_frame is None


def _await_frames(client: Task | str | None) -> str:
    """Say on one line where a task is, from its outermost coroutine to what it awaits.

    Where it waits in Trio, the function of Trio's that it has called is enough.
    """
    if not isinstance(client, Task) or _has_ended(client):
        return ""
    frames: deque[str] = deque(maxlen=MOST_FRAMES)
    in_trio = False
    # What is awaited may be anything of the user's, and Trio asks it for its attributes.
    with suppress(Exception):
        for frame, line in client.iter_await_frames():
            code = frame.f_code
            was_in_trio, in_trio = in_trio, code.co_filename.startswith(_TRIO)
            if not (was_in_trio and in_trio):
                frames.append(f"{code.co_filename}:{line} in {code.co_name}")
    return " > ".join(frames)
