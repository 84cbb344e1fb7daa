"""The task in which one worker lives, from before it is opened until it has been closed.

Everything that takes time happens to a worker in this task: opening, resetting, probing, closing. So
whatever the worker opened (a nursery, a cancel scope) is left in the task that entered it, as Trio
demands, and a crash of its background tasks arrives here, like an exit signal in Erlang.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

import trio
from trio.lowlevel import (
    Abort,
    Task,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from ._entry import Entry, Reason, State
from ._errors import PoolStartError, unwrapped
from ._hooks import call, takes_last_words
from ._manager import WorkerManager, manager_of, on_discarded
from ._options import Options

T = TypeVar("T")


class Owner(Protocol[T]):
    """What a worker task asks, and what it reports, in the order in which it may happen."""

    @property
    def is_doubtful(self) -> bool:
        """Whether a new worker has to give a sign of life before it counts as open."""

    def on_opened(self, entry: Entry[T]) -> None:
        """The worker is open, and serviced until `on_ready`."""

    def on_open_failed(self, entry: Entry[T], error: Exception, begun: float) -> None:
        """The worker could not be opened; that had begun at the time `begun`."""

    def on_ready(self, entry: Entry[T]) -> None:
        """The worker may be handed out: it is new, has been reset, or has answered a probe."""

    def on_service_failed(self, entry: Entry[T], reason: Reason, error: Exception) -> None:
        """The worker could not be reset, or does not answer. It has to leave."""

    def on_discarded(self, entry: Entry[T]) -> None:
        """A reset has thrown away what the client of the worker had written."""

    def on_hook_failed(self, hook: str, error: Exception) -> None:
        """A hook has failed whose failure changes nothing."""

    def on_closing(self, entry: Entry[T]) -> None:
        """The worker is about to be closed. Where its state is not CLOSING yet, it has crashed."""

    def on_closed(self, entry: Entry[T], error: Exception | None) -> None:
        """The worker has been closed, or has never been opened. `error` is what went wrong last."""


class WorkerTask(Generic[T]):
    """Runs one worker. The owner tells it what to do, and it reports to the owner.

    Three methods tell it what to do; they return at once, and the task does it: `reset`, `probe`, and
    `close`. The first two need an entry whose state is SERVICING, the last one whose state is CLOSING.
    """

    __slots__ = (
        "_activity",
        "_entry",
        "_job",
        "_life",
        "_manager",
        "_options",
        "_owner",
        "_sleeper",
    )

    def __init__(
        self, entry: Entry[T], owner: Owner[T], manager: WorkerManager[T], options: Options
    ) -> None:
        self._entry = entry
        self._owner = owner
        self._manager = manager
        self._options = options
        # Only the owner ends a worker: a client that is being cancelled may still need it. The owner
        # may do so before the task has begun.
        self._life = trio.CancelScope(shield=True)
        # A worker sleeps for most of its life, so what it needs only in between is made then.
        self._activity: trio.CancelScope | None = None
        self._job: Callable[[], Awaitable[None]] | None = None
        self._sleeper: Task | None = None  # the task itself, while it waits for something to do

    def reset(self) -> None:
        """Have the worker made ready for its next client: by the hook `on_checkin`, and a reset."""
        self._wake_for(self._reset_with_hooks)

    def probe(self, *, is_suspect: bool = False) -> None:
        """Have the worker asked for a sign of life. One that is suspect may have less time for it."""
        self._wake_for(partial(self._probe, is_suspect))

    def close(self, *, is_open: bool) -> None:
        """Have the worker closed; if it is not open yet, have the opening given up."""
        if is_open:
            if self._activity is not None:
                self._activity.cancel()
            self._wake()
        else:
            self._life.cancel()

    def _wake_for(self, job: Callable[[], Awaitable[None]]) -> None:
        # There is never more than one: a worker gets its next job only when it is ready again.
        self._job = job
        self._wake()

    def _wake(self) -> None:
        if self._sleeper is not None:
            task, self._sleeper = self._sleeper, None
            reschedule(task)

    # A Ctrl-C belongs to the main task, not to the worker task that happens to run.
    @enable_ki_protection
    async def run(self) -> None:
        """Open the worker, do the jobs, close the worker. An error is reported, never raised."""
        entry, options, owner = self._entry, self._options, self._owner
        begun = trio.current_time()
        was_opened = False
        failure: Exception | None = None
        # The one scope around everything bounds first the opening, then nothing, then the closing.
        self._life.deadline = begun + options.start_timeout
        try:
            with self._life:
                await checkpoint_if_cancelled()  # it may have been given up already
                lifespan = self._manager.lifespan()
                if not hasattr(lifespan, "__aenter__"):
                    raise PoolStartError(
                        f"lifespan must return an async context manager, not {type(lifespan).__name__}"
                    )
                async with lifespan as entry.worker:
                    try:
                        await self._manager._on_open(entry.worker)
                        await self._call_on_create()
                        if owner.is_doubtful:
                            await self._check_new()
                        # A worker that was not open within `start_timeout` is a failed start, even if
                        # no checkpoint has noticed the deadline.
                        await checkpoint_if_cancelled()
                        self._bind_callbacks()
                        if entry.state is State.OPENING:
                            self._life.deadline = math.inf
                            entry.opening_time = entry.opened_at - begun
                            was_opened = True
                            owner.on_opened(entry)
                            await self._do_jobs()
                    except Exception as error:
                        # Closing may take longer than its bound, and its error would hide this one.
                        failure = error
                        raise
                    finally:
                        if was_opened:
                            owner.on_closing(entry)
                        self._life.deadline = trio.current_time() + options.close_timeout
        except Exception as error:
            failure = unwrapped(error)
        if was_opened:
            # Nothing but the deadline cancels the life of a worker that has been opened.
            if self._life.cancelled_caught:
                failure = failure or trio.TooSlowError(f"not closed within {options.close_timeout} s")
            await self._call_on_destroy()
        elif entry.state is State.OPENING:
            too_slow = trio.TooSlowError(f"not open within {options.start_timeout} s")
            owner.on_open_failed(entry, failure or too_slow, begun)
        owner.on_closed(entry, failure)

    async def _call_on_create(self) -> None:
        worker, on_create = self._entry.worker, self._options.hooks.on_create
        if on_create is not None:
            await call(on_create, worker)
            manager_of(worker, self._manager)._after_hook(worker, "on_create")

    async def _check_new(self) -> None:
        """Ask a new worker for a sign of life. Raises what `check` raises, or `trio.TooSlowError`."""
        worker, timeout = self._entry.worker, self._options.reset_timeout
        with trio.move_on_after(timeout) as scope:
            await manager_of(worker, self._manager).check(worker)
        if scope.cancelled_caught:
            raise trio.TooSlowError(f"opened, but no sign of life within {timeout} s")

    async def _call_on_destroy(self) -> None:
        entry, on_destroy = self._entry, self._options.hooks.on_destroy
        arguments: tuple[object, ...] = (entry.evict_reason,)
        if on_destroy is not None and takes_last_words(on_destroy):
            arguments = (entry.evict_reason, entry.last_words)
        await self._call_quietly("on_destroy", self._options.close_timeout, *arguments)

    def _bind_callbacks(self) -> None:
        """Note in the entry what there is to ask of the worker when it changes hands.

        Only the methods that the manager overrides are called then: a default would cost a call each
        time, and change nothing.
        """
        entry = self._entry
        manager = self._manager = manager_of(entry.worker, self._manager)
        kind = type(manager)
        if kind.is_alive is not WorkerManager.is_alive:
            entry.is_alive = manager.is_alive
        if kind.needs_reset is not WorkerManager.needs_reset:
            entry.needs_reset = manager.needs_reset
        if kind._after_hook is not WorkerManager._after_hook:
            entry.after_hook = manager._after_hook
        if kind._last_words is not WorkerManager._last_words:
            entry.last_words_of = manager._last_words
        entry.can_be_checked = kind.check is not WorkerManager.check
        fileno = entry.fileno = manager.fileno(entry.worker)
        if not (fileno is None or isinstance(fileno, int)):
            raise TypeError(f"fileno must return an int or None, not {fileno!r}")
        entry.opened_at = entry.probed_at = trio.current_time()

    # -- Jobs ----------------------------------------------------------------------------------------

    async def _do_jobs(self) -> None:
        """Do what the owner asks for, until the worker has to be closed."""
        self._owner.on_ready(self._entry)
        while self._entry.state is not State.CLOSING:
            if self._job is None:
                self._sleeper = current_task()
                await wait_task_rescheduled(self._on_cancelled)
                continue
            job, self._job = self._job, None
            await job()

    def _on_cancelled(self, _: object) -> Abort:
        self._sleeper = None
        return Abort.SUCCEEDED

    async def _reset_with_hooks(self) -> None:
        """Make a returned worker ready: the hook `on_checkin`, a reset if it is needed, and the hook
        `after_release` when it may be used again."""
        discarding = on_discarded.set(partial(self._owner.on_discarded, self._entry))
        is_ready = await self._make_ready()
        on_discarded.reset(discarding)
        if is_ready:
            self._owner.on_ready(self._entry)
            await self._call_quietly("after_release", self._options.reset_timeout)

    async def _make_ready(self) -> bool:
        """Do what has to be done before the worker may be used again, and say whether it succeeded."""
        if self._options.hooks.on_checkin is not None and not (
            await self._attempt("reset_failed", self._prepare_for_on_checkin)
            and await self._attempt("hook_failed", self._call_on_checkin)
        ):
            return False
        return self._entry.needs_reset is None or await self._attempt(
            "reset_failed", self._reset_where_needed
        )

    async def _prepare_for_on_checkin(self) -> None:
        await self._manager._before_on_checkin(self._entry.worker)

    async def _call_on_checkin(self) -> None:
        await call(self._options.hooks.on_checkin, self._entry.worker)
        self._manager._after_hook(self._entry.worker, "on_checkin")

    async def _reset_where_needed(self) -> None:
        # Asked after the hook, because the hook may have left something to reset.
        needs_reset, worker = self._entry.needs_reset, self._entry.worker
        if needs_reset is not None and needs_reset(worker):
            await self._manager.reset(worker)

    async def _probe(self, is_suspect: bool) -> None:
        within = self._manager._suspect_timeout if is_suspect else math.inf
        check = partial(self._manager.check, self._entry.worker)
        if await self._attempt("check_failed", check, within=within):
            self._entry.probed_at = trio.current_time()
            self._owner.on_ready(self._entry)

    async def _attempt(
        self, reason: Reason, job: Callable[[], Awaitable[None]], *, within: float = math.inf
    ) -> bool:
        """Do something to the worker within `reset_timeout`, and say whether it succeeded.

        Where it did not, the worker has to leave for that reason. `within` is for a shorter time.
        """
        timeout = min(within, self._options.reset_timeout)
        activity = self._activity_within(timeout)
        if self._entry.state is State.CLOSING:
            activity.cancel()
        try:
            with activity:
                await job()
                return True
            raise trio.TooSlowError(f"not done within {timeout} s")
        except Exception as error:
            self._owner.on_service_failed(self._entry, reason, error)
        finally:
            self._activity = None
        return False

    async def _call_quietly(self, hook: str, timeout: float, *arguments: object) -> None:
        """Call a hook, within so many seconds, whose failure changes nothing."""
        function = getattr(self._options.hooks, hook)
        if function is None:
            return
        try:
            with self._activity_within(timeout):
                await call(function, *arguments)
        except Exception as error:
            self._owner.on_hook_failed(hook, error)
        finally:
            self._activity = None

    def _activity_within(self, timeout: float) -> trio.CancelScope:
        """Make the scope of what the task is about to do, which `close` cancels."""
        self._activity = scope = trio.CancelScope(deadline=trio.current_time() + timeout)
        return scope
