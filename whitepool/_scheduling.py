"""Dealing with Trio's scheduler: when to let other tasks run, when not to go through it at all, and
where a Ctrl-C must not strike."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import AbstractAsyncContextManager
from time import perf_counter
from types import TracebackType
from typing import TypeVar

from trio.lowlevel import enable_ki_protection

T_co = TypeVar("T_co", covariant=True)


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


class Uninterrupted(AbstractAsyncContextManager[T_co]):
    """A block that Ctrl-C does not strike while it is entered or left, except where that waits.

    In the middle of the code that does so, contextlib's included, a Ctrl-C would skip the rest of it.
    """

    def __init__(self, block: AbstractAsyncContextManager[T_co]) -> None:
        self._block = block

    @enable_ki_protection
    async def __aenter__(self) -> T_co:
        return await self._block.__aenter__()

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._block.__aexit__(exc_type, exc_value, traceback)
