"""The pool's record of one worker: the state it is in, and why it has to leave."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

if TYPE_CHECKING:
    import trio
    from trio.lowlevel import Task

    from ._worker_task import WorkerTask

T = TypeVar("T")

SMALLEST_JITTER = 0.9
"""The smallest factor for the periods of a worker. See `Entry.jitter`."""

SMALLEST_FIRST_LIFETIME = 0.05
"""The smallest share of `max_lifetime` that a worker gets which is no successor of an old one."""

HANDED_OVER = "handed over"
"""In place of the task that has a worker: its resource belongs to no one task. See `Entry.client`."""


class State(Enum):
    """Where a worker is in its life. Only `Roster` changes it, and `TRANSITIONS` says how."""

    OPENING = "its worker task is opening it"
    # What the statistics call `resetting`.
    SERVICING = "its worker task has just opened it, resets it, or probes it"
    IDLE = "it is ready to be handed out"
    IN_USE = "a client has it"
    CLOSING = "its worker task is closing it"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.OPENING: frozenset({State.SERVICING, State.CLOSING}),
    # A worker that is ready while tasks wait goes to the first of them, and is never idle.
    State.SERVICING: frozenset({State.IDLE, State.IN_USE, State.CLOSING}),
    State.IDLE: frozenset({State.IN_USE, State.SERVICING, State.CLOSING}),
    # A clean worker that is returned while tasks wait stays in use: it only changes hands.
    State.IN_USE: frozenset({State.IDLE, State.SERVICING, State.CLOSING}),
    State.CLOSING: frozenset(),
}
"""The states that may follow each state. A worker whose task has ended leaves the roster."""


Reason = Literal[
    "overflow",
    "idle",
    "lifetime",
    "retire_all",
    "shutdown",
    "crashed",
    "hung_up",
    "check_failed",
    "dead",
    "destroyed",
    "reset_failed",
    "hook_failed",
    "leaked",
]
"""Why a worker left. Retired in good health: ``"overflow"`` (beyond `pool_size`, and not needed),
``"idle"``, ``"lifetime"``, ``"retire_all"`` (`Session.retire_all` was called), ``"shutdown"``. Lost:
``"crashed"`` (a background task of the worker), ``"hung_up"`` (its peer did), ``"check_failed"``,
``"dead"`` (`WorkerManager.is_alive` said so). Destroyed: ``"destroyed"`` (by a client),
``"reset_failed"``, ``"hook_failed"``. And ``"leaked"``."""


class Departure(Enum):
    """When a worker that has to leave may go. It follows from the reason: see `REASONS`."""

    AT_ONCE = "whatever its state"
    ON_RETURN = "at once if it is idle, else when its client or its worker task gives it back"
    WHEN_REPLACED = "when it is idle, and another worker is there in its place"


class Leaving(NamedTuple):
    """What follows from a reason to leave."""

    counter: str
    """The statistic that counts it."""
    departure: Departure
    """When the worker may go."""


REASONS: dict[Reason, Leaving] = {
    "overflow": Leaving("retired", Departure.AT_ONCE),
    "idle": Leaving("retired", Departure.WHEN_REPLACED),
    "lifetime": Leaving("retired", Departure.WHEN_REPLACED),
    "retire_all": Leaving("retired", Departure.WHEN_REPLACED),
    "shutdown": Leaving("retired", Departure.AT_ONCE),
    "crashed": Leaving("lost", Departure.AT_ONCE),
    "hung_up": Leaving("lost", Departure.ON_RETURN),
    "check_failed": Leaving("lost", Departure.AT_ONCE),
    "dead": Leaving("lost", Departure.AT_ONCE),
    "destroyed": Leaving("destroyed", Departure.AT_ONCE),
    "reset_failed": Leaving("destroyed", Departure.AT_ONCE),
    "hook_failed": Leaving("destroyed", Departure.AT_ONCE),
    "leaked": Leaving("leaked", Departure.AT_ONCE),
}
"""What follows from each reason."""


class Entry(Generic[T]):
    """The record of one worker. It is plain data: its worker task and the supervisor act on it."""

    __slots__ = (
        "after_hook",
        "can_be_checked",
        "checked_out_at",
        "client",
        "crash",
        "evict_reason",
        "expires_at",
        "fileno",
        "idle_since",
        "in_use_since",
        "is_alive",
        "jitter",
        "last_words",
        "last_words_of",
        "lost",
        "needs_reset",
        "opened_at",
        "opening_time",
        "probed_at",
        "reported_at",
        "state",
        "task",
        "worker",
    )

    worker: T
    """The user's object. There is none before it has been opened."""

    task: WorkerTask[T]
    """The task in which the worker lives."""

    def __init__(self) -> None:
        self.state = State.OPENING
        self.evict_reason: Reason | None = None
        """Why the worker has to leave, or had to. None while it may stay."""
        # Workers that were opened together must not all be replaced, or probed, together.
        self.jitter = random.uniform(SMALLEST_JITTER, 1)
        """The factor for the periods of this worker."""
        self.opened_at = -math.inf
        self.opening_time = 0.0
        """Seconds that opening it took."""
        self.expires_at = math.inf
        """When it has reached its `max_lifetime`."""
        self.lost: trio.Event | None = None
        """Set when the pool closes the worker while a client has it. Made when the client asks."""
        self.crash: Exception | None = None
        """Why it crashed, as far as it is known yet."""
        self.last_words = ""
        """What its peer said last, if it is lost or destroyed, and its peer has said why."""
        self.in_use_since = -math.inf
        """When it was last handed to a client."""
        self.client: Task | str | None = None
        """The task that has it, or HANDED_OVER. It is noted only if `held_warning` is set, and None
        while no client has it."""
        self.reported_at = -math.inf
        """When one of its checkouts was last reported: the present one, if after `in_use_since`."""
        self.checked_out_at = ""
        """Where its last client had checked it out, for what a reset has to tell. It is noted at the
        return, and only if a reset follows."""
        self.idle_since = -math.inf
        """When it last became ready for a client. A probe does not change this."""
        self.probed_at = -math.inf
        """When it last answered a probe."""
        self.fileno: int | None = None
        # None if the manager does not override the method: then it is not called.
        self.is_alive: Callable[[T], bool] | None = None
        self.needs_reset: Callable[[T], bool] | None = None
        self.after_hook: Callable[[T, str], None] | None = None
        self.last_words_of: Callable[[T], str] | None = None  # also None once it was called
        self.can_be_checked = False

    @property
    def is_open(self) -> bool:
        """Whether the worker has been opened, and is not being closed."""
        return self.state is not State.OPENING and self.state is not State.CLOSING

    @property
    def is_expiring(self) -> bool:
        """Whether the worker is alive and well, but is to be replaced."""
        return (
            self.evict_reason is not None
            and self.is_open
            and REASONS[self.evict_reason].departure is Departure.WHEN_REPLACED
        )
