"""The task that owns the workers: it starts, admits, dismisses and replaces them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from . import _housekeeping as housekeeping
from ._backoff import CALM, Backoff
from ._errors import CheckoutTimeout, PoolClosed, PoolOverloaded, PoolStartError
from ._hooks import COUNTED_AS, Reason
from ._line import Line
from ._log import Troubles, log
from ._manager import WorkerManager
from ._options import Options
from ._statistics import COUNTERS, PoolState, PoolStatistics
from ._watch import HangupWatch
from ._worker import Place, Worker

T = TypeVar("T")

TRIAL = 1.0
"""Seconds. A worker that dies sooner has died young."""

LOOK_AGAIN_AFTER = 0.001
"""Seconds. The event loop is that late, at least, in noticing that a peer has hung up."""

REST = 0.05
"""Share of the shortest period for which the housekeeping sleeps at least. What comes due meanwhile
is done together: each look at all workers costs something, however few of them are due."""


class Supervisor(Generic[T]):
    """Owns the workers of one pool.

    It is off the hot path: a clean return, and a checkout that finds an idle worker, touch only the
    line. Workers that become ready for a reason of their own (new, reset, probed) come in through a
    memory channel; so does the news that somebody lacks one.
    """

    def __init__(self, manager: WorkerManager[T], options: Options) -> None:
        self.options = options
        self.name = str(options.name)
        self.line: Line[T] = Line(
            lifo=options.strategy == "lifo",
            patience=options.patience,
            refusal=self.refusal,
            left_unserved=self._one_has_left,
        )
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.draining = False
        self.closed = trio.Event()
        self.now = trio.lowlevel.current_clock().current_time
        self._manager = manager
        self._limit = options.pool_size + options.max_overflow
        # Whether each returned worker passes through its host, because a hook has to run there.
        self._hooks_on_return = (
            options.hooks.on_checkin is not None or options.hooks.after_release is not None
        )
        # Every worker that takes a place: starting, alive, and being closed. A connection that is
        # still being closed is a connection to the server.
        self._workers: set[Worker[T]] = set()
        self._starting = 0
        self._alive = 0
        self._in_host = 0
        # Alive and well, but to be replaced: too old, or idle for too long.
        self._expired: set[Worker[T]] = set()
        self._watch: HangupWatch[Worker[T]] = HangupWatch()
        self._looked = -math.inf
        self._backoff = Backoff()
        self._early_deaths = 0
        self._last_early_death = -math.inf
        self._opened = trio.Event()
        self._final_error: PoolStartError | None = None
        self._troubles = Troubles(self.name)
        self._when_started: list[Callable[[float], None]] = []
        self._news = False
        # Workers that are ready, or None: look around.
        self._inbox, self._outbox = trio.open_memory_channel[Worker[T] | None](math.inf)
        self._nursery: trio.Nursery

    # -- What sessions ask of it. All of it is plain functions: nothing here can be cancelled. --------

    def admit(self, worker: Worker[T], now: float, *, unused: bool = False) -> None:
        """Give a worker that is ready to the longest-waiting task, else to the shelf."""
        if self.line.waiters:
            self.line.serve(worker)
        elif self.draining:
            self.dismiss(worker, "shutdown")
        elif self.options.overflow_ttl == 0 and self._fresh() > self.options.pool_size:
            self.dismiss(worker, "overflow")
        elif unused:
            self.line.put_back(worker)
        else:
            worker.idle_since = now
            self.line.idle.append(worker)

    def take_back(self, worker: Worker[T]) -> None:
        """Receive a worker from a client, whatever its state."""
        now = self.now()
        if now > self._looked + LOOK_AGAIN_AFTER and self._watch.watched:
            self._notice_hangups()
        if worker.condemned is not None and self._has_to_leave(worker):
            return
        try:
            if worker.is_alive is not None and not worker.is_alive(worker.obj):
                self.dismiss(worker, "dead")
            elif self._hooks_on_return or (
                worker.needs_reset is not None and worker.needs_reset(worker.obj)
            ):
                self._to_host(worker)
                worker.clean()
            else:
                self.admit(worker, now)
        except Exception as error:  # a manager's; the client is not to blame
            self._troubles.tell("manager_failed", error=str(error))
            self.dismiss(worker, "dead")

    def dismiss(self, worker: Worker[T], reason: Reason) -> None:
        """Let a worker go. It must be off the shelf; whoever holds it finds out."""
        if worker.place is Place.LEAVING:
            return
        opened = worker.place is not Place.STARTING
        if opened:
            self._alive -= 1
            self._in_host -= worker.place is Place.HOST
            self._expired.discard(worker)
            self._watch.remove(worker.fileno, worker)
            self.counts[COUNTED_AS[reason]] += 1
            if COUNTED_AS[reason] == "lost":
                self._mourn(worker, reason)
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

    def is_fit(self, worker: Worker[T]) -> bool:
        """Look once more at a worker that has lain idle, before it is handed out.

        It is off the shelf already. It may have died without the event loop's noticing yet.
        """
        if self._watch.watched:
            self._notice_hangups()
        if worker.condemned == "hung_up":
            self.dismiss(worker, "hung_up")
            return False
        try:
            alive = worker.is_alive is None or worker.is_alive(worker.obj)
        except Exception as error:
            self._troubles.tell("manager_failed", error=str(error))
            alive = False
        if not alive:
            self.dismiss(worker, "dead")
        return alive

    def is_full(self) -> bool:
        """Say whether one more task in line would have to wait for a client to return a worker."""
        return len(self.line.waiters) >= self._limit - self._in_use()

    def one_is_lacking(self) -> None:
        """Have a worker started for a task that is about to join the line, where there is room."""
        if len(self._workers) < self._limit:
            self.look_around()

    def refusal(self, *, early: bool) -> CheckoutTimeout:
        """Make the error for a task that is sent away, while it is still known how things stood."""
        self.counts["overloads" if early else "timeouts"] += 1
        now = self.statistics()
        what = "is overloaded" if early else "has had no worker in time"
        error = (PoolOverloaded if early else CheckoutTimeout)(
            f"{self.name} {what}: {now.in_use} in use, {now.starting} starting, "
            f"{now.resetting} resetting, {now.waiting} waiting"
        )
        error.__cause__ = self._backoff.last_error
        return error

    def look_around(self) -> None:
        """Have the supervisor see what is missing, in its own task."""
        if not self._news:
            self._news = True
            self._inbox.send_nowait(None)

    @enable_ki_protection
    def drain(self) -> None:
        """Refuse new checkouts, serve the line, close every worker that nobody needs any more."""
        self.draining = True
        while self.line.idle:
            self.dismiss(self.line.idle.popleft(), "shutdown")
        self.look_around()

    @enable_ki_protection
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
            in_use=self._in_use(),
            overflow=max(0, self._alive + self._starting - self.options.pool_size),
            starting=self._starting,
            resetting=self._in_host,
            waiting=len(self.line.waiters),
            longest_wait=self.line.longest_wait(self.now()),
            **self.counts,
        )

    def _in_use(self) -> int:
        return self._alive - len(self.line.idle) - self._in_host

    def tell_of_starts(self, tell: Callable[[float], None]) -> None:
        """Tell how many seconds each worker took to open: those that are open, and those to come."""
        for worker in self._workers:
            if worker.place in (Place.HOST, Place.OUT):
                tell(worker.opened_in)
        self._when_started.append(tell)

    # -- What hosts tell it --------------------------------------------------------------------------

    def started(self, worker: Worker[T]) -> None:
        worker.place = Place.HOST
        self._starting -= 1
        self._alive += 1
        self._in_host += 1
        self.counts["started"] += 1
        self._watch.add(worker.fileno, worker)
        if self._backoff.last_error is not None:
            log.warning("start_recovered", pool=self.name, failures=self._backoff.failures)
        self._backoff.succeeded()
        for tell in self._when_started:
            tell(worker.opened_in)

    def start_failed(self, worker: Worker[T], error: Exception, begun: float) -> None:
        worker.place = Place.LEAVING
        self._starting -= 1
        self.counts["start_failures"] += 1
        self._fail_start(error, begun)
        self._troubles.tell("start_failed", error=str(error))
        if isinstance(error, PoolStartError) and not self._opened.is_set():
            self._final_error = error
            self._opened.set()
            self.drain()
        # Those who do not wait for clients, and for whom nothing else is on the way any more.
        on_the_way = self._starting + self._in_host
        for task in list(self.line.waiters) if self.line.not_queueing else ():
            if on_the_way > 0 or task not in self.line.not_queueing:
                on_the_way -= 1
            else:
                refusal = PoolStartError(f"{self.name}: a worker could not be started: {error}")
                refusal.__cause__ = error
                self.line.fail(task, refusal)

    def ready(self, worker: Worker[T]) -> None:
        self._inbox.send_nowait(worker)

    def host_work_failed(self, worker: Worker[T], reason: Reason, error: Exception) -> None:
        if worker.place is not Place.LEAVING:
            if COUNTED_AS[reason] != "lost":
                self._troubles.tell(reason, error=str(error))
            self.dismiss(worker, reason)

    def hook_failed(self, hook: str, error: Exception) -> None:
        self._troubles.tell("hook_failed", hook=hook, error=str(error))

    def left(self, worker: Worker[T]) -> None:
        """The worker is about to be closed; where nobody asked for that, it has died."""
        if worker.place is not Place.LEAVING:
            if worker in self.line.idle:
                self.line.idle.remove(worker)
            self.dismiss(worker, "crashed")

    def gone(self, worker: Worker[T], error: Exception | None) -> None:
        if worker.condemned == "crashed":
            self._troubles.tell("worker_lost", reason="crashed", error=str(error))
        elif worker.condemned is not None and error is not None:
            self._troubles.tell("close_failed", error=str(error))
        self._workers.remove(worker)
        self.look_around()

    # -- Its own tasks -------------------------------------------------------------------------------

    @enable_ki_protection
    async def run(self) -> None:
        """Supervise until the pool has been drained. Only `drain` and `close_now` end it."""
        try:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self.line.keep_time)
                    self._nursery.start_soon(self._keep_watch)
                    self._nursery.start_soon(self._keep_house)
                    try:
                        await self._supervise()
                    finally:
                        # Hosts are shielded: where a crash ends the loop, nobody else ends them.
                        self.close_now()
                    self._nursery.cancel_scope.cancel()
        finally:
            self._watch.close()
            self.closed.set()

    async def _supervise(self) -> None:
        self.look_around()
        async for worker in self._outbox:
            if worker is None:
                self._news = False
            elif worker.place is Place.HOST:
                worker.place = Place.OUT
                self._in_host -= 1
                probed, worker.probing = worker.probing, False
                if worker.condemned is None or not self._has_to_leave(worker):
                    self.admit(worker, self.now(), unused=probed)
            self._retire_expired()
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
            missing = max(missing, options.pool_size - self._fresh() - self._starting)
        room = self._limit - len(self._workers)
        # A server that refused is tried by one at a time, after a pause; then all follow.
        at_once = options.max_starting if self._backoff.last_error is None else 1
        if self.now() < self._backoff.retry_at:
            at_once = 0
        for _ in range(min(missing, room, at_once - self._starting)):
            worker = Worker(self, self._manager, options)
            self._workers.add(worker)
            self._starting += 1
            self._nursery.start_soon(worker.live)
        if options.lazy or self._alive - self._in_host >= options.pool_size:
            self._opened.set()

    def _one_has_left(self) -> None:
        """A task has left the line without a worker: it may have been the last to be served."""
        if self.draining:
            self.look_around()

    def _mourn(self, worker: Worker[T], reason: Reason) -> None:
        """A worker has died. Where they keep dying young, starting them takes pauses, too."""
        if reason != "crashed":  # that is told when it is known why
            self._troubles.tell("worker_lost", reason=reason)
        now = self.now()
        if now < worker.opened_at + TRIAL:
            if now > self._last_early_death + CALM:
                self._early_deaths = 0
            self._last_early_death = now
            self._early_deaths += 1
            # Each of them may have been unlucky once. Beyond that it is their successors that die.
            if self._early_deaths > self._limit:
                error = ConnectionError(f"workers are lost within {TRIAL} s of opening: {reason}")
                self._fail_start(error, worker.opened_at)

    def _fail_start(self, error: Exception, begun: float) -> None:
        self._backoff.failed(error, begun=begun, now=self.now())
        self._nursery.start_soon(self._look_around_at, self._backoff.retry_at)

    @enable_ki_protection
    async def _look_around_at(self, time: float) -> None:
        await trio.sleep_until(time)
        self.look_around()

    @enable_ki_protection
    async def _keep_watch(self) -> None:
        """Replace workers whose peers hang up, before anybody is given them."""
        while True:
            await self._watch.wait()
            self._notice_hangups()

    def _notice_hangups(self) -> None:
        self._looked = self.now()
        for worker in self._watch.hung_up():
            worker.condemned = "hung_up"
            self._expired.discard(worker)
            if worker in self.line.idle:
                self.line.idle.remove(worker)
                self.dismiss(worker, "hung_up")
            # Else its client, or its host, brings it back.

    def _has_to_leave(self, worker: Worker[T]) -> bool:
        """Dismiss a condemned worker that has come back, unless it still has to stand in."""
        assert worker.condemned is not None
        if worker in self._expired and not self._may_retire():
            return False
        self.dismiss(worker, worker.condemned)  # does nothing where it crashed, or was closed
        return True

    @enable_ki_protection
    async def _keep_house(self) -> None:
        """Retire what is too many, too old or too idle, and probe the rest."""
        shortest = housekeeping.shortest_period(self.options)
        while True:
            now = self.now()
            due = self._tidy(now)
            await trio.sleep_until(max(now + REST * shortest, min(due, now + shortest)))

    def _tidy(self, now: float) -> float:
        """Do what is due, and say when something will be due again."""
        options, idle = self.options, self.line.idle
        beyond_size = self._fresh() - options.pool_size
        superfluous, at_surplus = housekeeping.surplus(idle, beyond_size, options, now)
        for worker in superfluous:
            idle.remove(worker)
            self.dismiss(worker, "overflow")
        old, at_old = housekeeping.too_old(self._workers, now)
        for worker in old:
            self._condemn(worker, "lifetime")
        bored, at_bored = housekeeping.too_idle(idle, options, now)
        for worker in bored:
            self._condemn(worker, "idle")
        probing = sum(worker.probing and worker.place is Place.HOST for worker in self._workers)
        unheard_of, at_probe = housekeeping.to_probe(idle, probing, options, now)
        for worker in unheard_of:
            idle.remove(worker)
            self._to_host(worker)
            worker.probe()
        return min(at_surplus, at_old, at_bored, at_probe)

    def _to_host(self, worker: Worker[T]) -> None:
        worker.place = Place.HOST
        self._in_host += 1

    def _fresh(self) -> int:
        """Count the workers that are here to stay."""
        return self._alive - len(self._expired)

    def _condemn(self, worker: Worker[T], reason: Reason) -> None:
        """Have a worker replaced that is alive and well."""
        worker.condemned = reason
        self._expired.add(worker)
        self.look_around()

    def _retire_expired(self) -> None:
        """Let expired workers go that are idle, once there are others in their place."""
        for worker in [worker for worker in self.line.idle if worker in self._expired]:
            if self._may_retire() and worker.condemned is not None:
                self.line.idle.remove(worker)
                self.dismiss(worker, worker.condemned)

    def _may_retire(self) -> bool:
        """Say whether an expired worker may go."""
        options = self.options
        if options.lazy or self._fresh() >= options.pool_size:
            return True
        # Without room for a new one first, an old one must make it: one at a time, and not while the
        # server takes no new ones.
        return self._alive == len(self._workers) >= self._limit and self._backoff.last_error is None
