"""When a pool refuses a task, or sheds one that waits, because more tasks arrive than it can serve.

First come, first served collapses under overload: each task waits until its time is nearly up, and
the worker that it then gets comes too late to be of use. Shedding some tasks early leaves the others
enough of their time. Controlled delay (CoDel: Nichols and Jacobson, "Controlling Queue Delay", 2012;
Elixir's DBConnection queues by it) decides by how long the tasks that are served now have waited, and
not by how many wait. That distinguishes a lasting queue from a short burst.

Here the measure is each waiter's own timeout. `patience` is the share of it that a task may have to
wait. Half of that is a period, and the wait queue looks at each waiter after each of its periods. If a
task has waited for two periods, every task that was served in the second one had waited for at least
one, because the queue is first come, first served. What is left to ask is whether the queue grows.
"""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    """What there was to see when the wait queue looked at a waiter."""

    joined: int
    """How many tasks had ever joined the queue."""
    served: int
    """How many of them had been served."""
    served_before: bool
    """Whether a task was served in the period that ended with this look."""


def period(patience: float) -> float:
    """Return the share of a waiter's timeout after which to look at it; 1 turns shedding off."""
    return patience / 2 if patience < 1 else 1


def is_growing(last: Look, joined: int, served: int) -> bool:
    """Say whether the queue grew in the period since the `last` look: waiting longer can't help.

    1. More tasks joined than were served: else the queue drains, and the waiter's turn comes.
    2. A task was served: else nothing is gained by shedding another.
    3. A task was served in the period before, too. After a stall it takes one more period to tell, as
       the stall may have taken up most of the first.
    """
    return last.served_before and joined - last.joined > served - last.served > 0


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
