"""Opening a pool: options and wiring, and what ends what."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar
from weakref import WeakSet

import trio
from trio.lowlevel import enable_ki_protection

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

from ._checks import OnlyAsyncWith, check_runs_on_trio, did_you_mean
from ._manager import Factory, FactoryManager, WorkerManager, check_factory
from ._observing import tracking
from ._options import Options
from ._scheduling import Uninterrupted
from ._session import Session
from ._supervisor import Supervisor

P = ParamSpec("P")
T = TypeVar("T")

_running: WeakSet[Pool[Any]] = WeakSet()


@dataclass(frozen=True, eq=False, repr=False)
class Pool(Options, Generic[T]):
    """What a pool is made of: a factory, or a `WorkerManager`, and the options.

    Nothing is opened until `run_service` runs, or `open_pool` is entered. Wrong options raise
    `TypeError` or `ValueError` here.
    """

    factory: Factory[T] | WorkerManager[T]
    """A callable without arguments that returns an awaitable of a worker, or an async context manager
    that yields one; or a `WorkerManager`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factory(self.factory)

    async def run_service(
        self, *, task_status: trio.TaskStatus[Session[T]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run the pool until `Session.safe_shutdown`; for ``await nursery.start(pool.run_service)``.

        Where it is cancelled, clients that are being cancelled beside it have up to half of
        `close_timeout` to return what they hold. Then everything is closed.
        """
        async with self._open(grace=self.close_timeout / 2) as session:
            task_status.started(session)
            await session._supervisor.closed.wait()

    @asynccontextmanager
    @enable_ki_protection
    async def _open(self, grace: float) -> AsyncIterator[Session[T]]:
        """Yield a session; at a normal exit drain it, else close everything after `grace` seconds."""
        check_runs_on_trio("a pool")
        if self in _running:
            raise RuntimeError(
                f"{self.name} is running: make a Pool for each time that it runs at once"
            )
        factory = self.factory
        manager = factory if isinstance(factory, WorkerManager) else FactoryManager(factory)
        supervisor = Supervisor(manager, options=self)
        kind: type[Session[T]] = manager._session_class or Session
        if self.held_warning != math.inf:
            kind = tracking(kind)
        session = kind(supervisor)
        _running.add(self)
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(supervisor.run)
                try:
                    await supervisor.starter.wait_opened()
                    yield session
                    await session.safe_shutdown(self.shutdown_timeout)
                finally:
                    # The supervisor is shielded: it outlives a cancellation until all is closed.
                    with trio.CancelScope(shield=True):
                        await session.safe_shutdown(grace)
        except BaseExceptionGroup as group:
            # The nursery is an implementation detail: what leaves the block leaves as it was raised.
            if len(group.exceptions) > 1:
                raise
            error = group.exceptions[0]
        else:
            return
        finally:
            _running.discard(self)
        raise error  # outside of the `except`, so that the group is not its context


class Opening(Uninterrupted[Session[T]], OnlyAsyncWith):
    """The block of `open_pool`."""

    _usage = "open_pool(...) as session"

    def __init__(self, pool: Pool[T]) -> None:
        super().__init__(pool._open(grace=0))  # a `grace` is for `Pool.run_service`


def _naming_misspelt_options(init: Callable[..., None]) -> Callable[..., None]:
    """Have a constructor say which option was meant."""
    known = inspect.signature(init).parameters

    @wraps(init)
    def init_or_name(*arguments: Any, **options: Any) -> None:
        for option in options:
            if option not in known:
                raise TypeError(f"there is no option {option!r}{did_you_mean(option, known)}")
        init(*arguments, **options)

    return init_or_name


Pool.__init__ = _naming_misspelt_options(Pool.__init__)  # type: ignore[method-assign]


def _opener(pool: Callable[P, Pool[T]]) -> Callable[P, AbstractAsyncContextManager[Session[T]]]:
    """Make `open_pool`. It takes what `Pool` takes, also for type checkers, editors and `help`."""

    def open_pool(*arguments: P.args, **options: P.kwargs) -> AbstractAsyncContextManager[Session[T]]:
        """Open a pool for the length of an ``async with`` block, which gets a `Session`.

        Takes what `Pool` takes. Entering starts `pool_size` workers and returns when all are open, or
        `min_ready` of them; it raises `PoolStartError` if that fails for `start_timeout` seconds, or at
        once if it is pointless to try again. A normal exit drains
        the pool, as `Session.safe_shutdown` does with `shutdown_timeout`. An exit by an exception or by
        a cancellation closes everything at once, within `close_timeout`, shielded.
        """
        return Opening(pool(*arguments, **options))

    signature = inspect.signature(open_pool)
    parameters = inspect.signature(pool).parameters.values()
    open_pool.__signature__ = signature.replace(parameters=list(parameters))  # type: ignore[attr-defined]
    open_pool.__qualname__ = "open_pool"
    return open_pool


open_pool = _opener(Pool)
