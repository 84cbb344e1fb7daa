"""Dealing with Trio's scheduler: when to let other tasks run, and when not to go through it at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from time import perf_counter


class TimeSlice:
    """How long code that never has to wait may keep the event loop before it lets other tasks run.

    A checkpoint each time would cost more than the operation itself, and none at all would starve
    every other task.

    Args:
      seconds: how long that is.
      now: the clock. By default it is real time, because the clock of a test may stand still.
    """

    __slots__ = ("_now", "_seconds", "ends")

    def __init__(self, seconds: float, now: Callable[[], float] = perf_counter) -> None:
        self._seconds = seconds
        self._now = now
        self.ends = -math.inf
        """When the slice is used up. The hot path, which knows the time, compares this itself."""

    def is_over(self) -> bool:
        """Say whether it is time to let other tasks run."""
        return self._now() > self.ends

    def restart(self) -> None:
        """Begin a new slice. Call it right after other tasks have had their turn."""
        self.ends = self._now() + self._seconds


class NoopAwaitable:
    """What a plain function returns that has to be awaited: nothing, and at once.

    An ``__aexit__`` that is a plain function has done its work when it has been called. A coroutine
    would do it when it is awaited, and a Ctrl-C may strike between the two.
    """

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


NOOP = NoopAwaitable()
