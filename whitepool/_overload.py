"""When a pool refuses a task, or sheds one that waits, because more tasks arrive than it can serve.

First come, first served collapses under overload: each task waits until its time is nearly up, and
the worker that it then gets comes too late to be of use. Shedding some tasks early leaves the others
enough of their time. Controlled delay (CoDel: Nichols and Jacobson, "Controlling Queue Delay", 2012;
Elixir's DBConnection queues by it) decides by how long the tasks that are served now have waited, and
not by how many wait. That distinguishes a lasting queue from a short burst.

Here the measure is each waiter's own timeout. `patience` is the share of it that a task may have to
wait. Half of that is a period, and the wait queue looks at each waiter after each of its periods. If a
task has waited for two periods, every task that was served in the second one had waited for at least
one, because the queue is first come, first served. What is left to ask is whether the queue grows
(`is_growing`), and whether it does so by chance.

For that, `Excess` counts how many more tasks have joined than were served, with those that left: how
long the queue would be if no task ever left it. A burst, or a minute of bad luck, ends before that is
more than can be served in twice a waiter's timeout; a lasting overload gets there sooner or later, and
stays. (Tasks that did not wait count, too, for how many can be served.) Then, and until the excess has
drained, waiters are shed. (It is a leaky bucket; in statistics, a cumulative sum: Page, "Continuous
Inspection Schemes", 1954.)

An overload can hide from that count. Where clients give up their work when its own deadline has passed,
and get their workers just before it, they return them at once: as many are served as join, to no use.
So it is an overload, too, if for several timeouts those that are served have waited for most of theirs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

TIMEOUTS = 2
"""An excess is lasting if it takes more than so many of a waiter's timeouts to serve it,"""
FEW = 8
"""and so many tasks more, as chance counts for more where few are served within a timeout."""
MEMORY = 10
"""For so many timeouts it is remembered how fast tasks were served: most bad luck is shorter."""
LEAK = 0.5
"""While no task waits for long, the excess drains at this share of the rate at which tasks were served.
Some of that time, workers are idle, and some not: the queue can't tell."""
LATE = 0.7
"""Tasks are served late if they have waited, on average, for more than this share of a timeout."""
LATE_FOR = 4
"""For so many timeouts tasks have been served late when that is an overload."""
CALM = 0.2
"""It is over when tasks are served that have waited for less than this share of a timeout."""
STALL = 0.75
"""It is a stall, and no overload, if no task was served for this share of a timeout."""


class Look(NamedTuple):
    """What there was to see when the wait queue looked at a waiter, or when that joined."""

    joined: int
    """How many tasks had ever joined the queue."""
    served: int
    """How many of them had been served."""
    wait_time: float = 0.0
    """Seconds for which those had waited, in all. Not known of the time when a waiter joined."""
    checkouts: int = 0
    """How many tasks had ever got a worker, with those that did not wait. Not known then, either."""


class Excess:
    """How many more tasks have joined than were served, how fast they are served, and how late.

    The wait queue calls `count` at each look. The waiter that it looks at tells about the time since it
    joined: the queue was never empty in it. Of the time before, back to the last look, nothing is known
    but that no task waited for long. This way, joining and serving cost nothing more.
    """

    __slots__ = (
        "_checkouts",
        "_is_late",
        "_late_since",
        "_longest",
        "_seconds",
        "_seen",
        "_served",
        "_span",
        "_until",
        "tasks",
    )

    def __init__(self, now: float) -> None:
        self.tasks = 0.0
        """How many more joined than were served, less what has drained."""
        # So many tasks were served in so many seconds in which others waited.
        self._served = 0.0
        self._seconds = 0.0
        # So many got a worker in all of the time, which is so many seconds.
        self._checkouts = 0.0
        self._span = 0.0
        self._until = now  # the time of the last look
        self._seen = Look(0, 0)
        self._longest = 0.0  # the longest timeout of a waiter since there has been an excess
        self._late_since = math.inf  # since when tasks are served late
        self._is_late = False  # whether that has lasted, until they are served in good time again

    def count(self, now: float, since: float, timeout: float, then: Look, look: Look) -> None:
        """Count what has happened up to a `look`; `then` is what there was when the waiter joined."""
        self._checkouts += look.checkouts - self._seen.checkouts
        self._span += now - self._until
        if since > self._until:
            if self._seconds:
                idle = since - self._until
                self.tasks = max(0.0, self.tasks - LEAK * idle * self._rate)
            self._until, self._seen = since, then._replace(wait_time=look.wait_time)
            self._late_since, self._is_late = math.inf, False
        served = look.served - self._seen.served
        if served:
            wait_time = (look.wait_time - self._seen.wait_time) / served
            self._note_wait(wait_time / max(timeout, self._longest), now, timeout)
        self.tasks += look.joined - self._seen.joined - served
        self._served += served
        self._seconds += now - self._until
        self._until, self._seen = now, look
        if self._seconds > MEMORY * timeout:
            self._served /= 2
            self._seconds /= 2
        if self._span > MEMORY * timeout:
            self._checkouts /= 2
            self._span /= 2
        if self.tasks <= 0:
            self.tasks = self._longest = 0.0
        self._longest = max(timeout, self._longest)
        if look.served == then.served and now - since >= STALL * self._longest:
            self.tasks = 0.0
        elif self._seconds:
            # An hour of overload is forgotten as soon as a minute of it.
            self.tasks = min(self.tasks, 2 * self._bound(self._longest))

    def _note_wait(self, share: float, now: float, timeout: float) -> None:
        """Note for which share of a timeout the tasks that are served have waited."""
        if share > LATE:
            self._late_since = min(self._late_since, now)
            self._is_late = self._is_late or now - self._late_since >= LATE_FOR * timeout
        elif share < CALM or not self._is_late:
            self._late_since, self._is_late = math.inf, False

    def is_lasting(self, timeout: float) -> bool:
        """Say whether this is no chance, for a waiter with this timeout."""
        return self._is_late or (self._seconds > 0 and self.tasks > self._bound(timeout))

    def _bound(self, timeout: float) -> float:
        return FEW + TIMEOUTS * timeout * self._rate

    @property
    def _rate(self) -> float:
        """Tasks that can be served in a second.

        It is at least what was served while tasks waited, and at least what was served in all: where a
        few tasks take very long, a time in which others wait has more of those than usual.
        """
        return max(self._served / self._seconds, self._checkouts / self._span)


def period(patience: float) -> float:
    """Return the share of a waiter's timeout after which to look at it; 1 turns shedding off."""
    return patience / 2 if patience < 1 else 1


def is_growing(last: Look, look: Look) -> bool:
    """Say whether the queue grew in the period between two looks at a waiter.

    1. More tasks joined than were served: else the queue drains, and the waiter's turn comes.
    2. A task was served: else nothing is gained by shedding another.
    """
    return look.joined - last.joined > look.served - last.served > 0


def next_look(now: float, ends: float, seconds: float) -> float:
    """Return when to look at a waiter again: after `seconds`, but not later than its time `ends`.

    A period too short for the resolution of the clock counts as the rest of the time.
    """
    return now + seconds if now < now + seconds < ends else ends


def is_queue_full(waiting: int, max_waiting: float, obtainable: int) -> bool:
    """Say whether one more waiter would exceed `max_waiting`.

    Only the waiters count that need a client to return a worker. `obtainable` of them get one without
    that, because it is being opened, reset or closed, or because it may be opened.
    """
    return waiting >= obtainable + max_waiting
