"""Events for the operators of a pool: structlog in front, the standard logger ``whitepool`` behind."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any

import structlog
import trio
from structlog.typing import EventDict

_standard_logger = logging.getLogger("whitepool")
# Without a handler of its own the standard library would print warnings to stderr. The pool is
# quiet until the application asks.
_standard_logger.addHandler(logging.NullHandler())


def _to_standard_call(
    _logger: object, _method: str, event: EventDict
) -> tuple[tuple[str], dict[str, Any]]:
    """Make a message that a person can read, and keep every key as an attribute for machines."""
    name = event.pop("event")
    text = " ".join([name, *(f"{key}={value}" for key, value in event.items())])
    return (text,), {"extra": {"event": name, **event}}


log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    _standard_logger,
    processors=[structlog.stdlib.filter_by_level, _to_standard_call],
    wrapper_class=structlog.stdlib.BoundLogger,
)


class PoolLog:
    """The log of one pool."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        # Of each event: when it was logged last, and how many times it was not since.
        self._last: dict[str, float] = {}
        self._suppressed: Counter[str] = Counter()

    def warning(self, event: str, **keys: object) -> None:
        """Log an event that is rare."""
        log.warning(event, pool=self._pool, **keys)

    def info(self, event: str, **keys: object) -> None:
        """Log an event that is no trouble."""
        log.info(event, pool=self._pool, **keys)

    def throttled_warning(self, event: str, **keys: object) -> None:
        """Log an event that may be frequent, unless one of its name was logged less than a second ago.

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
