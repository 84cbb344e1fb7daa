"""What the pool asks of a worker, and of whom it asks it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest
import trio.testing

import whitepool


@pytest.mark.parametrize("method", ["aclose", "close"])
@pytest.mark.parametrize("asynchronous", [True, False])
async def test_a_worker_is_closed_by_the_method_it_has(
    method: str, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """`aclose` or `close`, plain or async."""
    closed = []

    async def close_async(self: Any) -> None:
        closed.append(self)

    def close_plain(self: Any) -> None:
        closed.append(self)

    kind = type("Closable", (), {method: close_async if asynchronous else close_plain})

    async def make() -> Any:
        return kind()

    async with whitepool.open_pool(make, pool_size=1):
        assert not closed
    assert len(closed) == 1
    assert not caplog.records


async def test_a_worker_without_a_close_is_left_alone() -> None:
    """A number is as good a worker as any."""

    async def make() -> int:
        return 7

    async with whitepool.open_pool(make, pool_size=1) as session, session.worker() as seven:
        assert seven == 7


async def test_a_class_may_bring_its_own_manager() -> None:
    """Then a bare factory is enough to have its objects reset, and closed as they need it."""
    resets = []
    closed = []

    class Own(whitepool.WorkerManager[Any]):
        def needs_reset(self, worker: Any) -> bool:
            return True

        async def reset(self, worker: Any) -> None:
            resets.append(worker)

        async def close(self, worker: Any) -> None:
            closed.append(worker)

    class Worker:
        __worker_manager__: ClassVar[whitepool.WorkerManager[Any]] = Own()

    async def make() -> Worker:
        return Worker()

    async with whitepool.open_pool(make, pool_size=1) as session:
        async with session.worker() as worker:
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert resets == [worker]
    assert closed == [worker]


async def test_a_manager_that_was_given_is_the_one() -> None:
    """What a class brings is for bare factories only."""

    class Own(whitepool.WorkerManager[Any]):
        async def close(self, worker: Any) -> None:
            pytest.fail("it is not to be asked")

    class Worker:
        __worker_manager__: ClassVar[whitepool.WorkerManager[Any]] = Own()

    closed = []

    class Given(whitepool.WorkerManager[Worker]):
        async def create(self) -> Worker:
            return Worker()

        async def close(self, worker: Worker) -> None:
            closed.append(worker)

    async with whitepool.open_pool(Given(), pool_size=1) as session, session.worker() as worker:
        pass
    assert closed == [worker]


def test_a_manager_that_opens_nothing() -> None:
    """The error says what is missing, and guesses only at a method of its own that is like it."""

    class Empty(whitepool.WorkerManager[Any]):
        def polish(self, worker: Any) -> None: ...

    with pytest.raises(TypeError, match=r"^Empty implements neither create nor lifespan$"):
        whitepool.Pool(Empty())

    class Misspelt(Empty):
        async def created(self) -> Any: ...

    with pytest.raises(TypeError, match=r"did you mean that by created\?$"):
        whitepool.Pool(Misspelt())


async def test_a_manager_must_be_able_to_create() -> None:
    """The one method without a default."""
    with pytest.raises(NotImplementedError):
        await whitepool.WorkerManager[Any]().create()


async def test_the_other_methods_have_a_default() -> None:
    """A worker is alive, clean and well; resetting and checking it does nothing."""
    manager, worker = whitepool.WorkerManager[object](), object()
    assert manager.is_alive(worker)
    assert not manager.needs_reset(worker)
    await manager.reset(worker)
    await manager.check(worker)


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        pytest.param(Mock(fileno=lambda: 7), 7, id="its own"),
        pytest.param(Mock(fileno=lambda: 7, socket=Mock(fileno=lambda: 8)), 7, id="its own first"),
        pytest.param(Mock(fileno=None, socket=Mock(fileno=lambda: 8)), 8, id="its socket's"),
        pytest.param(object(), None, id="none"),
        pytest.param(Mock(fileno=7, spec=["fileno"]), None, id="no method"),
        pytest.param(Mock(fileno=lambda: "7"), None, id="no number"),
        pytest.param(Mock(fileno=Mock(side_effect=OSError)), None, id="an error of the system"),
        pytest.param(Mock(fileno=Mock(side_effect=ValueError)), None, id="a closed file"),
    ],
)
def test_where_a_descriptor_is_looked_for(worker: Any, expected: int | None) -> None:
    """In the worker itself, then in its `socket`; a worker without one is not watched."""
    assert whitepool.WorkerManager[Any]().fileno(worker) == expected


@pytest.mark.parametrize("wrong", ["3", 3.0, object()])
async def test_a_descriptor_is_a_number(wrong: Any, autojump_clock: trio.testing.MockClock) -> None:
    """A manager that says something else has failed to open a worker."""

    class Wrong(whitepool.WorkerManager[object]):
        async def create(self) -> object:
            return object()

        def fileno(self, worker: object) -> Any:
            return wrong

    with pytest.raises(whitepool.PoolStartError) as caught:
        async with whitepool.open_pool(Wrong(), pool_size=1, start_timeout=3):
            pytest.fail("the pool was opened")
    assert isinstance(caught.value.__cause__, TypeError)
    assert repr(wrong) in str(caught.value.__cause__)


@pytest.mark.parametrize("kind", [Mock, MagicMock, AsyncMock])
@pytest.mark.filterwarnings("ignore:coroutine 'AsyncMockMixin:RuntimeWarning")
async def test_a_mock_is_a_worker_too(kind: type[Mock]) -> None:
    """What it has for a descriptor is not watched."""
    make: Callable[[], Awaitable[Any]] = AsyncMock(side_effect=kind)
    async with whitepool.open_pool(make, pool_size=1) as session:
        assert not session._supervisor._hangups.watched
        resource = await session.block_checkout()
        worker = resource.get()
        session.checkin(resource)
        assert session.statistics().lost == 0
    worker.aclose.assert_called()


async def test_a_manager_needs_no_hash(autojump_clock: trio.testing.MockClock) -> None:
    """A dataclass has none; a start that fails while a worker is open asks the managers why."""

    @dataclass
    class Settings(whitepool.WorkerManager[object]):
        is_away: bool = False

        async def create(self) -> object:
            if self.is_away:
                raise OSError("the server is away")
            return object()

    manager = Settings()
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=1) as session:
        async with session.worker():
            manager.is_away = True
            with pytest.raises(whitepool.CheckoutTimeout, match="the server is away"):
                await session.block_checkout(1)
        async with session.worker(0):
            pass
