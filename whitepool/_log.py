"""Events for the operators of a pool: to the application's structlog where that is configured, else to
the standard logger ``whitepool``."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from typing import Literal

import structlog
import trio

from ._errors import describe

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_standard_logger = logging.getLogger("whitepool")
# Without a handler of its own the standard library would print warnings to stderr. The pool is
# quiet until the application asks.
_null_handler = logging.NullHandler()
_standard_logger.addHandler(_null_handler)


def _find_caller(stack_info: bool = False, stacklevel: int = 1) -> tuple[str, int, str, None]:
    """Find the line of the pool that logs: neither one of this module, nor of a library below it.

    It stands in for `logging.Logger.findCaller`, which would name a line of structlog where the
    application's structlog hands its events on to this logger.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and name.partition(".")[0] not in {"logging", "structlog"}:
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None


_standard_logger.findCaller = _find_caller  # type: ignore[method-assign]


class PoolLog:
    """The log of one pool. Its methods never raise, whatever the application has logging do."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        # Of each event: when it was logged last, and how many times it was not since.
        self._last: dict[str, float] = {}
        self._suppressed: Counter[str] = Counter()

    def debug(self, event: str, **keys: object) -> None:
        """Log what becomes of a single worker. It may be frequent."""
        self._log("debug", event, keys)

    def info(self, event: str, **keys: object) -> None:
        """Log what becomes of the pool."""
        self._log("info", event, keys)

    def warning(self, event: str, **keys: object) -> None:
        """Log trouble that is rare."""
        self._log("warning", event, keys)

    def throttled_warning(self, event: str, **keys: object) -> None:
        """Log trouble that may be frequent, unless one of its name was logged less than a second ago.

        The next one of that name that is logged says how many were suppressed.
        """
        now = trio.current_time()
        if now - self._last.get(event, -math.inf) < 1:
            self._suppressed[event] += 1
            return
        suppressed = self._suppressed.pop(event, 0)
        if suppressed:
            keys["suppressed"] = suppressed
        self.warning(event, **keys)
        self._last[event] = now

    def _log(
        self, level: Literal["debug", "info", "warning"], event: str, keys: dict[str, object]
    ) -> None:
        # Asked each time, because an application may configure structlog after it has opened the pool.
        # For the same reason the logger is made each time: structlog may cache one that was used.
        if structlog.is_configured():
            try:
                logger = structlog.get_logger(_standard_logger.name)
                getattr(logger, level)(event, pool=self._pool, **keys)
                return
            except Exception as error:
                # The task that logs may be the supervisor's, or a worker's: it has to go on.
                keys["log_error"] = describe(error)
        if not _standard_logger.isEnabledFor(_LEVELS[level]):
            return
        keys = {"pool": self._pool, **keys}
        # A message that a person can read, and every key as an attribute for machines.
        message = " ".join([event, *(f"{key}={value}" for key, value in keys.items())])
        try:
            _standard_logger.log(_LEVELS[level], message, extra={"event": event, **keys})
        except Exception:
            # A filter has raised. Do what the standard library does where a handler raises.
            _null_handler.handleError(logging.makeLogRecord({"msg": message}))
