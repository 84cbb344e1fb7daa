"""One worker: its record, and the host task in which it lives from opening to closing."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Generic, Protocol, TypeVar

import trio
from trio.lowlevel import ParkingLot, checkpoint_if_cancelled, enable_ki_protection

from ._errors import unwrapped
from ._hooks import Reason, call
from ._manager import WorkerManager, close_timeout, manager_of
from ._options import Options

T = TypeVar("T")


class Place(Enum):
    """Where a worker is."""

    STARTING = "being opened by its host"
    HOST = "in the care of its host: just opened, being reset, or probed"
    OUT = "on the shelf, or with a client"
    LEAVING = "being closed by its host"


class Owner(Protocol[T]):
    """What a host tells its supervisor."""

    def started(self, worker: Worker[T]) -> None: ...
    def start_failed(self, worker: Worker[T], error: Exception, begun: float) -> None: ...
    def ready(self, worker: Worker[T]) -> None: ...
    def host_work_failed(self, worker: Worker[T], reason: Reason, error: Exception) -> None: ...
    def hook_failed(self, hook: str, error: Exception) -> None: ...
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
        "can_be_checked",
        "condemned",
        "expires",
        "fileno",
        "idle_since",
        "is_alive",
        "jitter",
        "needs_reset",
        "obj",
        "opened_at",
        "opened_in",
        "place",
        "probed",
        "probing",
    )

    obj: T
    """The user's object."""

    def __init__(self, owner: Owner[T], manager: WorkerManager[T], options: Options) -> None:
        self.place = Place.STARTING
        self.condemned: Reason | None = None
        """Why it has to leave."""
        # Between 0.9 and 1: workers that were opened together don't reconnect together.
        self.jitter = random.uniform(0.9, 1)
        self.opened_at = -math.inf
        self.opened_in = 0.0
        """Seconds that opening it took."""
        self.expires = math.inf
        self.idle_since = -math.inf
        self.probed = -math.inf
        """When it last gave a sign of life to its host."""
        self.probing = False
        self.fileno: int | None = None
        # A manager that leaves a question to its default is not asked: None.
        self.is_alive: Callable[[T], bool] | None = None
        self.needs_reset: Callable[[T], bool] | None = None
        self.can_be_checked = False
        self._owner = owner
        self._manager = manager
        self._options = options
        # Only the supervisor ends a worker: a client that is being cancelled still needs it. And it
        # may do so before the host has begun.
        self._life = trio.CancelScope(shield=True)
        self._activity = trio.CancelScope()
        self._job: Callable[[], Awaitable[None]] | None = None
        self._bell = ParkingLot()

    # -- What the supervisor asks of the host ------------------------------------------------------

    def clean(self) -> None:
        """Have the worker made ready for its next client."""
        self._job = self._clean
        self._bell.unpark()

    def probe(self) -> None:
        """Have the worker asked for a sign of life."""
        self.probing = True
        self._job = self._probe
        self._bell.unpark()

    def leave(self, opened: bool) -> None:
        """Have the worker closed, or give up opening it (its `place` is LEAVING)."""
        if opened:
            self._activity.cancel()
            self._bell.unpark()
        else:
            self._life.cancel()

    # -- The host ----------------------------------------------------------------------------------

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
        self._life.deadline = begun + options.start_timeout
        close_timeout.set(options.close_timeout)
        try:
            with self._life:
                async with self._manager.lifespan() as self.obj:
                    try:
                        await call(options.hooks.on_create, self.obj)
                        await checkpoint_if_cancelled()  # too late is too late
                        self._learn_manners()
                        if self.place is Place.STARTING:
                            self._life.deadline = math.inf
                            self.opened_in = self.opened_at - begun
                            opened = True
                            owner.started(self)
                            await self._work()
                    except Exception as error:
                        failure = error  # closing may take too long, and hide it
                        raise
                    finally:
                        if opened:
                            owner.left(self)
                        self._life.deadline = trio.current_time() + options.close_timeout
        except Exception as error:
            failure = unwrapped(error)
        if opened:
            if self._life.cancelled_caught:
                failure = trio.TooSlowError(f"not closed within {options.close_timeout} s")
            await self._call_quietly("on_destroy", options.close_timeout, self.condemned)
        elif self.place is Place.STARTING:
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
            await job()

    async def _clean(self) -> None:
        hooks = self._options.hooks
        if hooks.on_checkin is not None and not await self._attempt(
            "hook_failed", lambda: call(hooks.on_checkin, self.obj)
        ):
            return
        # Asked only now: the hook may have left something to clean.
        if self.needs_reset is not None and not await self._attempt("reset_failed", self._reset):
            return
        self._owner.ready(self)
        await self._call_quietly("after_release", self._options.reset_timeout)

    async def _reset(self) -> None:
        if self.needs_reset is not None and self.needs_reset(self.obj):
            await self._manager.reset(self.obj)

    async def _probe(self) -> None:
        if await self._attempt("check_failed", lambda: self._manager.check(self.obj)):
            self.probed = trio.current_time()
            self._owner.ready(self)

    async def _attempt(self, reason: Reason, job: Callable[[], Awaitable[None]]) -> bool:
        """Do something to the worker within `reset_timeout`; failing that, it has to leave."""
        timeout = self._options.reset_timeout
        self._activity = trio.CancelScope(deadline=trio.current_time() + timeout)
        if self.place is Place.LEAVING:
            self._activity.cancel()
        try:
            with self._activity:
                await job()
                return True
            raise trio.TooSlowError(f"not done within {timeout} s")
        except Exception as error:
            self._owner.host_work_failed(self, reason, error)
        return False

    async def _call_quietly(self, hook: str, timeout: float, *arguments: object) -> None:
        """Call a hook that can't change anything any more."""
        self._activity = trio.CancelScope(deadline=trio.current_time() + timeout)
        try:
            with self._activity:
                await call(getattr(self._options.hooks, hook), *arguments)
        except Exception as error:
            self._owner.hook_failed(hook, error)

    def _learn_manners(self) -> None:
        """Look up, once, what there is to ask when the worker changes hands."""
        manager = self._manager = manager_of(self.obj, self._manager)
        kind = type(manager)
        if kind.is_alive is not WorkerManager.is_alive:
            self.is_alive = manager.is_alive
        if kind.needs_reset is not WorkerManager.needs_reset:
            self.needs_reset = manager.needs_reset
        self.can_be_checked = kind.check is not WorkerManager.check
        fileno = self.fileno = manager.fileno(self.obj)
        if not (fileno is None or isinstance(fileno, int)):
            raise TypeError(f"fileno must return an int or None, not {fileno!r}")
        self.opened_at = self.probed = now = trio.current_time()
        self.expires = now + self._options.max_lifetime * self.jitter
