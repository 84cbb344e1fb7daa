"""The pure decisions, as tables: how many to start, which workers retire, and which are probed.

A row is named after the case of the code that it stands for, or after the boundary that it is at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from whitepool import Hooks, Reason
from whitepool import _sizing as sizing
from whitepool._entry import HANDED_OVER, Entry, State
from whitepool._options import Options

NOW = 100.0


def worker(
    idle_since: float = 0,
    *,
    state: State = State.IDLE,
    expires_at: float = math.inf,
    probed_at: float = -math.inf,
    can_be_checked: bool = True,
    reason: Reason | None = None,
    jitter: float = 1,
) -> Entry[str]:
    """Make the entry of a worker that is idle, can be probed, and may stay."""
    entry: Entry[str] = Entry()
    entry.state = state
    entry.idle_since, entry.probed_at, entry.expires_at = idle_since, probed_at, expires_at
    entry.can_be_checked, entry.evict_reason, entry.jitter = can_be_checked, reason, jitter
    return entry


def positions(entries: list[Entry[str]], found: list[Entry[str]]) -> list[int]:
    return [entries.index(entry) for entry in found]


# -- Starts --------------------------------------------------------------------------------------------

QUIET = {"unprovided": 0, "opening": 0, "lasting": 5, "target": 5, "room": 9, "at_once": 4}
"""A pool that has what it needs, and room for more."""


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        pytest.param({}, 0, id="nothing is missing"),
        pytest.param({"unprovided": 1}, 1, id="1. a task waits"),
        pytest.param(
            {"unprovided": 3, "opening": 1}, 2, id="1. a worker is on its way to one of three"
        ),
        pytest.param({"unprovided": 2, "opening": 2}, 0, id="1. a worker is on its way to each"),
        pytest.param(
            {"unprovided": 1, "opening": 3}, -2, id="1. more are on their way than tasks wait"
        ),
        pytest.param({"lasting": 3}, 2, id="2. two are missing"),
        pytest.param({"lasting": 2, "opening": 1}, 2, id="2. three are missing, one is on its way"),
        pytest.param({"lasting": 3, "opening": 2}, 0, id="2. those that are missing are on their way"),
        pytest.param({"lasting": 7}, 0, id="2. there are more than the pool wants"),
        pytest.param({"lasting": 0, "target": 0}, 0, id="2. a lazy pool wants none"),
        pytest.param({"unprovided": 3, "lasting": 4}, 3, id="the greater of the two: the waiters"),
        pytest.param({"unprovided": 1, "lasting": 2}, 3, id="the greater of the two: the missing ones"),
        pytest.param({"unprovided": 3, "room": 2}, 2, id="3. there is room for two"),
        pytest.param({"unprovided": 3, "room": 0}, 0, id="3. there is room for none"),
        pytest.param({"unprovided": 9}, 4, id="3. four at once"),
        pytest.param({"unprovided": 9, "opening": 3}, 1, id="3. four at once, three of them under way"),
        pytest.param({"unprovided": 9, "at_once": 0}, 0, id="3. none at once"),
    ],
)
def test_how_many_to_start(differs: dict[str, int], expected: int) -> None:
    """As many as are missing, within the bounds; 0 or less means none."""
    assert sizing.how_many_to_start(**{**QUIET, **differs}) == expected


@pytest.mark.parametrize(
    ("is_failing", "is_pausing", "expected"),
    [
        pytest.param(True, True, 0, id="1. the pause after a failure"),
        pytest.param(False, True, 0, id="1. a pause in any case"),
        pytest.param(True, False, 1, id="2. the last start failed"),
        pytest.param(False, False, 4, id="else"),
    ],
)
def test_how_many_start_at_once(is_failing: bool, is_pausing: bool, expected: int) -> None:
    """A server that refuses is tried by one start at a time."""
    found = sizing.starts_at_once(max_starting=4, is_failing=is_failing, is_pausing=is_pausing)
    assert found == expected


# -- Retiring ------------------------------------------------------------------------------------------

CROWDED: dict[str, Any] = {
    "lasting": 2,
    "target": 3,
    "waiting": 0,
    "open_now": 3,
    "total": 3,
    "limit": 3,
    "is_failing": False,
}
"""A pool without overflow in which one of three workers is to be replaced."""


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        pytest.param({"lasting": 3}, True, id="1. its replacement is there"),
        pytest.param({"lasting": 4}, True, id="1. and one more"),
        pytest.param({"lasting": 3, "is_failing": True}, True, id="1. also where starts fail"),
        pytest.param({"lasting": 0, "target": 0, "limit": 9}, True, id="1. a lazy pool needs none"),
        pytest.param({"lasting": 3, "waiting": 1, "limit": 4}, False, id="1. a task needs it"),
        pytest.param({"lasting": 3, "waiting": 1}, True, id="2. a task needs it, but there is no room"),
        pytest.param({}, True, id="2. there is no room"),
        pytest.param({"limit": 2}, True, id="2. there is less than no room"),
        pytest.param({"limit": 4}, False, id="2. there is room for one"),
        pytest.param({"open_now": 2}, False, id="2. another has made room already"),
        pytest.param({"is_failing": True}, False, id="2. the server refuses new ones"),
    ],
)
def test_whether_a_worker_may_retire(differs: dict[str, Any], expected: bool) -> None:
    """When its replacement is there, or when it has to make room for it."""
    assert sizing.may_retire(**{**CROWDED, **differs}) is expected


@pytest.mark.parametrize(
    ("excess", "overflow_ttl", "expected", "next_due"),
    [
        pytest.param(-1, 10, [], math.inf, id="fewer than the pool wants"),
        pytest.param(0, 10, [], math.inf, id="as many as the pool wants"),
        pytest.param(1, 10, [0], math.inf, id="the longest idle first"),
        pytest.param(2, 10, [0, 1], math.inf, id="due in this instant"),
        pytest.param(3, 10, [0, 1], 101, id="the third is due in a second"),
        pytest.param(9, 10, [0, 1], 101, id="more than are idle"),
        pytest.param(9, 0, [0, 1, 2, 3], math.inf, id="at once"),
        pytest.param(9, math.inf, [], math.inf, id="never"),
    ],
)
def test_which_workers_are_surplus(
    excess: int, overflow_ttl: float, expected: list[int], next_due: float
) -> None:
    """Those beyond the size of the pool that no client has needed for `overflow_ttl`."""
    idle = [worker(since) for since in (80, 90, 91, 99)]
    found, due = sizing.surplus(idle, excess, overflow_ttl, NOW)
    assert positions(idle, found) == expected
    assert due == next_due


@pytest.mark.parametrize(
    ("changes", "is_due", "next_due"),
    [
        pytest.param({"expires_at": 99}, True, math.inf, id="past"),
        pytest.param({"expires_at": 100}, True, math.inf, id="in this instant"),
        pytest.param({"expires_at": 101}, False, 101, id="in a second"),
        pytest.param({}, False, math.inf, id="never"),
        pytest.param({"expires_at": 99, "state": State.IN_USE}, True, math.inf, id="in use"),
        pytest.param({"expires_at": 99, "state": State.SERVICING}, True, math.inf, id="being reset"),
        pytest.param({"expires_at": 99, "state": State.OPENING}, False, math.inf, id="being opened"),
        pytest.param({"expires_at": 99, "state": State.CLOSING}, False, math.inf, id="being closed"),
        pytest.param({"expires_at": 99, "reason": "idle"}, False, math.inf, id="marked already"),
        pytest.param({"expires_at": 101, "reason": "idle"}, False, math.inf, id="marked, not due"),
    ],
)
def test_which_workers_are_too_old(changes: dict[str, Any], is_due: bool, next_due: float) -> None:
    """Open ones that have reached their `expires_at`, whatever they are doing."""
    entry = worker(**changes)
    assert sizing.lifetime_expired([entry], NOW) == ([entry] if is_due else [], next_due)


def test_the_first_of_those_that_grow_old() -> None:
    """The time that is returned is that of the first that is still to come."""
    old, later, soon = (worker(expires_at=time) for time in (50, 120, 110))
    assert sizing.lifetime_expired([old, later, soon], NOW) == ([old], 110)
    assert sizing.lifetime_expired([], NOW) == ([], math.inf)


@pytest.mark.parametrize(
    ("changes", "is_due", "next_due"),
    [
        pytest.param({"idle_since": 39}, True, math.inf, id="past"),
        pytest.param({"idle_since": 40}, True, math.inf, id="in this instant"),
        pytest.param({"idle_since": 41}, False, 101, id="in a second"),
        pytest.param({"idle_since": 41, "jitter": 0.9}, True, math.inf, id="a tenth earlier by chance"),
        pytest.param({"idle_since": 46, "jitter": 0.9}, True, math.inf, id="as early as chance allows"),
        pytest.param({"idle_since": 39, "reason": "lifetime"}, False, math.inf, id="marked already"),
        pytest.param({"idle_since": 41, "reason": "lifetime"}, False, math.inf, id="marked, not due"),
    ],
)
def test_which_workers_are_unused(changes: dict[str, Any], is_due: bool, next_due: float) -> None:
    """Those that are idle for `idle_timeout`, less their share of chance."""
    entry = worker(**changes)
    assert sizing.idle_expired([entry], 60, NOW) == ([entry] if is_due else [], next_due)


def test_the_first_of_those_that_are_unused() -> None:
    """With their jitter, the longest idle need not be the first."""
    unused, later, soon, last = worker(10), worker(60), worker(61, jitter=0.9), worker(62)
    assert sizing.idle_expired([unused, later, soon, last], 60, NOW) == ([unused], 61 + 0.9 * 60)
    assert sizing.idle_expired([unused], math.inf, NOW) == ([], math.inf)


def test_workers_that_were_used_lately_are_not_looked_at() -> None:
    """They come last, and none of them can be due before the first that was found."""

    def idle() -> Iterator[Entry[str]]:
        yield worker(10)
        yield worker(50)
        yield worker(57)
        raise AssertionError("it went on")

    assert sizing.idle_expired(idle(), 60, NOW)[1] == 110


# -- Long checkouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("since", "changes", "is_due", "next_due"),
    [
        pytest.param(89, {}, True, math.inf, id="for longer"),
        pytest.param(90, {}, True, math.inf, id="as of this instant"),
        pytest.param(91, {}, False, 101, id="in a second"),
        pytest.param(89, {"client": None}, False, math.inf, id="its client has not had its turn"),
        pytest.param(89, {"state": State.SERVICING}, False, math.inf, id="it is being reset"),
    ],
)
def test_which_checkouts_last_for_too_long(
    since: float, changes: dict[str, Any], is_due: bool, next_due: float
) -> None:
    """Those in which a client has had its worker for `held_warning`."""
    entry = worker(state=changes.get("state", State.IN_USE))
    entry.in_use_since, entry.client = since, changes.get("client", HANDED_OVER)
    assert sizing.held_too_long([entry], 10, NOW) == ([entry] if is_due else [], next_due)


# -- Probes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"idle_since": 70}, 100, id="it was used last"),
        pytest.param({"idle_since": 70, "jitter": 0.9}, 97, id="a tenth earlier by chance"),
        pytest.param({"idle_since": 9, "probed_at": 90}, 120, id="it was probed since"),
        pytest.param({"idle_since": 90, "probed_at": 9}, 120, id="it was used since"),
        pytest.param({"idle_since": 70, "state": State.IN_USE}, 130, id="it is in use"),
        pytest.param({"idle_since": 70, "state": State.SERVICING}, 130, id="it is being probed"),
    ],
)
def test_when_a_worker_is_probed(changes: dict[str, Any], expected: float) -> None:
    """When it has given no sign of life for `check_interval`, less its share of chance."""
    assert sizing.probe_at(worker(**changes), 30, NOW) == expected


@pytest.mark.parametrize(
    ("idle", "probing", "expected"),
    [
        pytest.param(1, 0, 1, id="the only one"),
        pytest.param(1, 1, 0, id="one of two is being probed"),
        pytest.param(2, 0, 1, id="half of two"),
        pytest.param(3, 0, 1, id="half of three, less than that"),
        pytest.param(4, 0, 2, id="half of four"),
        pytest.param(3, 1, 1, id="half of four, of which one is under way"),
        pytest.param(2, 2, 0, id="half of four, which are under way"),
        pytest.param(1, 3, -1, id="more than half are under way"),
        pytest.param(200, 0, 100, id="half of two hundred"),
        pytest.param(202, 0, 100, id="less than half of more, so that other tasks can run"),
    ],
)
def test_how_many_are_probed_together(idle: int, probing: int, expected: int) -> None:
    """Half of those that no client holds, but not too many of them."""
    assert sizing.room_for_probes(idle, probing) == expected


# -- When ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "period"),
    [
        pytest.param("overflow_ttl", "surplus", id="overflow"),
        pytest.param("max_lifetime", "lifetime", id="lifetime"),
        pytest.param("idle_timeout", "idle", id="idle"),
        pytest.param("check_interval", "probe", id="probes"),
        pytest.param("held_warning", "held", id="long checkouts"),
    ],
)
def test_the_periods(option: str, period: str) -> None:
    """Each is as long as its option says, less the tenth that chance may take off."""
    options: Any = {"overflow_ttl": math.inf, "check_interval": math.inf, option: 5.0}
    found = sizing.periods(Options(hooks=Hooks(), **options))._asdict()
    assert found.pop(period) == pytest.approx(4.5)
    assert set(found.values()) == {math.inf}


def test_an_option_of_zero_sets_no_period() -> None:
    """Overflow that leaves at once, and workers that are probed when they are handed out."""
    found = sizing.periods(Options(overflow_ttl=0, check_interval=0))
    assert found.surplus == found.probe == math.inf


@pytest.mark.parametrize(
    ("due", "pause", "expected"),
    [
        pytest.param(104, 0.5, 104, id="when the first is due"),
        pytest.param(110, 0.5, 110, id="due when a new one may be"),
        pytest.param(111, 0.5, 110, id="a new one may be due earlier"),
        pytest.param(math.inf, 0.5, 110, id="none is due"),
        pytest.param(100.1, 0.5, 100.5, id="it was due too soon"),
        pytest.param(90, 0.5, 100.5, id="it is overdue"),
        pytest.param(100.5, 0.5, 100.5, id="due as soon as may be"),
        pytest.param(90, 20, 110, id="a pause that is too long"),
    ],
)
def test_when_maintenance_looks_again(due: float, pause: float, expected: float) -> None:
    """When a worker comes due, but after a pause, and before one comes due that changes hands now."""
    assert sizing.next_look(NOW, due, pause, 10) == expected


def test_where_nothing_comes_due() -> None:
    """There is no other look."""
    assert sizing.next_look(NOW, math.inf, math.inf, math.inf) == math.inf
