"""Metrics of a pool, by OpenTelemetry's conventions for connection pools, and spans of the waits for a
worker. Needs the extra ``otel``::

    async with whitepool.postgres.open_pool("dbname=shop") as session:
        session = whitepool.telemetry.instrument(session)

The checkouts of the session that it returns are measured, and traced. A pool that is not instrumented
pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from time import time_ns
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
    from opentelemetry.trace import StatusCode, Tracer, TracerProvider
except ImportError as error:
    raise ImportError(
        f"whitepool.telemetry needs OpenTelemetry: pip install 'whitepool[otel]' ({error})"
    ) from error

from . import __version__
from ._observing import observed
from ._session import Session
from ._supervisor import Supervisor

__all__ = ["instrument"]

S = TypeVar("S", bound=Session[Any])

PREFIX = "db.client.connection."
POOL_NAME, STATE = PREFIX + "pool.name", PREFIX + "state"
WAIT_SPAN = "pool.wait"

# Names and units are the conventions', and nearly the descriptions.
TIMES = {
    "create_time": "The time it took to create a new connection.",
    "wait_time": "The time it took to obtain an open connection from the pool.",
    "use_time": "The time between borrowing a connection and returning it to the pool.",
}
NUMBERS = {
    "count": ("{connection}", "The number of connections that are currently in the state."),
    "idle.max": ("{connection}", "The maximum number of idle open connections allowed."),
    "idle.min": ("{connection}", "The minimum number of idle open connections allowed."),
    "max": ("{connection}", "The maximum number of open connections allowed."),
    "pending_requests": ("{request}", "The number of current pending requests for a connection."),
}
COUNTERS = {
    "timeouts": ("{timeout}", "The number of timeouts trying to obtain a connection from the pool."),
}
# The conventions have nothing of the kind, so these have a prefix of our own.
OWN_PREFIX = "whitepool."
OWN_COUNTERS = {
    "waited": ("{checkout}", "The number of checkouts that had to wait, and got a worker."),
    "wait_time": ("s", "The time for which those have waited, in all."),
    "overloads": ("{checkout}", "The number of timeouts that came early, as the wait queue grew."),
    "started": ("{worker}", "The number of workers that were opened."),
    "start_failures": ("{attempt}", "The number of attempts to open a worker that failed."),
    "retired": ("{worker}", "The number of workers that were closed in good health."),
    "lost": ("{worker}", "The number of workers that died."),
    "destroyed": ("{worker}", "The number of workers that were called broken, or could not be reset."),
    "leaked": ("{worker}", "The number of workers whose resource was never returned."),
    "discarded": ("{checkout}", "The number of checkouts whose writes were not committed."),
}
OWN_GAUGES = {
    "longest_use": ("s", "The time for which the worker is out that was checked out first."),
    "down": ("1", "1 while no worker is alive and none can be started, else 0."),
}

BOUNDARIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
"""Seconds: the steps of the histograms. The conventions have none for pools; these are those that they
have for ``db.client.operation.duration``."""


def instrument(
    session: S,
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
) -> S:
    """Return a session of the same pool that measures its checkouts; use it in place of the other.

    It is of the same kind: one of connections to PostgreSQL has `connection`, too. A checkout of it
    that has to wait makes a span ``pool.wait``, as a child of the task's current span.

    What the pool itself knows (how many workers there are and who waits for one, how long starts
    take) is reported from now on until it is closed, whichever session is used. Without a
    `meter_provider` or a `tracer_provider` the global ones are used; they may be set later.
    """
    panel = _panel(meter_provider)
    panel.watch(session._supervisor)
    tracer = trace.get_tracer("whitepool", __version__, tracer_provider)
    return observed(session, _Recorder(panel, tracer, session.name))


class _Recorder:
    """Records the checkouts of one pool in the histograms of a panel, and the waits as spans (see
    `Observer`)."""

    def __init__(self, panel: _Panel, tracer: Tracer, pool: str) -> None:
        self._tracer = tracer
        self._attributes = attributes = {POOL_NAME: pool}
        self.on_checkout = partial(panel.wait_time.record, attributes=attributes)
        self.on_return = partial(panel.use_time.record, attributes=attributes)

    def on_wait(self, waited: float, error: BaseException | None) -> None:
        """Make the span when the wait is over, in the task that has waited: nothing is open meanwhile.

        A cancellation is no error, as in the spans of OpenTelemetry's own.
        """
        # A sampler or a processor of the application's may raise. The task may have a worker by now,
        # which must not be lost.
        with suppress(Exception):
            end = time_ns()
            span = self._tracer.start_span(
                WAIT_SPAN, attributes=self._attributes, start_time=end - int(waited * 1e9)
            )
            if isinstance(error, Exception):
                kind = type(error)
                span.set_attribute("error.type", f"{kind.__module__}.{kind.__qualname__}")
                span.set_status(StatusCode.ERROR, str(error))
            span.end(end)


class _Panel:
    """The instruments of one meter provider. All its pools share them: a name is taken only once."""

    def __init__(self, meter: Meter) -> None:
        # Callbacks can't be taken back, so they keep no pool alive. A tuple that is replaced, not
        # changed: an exporter's thread may be reading it.
        self._pools: tuple[ref[Supervisor[Any]], ...] = ()
        self.create_time, self.wait_time, self.use_time = (
            meter.create_histogram(
                PREFIX + name, "s", description, explicit_bucket_boundaries_advisory=BOUNDARIES
            )
            for name, description in TIMES.items()
        )
        for prefix, numbers, create in (
            (PREFIX, NUMBERS, meter.create_observable_up_down_counter),
            (PREFIX, COUNTERS, meter.create_observable_counter),
            (OWN_PREFIX, OWN_COUNTERS, meter.create_observable_counter),
            (OWN_PREFIX, OWN_GAUGES, meter.create_observable_gauge),
        ):
            for name, (unit, description) in numbers.items():
                create(prefix + name, [partial(self._observe, prefix + name)], unit, description)

    def watch(self, supervisor: Supervisor[Any]) -> None:
        """Report what a pool knows, once, however often it is instrumented."""
        pools = [pool for pool in self._pools if pool() is not None]
        if all(pool() is not supervisor for pool in pools):
            self._pools = (*pools, ref(supervisor))
            attributes = {POOL_NAME: supervisor.name}
            supervisor.starter.observe(partial(self.create_time.record, attributes=attributes))

    def _observe(self, name: str, _: CallbackOptions) -> Iterable[Observation]:
        for pool in self._pools:
            supervisor = pool()
            if supervisor is not None and not supervisor.closed.is_set():
                for state, number in _numbers(supervisor).get(name, {}).items():
                    attributes = {POOL_NAME: supervisor.name}
                    yield Observation(number, {**attributes, STATE: state} if state else attributes)


def _numbers(supervisor: Supervisor[Any]) -> dict[str, dict[str, float]]:
    """Return what the instruments show of a pool, by name and state."""
    options, roster = supervisor.options, supervisor.roster
    for _ in range(3):
        with suppress(RuntimeError):  # in an exporter's thread: the wait queue has changed meanwhile
            now = supervisor.statistics()
            return {
                # Read from another thread, the counts may be inconsistent: never less than none.
                PREFIX + "count": {"idle": now.idle, "used": max(0, now.in_use + now.resetting)},
                PREFIX + "idle.max": {"": roster.limit if options.overflow_ttl else roster.pool_size},
                PREFIX + "idle.min": {"": 0 if options.lazy else roster.pool_size},
                PREFIX + "max": {"": roster.limit},
                PREFIX + "pending_requests": {"": now.waiting},
                PREFIX + "timeouts": {"": now.timeouts + now.overloads},
                **{OWN_PREFIX + name: {"": getattr(now, name)} for name in OWN_COUNTERS},
                OWN_PREFIX + "longest_use": {"": now.longest_use},
                OWN_PREFIX + "down": {"": int(now.state == "down")},
            }
    return {}


_panels: WeakKeyDictionary[MeterProvider, _Panel] = WeakKeyDictionary()
_global_panel: _Panel | None = None


def _panel(provider: MeterProvider | None) -> _Panel:
    """Find the panel of a meter provider, or make it."""
    global _global_panel
    the_global_one = metrics.get_meter_provider()
    provider = provider or the_global_one
    panel = _panels.get(provider)
    if panel is None and provider is the_global_one:
        # Before a provider is set, OpenTelemetry uses a proxy. The instruments made with it work on.
        panel = _global_panel
    if panel is None:
        panel = _Panel(provider.get_meter("whitepool", __version__))
    _panels[provider] = panel
    if provider is the_global_one:
        _global_panel = panel
    return panel
