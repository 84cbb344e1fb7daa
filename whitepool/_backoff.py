"""When a failed start may be tried again, and when workers that die young count as failed starts."""

from __future__ import annotations

import math
import random

FIRST_BOUND = 0.05
"""Seconds. The first pause is at most this long."""

LONGEST_BOUND = 0.8
"""Seconds. As no pause is longer, a pool tries again within a second of the moment in which its server
accepts connections."""

LONGEST_BOUND_FULL = 8.0
"""Seconds. No pause is longer where a server is full."""

FAILURE_RESET_AFTER = 5.0
"""Seconds without a failure after which the next one counts as the first again."""

FIRST_TRIES_FULL = 10
"""So many times a pool without a worker tries twice a second to get one of a full server, on average.
It has one by then, where other pools leave places to it. After that it tries once a second."""

EARLY_DEATH_WINDOW = 1.0
"""Seconds. A worker that dies sooner after it was opened has died early."""


def longest_pause(failures: int) -> float:
    """Return the bound of the pause that follows so many failures in a row: each doubles it."""
    # The exponent is bounded too: 2.0 ** 1024 overflows, after a quarter of an hour of failures.
    return min(LONGEST_BOUND, FIRST_BOUND * 2.0 ** min(failures - 1, 10))


def draw_pause_full(workers: int, failures: int) -> float:
    """Return the seconds to wait if a server is full, and the pool has so many workers.

    It serves with those, so the pauses are longer than where a server is down. The fewer it has, the
    sooner it tries again, so that pools with few catch up. One that has none must not miss a place that
    another pool leaves free for a moment (`_sharing.GAP`), and should get it before those that have
    some. Its first pauses are half as long: `failures` is how often it has failed before.
    """
    if workers == 0:
        return random.uniform(0.25, 0.75) * (1 if failures < FIRST_TRIES_FULL else 2)
    return random.uniform(0.5, 1) * min(LONGEST_BOUND_FULL, 1.5 * workers)


class Backoff:
    """Exponential backoff with full jitter, shared by all starts of a pool.

    Full jitter (Brooker, "Exponential Backoff and Jitter", 2015) draws each pause between zero and its
    bound, so that many pools do not try in step.
    """

    def __init__(self) -> None:
        self.last_error: Exception | None = None
        """Why the last start failed. None once a start has succeeded."""
        self.retry_at = -math.inf
        """No start before this time."""
        self.failures = 0
        """Failures without a pause of `FAILURE_RESET_AFTER`, even if starts succeeded in between. Those
        of starts that were under way together count as one."""
        self.last_failure = -math.inf
        """When a start failed last."""

    def recent_error(self, now: float, start_timeout: float) -> Exception | None:
        """Return why the last start failed, unless the starts after it have had time to succeed."""
        has_passed = now > self.last_failure + start_timeout + FAILURE_RESET_AFTER
        return None if has_passed else self.last_error

    def succeeded(self, *, begun: float) -> None:
        """Note that a start which began at the time `begun` has succeeded: the others need not wait."""
        self.last_error = None
        # If it was under way when another one failed, the pause stays. Otherwise starts that take
        # turns, each of whose workers dies before the next one is open, would go on without any.
        if begun >= self.last_failure:
            self.retry_at = -math.inf

    def failed(
        self,
        error: Exception,
        *,
        begun: float,
        now: float,
        pause: float | None = None,
    ) -> None:
        """Note that a start which began at the time `begun` has failed.

        The next has to wait for so many seconds; None: as long as `longest_pause` says, at most.
        """
        self.last_error = error
        # It was under way when another one failed, so this is the same refusal, not another.
        if begun < self.last_failure:
            return
        # A success in between changes nothing: a server may take connections only to drop them.
        if now > self.last_failure + FAILURE_RESET_AFTER:
            self.failures = 0
        self.last_failure = now
        self.failures += 1
        if pause is None:
            pause = random.uniform(0, longest_pause(self.failures))
        self.retry_at = now + pause


class EarlyDeaths:
    """Tells a few workers that died early by accident from a server whose workers never last."""

    def __init__(self) -> None:
        self._count = 0
        self._last = -math.inf

    def too_many(self, most: int, *, opened_at: float, now: float) -> bool:
        """Count the death of a worker if it is early; say whether there have been too many.

        More than `most` without a pause of `FAILURE_RESET_AFTER` mean that replacements die early, too.
        """
        if now >= opened_at + EARLY_DEATH_WINDOW:
            return False
        if now > self._last + FAILURE_RESET_AFTER:
            self._count = 0
        self._last = now
        self._count += 1
        return self._count > most
