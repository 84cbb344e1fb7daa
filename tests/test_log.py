"""The pool is quiet until it is asked, and then speaks as the application does."""

from __future__ import annotations

import gc
import linecache
import logging
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import structlog
import trio
from structlog.testing import LogCapture, capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked
from workshop import Manager, Workshop, hang

import whitepool
from whitepool._log import PoolLog
from whitepool._manager import on_discarded, on_misconfigured

PACKAGE = Path(whitepool.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "howto" / "logs.md"


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    """No test leaves structlog configured, which `capture_logs` does, too."""
    assert not structlog.is_configured()
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def told() -> Iterator[list[logging.LogRecord]]:
    """Everything that reaches the standard logger `whitepool`."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    logger = logging.getLogger("whitepool")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield records
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


def test_an_event_is_a_sentence_and_a_record(told: list[logging.LogRecord]) -> None:
    """People read one line, machines get the keys as attributes."""
    PoolLog("mine").warning("worker_lost", reason="100%")
    (record,) = told
    assert record.name == "whitepool"
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "worker_lost pool=mine reason=100%"
    assert (record.event, record.pool, record.reason) == (  # type: ignore[attr-defined]
        "worker_lost",
        "mine",
        "100%",
    )


def test_a_level_that_is_off_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The standard logger's level decides, before anything is made of the event."""
    caplog.set_level(logging.INFO, "whitepool")
    key = Mock()
    key.__str__ = key.__format__ = Mock(side_effect=AssertionError)  # type: ignore[method-assign]
    PoolLog("mine").debug("worker_started", seconds=key)
    assert not caplog.records


def test_silent_by_default() -> None:
    """An application that did not set up logging sees nothing, not even warnings. (Rule 12.)"""
    script = (
        "from whitepool._log import PoolLog; log = PoolLog('mine');"
        "log.warning('start_failed', error='x'); log.info('pool_opened'); log.debug('worker_started')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("", "")


async def test_what_is_not_logged_is_counted(
    told: list[logging.LogRecord], mock_clock: MockClock
) -> None:
    """An event is logged once a second, and the next one says how many of its name were not."""
    log = PoolLog("mine")
    for time, event in (
        (0, "start_failed"),
        (0.25, "start_failed"),
        (0.5, "start_failed"),
        (0.75, "close_failed"),
        (1, "start_failed"),
        (1.5, "close_failed"),
        (1.75, "close_failed"),
        (1.875, "start_failed"),
        (2, "start_failed"),
        (3, "start_failed"),
    ):
        mock_clock.jump(time - trio.current_time())
        log.throttled_warning(event, at=time)
    assert [record.getMessage() for record in told] == [
        "start_failed pool=mine at=0",
        "close_failed pool=mine at=0.75",
        "start_failed pool=mine at=1 suppressed=2",
        "close_failed pool=mine at=1.75 suppressed=1",
        "start_failed pool=mine at=2 suppressed=1",
        "start_failed pool=mine at=3",
    ]


class Talking(Manager):
    """A manager of workers whose peers say something when they leave."""

    def _last_words(self, worker: object) -> str:
        return "57P01: good night"


async def fail(*_: object) -> None:
    raise ValueError("no")


async def use(manager: Manager, **hooks: Any) -> None:
    """Open a pool, return a worker to it that needs a reset, and close it."""
    async with whitepool.open_pool(
        manager, name="mine", pool_size=1, hooks=whitepool.Hooks(**hooks)
    ) as session:
        async with session.worker() as tool:
            manager.dirty.add(tool)
        await wait_all_tasks_blocked()


async def a_worker_dies(shop: Workshop, manager: Manager) -> None:
    manager.is_alive = lambda worker: False  # type: ignore[method-assign]
    await use(manager)


async def a_worker_crashes(shop: Workshop, manager: Manager) -> None:
    async with whitepool.open_pool(shop.with_nursery, name="mine", pool_size=1):
        shop.tools[0].crash.set()
        await wait_all_tasks_blocked()


async def a_start_fails_and_the_next_does_not(shop: Workshop, manager: Manager) -> None:
    shop.before_open = lambda attempt: fail() if attempt == 1 else trio.lowlevel.checkpoint()
    await use(manager)


async def a_reset_fails(shop: Workshop, manager: Manager) -> None:
    manager.before_reset = fail
    await use(manager)


async def writes_are_discarded(shop: Workshop, manager: Manager) -> None:
    async def roll_back(_: object) -> None:
        on_discarded.get()()

    manager.before_reset = roll_back
    await use(manager)


async def a_hook_fails(shop: Workshop, manager: Manager) -> None:
    await use(manager, after_release=fail)


async def a_hook_fails_before_the_reset(shop: Workshop, manager: Manager) -> None:
    await use(manager, on_checkin=fail)


async def closing_fails(shop: Workshop, manager: Manager) -> None:
    shop.before_close = fail
    await use(manager)


async def a_manager_fails(shop: Workshop, manager: Manager) -> None:
    manager.needs_reset = Mock(side_effect=ValueError("no"))  # type: ignore[method-assign]
    await use(manager)


async def a_manager_finds_a_mistake(shop: Workshop, manager: Manager) -> None:
    async def find(worker: object) -> None:
        on_misconfigured.get()("it can't work")

    manager._on_open = find  # type: ignore[method-assign]
    await use(manager)


async def a_worker_is_forgotten(shop: Workshop, manager: Manager) -> None:
    async with whitepool.open_pool(manager, name="mine") as session:
        with pytest.warns(ResourceWarning):
            await session.block_checkout()
            gc.collect()
        await wait_all_tasks_blocked()


async def an_operator_acts(shop: Workshop, manager: Manager) -> None:
    async with whitepool.open_pool(shop.make, name="mine", pool_size=1) as session:
        session.resize(2)
        session.retire_all()
        await wait_all_tasks_blocked()


async def the_server_is_full(shop: Workshop, manager: Manager) -> None:
    shop.before_open = lambda attempt: fail() if attempt == 2 else trio.lowlevel.checkpoint()
    manager._is_full = lambda error: True  # type: ignore[method-assign]
    async with whitepool.open_pool(manager, name="mine", pool_size=2, max_starting=1):
        await trio.sleep(1)


async def a_worker_comes_back_late(shop: Workshop, manager: Manager) -> None:
    async with (
        whitepool.open_pool(manager, name="mine", held_warning=10) as session,
        session.worker(),
    ):
        await trio.sleep(15)


async def a_task_ends_with_a_worker(shop: Workshop, manager: Manager) -> None:
    async with whitepool.open_pool(
        manager, name="mine", held_warning=10, shutdown_timeout=15
    ) as session:
        kept = []

        async def end() -> None:
            kept.append(await session.block_checkout())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)


TROUBLES = (
    an_operator_acts,
    the_server_is_full,
    a_worker_dies,
    a_worker_crashes,
    a_start_fails_and_the_next_does_not,
    a_reset_fails,
    writes_are_discarded,
    a_hook_fails,
    a_hook_fails_before_the_reset,
    closing_fails,
    a_manager_fails,
    a_manager_finds_a_mistake,
    a_worker_is_forgotten,
    a_worker_comes_back_late,
    a_task_ends_with_a_worker,
)


async def provoke_everything() -> None:
    """Have pools log each event that there is."""
    for make_trouble in TROUBLES:
        shop = Workshop()
        await make_trouble(shop, Talking(shop))


async def test_the_page_on_logs(told: list[logging.LogRecord], autojump_clock: MockClock) -> None:
    """Its table has every event that there is, with its level and every key."""
    await provoke_everything()
    usual = {*vars(logging.makeLogRecord({})), "message", "event"}
    events: dict[tuple[str, str], set[str]] = {}
    for record in told:
        keys = vars(record).keys() - usual
        events.setdefault((vars(record)["event"], record.levelname), set()).update(keys)
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    assert events == {(event, level): set(re.findall(r"`(\w+)`", keys)) for event, level, keys in rows}


async def test_a_life_in_the_log(told: list[logging.LogRecord], autojump_clock: MockClock) -> None:
    """The pool is opened and closed once. What a client destroys is not retired, and is replaced."""
    shop = Workshop()
    shop.before_open = lambda _: trio.sleep(2)
    async with whitepool.open_pool(shop.make, name="mine", pool_size=2) as session:
        session.destroyed(await session.block_checkout())
        await trio.sleep(5)
        await session.safe_shutdown()
    assert [(record.levelname, record.getMessage()) for record in told] == [
        ("DEBUG", "worker_started pool=mine seconds=2.0"),
        ("DEBUG", "worker_started pool=mine seconds=2.0"),
        ("INFO", "pool_opened pool=mine workers=2"),
        ("DEBUG", "worker_started pool=mine seconds=2.0"),
        ("DEBUG", "worker_retired pool=mine reason=shutdown"),
        ("DEBUG", "worker_retired pool=mine reason=shutdown"),
        ("INFO", "pool_closed pool=mine"),
    ]


async def test_a_start_that_is_given_up_is_not_in_the_log(
    told: list[logging.LogRecord], autojump_clock: MockClock
) -> None:
    """No worker has been started, and none is retired."""
    shop = Workshop()
    async with whitepool.open_pool(shop.make, name="mine", pool_size=1) as session:
        shop.before_open = hang
        session.resize(2)
        await wait_all_tasks_blocked()
        del told[:]
        session.resize(1, 0)
        await wait_all_tasks_blocked()
        assert shop.opening == 0
    assert [record.getMessage() for record in told] == [
        "pool_resized pool=mine pool_size=1 max_overflow=0",
        "worker_retired pool=mine reason=shutdown",
        "pool_closed pool=mine",
    ]


async def test_a_reset_that_the_shutdown_ends_has_not_failed(
    told: list[logging.LogRecord], autojump_clock: MockClock
) -> None:
    """The log tells only that the worker was retired."""
    manager = Manager(Workshop())
    manager.before_reset = hang
    async with (
        whitepool.open_pool(manager, name="mine", pool_size=1, shutdown_timeout=1) as session,
        session.worker() as tool,
    ):
        manager.dirty.add(tool)
    assert {record.levelname for record in told} == {"INFO", "DEBUG"}
    assert told[-2].getMessage() == "worker_retired pool=mine reason=shutdown"


async def test_the_log_says_whose_writes_were_discarded(
    told: list[logging.LogRecord], autojump_clock: MockClock
) -> None:
    """With the line that has checked the worker out, where Python traces that."""
    shop = Workshop()
    tracemalloc.start(10)
    try:
        await writes_are_discarded(shop, Manager(shop))
    finally:
        tracemalloc.stop()
    (record,) = [record for record in told if vars(record)["event"] == "writes_discarded"]
    assert vars(record)["checked_out_at"].startswith(f"{__file__}:")


@pytest.mark.parametrize("error", [ValueError("later"), whitepool.PoolStartError("never")])
async def test_a_pool_that_could_not_be_opened_is_not_closed(
    told: list[logging.LogRecord], autojump_clock: MockClock, error: Exception
) -> None:
    """The log tells of neither."""

    async def start() -> None:
        raise error

    with pytest.raises(whitepool.PoolStartError):
        async with whitepool.open_pool(start, pool_size=1):
            pass
    assert {vars(record)["event"] for record in told} == {"start_failed"}


def configure_on_the_standard_library() -> None:
    """Have structlog log through `logging`, as its documentation proposes."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


@pytest.mark.parametrize("configure", [lambda: None, configure_on_the_standard_library])
async def test_a_record_names_the_line_of_the_pool(
    told: list[logging.LogRecord], autojump_clock: MockClock, configure: Any
) -> None:
    """It is the one that logs, and not one of structlog, or of the module for logs."""
    configure()
    await provoke_everything()
    assert len({record.msg.split()[0] for record in told}) > 10
    for record in told:
        assert Path(record.pathname).parent == PACKAGE
        assert record.filename != "_log.py"
        line = linecache.getline(record.pathname, record.lineno)
        assert re.search(r"self\._log\.\w*(info|debug|warning)\b", line), record
        assert f"def {record.funcName}(" in "".join(linecache.getlines(record.pathname))


async def test_the_line_that_logs_for_structlog(autojump_clock: MockClock) -> None:
    """structlog names it, where it is told to look beyond the module for logs."""
    # Without a choice of parameters it fails before Python 3.11.
    adder = structlog.processors.CallsiteParameterAdder(
        {structlog.processors.CallsiteParameter.FILENAME}, additional_ignores=["whitepool._log"]
    )
    capture = LogCapture()
    structlog.configure(processors=[adder, capture])
    await provoke_everything()
    assert {entry["filename"] for entry in capture.entries} == {
        "_holding.py",
        "_operating.py",
        "_starting.py",
        "_supervisor.py",
    }


@pytest.mark.parametrize("configure", [lambda: None, structlog.configure])
async def test_capture_logs(
    told: list[logging.LogRecord],
    capsys: pytest.CaptureFixture[str],
    autojump_clock: MockClock,
    configure: Any,
) -> None:
    """It sees the pool's events, whether the application has configured structlog or not."""
    configure()
    with capture_logs() as logs:
        shop = Workshop()
        await a_worker_crashes(shop, Manager(shop))
    assert logs[:3] == [
        {"event": "worker_started", "log_level": "debug", "pool": "mine", "seconds": 0.0},
        {"event": "pool_opened", "log_level": "info", "pool": "mine", "workers": 1},
        {
            "event": "worker_lost",
            "log_level": "warning",
            "pool": "mine",
            "reason": "crashed",
            "error": "RuntimeError: the background task crashed",
        },
    ]
    assert logs[-1] == {"event": "pool_closed", "log_level": "info", "pool": "mine"}
    assert told == []
    assert capsys.readouterr() == ("", "")


async def test_what_the_application_has_bound(autojump_clock: MockClock) -> None:
    """What was bound before the pool was opened is in each of its events."""
    capture = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    with structlog.contextvars.bound_contextvars(service="shop"):
        await provoke_everything()
    assert len({entry["event"] for entry in capture.entries}) > 10
    for entry in capture.entries:
        assert entry["service"] == "shop", entry


async def test_what_a_client_has_bound(autojump_clock: MockClock) -> None:
    """It is in the events that the client's own task comes upon."""
    capture = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    shop = Workshop()
    manager = Manager(shop)
    async with whitepool.open_pool(manager, pool_size=1) as session:
        with structlog.contextvars.bound_contextvars(request=7):
            async with session.worker() as tool:
                manager.dead.add(tool)
    (lost,) = [entry for entry in capture.entries if entry["event"] == "worker_lost"]
    assert lost["request"] == 7


async def test_structlog_may_be_configured_while_the_pool_is_open(
    told: list[logging.LogRecord],
) -> None:
    """And again: each event goes where it belongs by then, even if structlog caches loggers."""
    first, second = LogCapture(), LogCapture()
    async with whitepool.open_pool(Workshop().make, pool_size=1) as session:
        structlog.configure(processors=[first], cache_logger_on_first_use=True)
        session._supervisor._log.info("once")
        structlog.configure(processors=[second], cache_logger_on_first_use=True)
    assert [vars(record)["event"] for record in told] == ["worker_started", "pool_opened"]
    assert [entry["event"] for entry in first.entries] == ["once"]
    assert [entry["event"] for entry in second.entries] == ["worker_retired", "pool_closed"]


async def test_the_level_of_the_applications_structlog(told: list[logging.LogRecord]) -> None:
    """It decides, and not the one of the standard logger."""
    capture = LogCapture()
    structlog.configure(
        processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)
    )
    async with whitepool.open_pool(Workshop().make, pool_size=1):
        pass
    assert [entry["event"] for entry in capture.entries] == ["pool_opened", "pool_closed"]
    assert told == []


async def live_through_trouble() -> None:
    """Lose a worker in each way in which a pool comes to log that, and have the pool go on."""
    shop = Workshop()
    manager = Manager(shop)
    async with whitepool.open_pool(manager, pool_size=2) as session:
        with pytest.warns(ResourceWarning):
            await session.block_checkout()
            gc.collect()
        await wait_all_tasks_blocked()
        async with session.worker() as tool:
            manager.dead.add(tool)
        await wait_all_tasks_blocked()
        manager.before_reset = fail
        async with session.worker() as tool:
            manager.dirty.add(tool)
        await wait_all_tasks_blocked()
        statistics = session.statistics()
        assert (statistics.idle, statistics.lost, statistics.leaked, statistics.destroyed) == (
            2,
            1,
            1,
            1,
        )
        async with session.worker(), session.worker():
            pass
    assert not shop.alive


async def test_a_pipeline_that_raises(told: list[logging.LogRecord], autojump_clock: MockClock) -> None:
    """The pool goes on, and the standard logger gets the event, and why structlog did not take it."""

    def processor(*_: object) -> str:
        raise KeyError("tenant")

    structlog.configure(processors=[processor])
    await live_through_trouble()
    events = [vars(record)["event"] for record in told]
    assert events[:3] == ["worker_started", "worker_started", "pool_opened"]
    assert {"worker_leaked", "worker_lost", "reset_failed"} < set(events)
    assert {vars(record)["log_error"] for record in told} == {"KeyError: 'tenant'"}
    assert all(record.filename != "_log.py" for record in told)


async def test_a_filter_that_raises(
    told: list[logging.LogRecord], autojump_clock: MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    """The pool goes on, and Python reports the error as it does that of a handler."""

    def worth_telling(record: logging.LogRecord) -> bool:
        raise KeyError("tenant")

    logger = logging.getLogger("whitepool")
    logger.addFilter(worth_telling)
    try:
        await live_through_trouble()
    finally:
        logger.removeFilter(worth_telling)
    assert told == []
    reported = capfd.readouterr().err
    assert "KeyError: 'tenant'" in reported
    assert "worker_leaked pool=" in reported


async def test_a_mistake_is_told_once(told: list[logging.LogRecord], autojump_clock: MockClock) -> None:
    """Every worker may show it, and one sentence says it. Another mistake is another sentence."""
    manager = Manager(Workshop())

    async def find(worker: Any) -> None:
        on_misconfigured.get()(f"mistake {worker.number % 2}")

    manager._on_open = find  # type: ignore[method-assign]
    for _ in range(2):
        async with whitepool.open_pool(manager, name="mine", pool_size=6):
            pass
    messages = [record.getMessage() for record in told if "misconfigured" in record.getMessage()]
    assert messages == [f"misconfigured pool=mine reason=mistake {number}" for number in (1, 0)] * 2
