"""Everything that a user can import and call: to change this list is to change the public interface.

What begins with an underscore is private, and so is every module whose name does. A class stands with
what it has of its own; psycopg's own classes and Trio's are psycopg's and Trio's.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, Generic, get_args, get_origin

import pytest

import whitepool
import whitepool.postgres
from whitepool._options import Options

PUBLIC = """\
# whitepool
class CheckoutTimeout(PoolError, TooSlowError)
class Hooks
    def __init__(on_create=None, before_acquire=None, on_checkout=None, on_checkin=None,
            after_release=None, on_destroy=None)
    after_release
    before_acquire
    on_checkin
    on_checkout
    on_create
    on_destroy
class NotCheckedOut(PoolError)
class Pool
    def __init__(factory) and the options
    factory
    async def run_service(*, task_status=TASK_STATUS_IGNORED)
class PoolClosed(PoolError)
class PoolError(Exception)
class PoolFull(PoolError)
class PoolOverloaded(CheckoutTimeout)
class PoolStartError(PoolError)
class PoolStatistics
    checkouts
    destroyed
    discarded
    idle
    in_use
    last_error
    last_words
    leaked
    longest_use
    longest_wait
    lost
    max_overflow
    name
    overflow
    overloads
    pool_size
    resetting
    retired
    start_failures
    started
    starting
    state
    timeouts
    wait_time
    waited
    waiting
class PoolUnavailable(CheckoutTimeout)
Reason = overflow | idle | lifetime | retire_all | shutdown | crashed | hung_up | check_failed |
            dead | destroyed | reset_failed | hook_failed | leaked
class Resource
    def get()
    def hand_over()
    lost
class Session
    async def block_checkout(timeout=None)
    def checkin(resource)
    def checkout_nowait()
    def destroyed(resource)
    name
    async def nonblock_checkout()
    def resize()
    def retire_all(over=0.0)
    async def safe_shutdown(timeout=inf)
    def statistics()
    def worker(timeout=None)
class WorkerLost(PoolError)
class WorkerManager
    async def check(worker)
    async def close(worker)
    async def create()
    def fileno(worker)
    def is_alive(worker)
    def lifespan()
    def needs_reset(worker)
    async def reset(worker)
def open_pool(factory) and the options
# whitepool.live
class PoolView
    def __init__(*sessions, events=5)
async def watch(*sessions, above=None, console=None, period=0.1)
# whitepool.postgres
class PostgresManager(WorkerManager)
    def __init__(conninfo='', *, connection_class=<class 'whitepool.postgres.TrioConnection'>,
            configure=None, reset='rollback', **connect_keywords)
    async def check(worker)
    async def create()
    def is_alive(worker)
    def needs_reset(worker)
    async def reset(worker)
class PostgresSession(Session)
    def connection(timeout=None)
class TrioConnection(AsyncConnection)
    def __init__(pgconn, row_factory=None)
    async def cancel_safe(*, timeout=30.0)
    cleanup_timeout
    async def close()
    async def connect(conninfo='', *, autocommit=False, prepare_threshold=5, context=None,
            row_factory=None, cursor_factory=None, cleanup_timeout=5.0, **kwargs)
    def pipeline()
    def transaction(savepoint_name=None, force_rollback=False)
    async def wait(gen, interval=None, timeout=None)
async def connect(conninfo='', *, autocommit=False, prepare_threshold=5, context=None,
            row_factory=None, cursor_factory=None, cleanup_timeout=5.0, **kwargs)
def open_pool(conninfo='', *, connection_class=<class 'whitepool.postgres.TrioConnection'>,
            configure=None, reset='rollback', **connect_keywords) and the options
# whitepool.telemetry
def instrument(session, *, meter_provider=None, tracer_provider=None)
"""

OPTIONS = """\
pool_size = 5
max_overflow = 10
strategy = lifo
name = None
lazy = False
min_ready = None
overflow_ttl = 10.0
idle_timeout = inf
max_lifetime = inf
check_interval = 30.0
checkout_timeout = 5.0
start_timeout = 30.0
reset_timeout = 5.0
close_timeout = 5.0
shutdown_timeout = 30.0
max_starting = 4
max_waiting = inf
patience = 0.4
held_warning = inf
hooks = Hooks(on_create=None, before_acquire=None, on_checkout=None, on_checkin=None,
            after_release=None, on_destroy=None)
"""

MADE_BY_THE_POOL = (whitepool.PoolStatistics, whitepool.Resource, whitepool.Session)
"""Their constructors are not for users."""


def public_modules() -> Iterator[str]:
    yield "whitepool"
    for module in pkgutil.walk_packages(whitepool.__path__, "whitepool."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            yield module.name


def describe(name: str, thing: Any) -> Iterator[str]:
    """Describe something in the manner of a stub file, without types."""
    if isinstance(thing, type):
        bases = [base.__name__ for base in public_bases(thing)]
        yield f"class {name}({', '.join(bases)})" if bases else f"class {name}"
        for member_name, member in sorted(members(thing).items()):
            yield from ("    " + line for line in describe(member_name, member))
    elif inspect.isfunction(thing) or inspect.ismethod(thing):
        options = inspect.signature(Options).parameters
        every = inspect.signature(thing).parameters
        parameters = [
            parameter.replace(annotation=parameter.empty)
            for parameter in every.values()
            if parameter.name not in ("self", "cls") and parameter.name not in options
        ]
        keyword = "async def" if inspect.iscoroutinefunction(thing) else "def"
        signature = str(inspect.Signature(parameters))
        if options.keys() <= every.keys():
            signature += " and the options"
        yield f"{keyword} {name}{signature}"
    elif get_origin(thing) is not None:
        yield f"{name} = {' | '.join(get_args(thing))}"
    else:
        yield name


def is_private(base: type) -> bool:
    return base.__module__.rpartition(".")[2].startswith("_")


def public_bases(cls: type) -> Iterator[type]:
    for base in cls.__bases__:
        if is_private(base):
            yield from public_bases(base)
        elif base not in (object, Generic):
            yield base


def members(cls: type) -> dict[str, Any]:
    """Return what a class has of its own, and of bases that are private rooms of ours.

    The options are listed by themselves.
    """
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        is_ours = is_private(base) and base.__module__.startswith("whitepool.")
        if base is cls or (is_ours and base is not Options):
            found.update(dict.fromkeys(vars(base).get("__annotations__", ())))
            found.update(vars(base))
    return {
        name: member.__func__ if isinstance(member, classmethod) else member
        for name, member in found.items()
        if not name.startswith("_")
        or (name == "__init__" and cls not in MADE_BY_THE_POOL and inspect.isfunction(member))
    }


def wrapped(lines: list[str]) -> str:
    return "\n".join(textwrap.fill(line, 100, subsequent_indent=" " * 12) for line in lines) + "\n"


def test_everything_public() -> None:
    """The names, and how to call them."""
    lines = []
    for name in public_modules():
        module = importlib.import_module(name)
        lines.append(f"# {name}")
        for public in sorted(module.__all__):
            lines += describe(public, getattr(module, public))
    assert wrapped(lines) == PUBLIC


def test_options() -> None:
    """The keywords of `open_pool` and `Pool`, with their defaults."""
    options = inspect.signature(Options).parameters.values()
    lines = [f"{option.name} = {option.default}" for option in options]
    assert wrapped(lines) == OPTIONS


@pytest.mark.parametrize(
    "function", [whitepool.Pool, whitepool.open_pool, whitepool.postgres.open_pool]
)
def test_help_shows_every_option(function: Callable[..., object]) -> None:
    """With its type and its default; and so does an editor."""
    signature = inspect.signature(function).parameters
    for option in inspect.signature(Options).parameters.values():
        assert signature[option.name] == option


def test_things_say_where_they_are_imported_from() -> None:
    """Not in which private module they live."""
    for name in public_modules():
        module = importlib.import_module(name)
        for public in module.__all__:
            thing = getattr(module, public)
            if isinstance(thing, type):
                assert thing.__module__ == name
