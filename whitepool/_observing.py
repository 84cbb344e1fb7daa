"""Sessions that note more than others: what an observer wants to know, or which task has which worker.

The first session of a pool is not slowed by them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar, cast

from trio.lowlevel import Abort, RaiseCancelT, current_task, wait_task_rescheduled

from ._entry import HANDED_OVER, Entry
from ._session import Resource, Session

T = TypeVar("T")
S = TypeVar("S", bound=Session[Any])


class Observer(Protocol):
    """What an `ObservedSession` reports to. Times are seconds. No method may raise."""

    def on_wait(self, waited: float, error: BaseException | None) -> None:
        """A task has waited in the queue for a worker, and got it, or this error."""

    def on_checkout(self, waited: float) -> None: ...
    def on_return(self, used: float) -> None: ...


class ObservedSession(Session[T]):
    """A session that reports its checkouts to an observer. See `observed`."""

    _observer: Observer

    async def _wait(self, abort: Callable[[RaiseCancelT], Abort]) -> Entry[T]:
        since = self._now()
        error: BaseException | None = None
        try:
            entry: Entry[T] = await wait_task_rescheduled(abort)
            return entry
        except BaseException as its_error:
            error = its_error
            raise
        finally:
            self._observer.on_wait(self._now() - since, error)
            del error  # it would refer to itself, by this frame

    def _hand_out(self, entry: Entry[T], since: float) -> Resource[T]:
        self._observer.on_checkout(entry.in_use_since - since)
        return super()._hand_out(entry, since)

    def _redeem(self, resource: Resource[T]) -> Entry[T]:
        entry = super()._redeem(resource)
        # It may have been handed out by a session without an observer.
        if isinstance(resource._session, ObservedSession):
            self._observer.on_return(self._now() - entry.in_use_since)
        return entry


def observed(session: S, observer: Observer) -> S:
    """Return a session of the same pool, and of the same kind, that reports to an observer."""
    kind: Any = type(session)
    new: Any = _with(ObservedSession, kind)(session._supervisor)
    new._observer = observer
    return cast("S", new)


class TrackingSession(Session[T]):
    """A session that notes which task has which worker, for `held_warning`. See `tracking`."""

    def _hand_out(self, entry: Entry[T], since: float) -> Resource[T]:
        try:
            entry.client = current_task()
        except RuntimeError:  # `checkout_nowait` in a callback of Trio's, or of a host loop's
            entry.client = HANDED_OVER
        return super()._hand_out(entry, since)

    def _redeem(self, resource: Resource[T]) -> Entry[T]:
        entry = super()._redeem(resource)
        if entry.reported_at > entry.in_use_since:
            self._supervisor.holding.on_return(entry, self._now())
        entry.client = None
        return entry


def tracking(kind: type[Session[T]]) -> type[Session[T]]:
    """Return a class of sessions of the same kind that note which task has which worker."""
    plain: Any = kind
    return _with(TrackingSession, plain)


@cache
def _with(base: type[Session[Any]], kind: type[Session[Any]]) -> type[Session[Any]]:
    """Return a class of sessions of this kind that do what `base` adds, too."""
    if issubclass(kind, base):
        return kind
    return type(base.__name__.removesuffix("Session") + kind.__name__, (base, kind), {})
