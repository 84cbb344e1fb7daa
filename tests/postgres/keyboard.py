"""Ctrl-C, pressed by a test."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio


@contextmanager
def listening_to_ctrl_c() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt, as it may not in a program started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def press_ctrl_c(after: Callable[[], Awaitable[object]]) -> None:
    """Press Ctrl-C in the main task of the running program, after something has happened."""

    async def press() -> None:
        await after()
        signal.raise_signal(signal.SIGINT)

    trio.lowlevel.spawn_system_task(press)  # a system task, which gets no KeyboardInterrupt itself
