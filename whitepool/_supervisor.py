"""The task that owns the workers: it starts, admits, dismisses and replaces them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from ._backoff import Backoff
from ._errors import CheckoutTimeout, PoolClosed, PoolStartError
from ._line import Line
from ._log import log
from ._manager import WorkerManager
from ._options import Options
from ._statistics import PoolState, PoolStatistics
from ._worker import Place, Reason, Worker

T = TypeVar("T")

COUNTED_AS: dict[Reason, str] = {
    "overflow": "retired",
    "shutdown": "retired",
    "crashed": "lost",
    "dead": "lost",
    "destroyed": "destroyed",
    "reset_failed": "destroyed",
    "leaked": "leaked",
}


class Supervisor(Generic[T]):
    """Owns the workers of one pool.

    It is off the hot path: a clean return, and a checkout that finds an idle worker, touch only the
    line. Workers that become ready for a reason of their own (new, reset) come in through a memory
    channel; so does the news that somebody lacks one.
    """

    def __init__(self, manager: WorkerManager[T], options: Options) -> None:
        self.options = options
        self.name = str(options.name)
        self.line: Line[T] = Line(lifo=options.strategy == "lifo", timed_out=self._timed_out)
        self.counts: Counter[str] = Counter()
        self.draining = False
        self.closed = trio.Event()
        self._manager = manager
        self._limit = options.pool_size + options.max_overflow
        # Every worker that takes a place: starting, alive, and being closed. A connection that is
        # still being closed is a connection to the server.
        self._workers: set[Worker[T]] = set()
        self._starting = 0
        self._alive = 0
        self._in_host = 0
        self._backoff = Backoff()
        self._opened = trio.Event()
        self._final_error: PoolStartError | None = None
        self._news = False
        # Workers that are ready, or None: look around.
        self._inbox, self._outbox = trio.open_memory_channel[Worker[T] | None](math.inf)
        self._nursery: trio.Nursery

    # -- What others ask of it. All of it is plain functions: nothing here can be cancelled. ---------

    def admit(self, worker: Worker[T]) -> None:
        """Give a worker that is ready to the longest-waiting task, else to the shelf."""
        if self.line.waiters:
            self.line.serve(worker)
        elif self.draining:
            self.dismiss(worker, "shutdown")
        elif self.options.overflow_ttl == 0 and self._alive > self.options.pool_size:
            self.dismiss(worker, "overflow")
        else:
            worker.idle_since = trio.current_time()
            self.line.idle.append(worker)

    def take_back(self, worker: Worker[T]) -> None:
        """Receive a worker from a client, whatever its state."""
        if worker.condemned is not None:
            return  # it crashed, or the pool closed it, while it was out
        try:
            if worker.is_alive is not None and not worker.is_alive(worker.obj):
                self.dismiss(worker, "dead")
            elif worker.needs_reset is not None and worker.needs_reset(worker.obj):
                worker.place = Place.HOST
                self._in_host += 1
                worker.reset()
            else:
                self.admit(worker)
        except Exception as error:  # a manager's; the client is not to blame
            log.error("manager_failed", pool=self.name, error=str(error))
            self.dismiss(worker, "dead")

    def dismiss(self, worker: Worker[T], reason: Reason) -> None:
        """Let a worker go. It must be off the shelf; whoever holds it finds out."""
        if worker.place is Place.LEAVING:
            return
        opened = worker.place is not Place.STARTING
        if opened:
            self._alive -= 1
            self._in_host -= worker.place is Place.HOST
            self.counts[COUNTED_AS[reason]] += 1
        else:
            self._starting -= 1
        worker.place = Place.LEAVING
        worker.condemned = reason
        worker.leave(opened)
        self.look_around()

    def reclaim(self, worker: Worker[T], checked_out_at: str) -> None:
        """Take back a worker whose client forgot it."""
        if worker.place is Place.OUT:
            log.warning("worker_leaked", pool=self.name, checked_out_at=checked_out_at)
            self.dismiss(worker, "leaked")

    def may_start_one(self) -> bool:
        """Say whether one more waiter could get a worker of its own, now or once it is open."""
        return len(self.line.waiters) < self._starting + self._limit - len(self._workers)

    def one_is_lacking(self) -> None:
        """Have a worker started for a task that is about to join the line, where there is room."""
        if len(self._workers) < self._limit:
            self.look_around()

    def look_around(self) -> None:
        """Have the supervisor see what is missing, in its own task."""
        if not self._news:
            self._news = True
            self._inbox.send_nowait(None)

    def drain(self) -> None:
        """Refuse new checkouts, serve the line, close every worker that nobody needs any more."""
        self.draining = True
        while self.line.idle:
            self.dismiss(self.line.idle.popleft(), "shutdown")
        self.look_around()

    def close_now(self) -> None:
        """Close every worker, also those that are out."""
        self.drain()
        for task in list(self.line.waiters):
            self.line.fail(task, PoolClosed(f"{self.name} was shut down"))
        for worker in list(self._workers):
            self.dismiss(worker, "shutdown")

    async def wait_open(self) -> None:
        """Return when all `pool_size` workers have been started; `PoolStartError`."""
        options = self.options
        with trio.move_on_after(options.start_timeout):
            await self._opened.wait()
        if self._final_error is not None:
            raise self._final_error
        if not self._opened.is_set():
            raise PoolStartError(
                f"{self.name}: {self._alive} of {options.pool_size} workers started "
                f"within {options.start_timeout} s"
            ) from self._backoff.last_error

    def statistics(self) -> PoolStatistics:
        idle = len(self.line.idle)
        state: PoolState
        if self.closed.is_set():
            state = "closed"
        elif self.draining:
            state = "draining"
        elif idle:
            state = "ready"
        else:
            state = "overflow" if len(self._workers) < self._limit else "full"
        return PoolStatistics(
            name=self.name,
            state=state,
            pool_size=self.options.pool_size,
            max_overflow=self.options.max_overflow,
            idle=idle,
            in_use=self._alive - idle - self._in_host,
            overflow=max(0, self._alive + self._starting - self.options.pool_size),
            starting=self._starting,
            resetting=self._in_host,
            waiting=len(self.line.waiters),
            checkouts=self.counts["checkouts"],
            timeouts=self.counts["timeouts"],
            overloads=self.counts["overloads"],
            started=self.counts["started"],
            start_failures=self.counts["start_failures"],
            retired=self.counts["retired"],
            lost=self.counts["lost"],
            destroyed=self.counts["destroyed"],
            leaked=self.counts["leaked"],
        )

    # -- What hosts tell it -------------------------------------------------------------------------

    def started(self, worker: Worker[T]) -> None:
        worker.place = Place.HOST
        self._starting -= 1
        self._alive += 1
        self._in_host += 1
        self.counts["started"] += 1
        self._backoff.succeeded()

    def start_failed(self, worker: Worker[T], error: Exception, begun: float) -> None:
        worker.place = Place.LEAVING
        self._starting -= 1
        self.counts["start_failures"] += 1
        self._backoff.failed(error, begun=begun, now=trio.current_time())
        log.warning("start_failed", pool=self.name, error=str(error))
        if isinstance(error, PoolStartError) and not self._opened.is_set():
            self._final_error = error
            self._opened.set()
        for task in self.line.not_queueing.intersection(self.line.waiters):
            refusal = PoolStartError(f"{self.name}: a worker could not be started: {error}")
            refusal.__cause__ = error
            self.line.fail(task, refusal)
        self._nursery.start_soon(self._look_around_at, self._backoff.retry_at)

    def ready(self, worker: Worker[T]) -> None:
        self._inbox.send_nowait(worker)

    def host_work_failed(self, worker: Worker[T], error: Exception) -> None:
        if worker.place is not Place.LEAVING:
            log.warning("reset_failed", pool=self.name, error=str(error))
            self.dismiss(worker, "reset_failed")

    def left(self, worker: Worker[T]) -> None:
        """The worker is about to be closed; where nobody asked for that, it has died."""
        if worker.place is not Place.LEAVING:
            if worker in self.line.idle:
                self.line.idle.remove(worker)
            self.dismiss(worker, "crashed")

    def gone(self, worker: Worker[T], error: Exception | None) -> None:
        if worker.condemned == "crashed":
            log.warning("worker_lost", pool=self.name, reason="crashed", error=str(error))
        elif worker.condemned is not None and error is not None:
            log.warning("close_failed", pool=self.name, error=str(error))
        self._workers.remove(worker)
        self.look_around()

    # -- Its own task -------------------------------------------------------------------------------

    @enable_ki_protection
    async def run(self) -> None:
        """Supervise until the pool has been drained. Only `drain` and `close_now` end it."""
        try:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self.line.keep_time)
                    if self.options.overflow_ttl > 0:
                        self._nursery.start_soon(self._dismiss_overflow)
                    try:
                        await self._supervise()
                    finally:
                        # Hosts are shielded: where a crash ends the loop, nobody else ends them.
                        self.close_now()
                    self._nursery.cancel_scope.cancel()
        finally:
            self.closed.set()

    async def _supervise(self) -> None:
        self.look_around()
        async for worker in self._outbox:
            if worker is None:
                self._news = False
            elif worker.place is Place.HOST:
                worker.place = Place.OUT
                self._in_host -= 1
                self.admit(worker)
            self._balance()
            if self.draining and not self._workers and not self.line.waiters:
                break

    def _balance(self) -> None:
        """Start what is missing: workers that the line waits for, and those that make up the pool."""
        options, waiting = self.options, len(self.line.waiters)
        missing = waiting - self._starting
        if self.draining:
            for worker in [w for w in self._workers if w.place is Place.STARTING][waiting:]:
                self.dismiss(worker, "shutdown")
        elif not options.lazy:
            missing = max(missing, options.pool_size - self._alive - self._starting)
        room = self._limit - len(self._workers)
        # A server that refused is tried by one at a time, after a pause; then all follow.
        at_once = options.max_starting if self._backoff.last_error is None else 1
        if trio.current_time() < self._backoff.retry_at:
            at_once = 0
        for _ in range(min(missing, room, at_once - self._starting)):
            worker = Worker(self, self._manager, options)
            self._workers.add(worker)
            self._starting += 1
            self._nursery.start_soon(worker.live)
        if self._alive - self._in_host >= options.pool_size or options.lazy:
            self._opened.set()

    async def _look_around_at(self, time: float) -> None:
        await trio.sleep_until(time)
        self.look_around()

    async def _dismiss_overflow(self) -> None:
        """Let idle workers beyond `pool_size` go once nobody has wanted them for `overflow_ttl`."""
        ttl, idle = self.options.overflow_ttl, self.line.idle
        while True:
            now = trio.current_time()
            while idle and self._alive > self.options.pool_size and idle[0].idle_since + ttl <= now:
                self.dismiss(idle.popleft(), "overflow")
            # Whatever is put on the shelf from now on can't be due before this sleep ends.
            oldest = idle[0].idle_since if idle and self._alive > self.options.pool_size else now
            await trio.sleep_until(oldest + ttl)

    def _timed_out(self) -> CheckoutTimeout:
        """Make the error for a waiter whose time is up, while it is still known how things stood."""
        self.counts["timeouts"] += 1
        now = self.statistics()
        error = CheckoutTimeout(
            f"no worker of {self.name} came free in time: {now.in_use} in use, "
            f"{now.starting} starting, {now.resetting} resetting, {now.waiting} waiting"
        )
        error.__cause__ = self._backoff.last_error
        return error
