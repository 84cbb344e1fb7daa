"""A database server in a simulation, and fleets of pools that use it: whitepool's real code on a model.

The server has cores, which its sessions share, and places for so many sessions. It does to its clients
what servers do: it is full, restarts, freezes, fails over. Nothing here opens a socket, and all times
are those of Trio's clock.

    async def main():
        server = ModelServer(max_connections=100)
        async with open_fleet(server, pools=20, pool_size=4, max_overflow=2) as fleet:
            await server.restart(down_for=5)
            await trio.sleep(10)

    simulate(main)
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any, TypeVar
from unittest import mock

import trio
from outcome import Error
from trio._core import _run
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

import whitepool

T = TypeVar("T")


class ServerGone(ConnectionError):
    """The server has closed the connection."""


class ServerDown(ConnectionError):
    """The server takes no connections: it is not there."""


class ServerFull(ConnectionError):
    """The server takes no more connections."""


class JumpingClock(trio.abc.Clock):
    """A clock that jumps to whatever comes next when no task can run.

    `trio.testing.MockClock` does so, too, but has Trio's loop turn once more for each jump, and asks
    for Trio's statistics. Here what comes next may also be a call: it costs a fraction of a task that
    sleeps. No task may wait for the world outside, or in `trio.testing.wait_all_tasks_blocked`.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Call]] = []
        self._numbers = count()

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Jump. Trio asks this when no task can run, of its next deadline."""
        while self._calls and self._calls[0][2].function is None:
            heappop(self._calls)
        first = self._calls[0][0] if self._calls else inf
        if min(first, deadline) == inf:
            return inf
        self.now = max(self.now, min(first, deadline))
        while self._calls and self._calls[0][0] <= self.now:
            heappop(self._calls)[2].make()
        return 0.0

    def add(self, time: float, call: Call) -> None:
        heappush(self._calls, (time, next(self._numbers), call))


class Call:
    """A call that is to be made at a time. See `call_at`."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[], None]) -> None:
        self.function: Callable[[], None] | None = function

    def make(self) -> None:
        """Call, unless it was cancelled."""
        function, self.function = self.function, None
        if function is not None:
            function()

    def cancel(self) -> None:
        self.function = None


def call_at(time: float, function: Callable[[], None]) -> Call:
    """Have a function called at that time of Trio's clock; it may wake tasks, and must not raise."""
    call, clock = Call(function), trio.lowlevel.current_clock()
    if isinstance(clock, JumpingClock):
        clock.add(time, call)
    else:

        async def wait() -> None:
            await trio.sleep_until(time)
            call.make()

        trio.lowlevel.spawn_system_task(wait)
    return call


async def sleep(seconds: float) -> None:
    """Sleep; on a `JumpingClock` that costs less than `trio.sleep`."""
    call = call_at(trio.current_time() + seconds, partial(reschedule, current_task()))

    def abort(_: object) -> Abort:
        call.cancel()
        return Abort.SUCCEEDED

    await wait_task_rescheduled(abort)


class _Job:
    """Work that is being done, and the task that waits for it, if it still does."""

    __slots__ = ("is_over", "runs_on", "task")

    def __init__(self, runs_on: Callable[[], None] | None) -> None:
        self.task: Task | None = current_task()
        self.runs_on = runs_on
        self.is_over = False


class Cores:
    """The processor of a server. Its jobs share it evenly, and none gets more than one core."""

    def __init__(self, number: float) -> None:
        self.number = number
        self.running = 0
        """Jobs that are being done."""
        self.frozen = False
        # What a job that had always been there would have got, in seconds of a core; and as of when.
        self._progress = 0.0
        self._as_of = 0.0
        # A heap: the progress at which each job is done. One that was given up stays until then.
        self._jobs: list[tuple[float, int, _Job]] = []
        self._numbers = count()
        self._timer = Call(self._on_time)
        self._due = inf  # when the timer calls

    async def work(self, seconds: float, runs_on: Callable[[], None] | None = None) -> None:
        """Return when so many seconds of a core have been spent.

        If the task is cancelled, the work is given up. With `runs_on` it is done all the same, and
        that is called at its end.
        """
        self._advance()
        job = _Job(runs_on)
        heappush(self._jobs, (self._progress + seconds, next(self._numbers), job))
        self.running += 1
        self._set_timer()

        def abort(_: object) -> Abort:
            job.task = None
            if job.runs_on is None and not job.is_over:
                self._advance()
                job.is_over = True
                self.running -= 1
                self._set_timer()
            return Abort.SUCCEEDED

        await wait_task_rescheduled(abort)

    def drop_all(self, error: Exception | None) -> None:
        """End all jobs, with an error for the tasks that wait; without one, they hang."""
        self._advance()
        for _, _, job in self._jobs:
            if not job.is_over and job.task is not None and error is not None:
                reschedule(job.task, Error(error))
            job.is_over = True
        self._jobs.clear()
        self.running = 0
        self._set_timer()

    def freeze(self, frozen: bool) -> None:
        """Stop all work; or go on with it."""
        self._advance()
        self.frozen = frozen
        self._set_timer()

    def _on_time(self) -> None:
        """Have done the jobs that are done by now."""
        self._due = inf
        self._advance()
        while self._jobs and self._jobs[0][0] <= self._progress + 1e-9:
            _, _, job = heappop(self._jobs)
            if not job.is_over:
                job.is_over = True
                self.running -= 1
                if job.task is not None:
                    reschedule(job.task)
                elif job.runs_on is not None:
                    job.runs_on()
        self._set_timer()

    @property
    def _speed(self) -> float:
        """Seconds of a core that each job gets in a second."""
        return 0.0 if self.frozen else min(1.0, self.number / max(1, self.running))

    def _advance(self) -> None:
        now = trio.current_time()
        if now > self._as_of:
            self._progress += (now - self._as_of) * self._speed
            self._as_of = now

    def _set_timer(self) -> None:
        """Be called when the first job is done, as things are."""
        due = inf
        if self._jobs and not self.frozen:
            due = self._as_of + max(0.0, self._jobs[0][0] - self._progress) / self._speed
        if due != self._due:
            self._timer.cancel()
            self._due = due
            if due != inf:
                self._timer = call_at(due, self._on_time)


@dataclass(eq=False)
class ModelConnection:
    """A session of a server, as its client sees it."""

    server: ModelServer
    is_alive: bool = True
    """Whether it may be used, as far as its client can know."""
    is_silent: bool = False
    """Whether its server never answers again."""
    watch: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Cancelled when the server hangs up."""

    async def query(self, work: float, elsewhere: float = 0.0) -> None:
        """Have the server work for so many seconds of a core, after so many spent `elsewhere`.

        If it is cancelled, the server gives the work up, and the connection stays usable, unless the
        server does not answer, or can't cancel (see `ModelServer`). Raises `ServerGone`.
        """
        server = self.server
        if elsewhere:
            await sleep(elsewhere)
        if not self.is_alive:
            raise ServerGone("the connection is closed")
        if self.is_silent:
            await trio.sleep_forever()
        try:
            await server.cores.work(work, None if server.cancels else self._leave)
        except trio.Cancelled:
            self.is_alive = server.cancels and not server.cores.frozen and not self.is_silent
            raise

    def close(self) -> None:
        """Say goodbye. While the server still works on a query of this session, it keeps its place."""
        runs_on = not self.is_alive and not self.server.cancels
        self.is_alive = False
        if not runs_on:
            self._leave()

    def _leave(self) -> None:
        self.server.sessions.pop(self, None)


class ModelServer:
    """A database server.

    Args:
      max_connections: places for sessions, those included that are being opened.
      cores: what all sessions share.
      connect_work: seconds of a core that opening a session takes. Half of it is spent before the
        server knows that it is full.
      latency: seconds from an attempt to connect to the server's first word.
      cancels: whether a query whose client gives up is cancelled. If not, it runs on, and its
        connection is lost; its place is free when the query ends.
    """

    def __init__(
        self,
        *,
        max_connections: float = inf,
        cores: float = 8,
        connect_work: float = 0.004,
        latency: float = 0.001,
        cancels: bool = True,
    ) -> None:
        self.max_connections = max_connections
        self.connect_work = connect_work
        self.latency = latency
        self.cancels = cancels
        self.cores = Cores(cores)
        self.sessions: dict[ModelConnection, None] = {}
        """All that take a place, in the order in which they came."""
        self.most_sessions = 0
        self.attempts: list[float] = []
        """When each attempt to connect was made."""
        self.opened: list[float] = []
        """When each session was opened."""
        self.refused: list[float] = []
        """When each attempt was refused, because the server was down or full."""
        self._is_down = False
        self._is_silent = False

    async def connect(self) -> ModelConnection:
        """Open a session. Raises `ServerDown`, `ServerFull` or `ServerGone`."""
        self.attempts.append(trio.current_time())
        await sleep(self.latency)
        if self._is_silent:
            await trio.sleep_forever()
        if self._is_down:
            self.refused.append(trio.current_time())
            raise ServerDown("connection refused")
        await self.cores.work(self.connect_work / 2)
        if len(self.sessions) >= self.max_connections:
            self.refused.append(trio.current_time())
            raise ServerFull("sorry, too many clients already")
        connection = ModelConnection(self)
        self.sessions[connection] = None
        self.most_sessions = max(self.most_sessions, len(self.sessions))
        try:
            await self.cores.work(self.connect_work / 2)
        except BaseException:
            self.sessions.pop(connection, None)
            raise
        self.opened.append(trio.current_time())
        return connection

    # -- What befalls it -----------------------------------------------------------------------------

    def stop(self) -> None:
        """Die: all connections end, and attempts to connect are refused."""
        self._is_down = True
        self.freeze(False)
        for connection in self.sessions:
            connection.is_alive = False
            connection.watch.cancel()
        self.sessions.clear()
        self.cores.drop_all(ServerGone("the server closed the connection unexpectedly"))

    def start(self) -> None:
        """Take connections again."""
        self._is_down = self._is_silent = False

    def freeze(self, frozen: bool = True) -> None:
        """Answer nothing, neither a query nor an attempt to connect; or go on."""
        self.cores.freeze(frozen)

    async def restart(self, down_for: float) -> None:
        """Stop, and start after so many seconds."""
        self.stop()
        await trio.sleep(down_for)
        self.start()

    async def pause(self, seconds: float) -> None:
        """Freeze for so many seconds."""
        self.freeze()
        await trio.sleep(seconds)
        self.freeze(False)

    async def fail_over(self, after: float, *, silently: bool = False) -> None:
        """Lose the server, and have another take over after so many seconds.

        The old one dies. Or it vanishes `silently`, as if its network had: no connection hangs up, none
        answers ever again, and attempts to connect hang, too.
        """
        if not silently:
            await self.restart(after)
            return
        self._is_silent = True
        for connection in self.sessions:
            connection.is_silent = True
        self.sessions.clear()  # the places are those of the new server
        self.cores.drop_all(None)
        await trio.sleep(after)
        self.start()


class ModelManager(whitepool.WorkerManager[ModelConnection]):
    """Tells a pool how to treat connections to a model server."""

    def __init__(self, server: ModelServer) -> None:
        self.server = server
        self.opened: list[float] = []
        """When each connection of this pool was opened."""

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[ModelConnection]:
        connection = await self.server.connect()
        self.opened.append(trio.current_time())
        try:
            with connection.watch:
                yield connection
        finally:
            connection.close()
        # This takes the place of the pool's own watch for hang-ups, which needs descriptors.
        if connection.watch.cancelled_caught:
            raise ServerGone("the server closed the connection unexpectedly")

    def is_alive(self, worker: ModelConnection) -> bool:
        return worker.is_alive

    async def check(self, worker: ModelConnection) -> None:
        await worker.query(0.0001)

    def _is_full(self, error: Exception) -> bool:
        return isinstance(error, ServerFull)


@dataclass
class Fleet:
    """Pools of as many processes, in one `trio.run`. See `open_fleet`."""

    server: ModelServer
    sessions: list[whitepool.Session[ModelConnection]] = field(default_factory=list)
    """Those of the pools that are open."""
    managers: list[ModelManager] = field(default_factory=list)
    """Those of all pools."""
    failed: list[whitepool.PoolStartError] = field(default_factory=list)
    """Why the others could not be opened."""

    def count(self, number: str) -> int:
        """Return the sum of a number of all pools' statistics."""
        return sum(getattr(session.statistics(), number) for session in self.sessions)

    @property
    def alive(self) -> int:
        """Workers that are open."""
        return self.count("idle") + self.count("in_use") + self.count("resetting")


@asynccontextmanager
async def open_fleet(
    server: ModelServer, pools: int, *, over: float = 0.0, waits: bool = True, **options: Any
) -> AsyncIterator[Fleet]:
    """Open so many pools for the length of a block, each with the `options`.

    Args:
      over: seconds over which the pools start, one after the other. 0: all at once.
      waits: whether to wait until each pool is open, or has failed to open.
    """
    fleet = Fleet(server)
    settled = trio.Event()

    async def run_pool(number: int) -> None:
        await trio.sleep(over * number / pools)
        manager = ModelManager(server)
        fleet.managers.append(manager)
        pool = whitepool.open_pool(manager, name=f"pool {number + 1}", **options)
        try:
            async with pool as session:
                fleet.sessions.append(session)
                note_if_settled()
                await trio.sleep_forever()
        except whitepool.PoolStartError as error:
            fleet.failed.append(error)
            note_if_settled()

    def note_if_settled() -> None:
        if len(fleet.sessions) + len(fleet.failed) == pools:
            settled.set()

    async with trio.open_nursery() as processes:
        for number in range(pools):
            processes.start_soon(run_pool, number)
        if waits:
            await settled.wait()
        yield fleet
        processes.cancel_scope.cancel()


def simulate(main: Callable[..., Awaitable[T]], *arguments: Any, seed: int = 7) -> T:
    """Run an async function in a simulation, which is the same each time for a seed.

    Each pool is a process of its own: a checkout there lets no tasks of other processes run.
    """
    with seeded(seed), mock.patch("whitepool._session.BUSY_TIME_OF_TESTS", inf):
        return trio.run(main, *arguments, clock=JumpingClock())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let a seed determine what is random in a block, and in which order Trio runs its tasks there."""
    schedule, chance = _run._r.getstate(), random.getstate()
    with mock.patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
        _run._r.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            _run._r.setstate(schedule)
            random.setstate(chance)
