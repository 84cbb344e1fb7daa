"""Mistakes in how a pool is used are named at once, in words that say what to do. (Rule 13.)"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any
from unittest.mock import Mock

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, hang

import whitepool

Session = whitepool.Session[Tool]


# -- Threads -------------------------------------------------------------------------------------------


async def enter(session: Session) -> None:
    async with session.worker():
        pass


ASYNC_CALLS: dict[str, Callable[[Session], Awaitable[object]]] = {
    "block_checkout": lambda session: session.block_checkout(),
    "nonblock_checkout": lambda session: session.nonblock_checkout(),
    "worker": enter,
    "safe_shutdown": lambda session: session.safe_shutdown(0),
}
PLAIN_CALLS: dict[str, Callable[[Session, whitepool.Resource[Tool]], object]] = {
    "checkin": lambda session, resource: session.checkin(resource),
    "destroyed": lambda session, resource: session.destroyed(resource),
    "checkout_nowait": lambda session, _: session.checkout_nowait(),
    "statistics": lambda session, _: session.statistics(),
}


async def check_untouched(session: Session) -> None:
    now = session.statistics()
    assert (now.state, now.idle, now.in_use, now.checkouts) == ("ready", 1, 1, 1)
    session._supervisor.roster.check()


@pytest.mark.parametrize("call", PLAIN_CALLS)
async def test_a_plain_call_from_another_thread(call: str) -> None:
    """It raises, and nothing has been touched; the way out that the message names works."""
    async with whitepool.open_pool(Workshop().make, pool_size=2) as session:
        resource = await session.block_checkout()
        with pytest.raises(RuntimeError, match=r"trio\.from_thread\.run_sync"):
            await trio.to_thread.run_sync(PLAIN_CALLS[call], session, resource)
        await check_untouched(session)
        await trio.to_thread.run_sync(trio.from_thread.run_sync, session.checkin, resource)
        assert session.statistics().idle == 2


@pytest.mark.parametrize("call", ASYNC_CALLS)
@pytest.mark.parametrize("run", [trio.run, lambda function, *a: asyncio.run(function(*a))])
async def test_an_async_call_from_another_loop(call: str, run: Callable[..., object]) -> None:
    """Of another `trio.run`, or of asyncio, in another thread."""
    async with whitepool.open_pool(Workshop().make, pool_size=2) as session:
        resource = await session.block_checkout()
        with pytest.raises(RuntimeError, match=r"trio\.from_thread\.run\(session\.block_checkout\)"):
            await trio.to_thread.run_sync(run, ASYNC_CALLS[call], session)
        await check_untouched(session)
        session.checkin(resource)


async def test_a_session_may_be_shown_in_another_thread() -> None:
    """A debugger, or a logger, may ask for its repr."""
    async with whitepool.open_pool(Workshop().make, name="mine") as session:
        text = await trio.to_thread.run_sync(repr, session)
        assert "mine" in text


async def test_a_resource_is_collected_in_any_thread(recwarn: pytest.WarningsRecorder) -> None:
    """Forgetting one is a leak, whichever thread drops it last."""
    async with whitepool.open_pool(Workshop().make, pool_size=1) as session:
        held = [await session.block_checkout()]
        thread = threading.Thread(target=held.clear)
        thread.start()
        await trio.to_thread.run_sync(thread.join)
        while not session.statistics().leaked:
            await trio.lowlevel.checkpoint()
    assert recwarn.pop(ResourceWarning)


# -- Blocks -----------------------------------------------------------------------------------------


async def test_a_block_that_is_not_entered_as_one() -> None:
    """It is awaited, or `async` is missing: the error says what to write, and nothing is opened."""
    workshop = Workshop()
    opening: Any = whitepool.open_pool(workshop.make, pool_size=1)
    with pytest.raises(TypeError, match=r"write `async with open_pool\(\.\.\.\) as session:`"):
        await opening
    with pytest.raises(TypeError, match=r"write `async with open_pool"), opening:
        pass
    assert not workshop.tools
    async with opening as session:
        with pytest.raises(TypeError, match=r"write `async with session\.worker\(\) as worker:`"):
            await session.worker()
        block: Any = session.worker()
        with pytest.raises(TypeError, match=r"write `async with session\.worker"), block:
            pass
        assert session.statistics().checkouts == 0


# -- Without Trio, and without packages ----------------------------------------------------------------


def test_a_pool_on_asyncio() -> None:
    """It says that it needs Trio."""

    async def main() -> None:
        async with whitepool.open_pool(Workshop().make):
            pass

    with pytest.raises(RuntimeError, match=r"trio\.run, not with asyncio\.run"):
        asyncio.run(main())


async def test_a_factory_that_needs_asyncio(autojump_clock: MockClock) -> None:
    """Opening the pool ends at once, as another attempt would only fail as well."""
    began = trio.current_time()

    async def connect() -> Tool:
        asyncio.get_running_loop()
        raise AssertionError

    with pytest.raises(whitepool.PoolStartError, match="needs asyncio, and this is Trio") as refusal:
        async with whitepool.open_pool(connect):
            pass
    assert isinstance(refusal.value.__cause__, RuntimeError)
    assert trio.current_time() == began


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("whitepool.postgres", "psycopg", "postgres"),
        ("whitepool.telemetry", "opentelemetry", "otel"),
        ("whitepool.live", "rich", "live"),
    ],
)
def test_a_package_that_is_not_installed(module: str, missing: str, extra: str) -> None:
    """The error names the extra that brings it."""
    script = f"import sys; sys.modules[{missing!r}] = None; import {module}"  # as if it were not there
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 1
    assert f"pip install 'whitepool[{extra}]'" in result.stderr


# -- What is given to a pool ---------------------------------------------------------------------------


async def needs_an_argument(dsn: str) -> Tool:
    raise AssertionError(dsn)


async def forgot_the_decorator() -> AsyncIterator[Tool]:
    yield await Workshop().make()


class Misspelt(whitepool.WorkerManager[Tool]):
    async def creat(self) -> Tool:
        raise AssertionError


class Empty(whitepool.WorkerManager[Tool]):
    pass


class AsyncIsAlive(Manager):
    async def is_alive(self, worker: Tool) -> bool:  # type: ignore[override]
        return True


class AsyncNeedsReset(Manager):
    async def needs_reset(self, worker: Tool) -> bool:  # type: ignore[override]
        return True


class AsyncFileno(Manager):
    async def fileno(self, worker: Tool) -> int:  # type: ignore[override]
        return 0


class BareLifespan(Manager):
    async def lifespan(self) -> AsyncIterator[Tool]:  # type: ignore[override]
        yield await self.create()


class ResetsNothing(Manager):
    async def reset(self) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (needs_an_argument, "factory is called without arguments"),
        (forgot_the_decorator, "asynccontextmanager"),
        (7, "factory must be callable"),
        (Misspelt(), "neither create nor lifespan: did you mean that by creat?"),
        (Empty(), "Empty implements neither create nor lifespan"),
        (AsyncIsAlive(Workshop()), "is_alive must be a plain function"),
        (AsyncNeedsReset(Workshop()), "needs_reset must be a plain function"),
        (AsyncFileno(Workshop()), "fileno must be a plain function"),
        (BareLifespan(Workshop()), "asynccontextmanager"),
        (ResetsNothing(Workshop()), r"reset is called with \(worker\)"),
    ],
)
def test_a_factory_that_cannot_work(factory: Any, says: str) -> None:
    """It is refused where the pool is made, not after `start_timeout`."""
    with pytest.raises(TypeError, match=says.replace("?", r"\?")):
        whitepool.Pool(factory)


class PlainCreate(whitepool.WorkerManager[Tool]):
    def create(self) -> Tool:  # type: ignore[override]
        return Tool(Workshop(), 1)


class PlainLifespan(Manager):
    def lifespan(self) -> Tool:  # type: ignore[override]
        return Tool(self.shop, 1)


@pytest.mark.parametrize("factory", [PlainCreate(), PlainLifespan(Workshop()), lambda: 7])
async def test_a_factory_that_turns_out_not_to_work(factory: Any, autojump_clock: MockClock) -> None:
    """What can't be known before is known after the first call, and not called again."""
    began = trio.current_time()
    with pytest.raises(whitepool.PoolStartError, match="must"):
        async with whitepool.open_pool(factory, pool_size=1):
            pass
    assert trio.current_time() == began


@pytest.mark.parametrize("hook", ["on_create", "on_checkout", "on_checkin", "on_destroy"])
def test_a_hook_without_its_argument(hook: str) -> None:
    """It is refused where the hooks are made."""
    with pytest.raises(TypeError, match=rf"hooks\.{hook} is called with \((worker|reason)\)"):
        whitepool.Hooks(**{hook: lambda: None})


@pytest.mark.parametrize("hook", ["before_acquire", "after_release"])
def test_a_hook_with_an_argument_too_many(hook: str) -> None:
    with pytest.raises(TypeError, match=rf"hooks\.{hook} is called without arguments"):
        whitepool.Hooks(**{hook: lambda worker: None})


def test_a_hook_whose_signature_is_not_known() -> None:
    """Some builtins have none: they are taken as they are."""
    assert whitepool.Hooks(on_checkin=dict.update).on_checkin is not None


def test_a_pool_that_could_have_no_worker() -> None:
    """No client could ever be served."""
    with pytest.raises(ValueError, match="pool_size and max_overflow are both 0"):
        whitepool.Pool(Workshop().make, pool_size=0, max_overflow=0)


@pytest.mark.parametrize("call", [whitepool.Pool, whitepool.open_pool])
def test_a_misspelt_option(call: Callable[..., object]) -> None:
    """The error says which option was meant."""
    with pytest.raises(TypeError, match=r"no option 'poolsize': did you mean pool_size\?"):
        call(Workshop().make, poolsize=5)
    with pytest.raises(TypeError, match=r"no option 'colour'$"):
        call(Workshop().make, colour="red")


async def test_the_same_pool_twice_at_once() -> None:
    """It is refused; one after the other is fine."""
    pool = whitepool.Pool(Workshop().make, name="mine", pool_size=1)
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            session: Session = await nursery.start(pool.run_service)
            with pytest.raises(RuntimeError, match="mine is running"), trio.fail_after(5):
                await pool.run_service()
            async with session.worker():
                pass
            await session.safe_shutdown()


# -- What is given back --------------------------------------------------------------------------------


async def test_something_else_is_given_back() -> None:
    """The error says what was given, and what is wanted."""
    async with whitepool.open_pool(Workshop().make, pool_size=1) as session:
        resource = await session.block_checkout()
        anything: Any = resource.get()
        for give_back in (session.checkin, session.destroyed):
            with pytest.raises(TypeError, match=r"a whitepool\.Resource\), not Tool$"):
                give_back(anything)
        anything = session.block_checkout()
        with pytest.raises(TypeError, match=r"write `await` before block_checkout\(\)"):
            session.checkin(anything)
        anything.close()
        anything = session.worker()
        with pytest.raises(TypeError, match=r"leaving its block returns the worker"):
            session.checkin(anything)
        session.checkin(resource)


# -- What an error says --------------------------------------------------------------------------------


async def refused(_: int) -> None:
    raise OSError("connection refused")


async def test_why_a_pool_does_not_open(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """The message has the reason, and the log has it within a second, not after `start_timeout`."""
    shop = Workshop()
    shop.before_open = refused

    async def look() -> None:
        await trio.sleep(1)
        assert "start_failed" in caplog.text
        assert "OSError: connection refused" in caplog.text

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with pytest.raises(whitepool.PoolStartError) as caught:
            async with whitepool.open_pool(shop.make, name="mine", pool_size=5):
                pass
    assert str(caught.value) == (
        "mine: 0 of 5 workers started within 30 s; the last start failed: OSError: connection refused"
    )


async def test_why_a_checkout_timed_out(autojump_clock: MockClock) -> None:
    """The message has the timeout, how the pool stood, and why no worker starts. (Rule 4.)"""
    shop = Workshop()
    shop.before_open = refused
    async with whitepool.open_pool(shop.make, name="mine", lazy=True) as session:
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=0.5)
    assert str(caught.value).startswith("mine has had no worker within 0.5 s: 0 in use, ")
    assert str(caught.value).endswith("the last start failed: OSError: connection refused")
    assert isinstance(caught.value.__cause__, OSError)


async def held_by_block(session: Session) -> None:
    async with session.worker():
        await session.block_checkout(timeout=1)


async def held_by_variable(session: Session) -> None:
    resource = await session.block_checkout()
    try:
        await held_by_caller(session)
    finally:
        session.checkin(resource)


async def held_by_caller(session: Session) -> None:
    async with session.worker(timeout=1) as _:
        pass


async def held_as_worker(session: Session) -> None:
    async with session.worker() as tool:
        await session.block_checkout(timeout=1)
        print(tool)


@pytest.mark.parametrize("nested", [held_by_block, held_by_variable, held_as_worker])
async def test_a_nested_checkout(
    nested: Callable[[Session], Awaitable[None]], autojump_clock: MockClock
) -> None:
    """A task that waits for a worker while it holds the last one is told so."""
    async with whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as session:
        with pytest.raises(whitepool.CheckoutTimeout, match="seems to hold a worker"):
            await nested(session)


@pytest.mark.parametrize("by", ["block_checkout", "worker"])
async def test_a_checkout_that_is_not_nested(by: str, autojump_clock: MockClock) -> None:
    """Another task holds the last worker: that is no mistake."""
    ends: list[str] = []
    async with whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as session:

        async def wait() -> None:
            with pytest.raises(whitepool.CheckoutTimeout) as caught:
                if by == "worker":
                    await enter(session)
                else:
                    await session.block_checkout()
            ends.append(str(caught.value))

        async with session.worker(), trio.open_nursery() as nursery:
            nursery.start_soon(wait)
    assert len(ends) == 1
    assert "seems to hold" not in ends[0]


async def test_a_second_checkout_that_waits_for_a_start(autojump_clock: MockClock) -> None:
    """There would be a worker for it, if that start did not take so long: that is no mistake."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1, max_overflow=1) as session:
        shop.before_open = hang
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await held_by_block(session)
    assert "1 starting" in str(caught.value)
    assert "seems to hold" not in str(caught.value)


async def test_a_group_is_named_by_its_errors(caplog: pytest.LogCaptureFixture) -> None:
    """A log line names the types and the messages, and is never empty."""

    async def crash_twice(_: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash, KeyError("host"))
            nursery.start_soon(crash, ConnectionResetError())

    async def crash(error: Exception) -> None:
        raise error

    shop = Workshop()
    shop.before_open = crash_twice
    with pytest.raises(whitepool.PoolStartError):
        async with whitepool.open_pool(shop.make, start_timeout=0.01):
            pass
    told = caplog.records[0].__dict__["error"]
    assert set(told.split("; ")) == {"KeyError: 'host'", "ConnectionResetError"}


# -- A worker that dies under its client ---------------------------------------------------------------


async def test_a_worker_that_crashes_while_it_is_checked_out() -> None:
    """Its client is told at once, and asking for it tells why."""
    shop = Workshop()
    told = trio.Event()
    async with whitepool.open_pool(shop.with_nursery, pool_size=1) as session:
        resource = await session.block_checkout()

        async def wait() -> None:
            await resource.lost.wait()
            told.set()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                assert not told.is_set()
                resource.get().crash.set()
        await wait_all_tasks_blocked()
        with pytest.raises(
            whitepool.WorkerLost, match="RuntimeError: the background task crashed"
        ) as e:
            resource.get()
        assert isinstance(e.value.__cause__, RuntimeError)
        assert resource.lost.is_set()
        session.checkin(resource)
        with pytest.raises(whitepool.NotCheckedOut):
            print(resource.lost)
        async with session.worker() as tool:
            assert not tool.closed


async def test_a_client_that_asks_late() -> None:
    """The event is set although nothing waited for it when the worker crashed."""
    shop = Workshop()
    async with whitepool.open_pool(shop.with_nursery, pool_size=1) as session:
        resource = await session.block_checkout()
        resource.get().crash.set()
        await wait_all_tasks_blocked()
        assert resource.lost.is_set()
        session.checkin(resource)


async def test_why_it_crashed_is_known_when_it_is_closed() -> None:
    """Until then the client is told that it crashed, without a cause."""
    shop = Workshop()
    proceed = trio.Event()

    async def close_slowly(_: Tool) -> None:
        await proceed.wait()

    shop.before_close = close_slowly
    async with whitepool.open_pool(shop.with_nursery, pool_size=1) as session:
        resource = await session.block_checkout()
        resource.get().crash.set()
        await resource.lost.wait()
        with pytest.raises(whitepool.WorkerLost) as caught:
            resource.get()
        assert caught.value.__cause__ is None
        assert str(caught.value) == "the worker crashed while it was checked out"
        proceed.set()
        await wait_all_tasks_blocked()
        with pytest.raises(whitepool.WorkerLost, match="the background task crashed"):
            resource.get()
        session.checkin(resource)


async def test_a_worker_that_the_pool_has_closed_can_be_looked_at() -> None:
    """Only after a crash there is an error: a client may still need what it had."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1) as session:
        resource = await session.block_checkout()
        await session.safe_shutdown(0)
        assert resource.get().closed
        assert resource.lost.is_set()
        session.checkin(resource)


async def test_a_worker_that_leaves_after_its_checkout() -> None:
    """What the client was given to wait for is not set: nothing was lost under it."""
    async with whitepool.open_pool(Workshop().make, pool_size=1) as session:
        resource = await session.block_checkout()
        lost = resource.lost
        assert resource.lost is lost
        session.checkin(resource)
        await session.safe_shutdown()
        assert session.statistics().retired == 1
        assert not lost.is_set()


async def test_a_worker_that_the_pool_closes_under_its_client() -> None:
    """A client that waits for `lost` does not wait for ever, whatever the reason."""
    async with whitepool.open_pool(Workshop().make, pool_size=1) as session:
        resource = await session.block_checkout()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(resource.lost.wait)
            await session.safe_shutdown(0)
        session.checkin(resource)


async def test_a_variable_that_outlives_its_block(autojump_clock: MockClock) -> None:
    """It still refers to a worker that another client has by now: that is no nested checkout."""
    ends: list[str] = []

    async def client(session: Session) -> None:
        async with session.worker() as tool:
            await trio.sleep(1)
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=0.5)
        ends.append(f"{tool}: {caught.value}")

    async with (
        whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(client, session)
        await trio.sleep(0.5)
        nursery.start_soon(hold, session)
    assert len(ends) == 1
    assert "seems to hold" not in ends[0]


async def hold(session: Session) -> None:
    async with session.worker():
        await trio.sleep(5)


async def test_looking_for_a_nested_checkout_asks_no_object(autojump_clock: MockClock) -> None:
    """An object of the user's may do anything when it is asked for its class."""

    class Lazy:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("asked")

        @__class__.setter
        def __class__(self, value: Any) -> None: ...

    async def client(session: Session) -> None:
        lazy = Lazy()
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(timeout=0.5)
        del lazy

    async with (
        whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as session,
        session.worker(),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(client, session)


def test_a_decorator_that_adds_arguments() -> None:
    """What it wraps says nothing about how it is called."""

    def with_settings(function: Callable[..., Any]) -> Callable[[], Any]:
        @wraps(function)
        def call() -> Any:
            return function("settings")

        return call

    @with_settings
    async def factory(settings: str) -> Tool:
        raise AssertionError(settings)

    assert whitepool.Pool(factory).factory is factory
    with pytest.raises(TypeError, match="factory is called without arguments"):
        whitepool.Pool(asynccontextmanager(needs_a_name))  # type: ignore[arg-type]


async def needs_a_name(name: str) -> AsyncIterator[Tool]:
    raise AssertionError(name)
    yield


async def test_an_error_that_cannot_be_shown(autojump_clock: MockClock) -> None:
    """The pool survives it, and names its type."""

    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise IndexError

    async def fail(_: int) -> None:
        raise Unspeakable

    shop = Workshop()
    shop.before_open = fail
    with pytest.raises(whitepool.PoolStartError, match=r"the last start failed: Unspeakable$"):
        async with whitepool.open_pool(shop.make, start_timeout=1):
            pass


async def test_a_pool_that_could_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be tried again."""
    pool = whitepool.Pool(Workshop().make, pool_size=1)
    with monkeypatch.context() as patch:
        patch.setattr("whitepool._pool.Supervisor", Mock(side_effect=OSError("no descriptors")))
        with pytest.raises(OSError, match="no descriptors"):
            await pool.run_service()
    async with trio.open_nursery() as nursery:
        session: Session = await nursery.start(pool.run_service)
        await session.safe_shutdown()


async def test_a_worker_of_another_pool(autojump_clock: MockClock) -> None:
    """A task may hold one while it waits for one of this pool: they don't wait for each other."""
    async with (
        whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as session,
        whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as other,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(hold, session)
        async with other.worker():
            await trio.sleep(0.1)
            with pytest.raises(whitepool.CheckoutTimeout) as caught:
                await session.block_checkout(timeout=0.5)
        assert "seems to hold" not in str(caught.value)
