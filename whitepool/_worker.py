"""One worker: its record, and the host task in which it lives from opening to closing."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Generic, Literal, Protocol, TypeVar

import trio
from trio.lowlevel import ParkingLot, checkpoint_if_cancelled, enable_ki_protection

from ._manager import WorkerManager, manager_of
from ._options import Options

T = TypeVar("T")

Reason = Literal["overflow", "shutdown", "crashed", "dead", "destroyed", "reset_failed", "leaked"]
"""Why a worker leaves the pool."""


class Place(Enum):
    """Where a worker is."""

    STARTING = "being opened by its host"
    HOST = "in the care of its host: just opened, or being reset"
    OUT = "on the shelf, or with a client"
    LEAVING = "being closed by its host"


class Owner(Protocol[T]):
    """What a host tells its supervisor."""

    def started(self, worker: Worker[T]) -> None: ...
    def start_failed(self, worker: Worker[T], error: Exception, begun: float) -> None: ...
    def ready(self, worker: Worker[T]) -> None: ...
    def host_work_failed(self, worker: Worker[T], error: Exception) -> None: ...
    def left(self, worker: Worker[T]) -> None: ...
    def gone(self, worker: Worker[T], error: Exception | None) -> None: ...


class Worker(Generic[T]):
    """The pool's record of one worker."""

    __slots__ = (
        "_activity",
        "_bell",
        "_job",
        "_life",
        "_manager",
        "_options",
        "_owner",
        "condemned",
        "idle_since",
        "is_alive",
        "needs_reset",
        "obj",
        "place",
    )

    obj: T
    """The user's object."""

    def __init__(self, owner: Owner[T], manager: WorkerManager[T], options: Options) -> None:
        self.place = Place.STARTING
        self.condemned: Reason | None = None
        """Why it must not be given to anybody any more."""
        self.idle_since = -math.inf
        # A manager that leaves a question to its default is not asked: None.
        self.is_alive: Callable[[T], bool] | None = None
        self.needs_reset: Callable[[T], bool] | None = None
        self._owner = owner
        self._manager = manager
        self._options = options
        self._life = trio.CancelScope()
        self._activity = trio.CancelScope()
        self._job: Callable[[T], Awaitable[None]] | None = None
        self._bell = ParkingLot()

    def reset(self) -> None:
        """Have the host make the worker clean, and hand it to the supervisor when it is."""
        self._job = self._manager.reset
        self._bell.unpark()

    def leave(self, opened: bool) -> None:
        """Have the host close the worker, or give up opening it (its `place` is LEAVING)."""
        if opened:
            self._activity.cancel()
            self._bell.unpark()
        else:
            self._life.cancel()

    # A Ctrl-C belongs to the main task, not to whichever host happens to run.
    @enable_ki_protection
    async def live(self) -> None:
        """The host task: everything that takes time happens to a worker here, and only here.

        So whatever the worker opened (a nursery, a cancel scope) is left in the task that entered
        it, and a crash of its background tasks arrives here.
        """
        options, owner = self._options, self._owner
        begun = trio.current_time()
        opened = False
        failure: Exception | None = None
        # Only the supervisor ends a worker: a client that is being cancelled still needs it.
        self._life = trio.CancelScope(shield=True, deadline=begun + options.start_timeout)
        with self._life:
            try:
                async with self._manager.lifespan() as self.obj:
                    await checkpoint_if_cancelled()  # too late is too late
                    self._life.deadline = math.inf
                    self._learn_manners()
                    opened = True
                    owner.started(self)
                    try:
                        await self._work()
                    finally:
                        owner.left(self)
                        self._life.deadline = trio.current_time() + options.close_timeout
            except Exception as error:
                failure = error
        if opened and self._life.cancelled_caught:
            failure = failure or trio.TooSlowError(f"not closed within {options.close_timeout} s")
        if self.place is Place.STARTING:
            too_slow = trio.TooSlowError(f"not open within {options.start_timeout} s")
            owner.start_failed(self, failure or too_slow, begun)
        owner.gone(self, failure)

    async def _work(self) -> None:
        """Do what the supervisor asks for, until the worker leaves."""
        self._owner.ready(self)
        while self.place is not Place.LEAVING:
            if self._job is None:
                await self._bell.park()
                continue
            job, self._job = self._job, None
            timeout = self._options.reset_timeout
            self._activity = trio.CancelScope(deadline=trio.current_time() + timeout)
            try:
                with self._activity:
                    await job(self.obj)
                if self._activity.cancelled_caught:
                    raise trio.TooSlowError(f"not reset within {timeout} s")
            except Exception as error:
                self._owner.host_work_failed(self, error)
            else:
                self._owner.ready(self)

    def _learn_manners(self) -> None:
        """Look up, once, what there is to ask when the worker changes hands."""
        manager = self._manager = manager_of(self.obj, self._manager)
        kind = type(manager)
        if kind.is_alive is not WorkerManager.is_alive:
            self.is_alive = manager.is_alive
        if kind.needs_reset is not WorkerManager.needs_reset:
            self.needs_reset = manager.needs_reset
