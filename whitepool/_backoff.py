"""When a failed start may be tried again."""

from __future__ import annotations

import math
import random

FIRST = 0.05
# Seconds. As the longest pause is below one, a pool is whole again within a second of the moment its
# server accepts connections.
LONGEST = 0.8


CALM = 5.0
"""Seconds without a failure after which the next one is a first one again."""


class Backoff:
    """Exponential backoff with full jitter, shared by all starts of a pool.

    Full jitter (Brooker, "Exponential Backoff and Jitter", 2015): the pause is drawn between zero
    and a bound that doubles with each failure, so that many pools do not knock in step.
    """

    def __init__(self) -> None:
        self.last_error: Exception | None = None
        """Why the last start failed; None once a start has succeeded."""
        self.retry_at = -math.inf
        """No start before this time."""
        self.failures = 0
        """Failures in a row; those of starts that were under way together are one."""
        self._last_failure = -math.inf

    def succeeded(self) -> None:
        """Note that a start has succeeded: others need not wait."""
        self.last_error = None
        self.retry_at = -math.inf

    def failed(self, error: Exception, *, begun: float, now: float) -> None:
        """Note that a start which began at the time `begun` has failed."""
        self.last_error = error
        if begun < self._last_failure:
            return  # it was under way when another failed: the same wave, not a further refusal
        # Successes between them do not count: a server may take connections only to drop them.
        if now > self._last_failure + CALM:
            self.failures = 0
        self._last_failure = now
        # The exponent is bounded too: 2.0 ** 1024 overflows, after a quarter of an hour.
        bound = min(LONGEST, FIRST * 2.0 ** min(self.failures, 10))
        self.failures += 1
        self.retry_at = now + random.uniform(0, bound)
