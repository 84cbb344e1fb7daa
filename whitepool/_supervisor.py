"""The task that owns the workers: it starts, watches, admits, replaces and drains them."""

from __future__ import annotations

import math
from contextlib import suppress
from contextvars import copy_context
from typing import Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from ._backoff import FAILURE_RESET_AFTER
from ._checking import Checker
from ._entry import REASONS, Departure, Entry, Reason, State
from ._errors import PoolClosed, PoolFull, PoolStartError, describe
from ._hangup import HangupWatch
from ._holding import Holding
from ._log import PoolLog
from ._maintenance import Maintenance
from ._manager import WorkerManager, close_timeout, manager_of, on_misconfigured
from ._operating import Operator
from ._options import Options
from ._roster import IN_USE, Roster
from ._sharing import Sharing
from ._standing import Standing
from ._starting import Starter
from ._statistics import COUNTERS, PoolStatistics
from ._wait_queue import WaitQueue
from ._worker_task import WorkerTask

T = TypeVar("T")

ALIVE_BYPASS_WINDOW = 0.001
"""Seconds. A worker that has been idle for less than this is handed out without being revalidated (the
name and the idea are HikariCP's), and a checkin looks for hang-ups only if the last look is so old."""


class Supervisor(Generic[T]):
    """Owns the workers of one pool.

    It is off the hot path: a clean checkin, and a checkout that finds an idle worker, change the
    roster directly, and wake no task. Workers that become ready for a reason of their own (they are
    new, have been reset, or have answered a probe) come in through a memory channel. A None in it
    means that no worker is ready, only that there may be something to start.
    """

    def __init__(self, manager: WorkerManager[T], options: Options) -> None:
        self.options = options
        self.name = str(options.name)
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.roster: Roster[T] = Roster(self.counters, options)
        self.draining = False
        self.closed = trio.Event()
        self.now = trio.lowlevel.current_clock().current_time
        self._manager = manager
        # That of the worker that was opened last: if there is a bare factory, its workers know theirs.
        self._worker_manager = manager
        # Whether each returned worker passes through its task, because a hook has to run there.
        self._hooks_on_return = (
            options.hooks.on_checkin is not None or options.hooks.after_release is not None
        )
        # Whether a returned worker may be surplus, and then has to go: always with an `overflow_ttl` of
        # 0, else while the pool shrinks, or is to leave a place to others.
        self._seeks_surplus = options.overflow_ttl == 0
        # Whether each idle worker is probed before it is handed out.
        self.probes_first = options.check_interval == 0
        self._hangups: HangupWatch[Entry[T]] = HangupWatch()
        # To ask the kernel costs more than a checkin, so a checkin asks once in ALIVE_BYPASS_WINDOW.
        self._hangups_seen_at = -math.inf
        self._log = PoolLog(self.name)
        # With the variables of the task that opens the pool, as the supervisor's own task has them.
        self._context = copy_context()
        self.sharing = Sharing(
            self.roster,
            waiting=lambda: self.queue.waiting,
            evict=self.evict,
            call_in=self._call_one_in,
            wake=self.wake,
        )
        self.starter = Starter(
            self.roster, options, self.counters, self._log, self.sharing, start_one=self._start_worker
        )
        self.standing = Standing(options, self.counters, self.roster, self.starter)
        self.queue: WaitQueue[Entry[T]] = WaitQueue(
            patience=options.patience,
            make_timeout=self.standing.count_timeout,
            make_overload=self.standing.count_overload,
            on_unserved=self._on_unserved_waiter,
            checkouts=lambda: self.counters["checkouts"],
        )
        self.standing.queue = self.queue
        self.holding = Holding(self.roster, self._log, options.held_warning, evict=self.evict)
        self._maintenance = Maintenance(
            self.roster,
            options,
            evict=self.evict,
            replace=self.wake,
            report_held=self.holding.look,
            share=self.sharing.look,
        )
        self._checker = Checker(
            self.roster, self.queue, evict_if_dead=self.evict_if_dead, wake=self.wake
        )
        self._operator = Operator(
            self.roster,
            self._log,
            evict=self.evict,
            give_up_starts=self._give_up_starts,
            replace=self.wake,
        )
        # The channel of ready workers. It has no bound, because at most one message for each worker,
        # and one None, are in it at a time.
        self._send_ready, self._receive_ready = trio.open_memory_channel[Entry[T] | None](math.inf)
        self._is_woken = False  # whether there is a None in it
        self._misconfigured: set[str] = set()  # what was said of it already
        self._nursery: trio.Nursery

    # -- Workers change hands ------------------------------------------------------------------------
    #
    # Sessions call these. They are plain functions, so nothing can be cancelled in the middle of them.

    def admit(self, entry: Entry[T], now: float) -> None:
        """Give a worker that is ready to the task that has waited for the longest, else make it idle.

        Its state is IN_USE if a client has just returned it, else SERVICING.
        """
        # 1. The pool has been resized, and has too many; or it leaves a place to others.
        if self._seeks_surplus and (self.roster.too_many > 0 or self._leaves_place(entry, now)):
            self.evict(entry, "overflow")
        # 2. A task waits for it.
        elif self.queue.waiting:
            if entry.state is not IN_USE:
                self.roster.move(entry, IN_USE)
            entry.in_use_since = now
            self.queue.serve(entry, now)
        # 3. The pool is shutting down, and has no more use for it.
        elif self.draining:
            self.evict(entry, "shutdown")
        # 4. It is surplus, and does not linger.
        elif self.options.overflow_ttl == 0 and self.roster.lasting > self.roster.pool_size:
            self.evict(entry, "overflow")
        # 5. It becomes idle.
        elif entry.state is IN_USE:
            self.roster.put_idle(entry, now)
        else:
            if entry not in self.roster.probes:
                entry.idle_since = now
            self.roster.move(entry, State.IDLE)

    def take_back(self, entry: Entry[T]) -> bool:
        """Receive a worker from its client: evict it, have it reset, or admit it.

        Its state is IN_USE, or CLOSING if the pool has closed it meanwhile. What the manager raises is
        logged: it is no fault of the client, who gets no error. Returns whether the worker's own task
        has to make it ready first.
        """
        now = self.now()
        if now > self._hangups_seen_at + ALIVE_BYPASS_WINDOW and self._hangups.watched:
            self._notice_hangups()
        # 1. The pool has closed it while its client had it, or its peer has hung up.
        if entry.evict_reason is not None and not entry.is_expiring:
            self._evict_if_due(entry)
            return False
        try:
            is_dead = entry.is_alive is not None and not entry.is_alive(entry.worker)
            needs_service = self._hooks_on_return or (
                not is_dead and entry.needs_reset is not None and entry.needs_reset(entry.worker)
            )
        except Exception as error:
            self._log.throttled_warning("manager_failed", error=describe(error))
            is_dead, needs_service = True, False
        # 2. It has died while its client had it.
        if is_dead:
            self.evict(entry, "dead")
        # 3. There is something to do first, which takes time: in its own task, after this returns. That
        #    goes for one that is to be replaced, too: its client may have to be told of its writes.
        elif needs_service:
            self.roster.move(entry, State.SERVICING)
            entry.task.reset()
            return True
        # 4. It is to be replaced, and may go.
        elif entry.evict_reason is not None and self._evict_if_due(entry):
            pass
        # 5. It is ready for its next client, and no task waits for it: the usual case.
        elif not (self.queue.waiting or self.draining or self._seeks_surplus):
            self.roster.put_idle(entry, now)
        # 6. What becomes of it depends.
        else:
            self.admit(entry, now)
        return False

    def evict(self, entry: Entry[T], reason: Reason, *, is_logged: bool = False) -> None:
        """Have a worker closed, or its opening given up, whatever its state.

        A client that has it keeps its resource, and finds a closed worker. The worker task does the
        closing, and the supervisor replaces the worker if one is needed. Does nothing if it is being
        closed already. The death of a worker is logged, unless it `is_logged` with its error elsewhere.
        """
        if entry.state is State.CLOSING:
            return
        is_open = entry.is_open
        if entry.lost is not None and entry.state is IN_USE:
            entry.lost.set()
        self.roster.mark(entry, reason)
        self.roster.move(entry, State.CLOSING)
        if is_open:
            self._hangups.remove(entry.fileno, entry)
            self.starter.note_if_down(self.now())
            last_words = self._last_words(entry, reason)
            if REASONS[reason].counter == "lost":
                if not is_logged:
                    self._log.throttled_warning("worker_lost", reason=reason, **last_words)
                if self.starter.count_death(entry, reason, self.now()):
                    self._wake_for_retry()
                    self._wake_when_forgotten()
            elif REASONS[reason].counter == "retired":
                self._log.debug("worker_retired", reason=reason)
            # A hang-up needs no such search: the watch sees those of the others, too.
            if reason == "check_failed" or (last_words and reason != "hung_up"):
                self._maintenance.probe_all()
            if (reason == "check_failed" or last_words) and self.options.check_interval < math.inf:
                self.starter.is_doubtful = True
        entry.task.close(is_open=is_open)
        self.wake()

    def _last_words(self, entry: Entry[T], reason: Reason) -> dict[str, str]:
        """Note why a worker is lost or destroyed, in its peer's own words; return them for the log."""
        if entry.last_words_of is not None and REASONS[reason].counter in ("lost", "destroyed"):
            ask, entry.last_words_of = entry.last_words_of, None  # once is enough
            try:
                entry.last_words = ask(entry.worker)
            except Exception as error:
                self._log.throttled_warning("manager_failed", error=describe(error))
            if entry.last_words:
                self.standing.last_words[reason] = entry.last_words
        return {"last_words": entry.last_words} if entry.last_words else {}

    def evict_if_dead(self, entry: Entry[T]) -> bool:
        """Revalidate a worker that is about to be used again, without I/O: evict it if it has died, and
        say so. No client may have it.

        The watch for hang-ups is a task, which may not have had its turn since the peer hung up.
        """
        if self._hangups.watched:
            self._notice_hangups()
        if entry.evict_reason == "hung_up":
            self.evict(entry, "hung_up")
            return True
        try:
            is_dead = entry.is_alive is not None and not entry.is_alive(entry.worker)
        except Exception as error:
            self._log.throttled_warning("manager_failed", error=describe(error))
            is_dead = True
        if is_dead:
            self.evict(entry, "dead")
        return is_dead

    def reclaim(self, entry: Entry[T], checked_out_at: str) -> None:
        """Take back a worker whose resource was garbage-collected, unless the pool has closed it.

        It is not used again: its client may have left something half done.
        """
        if entry.state is State.IN_USE:
            # The garbage collector has sent for this from outside of all tasks.
            self._context.run(self._log.warning, "worker_leaked", checked_out_at=checked_out_at)
            self.evict(entry, "leaked")

    def _evict_if_due(self, entry: Entry[T]) -> bool:
        """Evict a worker that has come back, if it may go now (see `Departure`); say whether it went.

        It must have an `evict_reason`, and be idle, or just returned by its client or its own task.
        """
        assert entry.evict_reason is not None
        _, departure = REASONS[entry.evict_reason]
        if departure is Departure.WHEN_REPLACED and not self.starter.may_retire(
            waiting=self.queue.waiting, now=self.now()
        ):
            return False
        self.evict(entry, entry.evict_reason)  # does nothing if it was evicted while it was in use
        if departure is Departure.WHEN_REPLACED:
            self.starter.on_retired(self.now())
        return True

    def _call_one_in(self) -> None:
        """Have the next worker that comes back seen by `Sharing.takes`."""
        self._seeks_surplus = True

    def _leaves_place(self, entry: Entry[T], now: float) -> bool:
        """Say whether a worker that has come back leaves its place to others. A new one never does."""
        was_used = entry.in_use_since > -math.inf
        if self.draining or not was_used or not self.sharing.takes(now):
            return False
        self.starter.try_by(self.sharing.left_until)
        return True

    # -- What sessions ask ---------------------------------------------------------------------------

    def request_worker(self) -> None:
        """Have a worker started or probed for a task that is about to wait."""
        if len(self.roster.entries) < self.roster.limit or self.probes_first:
            self.wake()

    def is_unavailable(self, timeout: float) -> bool:
        """Say whether a task that comes now would wait for all of its timeout, as far as is known.

        It does if the pool has been down for longer than that, and the next start has to wait.
        """
        now = self.now()
        return self.starter.is_hopeless(now, timeout) and self.starter.is_pausing(now)

    def retire_all(self, over: float) -> None:
        """See `Operator`. Does nothing while the pool shuts down."""
        if not self.draining:
            self._operator.retire_all(over, self._nursery)

    def resize(self, pool_size: int, max_overflow: int) -> None:
        """See `Operator`. Does nothing while the pool shuts down."""
        if not self.draining:
            self._operator.resize(pool_size, max_overflow)
            self._maintenance.on_resized()
            self.sharing.on_resized()
            self._share()  # what is in use may be overflow now
            self._seeks_surplus = self._seeks_surplus or self.roster.too_many > 0
            if self.starter.is_failing:
                self._wake_when_forgotten()
            # What a nonblocking checkout waited for may have been given up: it must not wait for a
            # client now.
            for waiter in self.queue.nonblocking_beyond(self.standing.obtainable()):
                refusal = PoolFull(f"{self.name} was resized: clients take up every worker")
                self.queue.fail(waiter, refusal)

    def statistics(self) -> PoolStatistics:
        """Return a snapshot of the pool."""
        return self.standing.snapshot(draining=self.draining, closed=self.closed.is_set())

    # -- What worker tasks report --------------------------------------------------------------------
    #
    # `Owner` says when each is called, and in which state the worker is.

    @property
    def is_doubtful(self) -> bool:
        return self.starter.is_doubtful

    def on_opened(self, entry: Entry[T]) -> None:
        self.roster.move(entry, State.SERVICING)
        self._hangups.add(entry.fileno, entry)
        self._maintenance.add(entry)
        self._worker_manager = manager_of(entry.worker, self._manager)
        self.starter.on_opened(entry)
        # Also if another is being opened: that may be given up, and then says nothing.
        if self.now() < self.starter.backoff.retry_at:
            self._wake_for_retry()
        self._share()

    def on_open_failed(self, entry: Entry[T], error: Exception, begun: float) -> None:
        self.roster.move(entry, State.CLOSING)
        is_full = self._worker_manager._is_full(error)
        self.starter.on_failed(error, begun, self.now(), is_full=is_full)
        self._share()
        self._wake_for_retry()
        if self.starter.final_error is not None:
            self.drain()
        for waiter in list(self.queue):
            if self.starter.is_hopeless(waiter.since, waiter.timeout):
                self.queue.fail(waiter, self.standing.count_unavailable())
        # A nonblocking checkout waits only for what the pool itself is doing. If no worker is on its
        # way to it, it fails now.
        on_the_way = self.roster.opening + self.roster.servicing + len(self.roster.idle)
        for waiter in self.queue.nonblocking_beyond(on_the_way):
            refusal = PoolStartError(f"{self.name}: a worker could not be started: {describe(error)}")
            refusal.__cause__ = error
            self.queue.fail(waiter, refusal)

    def _share(self) -> None:
        """Look soon whether to leave a place to others, if that may be."""
        if self.sharing.may_be_due:
            self._maintenance.share_by(self.now())

    def on_ready(self, entry: Entry[T]) -> None:
        # The worker task only says so. What becomes of the worker is decided in the supervisor's task.
        self._send_ready.send_nowait(entry)

    def on_service_failed(self, entry: Entry[T], reason: Reason, error: Exception) -> None:
        # If it is being closed already, the work was cancelled for that.
        if entry.state is State.CLOSING:
            return
        if entry.evict_reason == "hung_up":
            reason = "hung_up"  # no wonder that it could not be reset
        last_words = self._last_words(entry, reason)
        if REASONS[reason].counter == "lost":
            self._log.throttled_warning(
                "worker_lost", reason=reason, error=describe(error), **last_words
            )
        else:
            self._log.throttled_warning(reason, error=describe(error), **last_words)
        self.evict(entry, reason, is_logged=True)

    def on_discarded(self, entry: Entry[T]) -> None:
        self.counters["discarded"] += 1
        self._log.throttled_warning("writes_discarded", checked_out_at=entry.checked_out_at)

    def on_hook_failed(self, hook: str, error: Exception) -> None:
        self._log.throttled_warning("hook_failed", hook=hook, error=describe(error))

    def _on_misconfigured(self, reason: str) -> None:
        # Every worker may show it: once is enough.
        if reason not in self._misconfigured:
            self._misconfigured.add(reason)
            self._log.warning("misconfigured", reason=reason)

    def on_closing(self, entry: Entry[T]) -> None:
        # If the pool has asked for it, the worker is being closed already, and this does nothing. A
        # crash is logged in `on_closed`, when its error is known.
        self.evict(entry, "crashed", is_logged=True)

    def on_closed(self, entry: Entry[T], error: Exception | None) -> None:
        if entry.evict_reason == "crashed":
            entry.crash = error
            reason = describe(error) if error else "its lifespan ended by itself"
            last_words = self._last_words(entry, "crashed")
            self._log.throttled_warning("worker_lost", reason="crashed", error=reason, **last_words)
        elif entry.evict_reason is not None and error is not None:
            self._log.throttled_warning("close_failed", error=describe(error))
        self.roster.remove(entry)
        # The two refer to each other, and would wait for the garbage collector, with the worker.
        del entry.task
        self.wake()

    # -- Supervising ---------------------------------------------------------------------------------

    @enable_ki_protection
    async def run(self) -> None:
        """Supervise until the pool has been drained. Only `drain` and `close_now` end it."""
        close_timeout.set(self.options.close_timeout)
        on_misconfigured.set(self._on_misconfigured)
        try:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self.queue.run_timers)
                    self._nursery.start_soon(self._watch_for_hangups)
                    self._nursery.start_soon(self._maintenance.run)
                    try:
                        await self._supervise()
                    finally:
                        # Where a bug ends the loop, nothing else would end the worker tasks: they
                        # are shielded.
                        self.close_now()
                    self._nursery.cancel_scope.cancel()
        finally:
            self._hangups.close()
            if self.starter.opened.is_set() and self.starter.final_error is None:
                self._log.info("pool_closed")
            self.closed.set()

    async def _supervise(self) -> None:
        """Admit the workers that come through the channel, and start those that are missing."""
        self.wake()
        while not self.draining or self.roster.entries or self.queue.waiting:
            self._receive(await self._receive_ready.receive())
            # First admit all that are ready: each may be the one that a waiter needs.
            with suppress(trio.WouldBlock):
                while True:
                    self._receive(self._receive_ready.receive_nowait())
            self._retire_expiring()
            self._give_up_starts()
            self.starter.start_missing(
                unprovided=self.queue.waiting - self._checker.probe_for_waiters(self._nursery),
                draining=self.draining,
                now=self.now(),
            )
            self.starter.set_opened_if_complete(self.now())

    def _receive(self, entry: Entry[T] | None) -> None:
        """Take a message from the channel: a worker that is ready, or None, to have been woken."""
        if entry is None:
            self._is_woken = False
        # It may have been evicted since it was sent.
        elif entry.state is State.SERVICING:
            has_left = entry.evict_reason is not None and self._evict_if_due(entry)
            # One that has been used may have died while it was reset, or while it waited for that.
            was_used = entry.in_use_since > -math.inf
            if not has_left and not (was_used and self.evict_if_dead(entry)):
                self.admit(entry, self.now())

    def wake(self) -> None:
        """Have the supervisor look at what is missing, in its own task. Any room may call it."""
        if not self._is_woken:
            self._is_woken = True
            self._send_ready.send_nowait(None)

    def _on_unserved_waiter(self) -> None:
        """A task has left the queue without a worker. The shutdown may have waited for it."""
        if self.draining:
            self.wake()

    def _wake_for_retry(self) -> None:
        """Have the supervisor look again when the pause after a failed start is over."""
        self._nursery.start_soon(self._wake_at, self.starter.backoff.retry_at)

    def _wake_when_forgotten(self) -> None:
        """Have the supervisor look again when the last failure is old (see `Starter.may_retire`).

        A pool that starts none any more, because it has been made smaller, is not woken by its starts.
        """
        forgotten_at = self.starter.backoff.last_failure + FAILURE_RESET_AFTER
        self._nursery.start_soon(self._wake_at, forgotten_at + 0.001)

    @enable_ki_protection
    async def _wake_at(self, time: float) -> None:
        await trio.sleep_until(time)
        self.wake()

    def _start_worker(self) -> None:
        """Start a worker, in a task of its own."""
        entry: Entry[T] = Entry()
        entry.task = WorkerTask(entry, self, self._manager, self.options)
        self.roster.add(entry)
        self._nursery.start_soon(entry.task.run)

    def _give_up_starts(self) -> None:
        """Give up starts: while draining, those that no task waits for; after a resize, those beyond
        the new limit."""
        roster = self.roster
        surplus = roster.too_many
        if self.draining:
            surplus = max(surplus, roster.opening - self.queue.waiting)
        if surplus > 0:
            if roster.opening:
                opening = [entry for entry in roster.entries if entry.state is State.OPENING]
                for entry in opening[-surplus:]:  # those that began last
                    self.evict(entry, "shutdown" if self.draining else "overflow")
        elif self._seeks_surplus:
            # The pool has shrunk.
            self._seeks_surplus = self.options.overflow_ttl == 0 or self.sharing.wants_worker

    def _retire_expiring(self) -> None:
        """Evict the idle workers that are to be replaced, as far as others are there in their place."""
        while (entry := self.roster.next_expiring()) is not None and self._evict_if_due(entry):
            pass

    # -- Hang-ups ------------------------------------------------------------------------------------

    @enable_ki_protection
    async def _watch_for_hangups(self) -> None:
        """Evict idle workers whose peers hang up, before they are handed out."""
        while True:
            await self._hangups.wait()
            self._notice_hangups()

    def _notice_hangups(self) -> None:
        """Mark the workers whose peers have hung up, and evict the idle ones.

        The others leave when their client, or their own task, gives them back: the client may still
        read what the peer sent before.
        """
        self._hangups_seen_at = self.now()
        for entry in self._hangups.hung_up():
            self.roster.mark(entry, "hung_up")
            if entry.state is State.IDLE:
                self.evict(entry, "hung_up")

    # -- The end -------------------------------------------------------------------------------------

    @enable_ki_protection
    def drain(self) -> None:
        """Begin the shutdown: refuse new checkouts, close idle workers, serve the tasks that wait.

        The supervisor ends when no task waits and every worker has been closed. May be called again.
        """
        self.draining = True
        while self.roster.idle:
            self.evict(self.roster.idle[0], "shutdown")
        self.wake()

    @enable_ki_protection
    def close_now(self) -> None:
        """End the shutdown: refuse the tasks that wait, close every worker, also those in use.

        May be called again, and before `drain`.
        """
        self.drain()
        for waiter in list(self.queue):
            self.queue.fail(waiter, PoolClosed(f"{self.name} was shut down"))
        for entry in list(self.roster.entries):
            self.evict(entry, "shutdown")
