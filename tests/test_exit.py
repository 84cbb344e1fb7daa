"""How programs with a pool end: by Ctrl-C, in the middle of things, and silently.

Each scenario runs in a child process, which is this file: ``python test_exit.py SCENARIO [DSN]``.
"""

from __future__ import annotations

import builtins
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
import trio
from proxy import open_proxy
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from workshop import Tool, Workshop, check_books

import whitepool
from whitepool._worker_task import WorkerTask
from whitepool.postgres import TrioConnection, connect, open_pool

BOUND = 15
"""Seconds after which a child is taken for hanging."""


def say(word: str) -> None:
    print(word, flush=True)


def python(*arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *options, __file__, *arguments]


def run(*arguments: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run a scenario to its end; return its exit code, stdout and stderr."""
    command = python(*arguments, options=options)
    child = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)
    return child.returncode, child.stdout, child.stderr


@contextmanager
def started(*arguments: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run a scenario until it is ready, and hand it over."""
    command = python(*arguments, options=options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n", child.communicate()
            yield child
        finally:
            child.kill()


def interrupt(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Press Ctrl-C, and wait for the end; press it again, as one does, where nothing happens."""
    for _ in range(3):
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            out, error = child.communicate(timeout=BOUND / 3)
            return child.returncode, out, error
    raise TimeoutError("it does not end")


# -- Ctrl-C --------------------------------------------------------------------------------------------


def only_interrupts(error: BaseException) -> bool:
    """Say whether this is a Ctrl-C, and nothing else; nurseries put groups around it."""
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return all(map(only_interrupts, inner)) if inner else isinstance(error, KeyboardInterrupt)


def report(session: whitepool.Session[Any], connections: list[TrioConnection[Any]]) -> None:
    """Tell the parent how things stood at the end."""
    now = session.statistics()
    check_books(session)
    still_open = sum(not connection.closed for connection in connections)
    say(f"{now.state}, in use {now.in_use}, idle {now.idle}, open {still_open}")


async def under_load(dsn: str) -> None:
    """Clients query, hold transactions, and wait for workers."""
    connections: list[TrioConnection[Any]] = []
    served = 0

    async def client(session: whitepool.Session[TrioConnection[Any]]) -> None:
        nonlocal served
        while True:
            async with session.worker() as connection, connection.transaction():
                await connection.execute("SELECT pg_sleep(0.001)")
            served += 1
            if served == 100:
                say("ready")

    session = None
    try:
        async with (
            open_pool(
                dsn,
                pool_size=4,
                max_overflow=2,
                hooks=whitepool.Hooks(on_create=connections.append),
            ) as session,
            trio.open_nursery() as nursery,
        ):
            for _ in range(20):
                nursery.start_soon(client, session)
    finally:
        assert session is not None
        report(session, connections)


@pytest.mark.parametrize("after", [0.0, 0.005, 0.02])
def test_ctrl_c_under_load(dsn: str, after: float) -> None:
    """Whatever it hits, it ends the program as KeyboardInterrupt, and everything is closed."""
    with started("under_load", dsn) as child:
        time.sleep(after)
        # Python itself loses a Ctrl-C that strikes in the middle of a weak reference's end, say.
        code, out, error = interrupt(child)
    assert (code, out) == (-signal.SIGINT, "closed, in use 0, idle 0, open 0\n"), error
    # Not always at the end: where it strikes inside contextlib, Python may have to say of the
    # generator that it cut off that the run was over when it was collected.
    assert "KeyboardInterrupt" in error


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_ctrl_c_at_the_end_of_an_operation(dsn: str) -> None:
    """A Ctrl-C may strike after the lock's end was called, and before it is awaited.

    Then the task that is interrupted, and would roll back, must not wait for itself for ever.
    """
    with trio.fail_after(3):
        async with await connect(dsn) as connection:
            await connection.lock.__aenter__()
            # What psycopg does, up to the instruction after which the signal is handled.
            never_awaited = connection.lock.__aexit__(None, None, None)
            del never_awaited
            with trio.fail_after(1):
                await connection.execute("SELECT 1")


async def during_opening() -> None:
    """One worker is open, one is on the way; they will never be enough."""
    shop = Workshop()

    async def second_hangs(attempt: int) -> None:
        if attempt == 2:
            say("ready")
            await trio.sleep_forever()

    shop.before_open = second_hangs
    try:
        async with whitepool.open_pool(shop.make, pool_size=2, max_starting=1):
            say("open")
    finally:
        say(f"{len(shop.tools)} opened, {len(shop.alive)} left open, {shop.opening} on the way")


def test_ctrl_c_during_opening() -> None:
    """It ends the opening, and what was open already is closed."""
    with started("during_opening") as child:
        code, out, error = interrupt(child)
    assert (code, out) == (-signal.SIGINT, "1 opened, 0 left open, 0 on the way\n"), error
    assert "Group" not in error


async def during_draining() -> None:
    """A client has a worker, and never returns it."""
    shop = Workshop()
    session = None
    try:
        async with whitepool.open_pool(shop.make, pool_size=2) as session:
            resource = await session.block_checkout()
            trio.lowlevel.spawn_system_task(when_draining, session)
    finally:
        assert session is not None
        now = session.statistics()
        say(f"{now.state}, {len(shop.alive)} left open")
        session.checkin(resource)


async def when_draining(session: whitepool.Session[Any]) -> None:
    while session.statistics().state != "draining":
        await trio.sleep(0.001)
    say("ready")


def test_ctrl_c_during_draining() -> None:
    """It ends the waiting for workers that clients hold: they are closed."""
    with started("during_draining") as child:
        code, out, error = interrupt(child)
    assert (code, out) == (-signal.SIGINT, "closed, 0 left open\n"), error
    assert "Group" not in error


async def during_closing() -> None:
    """Closing takes its time, as a worker's peer does not answer."""
    shop = Workshop()

    async def hangs(_: Tool) -> None:
        say("ready")
        await trio.sleep_forever()

    shop.before_close = hangs
    session = None
    try:
        async with whitepool.open_pool(shop.make, pool_size=1, close_timeout=0.5) as session:
            pass
    finally:
        assert session is not None
        say(session.statistics().state)


def test_ctrl_c_during_closing() -> None:
    """It does not cut the closing short, which has a limit of its own, and is not lost."""
    with started("during_closing") as child:
        code, out, error = interrupt(child)
    assert (code, out) == (-signal.SIGINT, "closed\n"), error
    assert "Group" not in error


async def while_a_worker_is_evicted(times: str) -> None:
    """Ctrl-C comes at the worst moment, and the user is impatient; a client has one of the workers."""
    shop = Workshop()
    close = WorkerTask.close
    pressed = 0

    def close_interrupted(task: WorkerTask[Any], *, is_open: bool) -> None:
        nonlocal pressed
        if pressed < int(times):
            pressed += 1
            signal.raise_signal(signal.SIGINT)
        close(task, is_open=is_open)

    session = None
    try:
        async with whitepool.open_pool(shop.make, pool_size=4) as session:
            resource = await session.block_checkout()
            WorkerTask.close = close_interrupted  # type: ignore[assignment, method-assign]
    finally:
        assert session is not None
        now = session.statistics()
        say(f"{now.state}, {len(shop.alive)} left open")
        check_books(session)
        session.checkin(resource)


@pytest.mark.parametrize("times", ["1", "4"])
def test_ctrl_c_while_a_worker_is_evicted(times: str) -> None:
    """Wherever it strikes, the pool closes all of them, and the program ends."""
    code, out, error = run("while_a_worker_is_evicted", times)
    assert (code, out) == (-signal.SIGINT, "closed, 0 left open\n"), error


# -- The end of the interpreter ------------------------------------------------------------------------

KEEP: list[Any] = []


async def out_of_a_closed_pool() -> None:
    """Resources are never returned, and outlive their pool in places that go at different times."""
    cycle: list[Any] = []
    cycle.append(cycle)
    gc.disable()
    last: list[Any] = []
    builtins.last = last  # type: ignore[attr-defined]  # they go when most modules are gone
    async with whitepool.open_pool(Workshop().make, pool_size=3, shutdown_timeout=0) as session:
        for place in (KEEP, cycle, last):
            place.append(await session.block_checkout())
            place.append(session)
        say("ready")


def out_in_a_daemon_thread() -> None:
    """The pool lives in a thread that the interpreter's end freezes, with a resource out."""
    ready = threading.Event()

    async def service() -> None:
        async with whitepool.open_pool(Workshop().make, pool_size=2) as session:
            builtins.last = [await session.block_checkout()]  # type: ignore[attr-defined]
            KEEP.append(await session.block_checkout())
            ready.set()
            await trio.sleep_forever()

    threading.Thread(target=trio.run, args=(service,), daemon=True).start()
    ready.wait()
    say("ready")


async def out_at_a_crash() -> None:
    """The program fails while a resource is out, and the traceback keeps it alive."""
    async with whitepool.open_pool(Workshop().make, pool_size=1) as session:
        resource = await session.block_checkout()
        say("ready")
        raise SystemExit(0 if resource else 1)


@pytest.mark.parametrize("scenario", [out_of_a_closed_pool, out_in_a_daemon_thread, out_at_a_crash])
def test_a_resource_that_is_out_at_the_end(scenario: Callable[[], Any]) -> None:
    """A resource that the interpreter takes down with it leaves nothing on stderr."""
    with started(scenario.__name__, options=("-X", "dev")) as development:
        assert run(scenario.__name__) == (0, "ready\n", "")
        out, error = development.communicate(timeout=BOUND)
    assert (development.returncode, out) == (0, "")
    # In development mode it may be called what it is.
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    complaints = [line for line in error.splitlines() if not line.startswith((" ", "Resource"))]
    assert all("ResourceWarning: <whitepool.Resource" in line for line in complaints), error


async def leaked_in_a_thread() -> None:
    """The garbage collector of another thread finds the resource."""
    gc.disable()
    async with whitepool.open_pool(Workshop().make, pool_size=1, max_overflow=0) as session:
        for _ in range(5):
            cycle: list[Any] = [await session.block_checkout()]
            cycle.append(cycle)
            del cycle
            await trio.to_thread.run_sync(gc.collect)
        async with session.worker():
            say(f"leaked {session.statistics().leaked}")
        check_books(session)


def test_a_leak_that_another_thread_collects() -> None:
    """It is reclaimed by the pool's own thread, each time."""
    assert run("leaked_in_a_thread") == (0, "leaked 5\n", "")


# -- Silence -------------------------------------------------------------------------------------------


async def server_is_down(dsn: str) -> None:
    """The server goes away under a pool, and another pool never finds it."""
    address = conninfo_to_dict(dsn)
    async with open_proxy(str(address["host"]), int(str(address["port"]))) as proxy:
        near = make_conninfo(dsn, **proxy.address)
        async with open_pool(near, pool_size=2, reset_timeout=0.1, check_interval=0.1) as session:
            async with session.worker() as connection:
                await connection.execute("BEGIN")
                proxy.stall()  # it can't be rolled back
            with trio.fail_after(5):
                while not session.statistics().destroyed:
                    await trio.sleep(0.01)
            proxy.down = True
            proxy.cut(reset=True)
            proxy.resume()
            with trio.fail_after(5):
                while session.statistics().lost == 0:
                    await trio.sleep(0.01)
            try:
                await session.block_checkout(timeout=0.5)
            except whitepool.CheckoutTimeout as error:
                assert error.__cause__ is not None
            now = session.statistics()
            assert now.start_failures > 2, now
            assert now.lost + now.destroyed == 2, now
        try:
            async with open_pool(near, start_timeout=0.5):
                pass
        except whitepool.PoolStartError as error:
            assert isinstance(error.__cause__, psycopg.OperationalError)
            say("refused")


def test_silence_is_the_default(dsn: str) -> None:
    """A program that did not set up logging sees nothing of a dead server but its exceptions.

    Nor is anything left behind that Python's development mode would complain of.
    """
    assert run("server_is_down", dsn, options=("-X", "dev")) == (0, "refused\n", "")


if __name__ == "__main__":
    # Where the tests run in the background, Python was started to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    scenario = globals()[sys.argv[1]]
    try:
        if sys.argv[1] == "out_in_a_daemon_thread":
            scenario()
        else:
            trio.run(scenario, *sys.argv[2:])
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or not only_interrupts(error):
            raise
        raise KeyboardInterrupt from error
