"""What is told of a pool by OpenTelemetry's conventions, and that it is true."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any
from unittest.mock import Mock

import pytest
import trio
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.semconv._incubating.attributes import db_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics
from prometheus_client import start_http_server
from prometheus_client.parser import text_string_to_metric_families
from trio.lowlevel import currently_ki_protected
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Tool, Workshop, nothing, raising, use

import whitepool
import whitepool.postgres
from whitepool import telemetry

Session = whitepool.Session[Tool]


class Board:
    """A meter provider, and what it was told."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def points(self, name: str, pool: str = "mine") -> dict[str, Any]:
        """Return a metric's data points of one pool, by state."""
        data = self.reader.get_metrics_data()
        found = {}
        for resource in data.resource_metrics if data else ():
            for metric in resource.scope_metrics[0].metrics:
                for point in metric.data.data_points:
                    attributes = dict(point.attributes or {})
                    if (
                        metric.name in (name, "db.client.connection." + name)
                        and attributes.pop("db.client.connection.pool.name") == pool
                    ):
                        found[str(attributes.get("db.client.connection.state", ""))] = point
        return found

    def number(self, name: str, state: str = "", pool: str = "mine") -> float | None:
        points = self.points(name, pool)
        return points[state].value if points else None

    def times(self, name: str, pool: str = "mine") -> tuple[int, float]:
        """Return how many times were measured, and their sum."""
        points = self.points(name, pool)
        return (points[""].count, round(points[""].sum, 9)) if points else (0, 0)


@pytest.fixture
def board(caplog: pytest.LogCaptureFixture) -> Iterator[Board]:
    board = Board()
    yield board
    board.provider.shutdown()
    # The SDK logs what it doesn't like: instruments made twice, callbacks that raise.
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []


@pytest.fixture
async def session(board: Board) -> AsyncIterator[Session]:
    async with whitepool.open_pool(
        Workshop().make, name="mine", pool_size=2, max_overflow=0, check_interval=600, patience=1
    ) as session:
        yield telemetry.instrument(session, meter_provider=board.provider)


def instruments(meter: Mock) -> dict[str, tuple[str, str]]:
    """Return the instruments that were asked of a meter: of which kind, with which unit."""
    found = {}
    for kind, arguments, keywords in meter.method_calls:
        bound = inspect.signature(getattr(Meter, kind)).bind(meter, *arguments, **keywords).arguments
        found[bound["name"]] = (kind.replace("observable_", ""), bound["unit"])
    return found


def test_the_conventions() -> None:
    """Names, kinds and units are those of the semantic conventions: all of them. Others are our own."""
    theirs, ours = Mock(spec=Meter), Mock(spec=Meter)
    for name, create in inspect.getmembers(db_metrics, inspect.isfunction):
        if name.startswith("create_db_client_connection_"):
            create(theirs)
    telemetry._Panel(ours)
    found = instruments(ours)
    assert {name: kind for name, kind in found.items() if name.startswith("db.")} == instruments(theirs)
    assert {name: kind for name, kind in found.items() if not name.startswith("db.")} == {
        "whitepool.waited": ("create_counter", "{checkout}"),
        "whitepool.wait_time": ("create_counter", "s"),
        "whitepool.overloads": ("create_counter", "{checkout}"),
        "whitepool.started": ("create_counter", "{worker}"),
        "whitepool.start_failures": ("create_counter", "{attempt}"),
        "whitepool.retired": ("create_counter", "{worker}"),
        "whitepool.lost": ("create_counter", "{worker}"),
        "whitepool.destroyed": ("create_counter", "{worker}"),
        "whitepool.leaked": ("create_counter", "{worker}"),
        "whitepool.discarded": ("create_counter", "{checkout}"),
        "whitepool.longest_use": ("create_gauge", "s"),
        "whitepool.down": ("create_gauge", "1"),
    }
    assert db_attributes.DB_CLIENT_CONNECTION_POOL_NAME == telemetry.POOL_NAME
    assert db_attributes.DB_CLIENT_CONNECTION_STATE == telemetry.STATE
    states = {state.value for state in db_attributes.DbClientConnectionStateValues}
    assert states == {"idle", "used"}


async def test_how_the_pool_stands(board: Board, session: Session) -> None:
    """Connections by state, and how many tasks wait for one."""
    first = await session.block_checkout()
    assert (board.number("count", "idle"), board.number("count", "used")) == (1, 1)
    second = await session.block_checkout()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(use, session)
        await wait_all_tasks_blocked()
        assert (board.number("count", "idle"), board.number("count", "used")) == (0, 2)
        assert board.number("pending_requests") == 1
        session.checkin(first)
    session.checkin(second)
    assert (board.number("count", "idle"), board.number("count", "used")) == (2, 0)
    assert board.number("pending_requests") == 0


async def test_waits_and_uses(board: Board, session: Session, autojump_clock: MockClock) -> None:
    """How many waited, and for how long; and how long the worker is out that went out first."""
    first = await session.block_checkout()
    await trio.sleep(1)
    second = await session.block_checkout()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(use, session)
        nursery.start_soon(use, session)
        await trio.sleep(2)
        assert board.number("whitepool.longest_use") == 3
        assert (board.number("whitepool.waited"), board.number("whitepool.wait_time")) == (0, 0)
        session.checkin(first)
    assert (board.number("whitepool.waited"), board.number("whitepool.wait_time")) == (2, 4)
    assert board.number("whitepool.longest_use") == 2
    session.checkin(second)
    assert board.number("whitepool.longest_use") == 0


async def test_a_pool_that_is_down(board: Board, autojump_clock: MockClock) -> None:
    """No worker is alive, and none can be started."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, name="mine", pool_size=1) as session:
        telemetry.instrument(session, meter_provider=board.provider)
        assert board.number("whitepool.down") == 0
        shop.before_open = raising(OSError("connection refused"))
        session.destroyed(await session.block_checkout())
        await trio.sleep(5)
        assert board.number("whitepool.down") == 1
        shop.before_open = nothing
        await trio.sleep(5)
        assert board.number("whitepool.down") == 0


async def test_a_worker_that_is_being_reset_is_used(board: Board) -> None:
    """It is open, and no client can have it."""
    manager = Manager(Workshop())
    proceed = trio.Event()
    manager.before_reset = lambda _: proceed.wait()
    async with whitepool.open_pool(manager, name="mine", pool_size=1) as session:
        telemetry.instrument(session, meter_provider=board.provider)
        async with session.worker() as tool:
            manager.dirty.add(tool)
        await wait_all_tasks_blocked()
        assert (board.number("count", "idle"), board.number("count", "used")) == (0, 1)
        proceed.set()


@pytest.mark.parametrize(
    ("options", "idle_min", "idle_max", "most"),
    [
        ({"pool_size": 2, "max_overflow": 3}, 2, 5, 5),
        ({"pool_size": 2, "max_overflow": 3, "overflow_ttl": 0}, 2, 2, 5),
        ({"pool_size": 2, "max_overflow": 3, "lazy": True}, 0, 5, 5),
    ],
)
async def test_the_bounds(board: Board, options: Any, idle_min: int, idle_max: int, most: int) -> None:
    """The number of idle workers is within idle.min and idle.max, once a pool has come to rest."""
    async with whitepool.open_pool(Workshop().make, name="mine", **options) as session:
        telemetry.instrument(session, meter_provider=board.provider)
        assert board.number("idle.min") == idle_min
        assert board.number("idle.max") == idle_max
        assert board.number("max") == most


async def test_waiting_and_using(board: Board, session: Session, autojump_clock: MockClock) -> None:
    """The wait ends when the client has its worker, and there the use begins."""
    resources = [await session.block_checkout() for _ in range(2)]
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait() -> None:
            async with session.worker():
                await trio.sleep(0.5)

        await trio.sleep(3)
        assert board.times("wait_time") == (2, 0)
        session.checkin(resources.pop())
    assert board.times("wait_time") == (3, 3)
    assert board.times("use_time") == (2, 3.5)
    await trio.sleep(1)
    session.destroyed(resources.pop())
    assert board.times("use_time") == (3, 8)


async def test_every_kind_of_checkout(
    board: Board, session: Session, autojump_clock: MockClock
) -> None:
    """Whichever way a worker comes and goes, its checkout is measured once."""
    async with session.worker():
        await trio.sleep(1)
    for _ in range(2):
        resource = await session.nonblock_checkout()
        await trio.sleep(1)
        session.checkin(resource)
    resource = session.checkout_nowait()
    await trio.sleep(1)
    session.destroyed(resource)
    assert board.times("wait_time") == (4, 0)
    assert board.times("use_time") == (4, 4)
    assert session.statistics().checkouts == 4


async def test_checkouts_that_got_no_worker(
    board: Board, session: Session, autojump_clock: MockClock
) -> None:
    """A task that is refused counts as a timeout, a cancelled one as nothing; neither is measured."""
    async with session.worker(), session.worker():
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(timeout=1)
        with pytest.raises(trio.WouldBlock):
            session.checkout_nowait()
        with pytest.raises(whitepool.PoolFull):
            await session.nonblock_checkout()
        with trio.move_on_after(1):
            await session.block_checkout()
        assert board.number("timeouts") == 1
        assert board.times("wait_time") == (2, 0)


async def test_an_overload_is_a_timeout(board: Board) -> None:
    """`PoolOverloaded` is a `CheckoutTimeout` that comes early, and is counted as one."""
    options = {"name": "mine", "pool_size": 1, "max_overflow": 0, "max_waiting": 0}
    async with whitepool.open_pool(Workshop().make, **options) as session:  # type: ignore[arg-type]
        session = telemetry.instrument(session, meter_provider=board.provider)
        async with session.worker():
            with pytest.raises(whitepool.PoolOverloaded):
                await session.block_checkout()
        assert board.number("timeouts") == board.number("whitepool.overloads") == 1


async def test_the_other_counters(board: Board, autojump_clock: MockClock) -> None:
    """They are those of the statistics: what was opened, what could not be, and why a worker left."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, name="mine", pool_size=1) as session:
        telemetry.instrument(session, meter_provider=board.provider)
        for attempts in 1, 2:
            shop.before_open = raising(OSError("no"))
            session.destroyed(await session.block_checkout())
            await trio.sleep(attempts)
            shop.before_open = nothing
            await trio.sleep(5)
        now = session.statistics()
        assert (now.started, now.destroyed, now.lost) == (3, 2, 0) and now.start_failures > 2
        for name in whitepool._statistics.COUNTERS:
            if name not in ("checkouts", "timeouts"):
                assert board.number("whitepool." + name) == getattr(now, name), name


async def test_a_hook_that_fails(board: Board) -> None:
    """A checkout that fails in a hook had a worker all the same, as in the statistics."""

    def fail(_: object) -> None:
        raise ValueError("no")

    hooks = whitepool.Hooks(on_checkout=fail)
    async with whitepool.open_pool(Workshop().make, name="mine", hooks=hooks) as session:
        session = telemetry.instrument(session, meter_provider=board.provider)
        with pytest.raises(ValueError, match="no"):
            await session.block_checkout()
        assert session.statistics().in_use == 0
        assert session.statistics().checkouts == 1
    assert board.times("wait_time")[0] == board.times("use_time")[0] == 1


async def test_starts(board: Board, autojump_clock: MockClock) -> None:
    """How long each start took is told, also of workers that were there before."""
    shop = Workshop()
    shop.before_open = lambda attempt: trio.sleep(attempt)
    async with whitepool.open_pool(
        shop.make, name="mine", pool_size=1, max_overflow=1, start_timeout=60
    ) as session:
        session = telemetry.instrument(session, meter_provider=board.provider)
        assert board.times("create_time") == (1, 1)
        async with session.worker(), session.worker():
            assert board.times("create_time") == (2, 3)
    bounds = board.points("create_time")[""].explicit_bounds
    assert bounds == telemetry.BOUNDARIES  # the SDK's own are milliseconds


async def test_a_start_that_is_under_way(board: Board, autojump_clock: MockClock) -> None:
    """It is measured once, when it is over."""
    shop = Workshop()
    shop.before_open = lambda attempt: trio.sleep(attempt)
    async with whitepool.open_pool(shop.make, name="mine", pool_size=1, max_overflow=1) as session:
        async with session.worker(), trio.open_nursery() as nursery:
            nursery.start_soon(use, session)
            await trio.sleep(1)
            assert session.statistics().starting == 1
            telemetry.instrument(session, meter_provider=board.provider)
            assert board.times("create_time") == (1, 1)
        assert board.times("create_time") == (2, 3)


async def test_two_pools(board: Board) -> None:
    """Pools share the instruments of a meter provider, each under its own name."""
    async with (
        whitepool.open_pool(Workshop().make, name="one", pool_size=1) as one,
        whitepool.open_pool(Workshop().make, name="two", pool_size=2) as two,
    ):
        one = telemetry.instrument(one, meter_provider=board.provider)
        two = telemetry.instrument(two, meter_provider=board.provider)
        async with one.worker():
            assert board.number("count", "used", pool="one") == 1
            assert board.number("count", "idle", pool="two") == 2
        assert board.times("use_time", pool="one")[0] == 1
        assert board.times("use_time", pool="two")[0] == 0


async def test_two_providers(board: Board) -> None:
    """Each meter provider has instruments of its own, and knows the pools that were shown to it."""
    other = Board()
    async with whitepool.open_pool(Workshop().make, name="mine", pool_size=1) as session:
        telemetry.instrument(session, meter_provider=board.provider)
        assert other.number("max") is None
        telemetry.instrument(session, meter_provider=other.provider)
        assert board.number("max") == other.number("max") == 11
    other.provider.shutdown()


async def test_instrumented_twice(board: Board, session: Session) -> None:
    """A pool is reported once, and a checkout is measured once."""
    again = telemetry.instrument(session, meter_provider=board.provider)
    async with again.worker():
        assert board.number("count", "used") == 1
    assert board.times("create_time")[0] == 2
    assert board.times("use_time")[0] == 1


async def test_either_session_takes_what_the_other_gave(board: Board) -> None:
    """Only what goes through the measuring session is measured, but nothing is refused."""
    async with whitepool.open_pool(Workshop().make, name="mine", pool_size=1) as plain:
        measuring = telemetry.instrument(plain, meter_provider=board.provider)
        measuring.checkin(await plain.block_checkout())
        plain.checkin(await measuring.block_checkout())
        resource = await measuring.block_checkout()
        measuring.checkin(resource)
        with pytest.raises(whitepool.NotCheckedOut):
            measuring.checkin(resource)
        assert plain.statistics().checkouts == 3
        assert plain.statistics().idle == 1
    assert board.times("wait_time")[0] == 2
    assert board.times("use_time")[0] == 1


async def test_a_leak_is_the_clients(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    """With tracemalloc on, the log names file and line of the client, and not of the session."""
    tracemalloc.start(10)
    try:
        with pytest.warns(ResourceWarning):
            await session.block_checkout()
            gc.collect()
        await wait_all_tasks_blocked()
    finally:
        tracemalloc.stop()
    (record,) = [r for r in caplog.records if r.message.startswith("worker_leaked")]
    assert f"{__file__}:" in record.message


async def test_a_closed_pool_says_nothing(board: Board) -> None:
    """Callbacks can't be taken back: they fall silent, and keep nothing alive."""
    async with whitepool.open_pool(Workshop().make, name="mine") as session:
        telemetry.instrument(session, meter_provider=board.provider)
        supervisor = weakref.ref(session._supervisor)
        assert board.number("max") == 15  # also where the measuring session is not kept
    assert board.number("max") is None
    del session
    await trio.lowlevel.checkpoint()
    gc.collect()
    assert supervisor() is None
    assert board.number("max") is None


def test_a_meter_provider_is_not_kept_alive() -> None:
    """An application (or its tests) may have many, one after the other."""
    board = Board()
    telemetry._panel(board.provider)
    provider = weakref.ref(board.provider)
    board.provider.shutdown()
    del board
    gc.collect()
    assert provider() is None


async def test_read_while_the_pool_is_busy(board: Board, session: Session) -> None:
    """An exporter reads in a thread of its own, whatever the pool is doing."""
    seen = []

    def export() -> None:
        for _ in range(100):
            seen.append(board.number("count", "used"))

    async def work() -> None:
        while True:
            async with session.worker(timeout=600):
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(work)
        await trio.to_thread.run_sync(export)
        nursery.cancel_scope.cancel()
    assert {0, 1, 2}.issuperset(seen)


async def test_read_in_the_middle_of_a_change(
    board: Board, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that don't fit together are never negative; a reading that fails is repeated."""
    supervisor = session._supervisor
    torn = replace(supervisor.statistics(), in_use=-1)
    moved = RuntimeError("OrderedDict mutated during iteration")
    monkeypatch.setattr(supervisor, "statistics", Mock(side_effect=[moved, torn] * 6))
    assert board.number("count", "used") == 0
    monkeypatch.setattr(supervisor, "statistics", Mock(side_effect=moved))
    assert board.number("count", "used") is None


@pytest.mark.parametrize(
    "checkout", ["block_checkout", "nonblock_checkout", "checkout_nowait", "worker"]
)
@pytest.mark.parametrize("give_back", ["checkin", "destroyed"])
async def test_control_c_waits(
    checkout: str, give_back: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C can't come between the pool and its client, as without metrics."""
    protected = []

    def record(*_: object) -> None:
        protected.append(currently_ki_protected())

    monkeypatch.setattr(session, "_observer", Mock(on_checkout=record, on_return=record))
    if checkout == "worker":
        async with session.worker():
            pass
    else:
        resource = getattr(session, checkout)()
        getattr(session, give_back)(await resource if inspect.isawaitable(resource) else resource)
    assert protected == [True, True]
    assert not currently_ki_protected()


async def test_the_same_signatures(session: Session) -> None:
    """To its users, a measuring session is a session."""
    for name, method in inspect.getmembers(whitepool.Session, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(method) == inspect.signature(getattr(type(session), name))


def run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_off_unless_asked_for() -> None:
    """A pool without metrics doesn't even import them."""
    script = "import sys, whitepool.postgres; print('opentelemetry' in sys.modules)"
    assert run(script) == "False\n"


GLOBAL_PROVIDER = """
import trio, whitepool, whitepool.telemetry
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

async def make():
    return object()

async def main():
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    async with (
        whitepool.open_pool(make, name="before", pool_size=1) as before,
        whitepool.open_pool(make, name="after", pool_size=1) as after,
        whitepool.open_pool(make, name="explicit", pool_size=1) as explicit,
    ):
        before = whitepool.telemetry.instrument(before)
        metrics.set_meter_provider(provider)
        after = whitepool.telemetry.instrument(after)
        explicit = whitepool.telemetry.instrument(explicit, meter_provider=provider)
        for session in (before, after, explicit):
            async with session.worker():
                pass
        (resource,) = reader.get_metrics_data().resource_metrics
        for metric in resource.scope_metrics[0].metrics:
            points = metric.data.data_points
            pools = {point.attributes["db.client.connection.pool.name"] for point in points}
            print(metric.name, *sorted(pools))

trio.run(main)
"""


def test_the_global_provider() -> None:
    """Without a meter provider it is the application's, which may be set before or after."""
    output = run(GLOBAL_PROVIDER).splitlines()
    # The start of the first came before there was a meter provider.
    missing = ["db.client.connection.create_time after explicit"]
    assert [line for line in output if not line.endswith(" after before explicit")] == missing
    assert len(output) == 21


async def scrape(port: int) -> dict[str, float]:
    """Do as Prometheus does, and return its samples, without the histograms' steps."""

    def get() -> str:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    samples = {}
    for family in text_string_to_metric_families(await trio.to_thread.run_sync(get)):
        for sample in family.samples:
            if (
                sample.labels.get("db_client_connection_pool_name") == "shop"
                and "le" not in sample.labels
            ):
                state = sample.labels.get("db_client_connection_state", "")
                name = sample.name.removeprefix("db_client_connection_")
                samples[f"{name} {state}".strip()] = sample.value
    return samples


async def test_prometheus(dsn: str) -> None:
    """From a real pool of connections to what Prometheus reads: the numbers are what has happened."""
    provider = MeterProvider([PrometheusMetricReader()], shutdown_on_exit=False)
    server, thread = start_http_server(0, addr="127.0.0.1")
    try:
        async with whitepool.postgres.open_pool(
            dsn, name="shop", pool_size=2, max_overflow=1, autocommit=True
        ) as session:
            session = telemetry.instrument(session, meter_provider=provider)
            for _ in range(5):
                async with session.worker() as connection:
                    await connection.execute("SELECT pg_sleep(0.01)")
            async with session.worker(), session.worker(), session.worker(timeout=60):
                with pytest.raises(whitepool.CheckoutTimeout):
                    await session.block_checkout(timeout=0)
                busy = await scrape(server.server_port)
            rest = await scrape(server.server_port)
    finally:
        await trio.to_thread.run_sync(server.shutdown)
        server.server_close()
        thread.join()
        provider.shutdown()
    expected = {
        "count idle": 0,
        "count used": 3,
        "idle_max": 3,
        "idle_min": 2,
        "max": 3,
        "pending_requests": 0,
        "timeouts_total": 1,
        "create_time_seconds_count": 3,
        "wait_time_seconds_count": 8,
        "use_time_seconds_count": 5,
    }
    assert {name: busy[name] for name in expected} == expected
    assert busy["use_time_seconds_sum"] >= 0.05
    assert busy["create_time_seconds_sum"] > 0
    expected |= {"count idle": 3, "count used": 0, "use_time_seconds_count": 8}
    assert {name: rest[name] for name in expected} == expected
