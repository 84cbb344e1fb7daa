"""What a trace shows: queries, by OpenTelemetry's instrumentation of psycopg, and waits."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import trio
import wrapt
from connections import Connection
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from psycopg import sql
from timing import until
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Tool, Workshop, nothing

import whitepool
from whitepool import telemetry
from whitepool.postgres import PostgresManager, connect, open_pool
from whitepool.postgres._rows import TrioCursor

AnyConnection = psycopg.AsyncConnection[Any]


class Journal:
    """A tracer provider, and the spans that have ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("tests")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self.spans]

    def tree(self) -> list[tuple[str, str]]:
        """Return each span's name with its parent's, in the order in which they ended."""
        names = {span.context.span_id: span.name for span in self.spans if span.context}
        return [
            (names.get(span.parent.span_id, "?") if span.parent else "", span.name)
            for span in self.spans
        ]


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    # What `uninstrument` leaves is not quite what there was before.
    for kind in (psycopg.Connection, psycopg.AsyncConnection):
        monkeypatch.setattr(kind, "connect", vars(kind)["connect"])
    journal = Journal()
    yield journal
    journal.provider.shutdown()


@pytest.fixture
def instrumented(journal: Journal) -> Iterator[None]:
    """psycopg is instrumented globally."""
    PsycopgInstrumentor().instrument(tracer_provider=journal.provider)
    yield
    PsycopgInstrumentor().uninstrument()


# Queries


async def test_queries_are_in_the_span_of_their_task(
    dsn: str, journal: Journal, instrumented: None
) -> None:
    """Tasks that share a pool have their queries in their own spans, whoever used it before."""

    async def request(number: int) -> None:
        for _ in range(3):
            with journal.tracer.start_as_current_span(f"request {number}"):
                async with session.connection() as connection:
                    await connection.execute(f"SELECT pg_sleep(0.01), {number}")

    async with (
        open_pool(dsn, pool_size=2, max_overflow=0) as session,
        trio.open_nursery() as nursery,
    ):
        for number in range(5):
            nursery.start_soon(request, number)
    queries = [span for span in journal.spans if span.name == "SELECT"]
    assert len(queries) == 15
    parents = {span.context.span_id: span.name for span in journal.spans if span.context}
    for span in queries:
        assert span.parent is not None and span.attributes is not None
        statement = str(span.attributes["db.statement"])
        assert parents[span.parent.span_id] == f"request {statement[-1]}"


async def test_what_a_query_says(dsn: str, journal: Journal, instrumented: None) -> None:
    """The attributes are those of the conventions, and of this server."""
    async with open_pool(dsn, pool_size=1) as session, session.connection() as connection:
        await connection.execute("SELECT 1")
        info = connection.info
        mine: dict[str, object] = {"db.name": info.dbname, "db.user": info.user}
        mine |= {"net.peer.name": info.host, "net.peer.port": info.port}
    (span,) = journal.spans
    assert (span.name, span.kind) == ("SELECT", SpanKind.CLIENT)
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes == {"db.system": "postgresql", "db.statement": "SELECT 1", **mine}


async def all_sorts(connection: AnyConnection) -> None:
    """Everything that makes a span with psycopg on asyncio, and what makes none."""
    await connection.execute("CREATE TEMP TABLE notes (note text)")
    await connection.execute(sql.SQL("SELECT {}").format(sql.Literal(1)))
    await connection.execute(b"SELECT 2")
    await connection.execute("/* a comment */ SELECT %s", (3,))
    async with connection.cursor() as cursor:
        await cursor.executemany("INSERT INTO notes VALUES (%s)", [("a",), ("b",)])
        async for _ in cursor.stream("SELECT * FROM notes"):
            pass
        async with cursor.copy("COPY notes FROM STDIN") as copy:
            await copy.write_row(("c",))
    async with connection.transaction():
        await connection.execute("UPDATE notes SET note = 'd'")
    async with connection.cursor("named") as named:
        await named.execute("SELECT * FROM notes")
        await named.fetchall()
    async with connection.pipeline():
        await connection.execute("SELECT 4")
        await connection.execute("SELECT 5")
    with suppress(psycopg.Error):
        await connection.execute("SELECT 1/0")
    await connection.rollback()
    with suppress(psycopg.Error):
        await connection.execute("")


class Seen(NamedTuple):
    """What there is in a span that does not depend on the time."""

    name: str
    kind: SpanKind
    attributes: dict[str, object]
    status: tuple[StatusCode, str | None]
    errors: list[object]
    scope: str
    parent: str


def seen(journal: Journal) -> list[Seen]:
    """Return what there is in the spans, and forget them."""
    found = [
        Seen(
            span.name,
            span.kind,
            dict(span.attributes or {}),
            (span.status.status_code, span.status.description),
            [(event.attributes or {})["exception.type"] for event in span.events],
            span.instrumentation_scope.name if span.instrumentation_scope else "",
            parent,
        )
        for span, (parent, _) in zip(journal.spans, journal.tree(), strict=True)
    ]
    journal.exporter.clear()
    return found


@pytest.mark.parametrize("globally", [True, False])
@pytest.mark.parametrize("keywords", [{}, {"cursor_factory": psycopg.AsyncClientCursor}])
def test_the_same_spans_as_on_asyncio(
    globally: bool, keywords: dict[str, Any], dsn: str, journal: Journal
) -> None:
    """A pooled connection on Trio makes the spans that psycopg makes on asyncio."""

    async def use(connection: AnyConnection) -> None:
        if not globally:
            PsycopgInstrumentor.instrument_connection(connection, tracer_provider=journal.provider)
        with journal.tracer.start_as_current_span("client"):
            await all_sorts(connection)

    async def on_asyncio() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, **keywords) as connection:
            await use(connection)

    async def on_trio() -> None:
        async with (
            open_pool(dsn, pool_size=1, **keywords) as session,
            session.connection() as connection,
        ):
            await use(connection)

    if globally:
        PsycopgInstrumentor().instrument(tracer_provider=journal.provider)
    try:
        asyncio.run(on_asyncio())
        expected = seen(journal)
        trio.run(on_trio)
        assert seen(journal) == expected
        statements = [span.attributes.get("db.statement") for span in expected]
        assert statements[:-1] == [
            "CREATE TEMP TABLE notes (note text)",
            "SELECT 1",
            "SELECT 2",
            "/* a comment */ SELECT %s",
            "INSERT INTO notes VALUES (%s)",
            "UPDATE notes SET note = 'd'",
            "SELECT 4",
            "SELECT 5",
            "SELECT 1/0",
            "",
        ]
    finally:
        if globally:
            PsycopgInstrumentor().uninstrument()


async def test_a_cancelled_query_ends_its_span(dsn: str, journal: Journal, instrumented: None) -> None:
    """It is no error, and the span that is current afterwards is the client's own."""
    async with open_pool(dsn, pool_size=1) as session:
        with journal.tracer.start_as_current_span("client") as client:
            with trio.move_on_after(0.05):
                async with session.connection() as connection:
                    await connection.execute("SELECT pg_sleep(30)")
            assert trace.get_current_span() is client
    assert journal.tree() == [("client", "SELECT"), ("", "client")]
    assert journal.spans[0].status.status_code is StatusCode.UNSET


async def test_cursors_stay_those_for_trio(dsn: str, journal: Journal, instrumented: None) -> None:
    """The instrumentation is put around the cursor factory that there was."""

    class Mine(TrioCursor[Any]):
        pass

    async with (
        await connect(dsn) as usual,
        await connect(dsn, cursor_factory=Mine) as given,
    ):
        assert TrioCursor in usual.cursor_factory.__mro__[1:]
        assert Mine in given.cursor_factory.__mro__[1:]


# Instrumenting


async def test_uninstrument(dsn: str, journal: Journal) -> None:
    """New connections make no spans any more, until psycopg is instrumented again."""

    async def query() -> list[str]:
        async with open_pool(dsn, pool_size=1) as session, session.connection() as connection:
            await connection.execute("SELECT 1")
        names = journal.names()
        journal.exporter.clear()
        return names

    instrumentor = PsycopgInstrumentor()
    assert await query() == []
    for _ in range(2):
        instrumentor.instrument(tracer_provider=journal.provider)
        assert await query() == ["SELECT"]
        instrumentor.uninstrument()
        assert await query() == []


SCRIPT = """
import os, trio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

def instrument():
    from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
    PsycopgInstrumentor().instrument()

{start}

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

async def main():
    async with whitepool.postgres.open_pool(os.environ["DSN"], pool_size=1) as session:
        async with session.connection() as connection:
            await connection.execute("SELECT 1")

trio.run(main)
print(*[span.name for span in exporter.get_finished_spans()])
"""


@pytest.mark.parametrize(
    "start",
    [
        "instrument()\nimport whitepool.postgres",
        "import whitepool.postgres\ninstrument()",
        "import whitepool.postgres",
    ],
    ids=["before the import", "after the import", "opentelemetry-instrument"],
)
def test_instrumented_at_any_time(start: str, dsn: str) -> None:
    """It does not matter which comes first, nor who instruments."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT.format(start=start)]
    if "instrument()" not in start:
        command.insert(0, str(Path(sys.executable).with_name("opentelemetry-instrument")))
        command.remove("-W")
        command.remove("error")  # it has warnings of its own
    environment = {**os.environ, "DSN": dsn, "PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert (result.stdout, result.returncode) == ("SELECT\n", 0), result.stderr


@pytest.mark.parametrize("reset", ["rollback", "session"])
@pytest.mark.parametrize("way", ["globally", "configure", "create"])
async def test_a_reset_keeps_the_instrumentation(
    way: str, reset: Any, dsn: str, journal: Journal
) -> None:
    """Each query of each client makes one span, also on a connection that was left dirty."""

    async def configure(connection: Connection) -> None:
        PsycopgInstrumentor.instrument_connection(connection, tracer_provider=journal.provider)

    class Manager(PostgresManager):
        async def create(self) -> Connection:
            connection = await super().create()
            await configure(connection)
            return connection

    kind = Manager if way == "create" else PostgresManager
    manager = kind(dsn, reset=reset, configure=configure if way == "configure" else None)
    if way == "globally":
        PsycopgInstrumentor().instrument(tracer_provider=journal.provider)
    try:
        async with whitepool.open_pool(manager, pool_size=1, max_overflow=0) as session:
            for client in range(3):
                async with session.worker() as connection:
                    await connection.execute("SELECT 1")
                assert journal.names() == ["SELECT"] * (client + 1)
    finally:
        if way == "globally":
            PsycopgInstrumentor().uninstrument()


async def test_a_reset_keeps_what_is_known_of_each_server(
    dsn: str, journal: Journal, instrumented: None
) -> None:
    """Connections of one pool may lead to different servers: their spans say so, also after resets."""
    hosts = ["127.0.0.1", "localhost"]

    class Manager(PostgresManager):
        async def create(self) -> Connection:
            connection: Connection = await connect(dsn, host=hosts.pop())
            return connection

    manager = Manager(dsn, reset="session")
    async with whitepool.open_pool(manager, pool_size=2, max_overflow=0) as session:
        for _ in range(3):
            async with session.worker() as one, session.worker() as other:
                expected = [one.info.host, other.info.host]
                await one.execute("SELECT 1")
                await other.execute("SELECT 1")
            assert sorted(expected) == ["127.0.0.1", "localhost"]
            assert [span.attributes["net.peer.name"] for span in seen(journal)] == expected


async def test_a_client_may_instrument_its_connection(dsn: str, journal: Journal) -> None:
    """With ``reset="session"`` that holds until the connection is returned, and can be done again."""
    async with open_pool(dsn, pool_size=1, max_overflow=0, reset="session") as session:
        for instruments in (True, False, True):
            async with session.worker() as connection:
                if instruments:
                    PsycopgInstrumentor.instrument_connection(
                        connection, tracer_provider=journal.provider
                    )
                await connection.execute("SELECT 1")
    assert journal.names() == ["SELECT"] * 2


async def test_wrappers_of_other_libraries(dsn: str, journal: Journal, instrumented: None) -> None:
    """All that wrap psycopg's `connect` are called, and none can put a proxy into the pool."""
    called = []

    class Mine(TrioCursor[Any]):
        pass

    async def wrapper(
        connect: Callable[..., Awaitable[object]], owner: type, args: Any, keywords: dict[str, Any]
    ) -> object:
        called.append(owner)
        keywords["cursor_factory"] = type("Cursor", (Mine, keywords["cursor_factory"]), {})
        return wrapt.ObjectProxy(await connect(*args, **keywords))

    wrapt.wrap_function_wrapper(psycopg.AsyncConnection, "connect", wrapper)
    try:
        async with open_pool(dsn, pool_size=1) as session, session.connection() as connection:
            assert type(connection) is called[0]
            assert Mine in connection.cursor_factory.__mro__[1:]
            await connection.execute("SELECT 1")
    finally:
        psycopg.AsyncConnection.connect = vars(psycopg.AsyncConnection)["connect"].__wrapped__  # type: ignore[method-assign]
    assert len(called) == 1
    assert journal.names() == ["SELECT"]


async def test_a_wrapper_that_fails_leaves_no_connection_open(dsn: str) -> None:
    """Nor does one that is cancelled, as its task does not get the connection."""
    opened: list[Any] = []

    async def wrapper(
        connect: Callable[..., Awaitable[object]], _: type, args: Any, keywords: dict[str, Any]
    ) -> object:
        opened.append(await connect(*args, **keywords))
        scope.cancel()
        await trio.sleep_forever()
        raise AssertionError

    wrapt.wrap_function_wrapper(psycopg.AsyncConnection, "connect", wrapper)
    try:
        with trio.CancelScope() as scope:
            await connect(dsn)
    finally:
        psycopg.AsyncConnection.connect = vars(psycopg.AsyncConnection)["connect"].__wrapped__  # type: ignore[method-assign]
    assert opened[0].closed


# What the pool itself does


async def test_what_the_pool_does_is_in_no_trace(
    dsn: str, journal: Journal, instrumented: None
) -> None:
    """Probes and resets make no spans, and a connection that a client waits for is not in its trace."""
    configured: list[Connection] = []
    probed: list[Connection] = []

    class Manager(PostgresManager):
        async def check(self, worker: Connection) -> None:
            await super().check(worker)
            probed.append(worker)

    async def configure(connection: Connection) -> None:
        configured.append(connection)
        await connection.execute("SET work_mem = '3MB'")
        await connection.commit()

    manager = Manager(dsn, reset="session", configure=configure)
    with journal.tracer.start_as_current_span("start-up"):
        async with whitepool.open_pool(
            manager, pool_size=1, max_overflow=1, overflow_ttl=math.inf, check_interval=0.01
        ) as session:
            with journal.tracer.start_as_current_span("client", context=Context()):
                async with session.worker() as connection, session.worker():
                    await connection.execute("SELECT 1")  # begins a transaction, and leaves it open
                before_resets = len(configured)
                await until(lambda: session.statistics().idle == 2)
                await until(lambda: len(set(probed)) == 2)
    assert (before_resets, len(configured)) == (2, 4)
    assert sorted(journal.tree()) == [
        ("", "client"),
        ("", "start-up"),
        ("client", "SELECT"),
        *[("start-up", "SET")] * 4,
    ]


# Waits


@asynccontextmanager
async def traced_pool(
    journal: Journal, before_open: Callable[[int], Awaitable[None]] = nothing, **options: Any
) -> AsyncIterator[whitepool.Session[Tool]]:
    """A pool of one fake worker, by a session that is instrumented."""
    shop = Workshop()
    shop.before_open = before_open
    async with whitepool.open_pool(
        shop.make, name="mine", pool_size=1, max_overflow=0, **options
    ) as session:
        yield telemetry.instrument(session, tracer_provider=journal.provider)


async def test_no_span_without_a_wait(journal: Journal) -> None:
    """A checkout that finds an idle worker makes none, nor does one that is refused at once."""
    async with traced_pool(journal, max_waiting=0) as session:
        async with session.worker():
            with pytest.raises(whitepool.PoolOverloaded):
                await session.block_checkout()
            with pytest.raises(whitepool.PoolFull):
                await session.nonblock_checkout()
            with pytest.raises(trio.WouldBlock):
                session.checkout_nowait()
        session.checkin(await session.nonblock_checkout())
        session.checkin(session.checkout_nowait())
    assert journal.spans == []


@pytest.mark.parametrize("checkout", ["block_checkout", "nonblock_checkout"])
async def test_a_wait_is_a_span(checkout: str, journal: Journal, autojump_clock: MockClock) -> None:
    """It lasts from the checkout until the task has its worker, in the task's current span."""
    async with traced_pool(journal, trio.sleep, lazy=True) as session:
        with journal.tracer.start_as_current_span("client"):
            before = time.time_ns()
            session.checkin(await getattr(session, checkout)())
            after = time.time_ns()
    assert journal.tree() == [("client", "pool.wait"), ("", "client")]
    span = journal.spans[0]
    assert span.kind is SpanKind.INTERNAL
    assert span.attributes == {"db.client.connection.pool.name": "mine"}
    assert span.status.status_code is StatusCode.UNSET
    assert span.start_time is not None and span.end_time is not None
    assert span.end_time - span.start_time == 1_000_000_000
    assert before <= span.end_time <= after
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "whitepool"
    assert span.instrumentation_scope.version == whitepool.__version__


async def test_each_waiter_has_its_own(journal: Journal, autojump_clock: MockClock) -> None:
    """Tasks that wait together have the span in their own traces, and the first one has none."""

    async def client(number: int) -> None:
        with journal.tracer.start_as_current_span(str(number)):
            async with session.worker(timeout=60):
                await trio.sleep(1)

    async with traced_pool(journal) as session, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(client, number)
            await wait_all_tasks_blocked()
    seconds = {
        parent: round((span.end_time - span.start_time) / 1e9)  # type: ignore[operator]
        for span, (parent, name) in zip(journal.spans, journal.tree(), strict=True)
        if name == "pool.wait"
    }
    assert seconds == {"1": 1, "2": 2, "3": 3}


async def test_a_wait_in_vain(journal: Journal, autojump_clock: MockClock) -> None:
    """A timeout is an error of its span; a cancellation is none."""
    async with traced_pool(journal) as session, session.worker():
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=2)
        with trio.move_on_after(1):
            await session.block_checkout()
    timeout, cancelled = journal.spans
    assert timeout.status.status_code is StatusCode.ERROR
    assert timeout.status.description == str(caught.value)
    assert (timeout.attributes or {})["error.type"] == "whitepool.CheckoutTimeout"
    assert timeout.end_time - timeout.start_time == 2_000_000_000  # type: ignore[operator]
    assert cancelled.status.status_code is StatusCode.UNSET
    assert cancelled.attributes == {"db.client.connection.pool.name": "mine"}
    assert cancelled.end_time - cancelled.start_time == 1_000_000_000  # type: ignore[operator]


async def test_a_processor_that_raises_loses_no_worker(
    journal: Journal, autojump_clock: MockClock
) -> None:
    """The application's own tracing may fail: the checkout does not."""

    class Broken(SpanProcessor):
        def on_start(self, span: Span, parent_context: Context | None = None) -> None:
            raise ValueError("no")

    journal.provider.add_span_processor(Broken())
    async with traced_pool(journal, lazy=True) as session:
        async with session.worker():
            assert session.statistics().in_use == 1
        assert session.statistics().idle == 1


async def test_waits_of_the_other_session(journal: Journal, autojump_clock: MockClock) -> None:
    """Only the session that `instrument` returns makes spans."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, pool_size=1, lazy=True) as plain:
        telemetry.instrument(plain, tracer_provider=journal.provider)
        async with plain.worker():
            pass
    assert journal.spans == []


async def test_a_trace_of_a_request(dsn: str, journal: Journal, instrumented: None) -> None:
    """With both, a request shows that it waited, and then what it asked."""
    async with open_pool(dsn, name="shop", pool_size=1, max_overflow=0) as session:
        session = telemetry.instrument(session, tracer_provider=journal.provider)

        async def request() -> None:
            with journal.tracer.start_as_current_span("request"):
                async with session.connection() as connection:
                    await connection.execute("SELECT 1")

        async with trio.open_nursery() as nursery, session.worker():
            nursery.start_soon(request)
            await wait_all_tasks_blocked()
    assert journal.tree() == [("request", "pool.wait"), ("request", "SELECT"), ("", "request")]
    wait, query, request_span = journal.spans
    assert None not in (wait.end_time, query.start_time, request_span.start_time, wait.start_time)
    assert request_span.start_time <= wait.start_time  # type: ignore[operator]
    assert wait.end_time <= query.start_time  # type: ignore[operator]
