"""What clients hold: the session, and the receipt for one checked-out worker."""

from __future__ import annotations

import math
import os
import tracemalloc
import warnings
from contextlib import AbstractAsyncContextManager
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, TypeVar

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
)

from ._errors import NotCheckedOut, PoolClosed, PoolFull
from ._hooks import call, call_now
from ._options import check_seconds
from ._scheduling import NOOP, NoopAwaitable, TimeSlice
from ._statistics import PoolStatistics
from ._supervisor import LOOK_AGAIN_AFTER, Supervisor
from ._worker import Place, Worker

T = TypeVar("T")

BUSY_TIME = 0.001
"""Seconds for which tasks that always find an idle worker may keep the event loop to themselves."""

_PACKAGE = os.path.join(os.path.dirname(__file__), "")


class Resource(Generic[T]):
    """The receipt for one checked-out worker. Give it back with `Session.checkin`."""

    __slots__ = ("__weakref__", "_session", "_worker")

    def __init__(self, session: Session[T], worker: Worker[T]) -> None:
        self._session = session
        self._worker: Worker[T] | None = worker

    def get(self) -> T:
        """Return the worker itself. Raises `NotCheckedOut` once the resource has been returned."""
        if self._worker is None:
            raise NotCheckedOut("the resource has been returned: it has no worker any more")
        return self._worker.obj

    def __repr__(self) -> str:
        state = "returned" if self._worker is None else "checked out"
        return f"<whitepool.Resource of {self._session.name}, {state}>"

    def __del__(self) -> None:
        # A forgotten checkin. The garbage collector may run this in any thread, in the middle of
        # anything: it only leaves a note for the pool's own thread.
        if self._worker is not None:
            self._session._leaked(self, self._worker)


class Session(Generic[T]):
    """A pool, as its clients see it. One session serves all tasks of one `trio.run`.

    Every asynchronous method is a cancellation point, and a cancelled one leaves no trace: either the
    caller has the resource, or the pool has the worker. Each lets other tasks run, but checkouts that
    find an idle worker do so only once a millisecond: they are followed by work that does. Another
    thread gets in by `trio.from_thread.run`.
    """

    def __init__(self, supervisor: Supervisor[T]) -> None:
        self._supervisor = supervisor
        self._line = supervisor.line
        self._counts = supervisor.counts
        self._now = supervisor.now
        self._before_acquire = supervisor.options.hooks.before_acquire
        self._on_checkout = supervisor.options.hooks.on_checkout
        self._time_slice = TimeSlice(BUSY_TIME)
        self._trio_token = trio.lowlevel.current_trio_token()

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._supervisor.name

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<whitepool.Session of {now.name}: {now.state}, {now.in_use} in use>"

    @enable_ki_protection
    async def block_checkout(self, timeout: float = 5.0) -> Resource[T]:
        """Check out a worker: an idle one, else a new one within the overflow, else by waiting in line.

        The line is first come, first served, and nobody overtakes it. Raises `CheckoutTimeout` after
        `timeout` seconds (`math.inf`: never; 0: unless a worker is idle), `PoolOverloaded` where
        `max_waiting` tasks are in line already, or earlier than that where the line stands (see
        `patience` of `Pool`), and `PoolClosed`.
        """
        check_seconds("timeout", timeout)
        if self._before_acquire is not None:
            await call(self._before_acquire)
        await checkpoint_if_cancelled()
        resource = self._take_idle()
        if resource is not None:
            if perf_counter() > self._time_slice.ends:
                await self._yield_to_others()
        else:
            supervisor = self._supervisor
            if len(self._line.waiters) >= supervisor.options.max_waiting and supervisor.is_full():
                await cancel_shielded_checkpoint()
                raise supervisor.refusal(early=True)
            supervisor.one_is_lacking()
            resource = self._receipt(await self._line.join(timeout))
        if self._on_checkout is not None:
            await self._tell_of_checkout(resource)
        return resource

    @enable_ki_protection
    async def nonblock_checkout(self) -> Resource[T]:
        """Check out a worker without queueing: an idle one, or a new one within the overflow.

        It waits for nobody to return a worker, but for what the pool itself is at: opening one,
        resetting one, or closing one to make room. Raises `PoolFull` where clients hold every worker
        that may exist, `PoolStartError` where a new one could not be started, and `PoolClosed`.
        """
        await call(self._before_acquire)
        await checkpoint_if_cancelled()
        resource = self._take_idle()
        if resource is not None:
            if perf_counter() > self._time_slice.ends:
                await self._yield_to_others()
        else:
            if self._supervisor.is_full():
                await cancel_shielded_checkpoint()
                raise PoolFull(f"{self.name}: clients hold every worker that may exist")
            self._supervisor.one_is_lacking()
            task = trio.lowlevel.current_task()
            self._line.not_queueing.add(task)
            try:
                resource = self._receipt(await self._line.join(math.inf))
            finally:
                self._line.not_queueing.discard(task)
        await self._tell_of_checkout(resource)
        return resource

    @enable_ki_protection
    def checkout_nowait(self) -> Resource[T]:
        """Check out an idle worker, now. Raises `trio.WouldBlock` if none is idle, and `PoolClosed`.

        Raises `TypeError` where a hook of the checkout is async: there is no time for it.
        """
        call_now("before_acquire", self._before_acquire)
        resource = self._take_idle()
        if resource is None:
            raise trio.WouldBlock
        try:
            call_now("on_checkout", self._on_checkout, resource.get())
        except BaseException:
            self.checkin(resource)
            raise
        return resource

    def _take_idle(self) -> Resource[T] | None:
        if self._supervisor.draining:
            raise PoolClosed(f"{self.name} is shutting down, or has shut down")
        while self._line.idle:
            worker = self._line.take()
            if self._now() - worker.idle_since < LOOK_AGAIN_AFTER or self._supervisor.is_fit(worker):
                return self._receipt(worker)
        return None

    async def _yield_to_others(self) -> None:
        """Let other tasks run. It is too late to be cancelled."""
        await cancel_shielded_checkpoint()
        self._time_slice.restart()

    def _receipt(self, worker: Worker[T]) -> Resource[T]:
        self._counts["checkouts"] += 1
        return Resource(self, worker)

    async def _tell_of_checkout(self, resource: Resource[T]) -> None:
        try:
            await call(self._on_checkout, resource.get())
        except BaseException:
            self.checkin(resource)
            raise

    @enable_ki_protection
    def checkin(self, resource: Resource[T]) -> None:
        """Give a worker back.

        It never blocks and does no I/O, so it can't be cancelled and belongs in a ``finally:``.
        A worker that has died is replaced, one that needs it is reset before its next use; both
        happen later, in the worker's host. Raises `NotCheckedOut` for a resource that has been
        returned already, or that is another pool's.
        """
        self._supervisor.take_back(self._redeem(resource))

    @enable_ki_protection
    def destroyed(self, resource: Resource[T]) -> None:
        """Give a worker back as broken: it is closed, and replaced where one is needed.

        Like `checkin`, it never blocks, and raises only `NotCheckedOut`.
        """
        self._supervisor.dismiss(self._redeem(resource), "destroyed")

    def _redeem(self, resource: Resource[T]) -> Worker[T]:
        """Take the worker off a resource: it can be returned once."""
        worker = resource._worker
        if worker is None:
            raise NotCheckedOut("the resource has been returned already")
        if resource._session._supervisor is not self._supervisor:
            raise NotCheckedOut(f"the resource is of {resource._session.name}, not of {self.name}")
        resource._worker = None
        return worker

    def worker(self, timeout: float = 5.0) -> AbstractAsyncContextManager[T]:
        """Check out a worker for the length of an ``async with`` block, and return it whatever happens.

        Entering raises what `block_checkout` raises. Leaving never blocks.
        """
        return _Lease(self, timeout)

    @enable_ki_protection
    async def safe_shutdown(self, timeout: float = math.inf) -> None:
        """Shut the pool down, and return when every worker is closed.

        New checkouts are refused with `PoolClosed`, tasks already in line are still served, and
        workers that are out are waited for, for at most `timeout` seconds (default: without end).
        Then whatever is left is closed at once. It may be called again, also with a shorter timeout,
        also from several tasks. Where it is cancelled, the pool goes on draining.
        """
        check_seconds("timeout", timeout)
        supervisor = self._supervisor
        supervisor.drain()
        with trio.move_on_after(timeout):
            await supervisor.closed.wait()
        if not supervisor.closed.is_set():
            supervisor.close_now()
            await supervisor.closed.wait()

    def statistics(self) -> PoolStatistics:
        """Return how the pool stands, and what it has seen."""
        return self._supervisor.statistics()

    def _leaked(self, resource: Resource[T], worker: Worker[T]) -> None:
        """Reclaim the worker of a resource that is being garbage-collected, in whatever thread."""
        if worker.place is not Place.OUT:
            return  # the pool has closed it already
        try:
            self._trio_token.run_sync_soon(self._supervisor.reclaim, worker, _origin(resource))
        except trio.RunFinishedError:
            return
        # With tracemalloc on, Python shows where `source` was allocated.
        warnings.warn(
            f"{resource!r} was never returned", ResourceWarning, stacklevel=2, source=resource
        )


def _origin(resource: Resource[Any]) -> str:
    """Say where a resource was checked out; tracemalloc knows, while it is tracing."""
    for frame in reversed(tracemalloc.get_object_traceback(resource) or ()):
        if not frame.filename.startswith(_PACKAGE):
            return f"{frame.filename}:{frame.lineno}"
    return "unknown: trace it with python -X tracemalloc=10"


class _Lease(AbstractAsyncContextManager[T]):
    """`Session.worker`. A class, as it costs half of a generator."""

    __slots__ = ("_resource", "_session", "_timeout")

    def __init__(self, session: Session[T], timeout: float) -> None:
        self._session = session
        self._timeout = timeout
        self._resource: Resource[T]

    @enable_ki_protection
    async def __aenter__(self) -> T:
        self._resource = await self._session.block_checkout(self._timeout)
        return self._resource.get()

    @enable_ki_protection
    def __aexit__(  # type: ignore[override]  # a plain function, see `NoopAwaitable`
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> NoopAwaitable:
        self._session.checkin(self._resource)
        return NOOP
