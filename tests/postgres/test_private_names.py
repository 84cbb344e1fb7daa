"""The private names of psycopg, and of what instruments it, that whitepool.postgres relies on.

A release that drops one of them fails here first, and says which. Those that are looked for
before they are used, as they are newer than the oldest psycopg that is supported, are marked.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from pathlib import Path
from typing import Any

import psycopg
import pytest
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from psycopg import AsyncPipeline, capabilities, errors, generators, pq
from psycopg.adapt import AdaptersMap

import whitepool.postgres

PSYCOPG = tuple(int(part) for part in re.findall(r"\d+", psycopg.__version__)[:3])

ATTRIBUTES: dict[str, object] = {
    "_adapters": None,
    "_autocommit": False,
    "_begin_statement": b"",
    "_closed": False,
    "_deferrable": None,
    "_isolation_level": None,
    "_notice_handlers": [],
    "_notify_handlers": [],
    "_num_transactions": 0,
    "_pipeline": None,
    "_read_only": None,
    "_tpc": None,
}
"""Attributes of a new connection, with the values that whitepool counts on."""

NEW_IN_3_2_4 = {"_notifies_backlog"}

METHODS = {
    "_check_connection_ok": (),
    "_should_cancel": (),
    "_try_cancel": ("timeout",),
    "wait": ("gen",),
}
"""Methods of a connection, with their parameters: called, or overridden, by whitepool."""

NEW_METHODS = {"_pipeline_nolock"}
"""Overridden where `executemany` calls it; in older releases that calls `pipeline`."""

CURSOR_METHODS = [
    "_make_row_maker",
    "_raise_for_result",
    "_select_current_result",
    "_start_copy_gen",
    "_stream_send_gen",
]
"""Methods of a cursor. The last one is a generator, and is recognised by its code."""

CURSOR_ATTRIBUTES: dict[str, object] = {"_rowcount": -1, "_pgconn": None}
"""Attributes of a new cursor, with the value of the one that whitepool sets."""

COPY_ATTRIBUTES: dict[str, object] = {"_finished": False, "_pgconn": None}
"""Attributes of a new COPY, likewise."""

PREPARED = ["clear", "_to_flush"]
"""What is used of `connection._prepared`."""

ERRORS = ["_WaitTimeout", "finish_pgconn"]
NEW_ERRORS = {"_WaitTimeout": (3, 3)}
"""Raised only where psycopg's `wait` has a timeout, which came together with it."""

GENERATORS = ["execute", "fetch", "fetch_many"]


OF_OPENTELEMETRY = {"_is_instrumented_by_opentelemetry", "_self_wrapper"}
"""Names of its instrumentation of psycopg, and of wrapt, by which it wraps `connect`."""


@pytest.fixture
def connection() -> psycopg.AsyncConnection[Any]:
    """One that was never open."""
    return psycopg.AsyncConnection(pq.PGconn.connect_start(b"host=/nowhere"))


def lacking(what: str) -> str:
    return f"psycopg {psycopg.__version__} has no {what} any more, which whitepool.postgres needs"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(connection: psycopg.AsyncConnection[Any], name: str) -> None:
    """A new connection has the attribute, with the value that whitepool takes for new."""
    assert hasattr(connection, name), lacking(f"AsyncConnection.{name}")
    assert getattr(connection, name) == ATTRIBUTES[name]


@pytest.mark.parametrize("name", NEW_IN_3_2_4)
def test_newer_attributes(connection: psycopg.AsyncConnection[Any], name: str) -> None:
    """A backlog of notifications, where there is one, is a deque."""
    if PSYCOPG >= (3, 2, 4):
        assert hasattr(connection, name), lacking(f"AsyncConnection.{name}")
    assert getattr(connection, name, deque()) == deque()


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    """A connection has the method, with the parameters that whitepool passes or takes."""
    method = getattr(psycopg.AsyncConnection, name, None)
    assert method is not None, lacking(f"AsyncConnection.{name}")
    for parameter in METHODS[name]:
        assert parameter in inspect.signature(method).parameters, lacking(f"{name}({parameter}=)")


@pytest.mark.parametrize("name", NEW_METHODS)
def test_newer_methods(name: str) -> None:
    """Either a connection has the method, or `executemany` has no use for it."""
    used = f"{name}(" in inspect.getsource(psycopg.AsyncCursor.executemany)
    assert used == hasattr(psycopg.AsyncConnection, name)
    if used:
        assert "_no_lock" in inspect.signature(AsyncPipeline).parameters, lacking("_no_lock")
    else:
        assert ".pipeline(" in inspect.getsource(psycopg.AsyncCursor.executemany)


@pytest.mark.parametrize("name", CURSOR_METHODS)
def test_methods_of_cursors(name: str) -> None:
    """A cursor has the method."""
    method = getattr(psycopg.AsyncCursor, name, None)
    assert callable(method), lacking(f"AsyncCursor.{name}")
    assert inspect.isgeneratorfunction(method) == name.endswith("_gen")


def test_attributes_of_cursors(connection: psycopg.AsyncConnection[Any]) -> None:
    """A cursor, and a COPY, have the attributes; what whitepool sets has the value that it expects."""
    cursor = psycopg.AsyncCursor(connection)
    copy = psycopg.AsyncCopy(cursor)
    for thing, attributes in ((cursor, CURSOR_ATTRIBUTES), (copy, COPY_ATTRIBUTES)):
        for name, value in attributes.items():
            assert hasattr(thing, name), lacking(f"{type(thing).__name__}.{name}")
            assert value is None or getattr(thing, name) == value


def test_rows_of_streams() -> None:
    """They are loaded by the transformer of a cursor, which is made for each query."""
    source = inspect.getsource(psycopg.AsyncCursor.stream)
    assert "self._tx.load_row(" in source, lacking("AsyncCursor._tx")


@pytest.mark.parametrize("name", PREPARED)
def test_prepared(connection: psycopg.AsyncConnection[Any], name: str) -> None:
    """A connection's bookkeeping of prepared statements can be cleared."""
    assert hasattr(connection, "_prepared"), lacking("AsyncConnection._prepared")
    assert hasattr(connection._prepared, name), lacking(f"PrepareManager.{name}")


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    """The module of errors has what is raised, and what keeps a failed connection's state."""
    if NEW_ERRORS.get(name, (3, 2)) <= PSYCOPG:
        assert hasattr(errors, name), lacking(f"errors.{name}")


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name: str) -> None:
    """The module of generators, which is not documented, has those that whitepool drives."""
    assert hasattr(generators, name), lacking(f"generators.{name}")


def test_transactions(connection: psycopg.AsyncConnection[Any]) -> None:
    """A transaction knows its connection as `_conn`, and its place among those entered."""
    transaction = psycopg.AsyncTransaction(connection)
    assert getattr(transaction, "_conn", None) is connection, lacking("AsyncTransaction._conn")
    assert getattr(transaction, "_stack_index", -1) == -1  # psycopg 3.2.0 sets it at entering


def test_pipelines(connection: psycopg.AsyncConnection[Any]) -> None:
    """A pipeline knows its connection as `_conn`, and how deep it is nested."""
    pipeline = AsyncPipeline(connection)
    assert getattr(pipeline, "_conn", None) is connection, lacking("AsyncPipeline._conn")
    assert getattr(pipeline, "level", None) == 0, lacking("AsyncPipeline.level")
    assert hasattr(pipeline, "pgconn"), lacking("AsyncPipeline.pgconn")


def test_the_way_to_cancel() -> None:
    """psycopg says whether libpq can cancel without a thread."""
    assert hasattr(capabilities, "has_cancel_safe"), lacking("capabilities.has_cancel_safe")


def test_opentelemetry(
    connection: psycopg.AsyncConnection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official instrumentation leaves its marks where whitepool looks for them."""
    for kind in (psycopg.Connection, psycopg.AsyncConnection):
        monkeypatch.setattr(kind, "connect", vars(kind)["connect"])
    PsycopgInstrumentor().instrument()
    assert callable(vars(psycopg.AsyncConnection)["connect"]._self_wrapper)
    PsycopgInstrumentor().uninstrument()
    assert not hasattr(vars(psycopg.AsyncConnection)["connect"], "_self_wrapper")
    PsycopgInstrumentor.instrument_connection(connection)
    assert connection._is_instrumented_by_opentelemetry is True  # type: ignore[attr-defined]


def test_adapters_are_private_until_they_are_used(connection: psycopg.AsyncConnection[Any]) -> None:
    """Asking a connection for its adapters makes its own copy, which a reset throws away."""
    assert isinstance(connection.adapters, AdaptersMap)
    assert connection._adapters is connection.adapters
    connection._adapters = None
    assert connection.adapters is not psycopg.adapters


def test_every_private_name_is_listed_here() -> None:
    """Whatever private name whitepool.postgres uses is in the lists above, or is its own."""
    own = {"_TYPE_CHECKING", "__"}
    listed = {
        *ATTRIBUTES,
        *NEW_IN_3_2_4,
        *METHODS,
        *PREPARED,
        *NEW_METHODS,
        *CURSOR_METHODS,
        *CURSOR_ATTRIBUTES,
        *COPY_ATTRIBUTES,
        *ERRORS,
        *OF_OPENTELEMETRY,
        "_prepared",
        "_conn",
        "_stack_index",
        "_tx",
    }
    folder = Path(inspect.getfile(whitepool.postgres)).parent
    source = "\n".join(path.read_text() for path in folder.glob("*.py"))
    used = set(re.findall(r"(?:\.|\")(_[a-zA-Z]\w*)", source))
    defined = set(re.findall(r"(?:def|class) (_\w+)|self\.(_\w+)(?:: .*)? =", source))
    own |= {name for pair in defined for name in pair}
    modules = {path.stem for room in (folder, folder.parent) for path in room.glob("*.py")}
    elsewhere = {"_created", "_open", "_resource"}  # of whitepool's own Pool, and of its _Lease
    assert used - listed - own - modules - elsewhere == set()
