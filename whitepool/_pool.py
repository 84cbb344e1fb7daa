"""Opening a pool: options, wiring, and who ends what."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

from ._manager import Factory, FactoryManager, WorkerManager
from ._options import Options
from ._session import Session
from ._supervisor import Supervisor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import PoolOptions

T = TypeVar("T")


class Pool(Generic[T]):
    """What a pool is made of: a factory, or a `WorkerManager`, and the options.

    Nothing is opened until `run_service` runs, or `open_pool` is entered. Wrong options raise
    `TypeError` or `ValueError` here. Times are seconds; `math.inf` is allowed for each.

    Args:
      factory: a callable without arguments that returns an awaitable of a worker, or an async
          context manager that yields one; or a `WorkerManager`.
      pool_size (int): workers kept alive. Default 5.
      max_overflow (int): workers started beyond those when all are busy. Default 10.
      strategy (str): which idle worker goes first. ``"lifo"`` (default) keeps few of them warm,
          ``"fifo"`` spreads the use.
      name (str): appears in logs, statistics and errors. Default ``"pool-1"`` and so on.
      lazy (bool): start workers at the first need instead of at opening. Default `False`.
      overflow_ttl (float): how long an idle overflow worker lingers before it is dismissed.
          Default 10; 0 dismisses it when it is returned, as poolboy does.
      idle_timeout (float): an idle worker that was not used for this long, less up to a tenth by
          chance, is retired, and replaced unless the pool is lazy. Default `math.inf`.
      max_lifetime (float): a worker this old, less up to a tenth by chance, is retired once it is
          idle. Its replacement is opened first, where there is room. Default `math.inf`.
      check_interval (float): an idle worker is probed with `WorkerManager.check` this often, or up to
          a tenth more often. Default 30; `math.inf`: never.
      start_timeout (float): how long opening the pool may take, retries included, before
          `PoolStartError`; and later, how long one attempt to start a worker may take. Default 30.
      reset_timeout (float): how long one reset, one probe, or one hook in between may take before
          the worker is destroyed. Default 5.
      close_timeout (float): how long closing one worker may take before it is abandoned; `on_destroy`
          has as long again. Default 5.
      shutdown_timeout (float): how long `open_pool` waits for outstanding workers at a normal exit.
          Default 30.
      max_starting (int): workers being opened at once. Default 4.
      max_waiting (float): tasks allowed in line for those that clients hold; one more gets
          `PoolOverloaded` at once. Default `math.inf`.
      patience (float): when the line stands because too much is asked, a task is sent away with
          `PoolOverloaded` once it has waited this share of its own timeout, so that those who are
          served have time left. Default 0.4; 1 turns it off. A line that drains, and a task with
          ``timeout=math.inf``, is left alone.
      hooks (Hooks): functions to be called in the life of a worker. Default none.
    """

    def __init__(self, factory: Factory[T] | WorkerManager[T], **options: Unpack[PoolOptions]) -> None:
        self._options = Options(**options)
        if isinstance(factory, WorkerManager):
            self._manager: WorkerManager[T] = factory
        elif callable(factory):
            self._manager = FactoryManager(factory)
        else:
            raise TypeError(f"factory must be callable, or a WorkerManager, not {factory!r}")

    async def run_service(
        self, *, task_status: trio.TaskStatus[Session[T]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run the pool until `Session.safe_shutdown`; for ``await nursery.start(pool.run_service)``.

        Where it is cancelled, clients that are being cancelled beside it have up to half of
        `close_timeout` to return what they hold. Then everything is closed.
        """
        async with self._open(grace=self._options.close_timeout / 2) as session:
            task_status.started(session)
            await session._supervisor.closed.wait()

    @asynccontextmanager
    @enable_ki_protection
    async def _open(self, grace: float) -> AsyncIterator[Session[T]]:
        """Yield a session; at a normal exit drain it, else close everything after `grace` seconds."""
        supervisor = Supervisor(self._manager, self._options)
        session = Session(supervisor)
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(supervisor.run)
                try:
                    await supervisor.wait_open()
                    yield session
                    await session.safe_shutdown(self._options.shutdown_timeout)
                finally:
                    # The supervisor is shielded: it outlives a cancellation until all is closed.
                    with trio.CancelScope(shield=True):
                        await session.safe_shutdown(grace)
        except BaseExceptionGroup as group:
            # The nursery is an implementation detail: what leaves the block leaves as it was raised.
            if len(group.exceptions) == 1:
                error = group.exceptions[0]
            else:
                raise
        else:
            return
        raise error


def open_pool(
    factory: Factory[T] | WorkerManager[T], **options: Unpack[PoolOptions]
) -> AbstractAsyncContextManager[Session[T]]:
    """Open a pool for the length of an ``async with`` block, which gets a `Session`.

    Takes what `Pool` takes. Entering starts `pool_size` workers and returns when all are open;
    it raises `PoolStartError` where that fails for `start_timeout` seconds. A normal exit drains the
    pool, as `Session.safe_shutdown` does with `shutdown_timeout`. An exit by an exception or by a
    cancellation closes everything at once, within `close_timeout`, shielded.
    """
    return Pool(factory, **options)._open(grace=0)
