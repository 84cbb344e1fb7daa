"""How long a test waits: until something holds, and not for ever."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio


async def until(condition: Callable[[], bool], within: float = 10.0) -> float:
    """Return when the condition holds, with the seconds that took; fail when it takes too long."""
    begun = trio.current_time()
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(0.001)
    return trio.current_time() - begun


class Hangs(BaseException):
    """The pool hangs, or spins. Not an `Exception`, so that nothing takes it for a failed start."""


@contextmanager
def alarm(seconds: int = 20) -> Iterator[None]:
    """Raise `Hangs` in a block that takes too long, also where Trio no longer comes to run a task."""

    def ring(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
