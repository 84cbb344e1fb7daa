"""What the pool must know of its workers: how to open, check, reset and close them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, Union, cast

import trio

from ._checks import check_call, check_plain, did_you_mean
from ._errors import PoolStartError

if TYPE_CHECKING:
    from ._session import Session

T = TypeVar("T")

close_timeout: ContextVar[float] = ContextVar("close_timeout", default=5.0)
"""Seconds for closing a worker, in the tasks of a pool. A context variable, because `lifespan` may be
the user's own, and takes no arguments."""

METHOD_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "create": (),
    "lifespan": (),
    "close": ("worker",),
    "is_alive": ("worker",),
    "needs_reset": ("worker",),
    "reset": ("worker",),
    "check": ("worker",),
    "fileno": ("worker",),
}
"""What each method of a manager is called with."""

on_discarded: ContextVar[Callable[[], None]] = ContextVar("on_discarded", default=lambda: None)
"""For a manager to call in its `reset`, if that throws away what a client has written. Each worker task
sets this context variable for that, because `reset` may be the user's own, which calls the one it
overrides."""

on_misconfigured: ContextVar[Callable[[str], None]] = ContextVar(
    "on_misconfigured", default=lambda reason: None
)
"""For a manager to call if a worker shows that the pool is configured for what can't work, with a
sentence that says so. It is set in the tasks of a pool."""

Factory = Union[Callable[[], Awaitable[T]], Callable[[], AbstractAsyncContextManager[T]]]


class WorkerManager(Generic[T]):
    """How to treat one kind of worker. Implement `create`; every other method has a default.

    The asynchronous methods run in the worker's own task. The others are called whenever a worker
    changes hands: they must be quick, and must do no I/O.
    """

    _session_class: ClassVar[type[Session[Any]] | None] = None
    """What clients of the pool hold. None: a `Session`."""

    _suspect_timeout: ClassVar[float] = math.inf
    """Seconds in which a worker has to answer a probe when another one has just been found useless, if
    that is less than `reset_timeout`. No client can get it until then."""

    async def create(self) -> T:
        """Open a worker.

        An exception means that the attempt failed, and it will be repeated. `PoolStartError` says
        that repeating it is pointless: opening the pool then fails at once.
        """
        raise NotImplementedError

    async def close(self, worker: T) -> None:
        """Close a worker: by its ``aclose()`` or ``close()``, plain or async, if it has one."""
        close = getattr(worker, "aclose", None) or getattr(worker, "close", None)
        if close is not None:
            result = close()
            if inspect.isawaitable(result):
                await result

    def is_alive(self, worker: T) -> bool:
        """Say whether a worker that was returned, or has lain idle, may be used. Default: yes."""
        return True

    def needs_reset(self, worker: T) -> bool:
        """Say whether a returned worker must be reset before its next use. Default: no."""
        return False

    async def reset(self, worker: T) -> None:
        """Make a returned worker as good as new. Where this raises, the worker is destroyed."""

    async def check(self, worker: T) -> None:
        """Ask an idle worker for a sign of life. Where this raises, the worker is replaced."""

    def fileno(self, worker: T) -> int | None:
        """Return the file descriptor of the worker's connection to its peer, to be watched.

        Default: what its own ``fileno()`` returns, or that of its ``socket``. None: there is nothing to
        watch.
        """
        for thing in (worker, getattr(worker, "socket", None)):
            fileno = getattr(thing, "fileno", None)
            if callable(fileno):
                try:
                    number = fileno()
                except (OSError, ValueError):
                    return None  # it has the method, but no descriptor behind it
                return number if isinstance(number, int) else None
        return None

    def lifespan(self) -> AbstractAsyncContextManager[T]:
        """Return an async context manager that yields a worker, from `create` to `close`.

        Override it for workers that need a nursery of their own. It is entered and left in the worker's
        own task. When one of its background tasks crashes, the worker is replaced.
        """
        return _Lifespan(self._create_ready, self)

    async def _create_ready(self) -> T:
        """Open a worker by `create`, and explain its refusals. Default: there is nothing to explain."""
        return await created_by(self)

    def _is_full(self, error: Exception) -> bool:
        """Say whether a start failed because the peer takes no more connections."""
        return False

    async def _on_open(self, worker: T) -> None:
        """Set up a worker that was just opened, whichever `lifespan` opened it."""

    async def _before_on_checkin(self, worker: T) -> None:
        """Undo what the client has left half done, as far as the hook `on_checkin` must not see it."""

    def _after_hook(self, worker: T, hook: str) -> None:
        """Raise an error if that hook has left the worker in a state in which no client may get it."""

    def _last_words(self, worker: T) -> str:
        """Return what its peer said last that explains why a worker is of no use any more, in one line.

        It is asked once, when the worker is lost or destroyed. Default: its peer has said nothing.
        """
        return ""


class FactoryManager(WorkerManager[T]):
    """Makes a manager of a bare factory."""

    def __init__(self, factory: Factory[T]) -> None:
        self._factory = factory

    def lifespan(self) -> AbstractAsyncContextManager[T]:
        made: object = self._factory()
        # This comes first: some objects can be awaited as well, but only the context manager knows how
        # to close what it opened.
        if hasattr(made, "__aenter__") and hasattr(made, "__aexit__"):
            return cast("AbstractAsyncContextManager[T]", made)
        if inspect.isawaitable(made):
            return _Lifespan(lambda: cast("Awaitable[T]", made), self)
        raise PoolStartError(
            "the factory must return an awaitable or an async context manager, "
            f"not {type(made).__name__}"
        )


async def created_by(manager: WorkerManager[T]) -> T:
    """Call `create`. Raises `PoolStartError` if it is not async, as that would not change."""
    made: object = manager.create()
    if not inspect.isawaitable(made):
        raise PoolStartError(f"create must be async, but it returned {type(made).__name__}")
    return cast("T", await made)


def check_factory(factory: object) -> None:
    """Raise `TypeError` for a factory or manager that can't work, as far as that can be known."""
    if isinstance(factory, WorkerManager):
        _check_manager(factory)
    elif not callable(factory):
        raise TypeError(f"factory must be callable, or a WorkerManager, not {factory!r}")
    elif inspect.isasyncgenfunction(factory):
        raise TypeError(
            "factory is an async generator: decorate it with contextlib.asynccontextmanager"
        )
    else:
        check_call("factory", factory)


def _check_manager(manager: WorkerManager[Any]) -> None:
    """Raise `TypeError` for a manager that lacks what it needs, or has it in the wrong form."""
    name = type(manager).__name__
    overridden = {
        method
        for method in METHOD_ARGUMENTS
        if getattr(getattr(manager, method), "__func__", None) is not getattr(WorkerManager, method)
    }
    if not overridden & {"create", "lifespan"}:
        own = [word for word in dir(manager) if not hasattr(WorkerManager, word)]
        misspelt = [word for word in own if did_you_mean(word, ("create", "lifespan"))]
        hint = f": did you mean that by {misspelt[0]}?" if misspelt else ""
        raise TypeError(f"{name} implements neither create nor lifespan{hint}")
    for method in sorted(overridden):
        check_call(f"{name}.{method}", getattr(manager, method), *METHOD_ARGUMENTS[method])
    for method in ("is_alive", "needs_reset", "fileno"):
        check_plain(f"{name}.{method}", getattr(manager, method))
    lifespan = manager.lifespan
    if inspect.isasyncgenfunction(lifespan) or inspect.iscoroutinefunction(lifespan):
        raise TypeError(
            f"{name}.lifespan must return an async context manager: "
            "decorate it with contextlib.asynccontextmanager"
        )


NEEDS_ASYNCIO = (
    "what opens a worker needs asyncio, and this is Trio: for PostgreSQL, connect with "
    "whitepool.postgres.connect"
)


class _Lifespan(AbstractAsyncContextManager[T]):
    """A worker, from when it is opened until it has been closed.

    A class, because each worker keeps its own: a generator would take a KiB.
    """

    __slots__ = ("_manager", "_open", "_worker")

    def __init__(self, open: Callable[[], Awaitable[T]], manager: WorkerManager[T]) -> None:
        self._open: Callable[[], Awaitable[T]] | None = open
        self._manager = manager

    async def __aenter__(self) -> T:
        assert self._open is not None
        try:
            self._worker = await self._open()
        except RuntimeError as error:
            if str(error) == "no running event loop":
                raise PoolStartError(NEEDS_ASYNCIO) from error
            raise
        self._open = None
        self._manager = manager_of(self._worker, self._manager)
        return self._worker

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close the worker, within `close_timeout`.

        It is shielded: if opening the worker was given up, or one of its own tasks has crashed,
        everything around it has been cancelled. What ended the block is not hidden by a close that
        takes too long.
        """
        seconds = close_timeout.get()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + seconds) as scope:
            await self._manager.close(self._worker)
        if scope.cancelled_caught and error is None:
            raise trio.TooSlowError(f"not closed within {seconds} s")


def manager_of(worker: T, manager: WorkerManager[T]) -> WorkerManager[T]:
    """Find the manager of a worker: `manager`, unless the worker's class brings its own.

    A class brings one in the attribute ``__worker_manager__``. Then its objects are reset, checked and
    watched even if a bare factory makes them.
    """
    if isinstance(manager, FactoryManager):
        own: WorkerManager[T] | None = getattr(type(worker), "__worker_manager__", None)
        if own is not None:
            return own
    return manager
