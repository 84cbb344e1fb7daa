"""Random uses of a pool, which a model that fits on one page must not be contradicted by.

The model knows which client holds what, in which order clients wait, and what became of each tool. It
doesn't know how the pool works: what it checks after each step is something that a client could notice.
The pool's own books are checked beside it.
"""

from __future__ import annotations

import math
import socket
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import hypothesis.strategies as st
import trio
import trio.testing
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from outcome import Outcome, Value, capture
from timing import Hangs, alarm
from workshop import Manager, Tool, Workshop, check_books, tool_of

import whitepool
from whitepool._checking import PROMPT_ANSWER

R = TypeVar("R")

RESET_TIMEOUT = 2.0
START_TIMEOUT = 5.0
LONGEST_PAUSE = 0.8
"""Seconds for which the pool leaves a server alone that has refused, at most."""
LONGEST_PAUSE_FULL = 8.0
"""The same, if it has refused because it is full."""
GAP = 1.5
"""Seconds for which a place is left to other pools, at most."""
FULL_FOR = 1.25 * 30
"""Seconds for which a server that has refused because it is full counts as full, at most."""


class BackgroundTrio:
    """A Trio in a thread of its own, where time stands still until it is told to pass."""

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self.nursery: trio.Nursery
        self._token: trio.lowlevel.TrioToken
        self._is_up = threading.Event()
        self._end: Outcome[None] = Value(None)
        self.hangs = False
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        self._is_up.wait()
        # The run can be repeated only if this thread and that one never compete.
        self.run(trio.lowlevel.checkpoint)

    def _live(self) -> None:
        self._end = capture(lambda: trio.run(self._main, clock=self.clock))

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self.nursery:
            self._is_up.set()
            await trio.sleep_forever()

    def run(self, function: Callable[..., Awaitable[R]], *arguments: Any) -> R:
        """Call a function in there, and let everything happen that follows from it at once."""

        async def call() -> R:
            result = await function(*arguments)
            await trio.testing.wait_all_tasks_blocked()
            return result

        try:
            with alarm(5):
                return trio.from_thread.run(call, trio_token=self._token)
        except Hangs:
            self.hangs = True
            raise TimeoutError("the pool hangs, or spins") from None
        except (trio.Cancelled, trio.RunFinishedError):
            self._thread.join()
            self._end.unwrap()  # a task has crashed
            raise

    async def let_pass(self, seconds: float) -> None:
        """Let time pass as it does: whatever falls due, falls due one after the other."""
        self.clock.autojump_threshold = 0
        await trio.sleep(seconds)
        self.clock.autojump_threshold = math.inf

    def stop(self) -> None:
        if self.hangs:
            return  # it can't be stopped
        with suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self.nursery.cancel_scope.cancel, trio_token=self._token)
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()


class Moody(Manager):
    """A manager of tools that can die in every way. Each of its actions may be slow, or fail."""

    def __init__(self) -> None:
        shop = Workshop()
        super().__init__(shop)
        shop.before_open = self._before_open
        shop.before_close = self._before_close
        self.before_reset = self._before_reset
        self.complaints: list[str] = []
        self.crashed: set[Tool] = set()
        self.hung_up: set[Tool] = set()
        self.peers: dict[Tool, tuple[socket.socket, socket.socket]] = {}
        self.last_failure = self.last_success = self.last_full = -math.inf
        self.places = 0
        """How many workers there may be when the server is full."""
        self.refused = 0
        """How often it has said so."""
        self.rush = 0
        """Workers that were started in this step, without time having passed."""
        self._rush_at = -math.inf
        self.repair()

    def _is_full(self, error: Exception) -> bool:
        return "too many" in str(error)

    def repair(self) -> None:
        self.opens = self.resets_are = self.checks = self.closes = "ok"
        self.confused = False

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[Tool]:
        begun = trio.current_time()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            async with self.shop.with_nursery() as tool:
                self.peers[tool] = ours, theirs
                if trio.current_time() >= begun + START_TIMEOUT:
                    self.last_failure = trio.current_time()  # open, but too late
                self.last_success = trio.current_time()
                yield tool

    def fileno(self, worker: Tool) -> int:
        return self.peers[worker][0].fileno()

    def is_alive(self, worker: Tool) -> bool:
        if self.confused:
            raise RuntimeError("a bug in is_alive")
        return super().is_alive(worker)

    async def check(self, worker: Tool) -> None:
        await self._act(self.checks, worker)

    async def _before_reset(self, tool: Tool) -> None:
        await self._act(self.resets_are, tool)

    async def _act(self, mood: str, tool: Tool) -> None:
        if mood == "slow":
            await trio.sleep(1)
        elif mood == "hanging":
            await trio.sleep_forever()
        if mood in ("failing", "flaky") or tool in self.dead:
            raise OSError("no answer")

    async def _before_open(self, attempt: int) -> None:
        now = trio.current_time()
        self.rush = self.rush + 1 if now == self._rush_at else 1
        self._rush_at = now
        if self.rush > 40:
            self.complaints.append("workers are started without end, while no time passes")
            await trio.sleep_forever()
        if self.opens == "full" and len(self.shop.alive) >= self.places:
            self.last_full = trio.current_time()
            self.refused += 1
            raise OSError("too many clients")
        try:
            if self.opens == "slow":
                await trio.sleep(0.7)
            elif self.opens == "hanging":
                await trio.sleep_forever()
            if self.opens == "failing" or (self.opens == "flaky" and attempt % 2 == 0):
                raise OSError("connection refused")
        except BaseException:
            self.last_failure = trio.current_time()
            raise

    async def _before_close(self, _: Tool) -> None:
        if self.closes == "slow":
            await trio.sleep(1)


@dataclass(eq=False)
class Client:
    """A task that wants a worker."""

    number: int
    """Clients come one after the other: the one with the smaller number began to wait first."""
    deadline: float
    comes_too_late: bool
    """The pool has begun to shut down."""
    joined: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    end: str = "waiting"
    ended_at: float = math.inf


sizes = st.integers(0, 3)
seconds = st.sampled_from([0.05, 0.5, 2.0, 10.0, 40.0])
any_of = st.integers(0, 11)
"""Which one of however many there are."""
moods = st.sampled_from(["ok", "slow", "failing", "flaky", "hanging"])
ways_to_return = st.sampled_from(["checkin", "checkin", "dirty", "dirty", "destroyed", "leak"])
deaths = st.sampled_from(["crashes", "hangs up", "is dead"])
periods = st.one_of(st.just(math.inf), st.integers(5, 30).map(float))


class PoolMachine(RuleBasedStateMachine):
    """Hypothesis chooses a pool and what happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.trio = BackgroundTrio()
        self.manager = Moody()
        self.shop = self.manager.shop
        self.complaints = self.manager.complaints
        self.clients: list[Client] = []
        self.leases: list[whitepool.Resource[Tool]] = []
        self.held: set[Tool] = set()
        self.returned: list[whitepool.Resource[Tool]] = []
        self.leaked = 0
        self.lost = 0
        self.last_death = -math.inf
        self.steps = 0
        self.draining = False
        self.to_be_replaced: dict[Tool, float] = {}
        """Those that have been called in, and when that was over."""
        self.closes_by = math.inf
        """When the workers that clients still hold will be closed."""

    @initialize(
        seed=st.random_module(),  # of Trio's scheduler too
        pool_size=sizes,
        max_overflow=sizes,
        min_ready=st.sampled_from([None, 0]),
        strategy=st.sampled_from(["lifo", "fifo"]),
        lazy=st.booleans(),
        overflow_ttl=st.sampled_from([0.0, 1.0, 10.0, math.inf]),
        idle_timeout=periods,
        max_lifetime=periods,
        check_interval=st.sampled_from([math.inf, 3.0, 0.0]),
        patience=st.sampled_from([0.4, 1.0]),
        with_hooks=st.booleans(),
        opens=st.sampled_from(["ok", "ok", "slow", "flaky", "failing"]),
    )
    def open(self, seed: object, with_hooks: bool, opens: str, **options: Any) -> None:
        assume(options["pool_size"] or options["max_overflow"])

        async def open_it() -> whitepool.Session[Tool]:
            session: whitepool.Session[Tool] = await self.trio.nursery.start(pool.run_service)
            return session

        if with_hooks:  # every returned worker passes through its task
            hooks = whitepool.Hooks(on_checkin=lambda _: None, after_release=lambda: trio.sleep(0.3))
            options["hooks"] = hooks
        self.limit = options["pool_size"] + options["max_overflow"]
        self.options = options
        pool = whitepool.Pool(
            self.manager, reset_timeout=RESET_TIMEOUT, start_timeout=START_TIMEOUT, **options
        )
        self.session = self.trio.run(open_it)
        self.manager.opens = opens

    # -- Clients ---------------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Client]:
        return [client for client in self.clients if client.end == "waiting"]

    async def _client(self, client: Client, checkout: Callable[[], Awaitable[Any]]) -> None:
        with client.scope:
            try:
                resource = await checkout()
            except whitepool.PoolUnavailable:
                client.end = "unavailable"
                timeout = client.deadline - client.joined
                outage = client.joined - self.manager.last_success
                # Workers that are opened, and then give no sign of life, end no outage.
                is_doubtful = self.session._supervisor.starter.is_doubtful
                self._expect(outage > timeout or is_doubtful, f"{client} could have waited")
                self._expect(not self.held - self.manager.crashed, "a client has a worker")
            except whitepool.PoolOverloaded:
                client.end = "overloaded"
                self._expect(self.options["patience"] < 1, f"{client} was shed")
            except whitepool.CheckoutTimeout:
                client.end = "timed out"
                self._expect(trio.current_time() >= client.deadline, f"{client} timed out too early")
            except whitepool.PoolClosed:
                client.end = "refused"
                in_time = trio.current_time() < self.closes_by
                self._expect(client.comes_too_late or not in_time, f"{client} was not served")
            except (whitepool.PoolFull, whitepool.PoolStartError) as error:
                client.end = type(error).__name__
            else:
                client.end = "served"
                self._receive(resource)
        if client.scope.cancelled_caught:
            client.end = "cancelled"
        elif client.comes_too_late:
            self._expect(client.end == "refused", f"{client} was let in")
        client.ended_at = trio.current_time()

    def _receive(self, resource: whitepool.Resource[Tool]) -> None:
        tool = tool_of(resource)
        reasons = {
            "held by another client": self.held,
            "dirty": self.manager.dirty,
            "dead": self.manager.dead,
            "crashed": self.manager.crashed,
            "hung up": self.manager.hung_up,
        }
        # The shutdown may take back what a task was given a moment ago, as it does from any client.
        if trio.current_time() < self.closes_by:
            reasons["closed"] = {tool for tool in self.shop.tools if tool.closed}
        for reason, tools in reasons.items():
            self._expect(tool not in tools, f"{tool} was given out, which is {reason}")
        self.held.add(tool)
        self.leases.append(resource)

    def _expect(self, truth: bool, else_complain: str) -> None:
        """What a task has to complain of is raised after the step, in the thread of the test."""
        if not truth:
            self.complaints.append(else_complain)

    async def _enter(self, timeout: float, checkout: Callable[[], Awaitable[Any]]) -> None:
        now = trio.current_time()
        client = Client(len(self.clients), now + timeout, self.draining, now)
        self.clients.append(client)
        self.trio.nursery.start_soon(self._client, client, checkout)

    @rule(timeouts=st.lists(st.sampled_from([0.0, 0.5, 3.0, math.inf]), min_size=1, max_size=4))
    def block_checkout(self, timeouts: list[float]) -> None:
        for timeout in timeouts:
            self.trio.run(self._enter, timeout, partial(self.session.block_checkout, timeout))

    @rule(waits=st.booleans())
    def checkout_without_queueing(self, waits: bool) -> None:
        async def checkout_nowait() -> whitepool.Resource[Tool]:
            try:
                return self.session.checkout_nowait()
            except (trio.WouldBlock, RuntimeError) as error:
                must_wait = self.options["check_interval"] == 0
                self._expect(isinstance(error, RuntimeError) == must_wait, f"it raised {error!r}")
                raise whitepool.PoolFull from None

        checkout = self.session.nonblock_checkout if waits else checkout_nowait
        self.trio.run(self._enter, math.inf, checkout)

    @precondition(lambda self: self.waiting)
    @rule(which=any_of)
    def cancel_a_waiting_client(self, which: int) -> None:
        async def cancel() -> None:
            client.scope.cancel()

        client = self.waiting[which % len(self.waiting)]
        self.trio.run(cancel)
        assert client.end == "cancelled"

    @precondition(lambda self: self.waiting and self.leases)
    @rule(which=any_of, cancel_first=st.booleans())
    def cancel_in_the_moment_of_a_return(self, which: int, cancel_first: bool) -> None:
        async def both() -> None:
            if cancel_first:
                client.scope.cancel()
            self._give_back(which)
            client.scope.cancel()

        client = self.waiting[0]  # it is the one to be served
        self.trio.run(both)
        assert client.end in ("cancelled", "served")

    # -- Returns ---------------------------------------------------------------------------------------

    def _give_back(self, which: int, way: str = "checkin") -> None:
        resource = self.leases.pop(which % len(self.leases))
        tool = tool_of(resource)
        self.held.remove(tool)
        if way == "leak":
            self.leaked += tool in self._tools_in_use([tool])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del resource  # the last reference
            return
        if way == "dirty":
            self.manager.dirty.add(tool)
        (self.session.destroyed if way == "destroyed" else self.session.checkin)(resource)
        self.returned.append(resource)

    @precondition(lambda self: self.leases)
    @rule(ways=st.lists(st.tuples(any_of, ways_to_return), min_size=1, max_size=4))
    def give_back(self, ways: list[tuple[int, str]]) -> None:
        async def all_at_once() -> None:
            for which, way in ways[: len(self.leases)]:
                self._give_back(which, way)

        self.trio.run(all_at_once)

    @precondition(lambda self: self.returned)
    @rule(which=any_of, broken=st.booleans())
    def return_again(self, which: int, broken: bool) -> None:
        async def return_again() -> None:
            before = self.session._supervisor.statistics()
            try:
                give_back(self.returned[which % len(self.returned)])
            except whitepool.NotCheckedOut:
                assert self.session._supervisor.statistics() == before
            else:
                raise AssertionError("it was accepted")

        give_back = self.session.destroyed if broken else self.session.checkin
        self.trio.run(return_again)

    # -- Misfortunes -----------------------------------------------------------------------------------

    async def _kill(self, tool: Tool, how: str) -> None:
        if how == "crashes":
            self.manager.crashed.add(tool)
            tool.crash.set()
        elif how == "hangs up":
            self.manager.hung_up.add(tool)
            self.manager.peers[tool][1].close()
        else:
            self.manager.dead.add(tool)
            # One that was returned in this very millisecond isn't asked again.
            await self.trio.let_pass(0.002)

    @rule(which=any_of, how=deaths)
    def an_idle_worker_dies(self, which: int, how: str) -> None:
        """Or one that is being reset, probed or closed."""
        there = [tool for tool in self.shop.alive if tool not in self.held]
        if there:
            self.trio.run(self._kill, there[which % len(there)], how)

    @precondition(lambda self: self.leases)
    @rule(which=any_of, how=deaths)
    def a_busy_worker_dies(self, which: int, how: str) -> None:
        self.trio.run(self._kill, tool_of(self.leases[which % len(self.leases)]), how)

    # -- Operators -------------------------------------------------------------------------------------

    @rule(over=st.sampled_from([0.0, 0.0, 3.0]))
    def retire_all(self, over: float) -> None:
        async def retire_all() -> None:
            there = [tool for tool in self.shop.alive if tool in self.manager.peers]
            if not self.draining:
                self.to_be_replaced |= dict.fromkeys(there, trio.current_time() + over)
            self.session.retire_all(over)

        self.trio.run(retire_all)

    @rule(pool_size=st.none() | sizes, max_overflow=st.none() | sizes)
    def resize(self, pool_size: int | None, max_overflow: int | None) -> None:
        async def resize() -> None:
            self.session.resize(pool_size, max_overflow)
            now = self.session.statistics()
            if not self.draining:
                assert now.pool_size == (before.pool_size if pool_size is None else pool_size)
                assert now.max_overflow == (
                    before.max_overflow if max_overflow is None else max_overflow
                )
            self.limit = now.pool_size + now.max_overflow
            # From now on none is started beyond the new limit.
            self.shop.most_alive = 0

        before = self.session._supervisor.statistics()
        size = before.pool_size if pool_size is None else pool_size
        assume(size or (before.max_overflow if max_overflow is None else max_overflow))
        self.trio.run(resize)

    @rule(mood=moods)
    def opening_is(self, mood: str) -> None:
        self.manager.opens = mood

    @rule(places=st.integers(0, 4))
    def the_server_is_full(self, places: int) -> None:
        self.manager.opens = "full"
        self.manager.places = places

    @rule(what=st.sampled_from(["resets_are", "checks", "closes"]), mood=moods)
    def the_rest_is(self, what: str, mood: str) -> None:
        setattr(self.manager, what, mood)

    @rule(confused=st.booleans())
    def the_manager_is_confused(self, confused: bool) -> None:
        self.manager.confused = confused

    # -- Time ------------------------------------------------------------------------------------------

    @rule(seconds=seconds)
    def time_passes(self, seconds: float) -> None:
        before = self.shop.attempts
        starts_fail = self.manager.opens not in ("ok", "slow") or self.manager.checks != "ok"
        refused = self.manager.refused
        self.trio.run(self.trio.let_pass, seconds)
        # Once a second on average without a worker, and not more often with one; for each worker that
        # goes, another attempt is made in its place.
        gone = self.session._supervisor.counters["started"]
        assert self.manager.refused - refused <= 5 + 2 * seconds + 2 * self.limit + gone
        if not starts_fail:
            # Each worker has been replaced once by the end of its life, and each a few times more
            # for some other reason. Workers that come and go for nothing are many more.
            shortest = 0.9 * min(self.options["idle_timeout"], self.options["max_lifetime"])
            began = self.trio.clock.current_time() - seconds
            called_in = sum(time >= began for time in self.to_be_replaced.values())
            assert self.shop.attempts - before <= (
                5 + called_in + 2 * self.limit * (2 + seconds / shortest) + seconds
            )

    @rule(seconds=seconds)
    def the_machine_sleeps(self, seconds: float) -> None:
        async def jump() -> None:
            self.trio.clock.jump(seconds)

        self.trio.run(jump)

    @rule()
    def all_is_well_in_the_end(self) -> None:
        """Everything is repaired and returned: the pool must be complete again, or closed."""

        async def come_to_rest() -> None:
            self.manager.repair()
            if self.limit == 0:
                for client in self.waiting:
                    client.scope.cancel()
            for _ in range(100):
                while self.leases:
                    self._give_back(0)
                await self.trio.let_pass(1)
                if not self.waiting and not self.leases:
                    break
            await self.trio.let_pass(60 + FULL_FOR)

        self.trio.run(come_to_rest)
        now = self.session._supervisor.statistics()
        assert not self.waiting
        if self.draining:
            assert now.state == "closed"
            return
        assert (now.in_use, now.starting, now.resetting, now.waiting) == (0, 0, 0, 0)
        assert not self.to_be_replaced.keys() & set(self.shop.alive)
        assert now.idle <= self.limit
        if not self.options["lazy"]:
            assert now.idle >= now.pool_size
        if self.options["overflow_ttl"] != math.inf:
            assert now.idle <= now.pool_size

    # -- The end ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.steps > 8)
    @rule(timeout=st.sampled_from([0.0, 3.0, math.inf]))
    def shut_down(self, timeout: float) -> None:
        async def shut_down() -> None:
            await self.session.safe_shutdown(timeout)
            closed = not self.shop.alive and not self.shop.opening
            self._expect(closed, "safe_shutdown returned before everything was closed")

        async def begin() -> None:
            self.draining = True
            self.closes_by = min(self.closes_by, trio.current_time() + timeout)
            self.trio.nursery.start_soon(shut_down)

        self.trio.run(begin)

    def teardown(self) -> None:
        try:
            if hasattr(self, "session") and not self.trio.hangs:
                self.all_is_well_in_the_end()
                self.trio.run(self._shut_down_now)
                assert not self.complaints
                assert not self.shop.alive
                assert not self.shop.opening
                assert not self.waiting
                now = self.session._supervisor.statistics()
                check_books(self.session)
                assert now.state == "closed"
                for resource in self.leases:
                    self.session.checkin(resource)  # late, but in good standing
        finally:
            self.trio.stop()

    async def _shut_down_now(self) -> None:
        self.closes_by = trio.current_time()
        self.trio.clock.autojump_threshold = 0
        await self.session.safe_shutdown(0)

    # -- What must hold after each step ----------------------------------------------------------------

    @invariant()
    def nothing_contradicts_the_model(self) -> None:
        self.steps += 1
        self.manager.rush = 0
        assert not self.complaints
        self._the_books_add_up()
        self._the_bounds_hold()
        self._no_waiter_is_overtaken()
        self._no_waiter_waits_in_vain()
        self._a_drained_pool_closes()

    def _tools_in_use(self, tools: list[Tool]) -> list[Tool]:
        """Of tools that clients hold, those which the pool counts: it has not closed them yet."""
        if self.closes_by <= self.trio.clock.current_time():
            return []
        return [tool for tool in tools if tool not in self.manager.crashed]

    def _the_books_add_up(self) -> None:
        now = self.session._supervisor.statistics()
        check_books(self.session)
        assert now.in_use == len(self._tools_in_use([tool_of(resource) for resource in self.leases]))
        assert now.waiting == len(self.waiting)
        assert now.leaked == self.leaked
        ends = [client.end for client in self.clients]
        assert now.checkouts == ends.count("served")
        assert now.timeouts == ends.count("timed out") + ends.count("unavailable")
        assert not (now.state == "down" and (now.idle or now.in_use or now.resetting))
        assert now.overloads == ends.count("overloaded")

    def _the_bounds_hold(self) -> None:
        # From the factory's side, where a worker that is being closed still counts.
        assert self.shop.most_alive <= self.limit

    def _no_waiter_is_overtaken(self) -> None:
        served = [client for client in self.clients if client.end == "served"]
        for late in served[-20:]:
            for early in self.clients[: late.number]:
                # Clients that are served at the same time resume in any order.
                assert early.ended_at <= late.ended_at, f"{late} overtook {early}"

    def _no_waiter_waits_in_vain(self) -> None:
        now = self.trio.clock.current_time()
        for client in self.waiting:
            assert now < client.deadline, f"{client} was forgotten"
        lost = self.session._supervisor.statistics().lost
        # Where more workers have died than there are places, it may be their successors that die: that
        # is no better than a start that fails.
        if lost > max(self.lost, self.limit):
            self.last_death = now
        self.lost = lost
        # What is missing is being started, unless starts have just failed. (A new worker that gives no
        # sign of life, after another has been found useless, is such a start.)
        supervisor = self.session._supervisor
        last_failure = max(self.manager.last_failure, supervisor.starter.backoff.last_failure)
        if now - max(last_failure, self.last_death) <= LONGEST_PAUSE:
            return
        # A full server is left alone for longer, also after it has given a place, and then only tasks
        # that wait need another worker.
        is_full = now - self.manager.last_full <= FULL_FOR
        last = max(self.manager.last_full, self.manager.last_success) if is_full else -math.inf
        if now - last <= LONGEST_PAUSE_FULL:
            return
        # A place may be left to other pools, for a moment.
        left_for = self.session._supervisor.sharing.left_until - now
        assert left_for <= GAP
        opening = supervisor.roster.opening
        there = len(self.shop.alive) + self.shop.opening
        if self.waiting and there < self.limit and left_for < 0:
            # A worker that is probed may serve one of them, if it answers promptly. (Before that, it
            # may have a hook to run.)
            probes = self.session._supervisor.roster.probes.values()
            prompt = [began for began in probes if began > now - PROMPT_ANSWER]
            assert opening or len(prompt) >= len(self.waiting)
        pool_size = self.session._supervisor.statistics().pool_size
        if now - self.manager.last_full <= FULL_FOR:
            return
        if not self.options["lazy"] and not self.draining and there < pool_size:
            assert opening

    def _a_drained_pool_closes(self) -> None:
        now = self.session._supervisor.statistics()
        if self.draining and not now.waiting and not now.in_use:
            assert not self.shop.opening, "no task waits for that any more"
            if not self.shop.alive:
                assert now.state == "closed"
        if now.state == "closed":
            assert self.draining
            assert not self.shop.alive
            assert not now.waiting


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
    report_multiple_bugs=False,
)


# -- What it has found, as plain tests ---------------------------------------------------------------


async def test_a_crash_and_a_slow_end_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """A worker that crashes and takes too long to close doesn't take the pool with it. (Rule 5.)"""
    shop = Workshop()
    shop.before_close = lambda _: trio.sleep(1)
    async with whitepool.open_pool(shop.with_nursery, pool_size=1, close_timeout=0.5) as session:
        shop.tools[0].crash.set()
        await trio.sleep(10)
        async with session.worker() as tool:
            assert tool is not shop.tools[0]


async def test_a_crash_during_after_release(autojump_clock: trio.testing.MockClock) -> None:
    """It is noticed at once, though the hook takes its time. (Rule 6.)"""
    shop = Workshop()
    hooks = whitepool.Hooks(after_release=lambda: trio.sleep(2))
    async with whitepool.open_pool(
        shop.with_nursery, pool_size=1, max_overflow=0, hooks=hooks
    ) as session:
        async with session.worker() as first:
            pass
        await trio.sleep(1)
        first.crash.set()
        await trio.testing.wait_all_tasks_blocked()
        async with session.worker() as other:
            assert other is not first


async def test_pauses_between_failures_do_not_end(autojump_clock: trio.testing.MockClock) -> None:
    """Also where starts succeed and fail at the same instant, as on a mocked clock. (Rule 5.)"""
    shop = Workshop()

    async def client() -> None:
        async with session.worker(math.inf):
            await trio.sleep(1)

    async def only_the_second(attempt: int) -> None:
        if attempt > 100:
            await trio.sleep_forever()  # instead of trying again and again, while no time passes
        if attempt != 2:
            raise OSError("connection refused")

    shop.before_open = only_the_second
    async with whitepool.open_pool(shop.make, pool_size=0, max_overflow=3) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(client)
        assert shop.attempts < 100
