"""The pool's record of one worker: the state it is in, and why it has to leave."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

from ._hooks import Reason

if TYPE_CHECKING:
    from ._worker_task import WorkerTask

T = TypeVar("T")


class State(Enum):
    """Where a worker is in its life. Only `Roster` changes it, and `TRANSITIONS` says how."""

    OPENING = "its worker task is opening it"
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


class Departure(Enum):
    """When a worker that has to leave may go. It follows from the reason: see `REASONS`."""

    AT_ONCE = "whatever its state"
    ON_RETURN = "at once where it is idle, else when its client or its worker task gives it back"
    WHEN_REPLACED = "when it is idle, and another worker is there in its place"


REASONS: dict[Reason, tuple[str, Departure]] = {
    "overflow": ("retired", Departure.AT_ONCE),
    "idle": ("retired", Departure.WHEN_REPLACED),
    "lifetime": ("retired", Departure.WHEN_REPLACED),
    "shutdown": ("retired", Departure.AT_ONCE),
    "crashed": ("lost", Departure.AT_ONCE),
    "hung_up": ("lost", Departure.ON_RETURN),
    "check_failed": ("lost", Departure.AT_ONCE),
    "dead": ("lost", Departure.AT_ONCE),
    "destroyed": ("destroyed", Departure.AT_ONCE),
    "reset_failed": ("destroyed", Departure.AT_ONCE),
    "hook_failed": ("destroyed", Departure.AT_ONCE),
    "leaked": ("leaked", Departure.AT_ONCE),
}
"""For each reason to leave: the statistic that counts it, and when the worker may go."""


class Entry(Generic[T]):
    """The record of one worker. It is plain data: its worker task and the supervisor act on it."""

    __slots__ = (
        "can_be_checked",
        "evict_reason",
        "expires_at",
        "fileno",
        "idle_since",
        "in_use_since",
        "is_alive",
        "jitter",
        "needs_reset",
        "opened_at",
        "opening_time",
        "probed_at",
        "probing",
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
        self.jitter = random.uniform(0.9, 1)
        """The factor for the periods of this worker."""
        self.opened_at = -math.inf
        self.opening_time = 0.0
        """Seconds that opening it took."""
        self.expires_at = math.inf
        """When it has reached its `max_lifetime`."""
        self.in_use_since = -math.inf
        """When it was handed to its client, or to the one before."""
        self.idle_since = -math.inf
        """When it last became ready for a client. A probe does not change this."""
        self.probed_at = -math.inf
        """When it last answered a probe."""
        self.probing = False
        """Whether it is being serviced for a probe, after which it goes back to where it was."""
        self.fileno: int | None = None
        # A manager that leaves a question to its default is not asked at all: None.
        self.is_alive: Callable[[T], bool] | None = None
        self.needs_reset: Callable[[T], bool] | None = None
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
            and REASONS[self.evict_reason][1] is Departure.WHEN_REPLACED
        )
