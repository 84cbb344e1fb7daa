"""What clients hold: the session, and the receipt for one checked-out worker."""

from __future__ import annotations

import inspect
import math
import os
import tracemalloc
import warnings
from collections.abc import Awaitable, Callable, Sized
from contextlib import AbstractAsyncContextManager
from threading import get_ident
from types import TracebackType
from typing import Any, Generic, TypeVar

import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    wait_task_rescheduled,
)

from . import _overload as overload
from ._checks import OnlyAsyncWith, check_seconds
from ._entry import HANDED_OVER, Entry, State
from ._errors import NotCheckedOut, PoolClosed, PoolFull, WorkerLost, describe
from ._hooks import call, call_now
from ._nesting import Holder
from ._options import check_size
from ._scheduling import NOOP, NoopAwaitable, TimeSlice
from ._statistics import PoolStatistics
from ._supervisor import ALIVE_BYPASS_WINDOW, Supervisor

T = TypeVar("T")

BUSY_TIME = 0.001
"""Seconds for which a task that always finds an idle worker may keep the event loop to itself."""

BUSY_TIME_OF_TESTS = -1.0
"""The same with another clock than Trio's own, which may stand still: each checkout lets others run."""

_PACKAGE = os.path.join(os.path.dirname(__file__), "")


class Resource(Holder[T]):
    """The receipt for one checked-out worker. Give it back with `Session.checkin`."""

    __slots__ = ("__weakref__", "_entry", "_session")

    def __init__(self, session: Session[T], entry: Entry[T]) -> None:
        self._session = session
        self._entry: Entry[T] | None = entry

    def _held(self) -> Entry[T] | None:
        return self._entry

    def get(self) -> T:
        """Return the worker itself.

        Raises `NotCheckedOut` once the resource has been returned, and `WorkerLost` if the worker has
        crashed meanwhile, or was reclaimed because the task that checked it out has ended.
        """
        entry = self._checked_out()
        if entry.evict_reason is not None:
            _check_not_lost(entry)
        return entry.worker

    def hand_over(self) -> None:
        """Say that another task has the resource from now on.

        It matters only to a pool with `held_warning`, which would reclaim the worker when the task that
        checked it out has ended. Raises `NotCheckedOut` once the resource has been returned.
        """
        self._checked_out().client = HANDED_OVER

    @property
    def lost(self) -> trio.Event:
        """An event that is set when the worker crashes, or the pool closes it, while it is checked out.

        Wait for it beside an answer that a dead worker would never give. After a crash, `get` says why.
        Raises `NotCheckedOut` once the resource has been returned.
        """
        entry = self._checked_out()
        if entry.lost is None:
            entry.lost = trio.Event()
            if entry.state is State.CLOSING:
                entry.lost.set()
        return entry.lost

    def _checked_out(self) -> Entry[T]:
        if self._entry is None:
            raise NotCheckedOut("the resource has been returned: it has no worker any more")
        return self._entry

    def __repr__(self) -> str:
        state = "returned" if self._entry is None else "checked out"
        return f"<whitepool.Resource of {self._session.name}, {state}>"

    def __del__(self) -> None:
        # A forgotten checkin. The garbage collector may run this in any thread, in the middle of
        # anything: it only leaves a note for the pool's own thread.
        if self._entry is not None:
            self._session._on_leak(self, self._entry)


class Session(Generic[T]):
    """A pool, as its clients see it. One session serves all tasks of one `trio.run`.

    Every asynchronous method is a cancellation point, and a cancelled one leaves no trace: either the
    caller has the resource, or the pool has the worker. Each lets other tasks run, but a checkout that
    finds an idle worker does so only if one task makes many, and then once a millisecond: the work that
    follows a checkout lets others run anyway.
    From another thread, call it by `trio.from_thread.run`.
    """

    # Sleep in the wait queue until there is a worker, or an error.
    _wait: Callable[[Callable[[RaiseCancelT], Abort]], Awaitable[Entry[T]]] = staticmethod(
        wait_task_rescheduled
    )

    def __init__(self, supervisor: Supervisor[T]) -> None:
        self._supervisor = supervisor
        self._roster = supervisor.roster
        self._queue = supervisor.queue
        # Those that may be handed out without asking them first.
        self._ready: Sized = () if supervisor.probes_first else supervisor.roster.idle
        self._counters = supervisor.counters
        self._now = supervisor.now
        self._before_acquire = supervisor.options.hooks.before_acquire
        self._on_checkout = supervisor.options.hooks.on_checkout
        self._checkout_timeout = supervisor.options.checkout_timeout
        self._max_waiting = supervisor.options.max_waiting
        self._is_real_time = type(trio.lowlevel.current_clock()).__name__ == "SystemClock"
        busy_time = BUSY_TIME if self._is_real_time else BUSY_TIME_OF_TESTS
        self._time_slice = TimeSlice(busy_time, self._now)
        self._last_task = 0  # a number, not the task: that would be kept from being collected
        self._thread = get_ident()
        self._trio_token = trio.lowlevel.current_trio_token()

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._supervisor.name

    def __repr__(self) -> str:
        now = self._supervisor.statistics()  # a debugger may ask from any thread
        return f"<whitepool.Session of {now.name}: {now.state}, {now.in_use} in use>"

    @enable_ki_protection
    async def block_checkout(self, timeout: float | None = None) -> Resource[T]:
        """Check out a worker: an idle one, else a new one within the overflow, else by waiting.

        The wait queue is first come, first served, and no newcomer overtakes a waiter. Raises
        `CheckoutTimeout` after `timeout` seconds (`math.inf`: never; 0: unless a worker is idle; None:
        the pool's `checkout_timeout`),
        `PoolOverloaded` if `max_waiting` tasks wait already, or earlier than `timeout` if the queue
        grows (see `patience` of `Pool`), and `PoolClosed`.
        """
        if get_ident() != self._thread:
            raise self._in_another_thread()
        if timeout is None:
            timeout = self._checkout_timeout
        elif timeout.__class__ is not float or not timeout > 0:  # the usual case costs no call
            check_seconds("timeout", timeout)
        if self._before_acquire is not None:
            await call(self._before_acquire)
        # A task that has to wait is cancelled there.
        if self._ready or self._supervisor.draining:
            await checkpoint_if_cancelled()
        entry = self._take_idle()
        if entry is not None:
            resource = self._hand_out(entry, entry.in_use_since)
            if entry.in_use_since > self._time_slice.ends and self._has_kept_the_loop():
                await self._yield_to_others()
        else:
            supervisor = self._supervisor
            if self._max_waiting != math.inf and overload.is_queue_full(
                self._queue.waiting, self._max_waiting, supervisor.standing.obtainable()
            ):
                await checkpoint()
                raise supervisor.standing.count_overload()
            if supervisor.starter.down_since is not None and supervisor.is_unavailable(timeout):
                await checkpoint()
                raise supervisor.standing.count_unavailable()
            supervisor.request_worker()
            waiter = self._queue.join(timeout)
            entry = await self._wait(waiter.abort)
            resource = self._hand_out(entry, waiter.since)
        if self._on_checkout is not None:
            await self._call_on_checkout(resource, entry)
        return resource

    @enable_ki_protection
    async def nonblock_checkout(self) -> Resource[T]:
        """Check out a worker without queueing: an idle one, or a new one within the overflow.

        It does not wait for a client to return a worker, but for what the pool itself is doing: opening
        one, resetting one, or closing one to make room. Raises `PoolFull` if clients hold every
        worker that may exist, `PoolStartError` if a new one could not be started, and `PoolClosed`.
        """
        if get_ident() != self._thread:
            raise self._in_another_thread()
        await call(self._before_acquire)
        await checkpoint_if_cancelled()
        entry = self._take_idle()
        if entry is not None:
            resource = self._hand_out(entry, entry.in_use_since)
            if entry.in_use_since > self._time_slice.ends and self._has_kept_the_loop():
                await self._yield_to_others()
        else:
            if self._queue.waiting >= self._supervisor.standing.obtainable():
                await cancel_shielded_checkpoint()
                raise PoolFull(f"{self.name}: clients, and tasks that wait, take up every worker")
            self._supervisor.request_worker()
            waiter = self._queue.join(math.inf, blocking=False)
            entry = await self._wait(waiter.abort)
            resource = self._hand_out(entry, waiter.since)
        if self._on_checkout is not None:
            await self._call_on_checkout(resource, entry)
        return resource

    @enable_ki_protection
    def checkout_nowait(self) -> Resource[T]:
        """Check out an idle worker, now. Raises `trio.WouldBlock` if none is idle, and `PoolClosed`.

        There is no time to wait, so it raises `TypeError` if a hook of the checkout is async, and
        `RuntimeError` if each worker has to be probed first (``check_interval=0``).
        """
        if get_ident() != self._thread:
            raise self._in_another_thread()
        call_now("before_acquire", self._before_acquire)
        entry = self._take_idle()
        if entry is None and self._supervisor.probes_first:
            raise RuntimeError("checkout_nowait can't wait for a probe (check_interval is 0)")
        if entry is None:
            raise trio.WouldBlock
        resource = self._hand_out(entry, entry.in_use_since)
        try:
            call_now("on_checkout", self._on_checkout, entry.worker)
            if self._on_checkout is not None and entry.after_hook is not None:
                entry.after_hook(entry.worker, "on_checkout")
        except BaseException:
            self.checkin(resource)
            raise
        return resource

    def _take_idle(self) -> Entry[T] | None:
        """Return an idle worker that is alive, as one in use; None if there is none."""
        while self._ready:
            now = self._now()
            entry = self._roster.take_idle(now)
            if now - entry.idle_since < ALIVE_BYPASS_WINDOW:
                return entry
            if not self._supervisor.evict_if_dead(entry):
                return entry
        # This comes last, as a pool that is draining has no idle workers.
        if self._supervisor.draining:
            raise PoolClosed(f"{self.name} is shutting down, or has shut down")
        return None

    def _has_kept_the_loop(self) -> bool:
        """Say whether this task may have run without a pause since the last checkout.

        If another task made that one, this task has been woken since, and others have had their turn.
        """
        before, self._last_task = self._last_task, id(current_task())
        return before == self._last_task or not self._is_real_time

    async def _yield_to_others(self) -> None:
        """Let other tasks run. It is too late to be cancelled: the caller has a worker."""
        await cancel_shielded_checkpoint()
        self._time_slice.restart()

    def _hand_out(self, entry: Entry[T], since: float) -> Resource[T]:
        """Count a checkout, and make the receipt for it; `since` is when its task began to wait.

        Every checkout comes through here. What may follow is the hook `on_checkout`.
        """
        self._counters["checkouts"] += 1
        return Resource(self, entry)

    async def _call_on_checkout(self, resource: Resource[T], entry: Entry[T]) -> None:
        try:
            await call(self._on_checkout, entry.worker)
            if entry.after_hook is not None:
                entry.after_hook(entry.worker, "on_checkout")
        except BaseException:
            self.checkin(resource)
            raise

    @enable_ki_protection
    def checkin(self, resource: Resource[T]) -> None:
        """Give a worker back.

        It never blocks and does no I/O, so it can't be cancelled and belongs in a ``finally:``.
        A worker that has died is replaced, and one that needs it is reset before its next use. Both
        happen later, in the worker's own task. Raises `NotCheckedOut` for a resource that has been
        returned already, or that belongs to another pool.
        """
        entry = self._redeem(resource)
        if self._supervisor.take_back(entry):
            entry.checked_out_at = _origin(resource)

    @enable_ki_protection
    def destroyed(self, resource: Resource[T]) -> None:
        """Give a worker back as broken: it is closed, and replaced if one is needed.

        Like `checkin`, it never blocks, and raises only `NotCheckedOut`.
        """
        self._supervisor.evict(self._redeem(resource), "destroyed")

    def _redeem(self, resource: Resource[T]) -> Entry[T]:
        """Take the entry off a resource, which can be done once. Every return begins here."""
        if get_ident() != self._thread:
            raise self._in_another_thread()
        try:
            entry = resource._entry
        except AttributeError:
            raise _not_a_resource(resource) from None
        if entry is None:
            raise NotCheckedOut("the resource has been returned already")
        session = resource._session
        if session is not self and session._supervisor is not self._supervisor:
            raise NotCheckedOut(f"the resource is of {session.name}, not of {self.name}")
        resource._entry = None
        return entry

    def _in_another_thread(self) -> RuntimeError:
        """Make the error for a call from outside of the thread in which the pool runs.

        Trio runs one task at a time, so nothing in a pool is locked: a call from another thread, or
        from another `trio.run` there, would corrupt it.
        """
        return RuntimeError(
            f"{self.name} runs in another thread. Call its session by "
            "trio.from_thread.run(session.block_checkout) from there, and so on for async methods; by "
            "trio.from_thread.run_sync(session.checkin, resource) for plain ones"
        )

    def worker(self, timeout: float | None = None) -> AbstractAsyncContextManager[T]:
        """Check out a worker for the length of an ``async with`` block, and return it whatever happens.

        Entering raises what `block_checkout` raises. Leaving never blocks.
        """
        return _Lease(self, timeout)

    @enable_ki_protection
    async def safe_shutdown(self, timeout: float = math.inf) -> None:
        """Shut the pool down, and return when every worker is closed.

        New checkouts are refused with `PoolClosed`, and tasks that wait already are still served.
        Workers that clients hold are waited for, for at most `timeout` seconds (default: without end).
        Then those that are left are closed at once. You may call it again, also with a shorter timeout,
        also from several tasks. If it is cancelled, the pool goes on draining.
        """
        check_seconds("timeout", timeout)
        if get_ident() != self._thread:
            raise self._in_another_thread()
        supervisor = self._supervisor
        supervisor.drain()
        with trio.move_on_after(timeout):
            await supervisor.closed.wait()
        if not supervisor.closed.is_set():
            supervisor.close_now()
            await supervisor.closed.wait()

    @enable_ki_protection
    def retire_all(self, over: float = 0.0) -> None:
        """Have every worker that is open now replaced, without a client noticing.

        A replacement is opened first, where there is room; otherwise workers are replaced one at a
        time. Those in use go when they are returned. With `over` they are called in one by one in the
        course of so many seconds. Returns at once, and does nothing once the pool shuts down.
        """
        check_seconds("over", over)
        if over == math.inf:
            raise ValueError("over must be a finite number of seconds, not inf")
        if get_ident() != self._thread:
            raise self._in_another_thread()
        self._supervisor.retire_all(over)

    @enable_ki_protection
    def resize(self, pool_size: int | None = None, max_overflow: int | None = None) -> None:
        """Change how many workers the pool keeps, or may start beyond those; None changes nothing.

        A larger pool starts workers. In a smaller one, idle workers are retired at once, and those in
        use when they are returned, as far as there are too many. Raises what `Pool` raises for such
        bounds. Returns at once, and does nothing once the pool shuts down.
        """
        roster = self._roster
        if pool_size is None:
            pool_size = roster.pool_size
        if max_overflow is None:
            max_overflow = roster.limit - roster.pool_size
        check_size(pool_size, max_overflow)
        if get_ident() != self._thread:
            raise self._in_another_thread()
        self._supervisor.resize(pool_size, max_overflow)

    def statistics(self) -> PoolStatistics:
        """Return how the pool stands, and what it has counted."""
        if get_ident() != self._thread:
            raise self._in_another_thread()
        return self._supervisor.statistics()

    def _on_leak(self, resource: Resource[T], entry: Entry[T]) -> None:
        """Reclaim the worker of a resource that is being garbage-collected, in any thread."""
        if entry.state is not State.IN_USE:
            return  # the pool has closed it already
        try:
            self._trio_token.run_sync_soon(self._supervisor.reclaim, entry, _origin(resource))
        except trio.RunFinishedError:
            return
        # With tracemalloc on, Python shows where `source` was allocated.
        warnings.warn(
            f"{resource!r} was never returned", ResourceWarning, stacklevel=2, source=resource
        )


def _check_not_lost(entry: Entry[Any]) -> None:
    """Raise `WorkerLost` if a worker has left under its client, in a way that the client must know."""
    if entry.evict_reason == "crashed":
        raise WorkerLost(
            "the worker crashed while it was checked out"
            + (f": {describe(entry.crash)}" if entry.crash else "")
        ) from entry.crash
    if entry.evict_reason == "leaked":
        raise WorkerLost(
            "the pool has reclaimed the worker, because the task that checked it out has ended: "
            "call hand_over() on a resource that another task is to have"
        )


def _not_a_resource(thing: object) -> TypeError:
    """Make the error for something that was returned, and that no checkout has handed out."""
    what = f"not {type(thing).__name__}"
    if inspect.iscoroutine(thing):
        what = f"not a coroutine: write `await` before {thing.__name__}()"
    elif isinstance(thing, _Lease):
        what = "not session.worker(): leaving its block returns the worker"
    return TypeError(f"return the resource that a checkout gave you (a whitepool.Resource), {what}")


def _origin(resource: Resource[Any]) -> str:
    """Say where a resource was checked out. tracemalloc knows, while it is tracing."""
    for frame in reversed(tracemalloc.get_object_traceback(resource) or ()):
        if not frame.filename.startswith(_PACKAGE):
            return f"{frame.filename}:{frame.lineno}"
    return "unknown: trace it with python -X tracemalloc=10"


_ENTERED = "this block has been entered already: call worker() for each block"


class _Lease(AbstractAsyncContextManager[T], OnlyAsyncWith, Holder[T]):
    """`Session.worker`. A class, because a generator would cost twice as much."""

    _usage = "session.worker() as worker"

    def __init__(self, session: Session[T], timeout: float | None) -> None:
        self._session = session
        self._timeout = timeout
        self._resource: Resource[T] | None = None

    def _held(self) -> Entry[T] | None:
        return None if self._resource is None else self._resource._entry

    @enable_ki_protection
    async def __aenter__(self) -> T:
        if self._resource is not None:
            raise RuntimeError(_ENTERED)
        resource = await self._session.block_checkout(self._timeout)
        if self._resource is not None:  # by another task, meanwhile
            self._session.checkin(resource)
            raise RuntimeError(_ENTERED)
        self._resource = resource
        # Not `get`, which raises if the worker has crashed since: then the block would not be entered,
        # and its worker not be returned.
        return resource._checked_out().worker

    @enable_ki_protection
    def __aexit__(  # type: ignore[override]  # a plain function, see `NoopAwaitable`
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> NoopAwaitable:
        resource, self._resource = self._resource, None
        assert resource is not None
        self._session.checkin(resource)
        return NOOP
