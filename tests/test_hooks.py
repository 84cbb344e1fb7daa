"""The six hooks: when they are called, and what happens where one fails."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from workshop import Manager, Tool, Workshop, check_books, hang, raising

import whitepool

NAMES = (
    "on_create",
    "before_acquire",
    "on_checkout",
    "on_checkin",
    "after_release",
    "on_destroy",
)


class Diary:
    """Hooks that write down what they were called with, and in which task."""

    def __init__(self, asynchronous: bool) -> None:
        self.entries: list[tuple[str, tuple[Any, ...], trio.lowlevel.Task]] = []
        self.hooks = whitepool.Hooks(**{name: self._hook(name, asynchronous) for name in NAMES})

    def _hook(self, name: str, asynchronous: bool) -> Any:
        def plain(*arguments: Any) -> None:
            self.entries.append((name, arguments, trio.lowlevel.current_task()))

        async def with_checkpoint(*arguments: Any) -> None:
            await trio.lowlevel.checkpoint()
            plain(*arguments)

        return with_checkpoint if asynchronous else plain

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.entries]


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_the_life_of_a_worker(asynchronous: bool) -> None:
    """Each hook is called at its time, with its argument, in its task; plain or async."""
    diary = Diary(asynchronous)
    async with whitepool.open_pool(Workshop().make, pool_size=1, hooks=diary.hooks) as session:
        async with session.worker() as tool:
            pass
        await trio.testing.wait_all_tasks_blocked()
    assert diary.names == [
        "on_create",
        "before_acquire",
        "on_checkout",
        "on_checkin",
        "after_release",
        "on_destroy",
    ]
    arguments = {name: arguments for name, arguments, _ in diary.entries}
    assert arguments == {
        "on_create": (tool,),
        "before_acquire": (),
        "on_checkout": (tool,),
        "on_checkin": (tool,),
        "after_release": (),
        "on_destroy": ("shutdown",),
    }
    tasks = {name: task for name, _, task in diary.entries}
    here = trio.lowlevel.current_task()
    assert tasks["before_acquire"] is tasks["on_checkout"] is here
    worker_task = tasks["on_create"]
    assert worker_task is not here
    assert tasks["on_checkin"] is tasks["after_release"] is tasks["on_destroy"] is worker_task


async def test_every_kind_of_checkout_calls_them() -> None:
    """Also the one that waits, and the one that does not."""
    diary = Diary(asynchronous=False)
    async with whitepool.open_pool(
        Workshop().make, pool_size=1, max_overflow=0, hooks=diary.hooks
    ) as session:

        async def client() -> None:
            session.checkin(await session.block_checkout())

        async with trio.open_nursery() as nursery:
            resource = session.checkout_nowait()
            nursery.start_soon(client)
            await trio.testing.wait_all_tasks_blocked()
            session.checkin(resource)
        await trio.testing.wait_all_tasks_blocked()
        session.checkin(await session.nonblock_checkout())
        assert diary.names.count("before_acquire") == diary.names.count("on_checkout") == 3


async def test_a_raising_on_create_is_a_failed_start(autojump_clock: trio.testing.MockClock) -> None:
    """The worker is closed, and another is tried."""
    shop = Workshop()

    def refuse_the_first(tool: Tool) -> None:
        if tool.number == 1:
            raise ValueError("not this one")

    async with whitepool.open_pool(
        shop.make, pool_size=1, hooks=whitepool.Hooks(on_create=refuse_the_first)
    ) as session:
        now = session.statistics()
        assert (now.started, now.start_failures, now.idle) == (1, 1, 1)
        assert shop.tools[0].closed


async def test_a_raising_before_acquire_raises_to_the_caller() -> None:
    """The caller gets no worker, and none was taken."""

    def closed_today() -> None:
        raise ValueError("closed today")

    async with whitepool.open_pool(
        Workshop().make, pool_size=1, hooks=whitepool.Hooks(before_acquire=closed_today)
    ) as session:
        for checkout in (session.block_checkout, session.nonblock_checkout):
            with pytest.raises(ValueError, match="closed today"):
                await checkout()
        with pytest.raises(ValueError, match="closed today"):
            session.checkout_nowait()
        assert session.statistics().idle == 1
        assert session.statistics().checkouts == 0


async def test_a_raising_on_checkout_returns_the_worker() -> None:
    """And raises to the caller."""

    async def no(tool: Tool) -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError("no")

    async with whitepool.open_pool(
        Workshop().make, pool_size=1, hooks=whitepool.Hooks(on_checkout=no)
    ) as session:
        for checkout in (session.block_checkout, session.nonblock_checkout):
            with pytest.raises(ValueError, match="no"):
                await checkout()
            assert session.statistics().idle == 1


async def test_a_cancelled_on_checkout_returns_the_worker() -> None:
    """No cancellation is swallowed, no worker lost."""

    async with whitepool.open_pool(
        Workshop().make, pool_size=1, hooks=whitepool.Hooks(on_checkout=hang)
    ) as session:
        with trio.move_on_after(0.01) as scope:
            await session.block_checkout()
        assert scope.cancelled_caught
        assert session.statistics().idle == 1


@pytest.mark.parametrize("how", ["raises", "hangs"])
async def test_a_failing_on_checkin_destroys_the_worker(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Whether it raises, or takes longer than `reset_timeout`."""
    shop = Workshop()
    reasons: list[whitepool.Reason] = []

    async def fail(tool: Tool) -> None:
        if how == "hangs":
            await trio.sleep_forever()
        raise ValueError("no")

    hooks = whitepool.Hooks(on_checkin=fail, on_destroy=reasons.append)
    async with whitepool.open_pool(
        shop.make, pool_size=1, max_overflow=0, reset_timeout=2, hooks=hooks
    ) as session:
        async with session.worker() as tool:
            pass
        async with session.worker() as other:
            assert other is not tool
        assert reasons == ["hook_failed"]
        assert session.statistics().destroyed == 1


@pytest.mark.parametrize("what", ["hook", "reset"])
async def test_after_release_is_for_workers_that_may_be_used_again(what: str) -> None:
    """It is not called for one that leaves, because its hook or its reset has failed."""
    released: list[float] = []
    manager = Manager(Workshop())
    manager.before_reset = raising(OSError("no"))
    hooks = whitepool.Hooks(
        on_checkin=raising(OSError("no")) if what == "hook" else manager.dirty.add,
        after_release=lambda: released.append(trio.current_time()),
    )
    async with whitepool.open_pool(manager, pool_size=1, hooks=hooks) as session:
        async with session.worker():
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().destroyed == 1
        assert not released


class Inspecting(Manager):
    """A manager that looks at each worker after a hook, and may refuse it."""

    def __init__(self) -> None:
        super().__init__(Workshop())
        self.looked_after: list[str] = []
        self.refuses = ""

    def _after_hook(self, worker: Tool, hook: str) -> None:
        self.looked_after.append(hook)
        if hook == self.refuses:
            raise ValueError("the hook has left it open")


@pytest.mark.parametrize("how", ["block_checkout", "nonblock_checkout", "checkout_nowait"])
async def test_what_a_hook_has_left_behind_is_seen(how: str) -> None:
    """After each hook that has a worker, and only after a hook. What a client can't have goes back."""

    async def check_out() -> whitepool.Resource[Tool]:
        made: Any = getattr(session, how)()
        resource: whitepool.Resource[Tool] = made if how == "checkout_nowait" else await made
        return resource

    manager = Inspecting()
    async with whitepool.open_pool(manager, pool_size=1) as session:
        session.checkin(await check_out())
    assert manager.looked_after == []
    hooks = whitepool.Hooks(
        on_create=lambda _: None, on_checkout=lambda _: None, on_checkin=lambda _: None
    )
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0, hooks=hooks) as session:
        session.checkin(await check_out())
        await trio.testing.wait_all_tasks_blocked()
        assert manager.looked_after == ["on_create", "on_checkout", "on_checkin"]
        manager.refuses = "on_checkout"
        with pytest.raises(ValueError, match="left it open"):
            await check_out()
        await trio.testing.wait_all_tasks_blocked()
        assert (session.statistics().idle, session.statistics().destroyed) == (1, 0)
        manager.refuses = "on_checkin"
        session.checkin(await check_out())
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().destroyed == 1


async def test_on_checkin_may_leave_something_to_reset() -> None:
    """It runs before the worker is reset."""
    manager = Manager(Workshop())
    hooks = whitepool.Hooks(on_checkin=manager.dirty.add)
    async with whitepool.open_pool(manager, pool_size=1, hooks=hooks) as session:
        async with session.worker():
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert manager.resets == 1


async def test_what_a_client_has_left_half_done_is_undone_before_the_hook() -> None:
    """As far as `on_checkin` must not see it."""
    manager = Manager(Workshop())
    seen: list[bool] = []

    async def undo(worker: Tool) -> None:
        manager.dirty.discard(worker)

    manager._before_on_checkin = undo  # type: ignore[method-assign]
    hooks = whitepool.Hooks(on_checkin=lambda worker: seen.append(worker in manager.dirty))
    async with whitepool.open_pool(manager, pool_size=1, hooks=hooks) as session:
        async with session.worker() as tool:
            manager.dirty.add(tool)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [False]


async def test_a_hook_alone_makes_no_reset() -> None:
    """A worker that is clean after `on_checkin` is not reset."""
    manager = Manager(Workshop())
    hooks = whitepool.Hooks(on_checkin=lambda _: None)
    async with whitepool.open_pool(manager, pool_size=1, hooks=hooks) as session:
        async with session.worker():
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().idle == 1
        assert manager.resets == 0


async def test_a_worker_that_has_to_leave_is_not_reset_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Also where its hook has not noticed: the shutdown waits for that, and for nothing more."""
    manager = Manager(Workshop())
    manager.before_reset = hang

    async def deafly(tool: Tool) -> None:
        manager.dirty.add(tool)
        with trio.CancelScope(shield=True):
            await trio.sleep(1)

    hooks = whitepool.Hooks(on_checkin=deafly)
    async with whitepool.open_pool(manager, pool_size=1, hooks=hooks) as session:
        async with session.worker():
            pass
        await trio.testing.wait_all_tasks_blocked()
        await session.safe_shutdown(timeout=0.5)
        assert trio.current_time() == 1
    assert not manager.shop.alive


async def test_a_question_that_raises_behind_a_hook_is_no_crash() -> None:
    """It is the manager that raises in `needs_reset`: the worker is destroyed."""
    reasons: list[whitepool.Reason] = []

    class Confused(Manager):
        def needs_reset(self, worker: Tool) -> bool:
            raise ValueError

    hooks = whitepool.Hooks(on_checkin=lambda _: None, on_destroy=reasons.append)
    async with whitepool.open_pool(Confused(Workshop()), pool_size=1, hooks=hooks) as session:
        async with session.worker():
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert reasons == ["reset_failed"]
        assert session.statistics().lost == 0


async def test_failures_that_change_nothing_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Those of `after_release` and `on_destroy`."""

    def fail(*_: Any) -> None:
        raise ValueError("too late")

    hooks = whitepool.Hooks(after_release=fail, on_destroy=fail)
    async with whitepool.open_pool(Workshop().make, pool_size=1, name="mine", hooks=hooks) as session:
        async with session.worker():
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert session.statistics().idle == 1
        check_books(session)
    assert (
        caplog.records[0].message
        == "hook_failed pool=mine hook=after_release error=ValueError: too late"
    )


async def test_a_hanging_on_destroy_is_abandoned(autojump_clock: trio.testing.MockClock) -> None:
    """After `close_timeout`."""

    async with whitepool.open_pool(
        Workshop().make, pool_size=3, close_timeout=2, hooks=whitepool.Hooks(on_destroy=hang)
    ):
        pass
    assert trio.current_time() == pytest.approx(2)


async def test_checkout_nowait_has_no_time_for_an_async_hook() -> None:
    """It says so, and nothing is lost."""

    for name in ("before_acquire", "on_checkout"):
        async with whitepool.open_pool(
            Workshop().make,
            pool_size=1,
            hooks=whitepool.Hooks(**{name: raising(AssertionError("must not run"))}),
        ) as session:
            with pytest.raises(TypeError, match=name):
                session.checkout_nowait()
            await trio.testing.wait_all_tasks_blocked()
            assert session.statistics().idle == 1


def test_a_hook_must_be_callable() -> None:
    """It is refused by name."""
    with pytest.raises(TypeError, match=r"on_destroy.*7"):
        whitepool.Hooks(on_destroy=7)  # type: ignore[arg-type]
