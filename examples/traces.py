"""Two requests share one connection: the trace of the second shows how long it waited, and for what.

    pip install opentelemetry-sdk opentelemetry-instrumentation-psycopg
    python examples/traces.py

runs against DATABASE_URL, or against a PostgreSQL of its own where that is not set, and prints the
spans. With the name of a file it draws them as well: ``python examples/traces.py trace.svg``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import trio
from embedded_postgres import database_url
from matplotlib.figure import Figure
from opentelemetry import trace
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import whitepool.postgres
import whitepool.telemetry

Session = whitepool.postgres.PostgresSession[Any]

tracer = trace.get_tracer("shop")


async def order(session: Session, item: str) -> None:
    with tracer.start_as_current_span(f"POST /orders/{item}"):
        async with session.connection() as connection:
            await connection.execute("SELECT count(*) FROM stock WHERE item = %s", (item,))
            await connection.execute("SELECT pg_sleep(0.02)")  # a query that takes its time
            await connection.execute("INSERT INTO stock VALUES (%s)", (item,))


async def shop(dsn: str) -> None:
    options: dict[str, Any] = {"name": "shop", "pool_size": 1, "max_overflow": 0}
    async with whitepool.postgres.open_pool(dsn, **options, configure=prepare) as session:
        session = whitepool.telemetry.instrument(session)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(order, session, "tea")
            await trio.sleep(0.005)
            nursery.start_soon(order, session, "milk")


async def prepare(connection: whitepool.postgres.TrioConnection[Any]) -> None:
    await connection.execute("CREATE TEMP TABLE stock (item text)")
    await connection.commit()


Row = tuple[int, str, float, float, bool]
"""A span: how deep it is in its trace, its name, when it began and ended in milliseconds, and whether
it is a wait."""


def rows(spans: Iterable[ReadableSpan]) -> list[Row]:
    """Put the spans of all requests into the order of a trace: each one below its parent."""
    by_start = sorted(spans, key=lambda span: span.start_time or 0)
    (first, *_) = roots = [span for span in by_start if span.name.startswith("POST")]
    found: list[Row] = []
    for root in roots:
        for span in [root, *(other for other in by_start if other.parent == root.context)]:
            begun, ended = (
                ((time or 0) - (first.start_time or 0)) / 1e6
                for time in (span.start_time, span.end_time)
            )
            statement = (span.attributes or {}).get("db.statement", span.name)
            found.append(
                (int(span is not root), str(statement), begun, ended, span.name == "pool.wait")
            )
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Draw spans as bars, to be read on white and on black."""
    grey, blue, orange = "#808080", "#4c8dd6", "#e8590c"
    look: Any = {"text.color": grey, "svg.fonttype": "none", "svg.hashsalt": "trace"}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(8, 0.3 * len(rows)), layout="constrained")
        names, axes = figure.subplots(1, 2, sharey=True, width_ratios=(4, 5))
        for number, (depth, name, begun, ended, is_wait) in enumerate(rows):
            names.text(0.06 * depth, number, name, va="center", weight="normal" if depth else "bold")
            colour = orange if is_wait else blue if depth else grey
            bar = axes.barh(number, ended - begun, left=begun, height=0.7, color=colour)
            axes.bar_label(bar, [f"{ended - begun:.1f} ms"], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        for panel in (names, axes):
            panel.set_axis_off()
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def main() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    PsycopgInstrumentor().instrument()
    with database_url() as url:
        trio.run(shop, url)
    found = rows(exporter.get_finished_spans())
    for depth, name, begun, ended, _ in found:
        print(f"{begun:6.1f} ms  {ended - begun:6.1f} ms  {'  ' * depth}{name}")
    if sys.argv[1:]:
        draw(found, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
