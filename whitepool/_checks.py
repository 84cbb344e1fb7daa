"""What is wrong with an argument, said before anything is opened."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import ClassVar, NoReturn

import trio


def check_count(option: str, value: object, *, least: int = 0) -> None:
    """Raise unless `value` is an int, and `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{option} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{option} must be {least} or more, not {value!r}")


def check_seconds(option: str, value: object, *, more_than_zero: bool = False) -> None:
    """Raise unless `value` is a number of seconds; `math.inf` is one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{option} must be a number of seconds, not {value!r}")
    if math.isnan(value) or value < 0 or (more_than_zero and value == 0):
        bound = "more than 0" if more_than_zero else "0 or more"
        raise ValueError(f"{option} must be {bound} seconds, not {value!r}")


def check_call(what: str, function: Callable[..., object], *arguments: str) -> None:
    """Raise `TypeError` unless `function` can be called with so many arguments, named here."""
    problem = _why_not_call(function, arguments)
    if problem is not None:
        takes = f"with ({', '.join(arguments)})" if arguments else "without arguments"
        raise TypeError(f"{what} is called {takes}: {problem}") from None


def can_call(function: Callable[..., object], *arguments: str) -> bool:
    """Return whether `function` can be called with so many arguments, as far as that can be known."""
    return _why_not_call(function, arguments) is None


def _why_not_call(function: Callable[..., object], arguments: tuple[str, ...]) -> TypeError | None:
    """Return what is wrong with such a call; None: nothing, or it can't be known.

    A decorator may add arguments, so what it wraps says nothing, unless it is one of contextlib's.
    """
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    adds_nothing = getattr(code, "co_filename", "") == contextlib.__file__
    try:
        signature = inspect.signature(function, follow_wrapped=adds_nothing)
    except Exception:
        return None  # some builtins have none, and the annotations of a function may not exist yet
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return error
    return None


def check_plain(what: str, function: Callable[..., object]) -> None:
    """Raise `TypeError` if a function, or an object that is called, is async."""
    for called in (function, type(function).__call__):
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            raise TypeError(f"{what} must be a plain function: an async one can't answer at once")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that names the known word that is most like `name`; empty if there is none."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f": did you mean {found[0]}?" if found else ""


def check_runs_on_trio(what: str) -> None:
    """Raise `RuntimeError` if this is not called from a task of Trio's."""
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        raise RuntimeError(
            f"{what} needs Trio, which does not run here: start your program with trio.run, "
            "not with asyncio.run, and a service with a server that supports Trio, such as Hypercorn"
        ) from None


class OnlyAsyncWith:
    """A base of async context managers. It says so if one is awaited, or entered without ``async``."""

    _usage: ClassVar[str]

    def __await__(self) -> NoReturn:
        raise TypeError(f"this is a block: write `async with {self._usage}:`")

    def __enter__(self) -> NoReturn:
        self.__await__()

    def __exit__(self, *_: object) -> None:
        """Python looks for this method before it calls `__enter__`."""
