"""Events for whoever runs the pool: structlog in front, the standard logger ``whitepool`` behind."""

from __future__ import annotations

import logging
from typing import Any

import structlog
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
