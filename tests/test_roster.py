"""The books: every transition is checked and counted, and books that are wrong are found out."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from whitepool import Reason
from whitepool._entry import REASONS, TRANSITIONS, Departure, Entry, State
from whitepool._options import Options, Strategy
from whitepool._roster import IllegalTransition, Roster
from whitepool._statistics import COUNTERS

OPENING, SERVICING, IDLE, IN_USE, CLOSING = State

WAY_TO: dict[State, list[State]] = {
    OPENING: [],
    SERVICING: [SERVICING],
    IDLE: [SERVICING, IDLE],
    IN_USE: [SERVICING, IN_USE],
    CLOSING: [SERVICING, CLOSING],
}
"""For each state: the moves that lead a new worker there."""

ALLOWED = {
    (OPENING, SERVICING): "it has been opened",
    (OPENING, CLOSING): "it could not be opened, or is needed no more",
    (SERVICING, IDLE): "it is ready",
    (SERVICING, IN_USE): "it is ready, and a task waits",
    (SERVICING, CLOSING): "it could not be reset, or did not answer",
    (IDLE, IN_USE): "it is checked out",
    (IDLE, SERVICING): "it is probed",
    (IDLE, CLOSING): "it is retired, or dead",
    (IN_USE, IDLE): "it is returned",
    (IN_USE, SERVICING): "it is returned, and needs a reset",
    (IN_USE, CLOSING): "it is returned, and broken",
}
"""The transitions that may happen to a worker, and when."""

FORBIDDEN = [pair for pair in product(State, State) if pair not in ALLOWED]

RosterOf = Roster[str]


def new_roster(strategy: Strategy = "lifo") -> RosterOf:
    return Roster(dict.fromkeys(COUNTERS, 0), Options(strategy=strategy))


def add(
    roster: RosterOf, state: State = OPENING, *, idle_since: float = 0, reason: Reason = "destroyed"
) -> Entry[str]:
    """Enter a worker, and lead it to a state."""
    entry: Entry[str] = Entry()
    entry.idle_since = idle_since
    roster.add(entry)
    for step in WAY_TO[state]:
        if step is CLOSING:
            roster.mark(entry, reason)
        roster.move(entry, step)
    return entry


def counts(roster: RosterOf) -> dict[State, int]:
    """Return how many workers the roster counts in each state."""
    return {
        OPENING: roster.opening,
        SERVICING: roster.servicing,
        IDLE: len(roster.idle),
        IN_USE: roster.in_use,
        CLOSING: roster.closing,
    }


# -- Transitions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), list(ALLOWED), ids=list(ALLOWED.values()))
def test_an_allowed_transition(before: State, after: State) -> None:
    """It changes the state, and the counts of the two states, and no other."""
    roster = new_roster()
    others = [add(roster, state) for state in State]
    entry = add(roster, before)
    expected = counts(roster)
    expected[before] -= 1
    expected[after] += 1
    if after is CLOSING:
        roster.mark(entry, "destroyed")
    roster.move(entry, after)
    assert entry.state is after
    assert [other.state for other in others] == list(State)
    assert counts(roster) == expected
    roster.check()


@pytest.mark.parametrize(("before", "after"), FORBIDDEN)
def test_a_forbidden_transition(before: State, after: State) -> None:
    """It is refused by name, and changes nothing."""
    roster = new_roster()
    entry = add(roster, before)
    expected = counts(roster)
    with pytest.raises(IllegalTransition, match=f"from {before.name} to {after.name}"):
        roster.move(entry, after)
    assert entry.state is before
    assert counts(roster) == expected
    roster.check()


def test_the_table_is_the_one_in_the_code() -> None:
    """No other transition is allowed, and none of these is forbidden."""
    found = {(before, after) for before, states in TRANSITIONS.items() for after in states}
    assert found == set(ALLOWED)


def test_an_open_worker_is_not_closed_without_a_reason() -> None:
    """The statistics could not count it. One that was never opened needs none."""
    roster = new_roster()
    with pytest.raises(AssertionError):
        roster.move(add(roster, IDLE), CLOSING)
    roster = new_roster()
    roster.move(add(roster, OPENING), CLOSING)
    roster.check()


# -- Counts --------------------------------------------------------------------------------------------


def test_the_counts_follow_from_the_entries() -> None:
    """Open are those that are neither being opened nor being closed."""
    roster = new_roster()
    for number, state in enumerate(State, start=1):
        for _ in range(number):
            add(roster, state)
    assert counts(roster) == {OPENING: 1, SERVICING: 2, IDLE: 3, IN_USE: 4, CLOSING: 5}
    assert len(roster.entries) == 15
    assert roster.open == 9
    assert roster.lasting == 9
    roster.check()


def test_the_bounds_may_change() -> None:
    """Those that are being closed take up room, but are none of those that have to go."""
    roster = new_roster()
    assert (roster.pool_size, roster.limit) == (5, 15)
    for state in State:
        add(roster, state)
    assert (roster.room, roster.too_many) == (10, -11)
    roster.limit = 3
    assert (roster.room, roster.too_many) == (-2, 1)


def test_the_entries_are_in_the_order_of_their_starts() -> None:
    """Whatever becomes of them."""
    roster = new_roster()
    entries = [add(roster, state) for state in (IDLE, OPENING, IN_USE, CLOSING, SERVICING)]
    assert list(roster.entries) == entries
    roster.remove(entries[3])
    entries[3:4] = []
    assert list(roster.entries) == entries


@pytest.mark.parametrize("after", [IDLE, IN_USE, CLOSING])
def test_a_probe_ends_when_the_state_changes(after: State) -> None:
    """Those that are probed are known, with when that began; a reset is no probe."""
    roster = new_roster()
    add(roster, SERVICING)
    entry = add(roster, IDLE, idle_since=3)
    roster.begin_probe(entry, now=7)
    assert (entry.state, entry.idle_since) == (SERVICING, 3)
    assert roster.probes == {entry: 7}
    roster.check()
    if after is CLOSING:
        roster.mark(entry, "check_failed")
    roster.move(entry, after)
    assert not roster.probes
    roster.check()


def test_a_worker_is_started_once() -> None:
    """When it has been opened; a reset or a probe starts nothing."""
    roster = new_roster()
    entry = add(roster)
    assert roster._counters["started"] == 0
    for state in (SERVICING, IDLE, SERVICING, IN_USE, SERVICING):
        roster.move(entry, state)
        assert roster._counters["started"] == 1


@pytest.mark.parametrize("reason", REASONS)
def test_a_worker_that_leaves_is_counted_by_its_reason(reason: Reason) -> None:
    """In one of the statistics, once, when it begins to be closed."""
    roster = new_roster()
    entry = add(roster, IN_USE)
    roster.mark(entry, reason)
    departed = {counter: roster._counters[counter] for counter, _ in REASONS.values()}
    assert set(departed.values()) == {0}
    roster.move(entry, CLOSING)
    roster.remove(entry)
    assert roster._counters == {
        **dict.fromkeys(COUNTERS, 0),
        "started": 1,
        REASONS[reason][0]: 1,
    }
    assert not roster.entries
    roster.check()


def test_a_worker_that_was_never_opened_is_not_counted() -> None:
    """Neither as one that was started, nor as one that left."""
    roster = new_roster()
    entry = add(roster)
    roster.mark(entry, "shutdown")
    roster.move(entry, CLOSING)
    assert roster.closing == 1
    roster.remove(entry)
    assert roster.closing == 0
    assert set(roster._counters.values()) == {0}
    roster.check()


@pytest.mark.parametrize("state", [SERVICING, IDLE, IN_USE])
@pytest.mark.parametrize("reason", REASONS)
def test_workers_that_are_to_be_replaced_do_not_last(state: State, reason: Reason) -> None:
    """They are counted from when they are marked until they are being closed."""
    roster = new_roster()
    entry = add(roster, state)
    roster.mark(entry, reason)
    waits = REASONS[reason][1] is Departure.WHEN_REPLACED
    assert (len(roster.expiring), roster.lasting) == ((1, 0) if waits else (0, 1))
    roster.mark(entry, reason)
    assert len(roster.expiring) == waits
    roster.move(entry, CLOSING)
    assert (len(roster.expiring), roster.lasting) == (0, 0)
    roster.check()


def test_a_second_reason_takes_the_place_of_the_first() -> None:
    """A worker that was to be replaced, and hangs up, need not wait for its replacement."""
    roster = new_roster()
    entry = add(roster, IN_USE)
    roster.mark(entry, "lifetime")
    roster.mark(entry, "hung_up")
    assert entry.evict_reason == "hung_up"
    assert (len(roster.expiring), roster.lasting) == (0, 1)
    roster.check()


# -- The idle ones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["lifo", "fifo"])
def test_the_strategy_says_which_end_is_taken(strategy: Strategy) -> None:
    """The one that was in use last, or the one that has been idle the longest."""
    roster = new_roster(strategy)
    entries = [add(roster, IDLE, idle_since=time) for time in (1, 2, 3)]
    taken = []
    for _ in entries:
        announced = roster.next_idle()
        taken.append(roster.take_idle(now=7))
        assert announced is taken[-1]
    assert taken == (entries[::-1] if strategy == "lifo" else entries)
    assert all((entry.state, entry.in_use_since) == (IN_USE, 7) for entry in entries)
    assert counts(roster)[IN_USE] == 3
    roster.check()
    with pytest.raises(IndexError):
        roster.take_idle(now=8)


def test_a_returned_worker_is_the_last_to_have_been_in_use() -> None:
    """It comes to the right end."""
    roster = new_roster()
    entry, other = add(roster, IN_USE), add(roster, IDLE, idle_since=1)
    roster.put_idle(entry, now=2)
    assert list(roster.idle) == [other, entry]
    assert (entry.state, entry.idle_since) == (IDLE, 2)
    roster.check()


@pytest.mark.parametrize(
    ("idle_since", "position"), [(0, 0), (1, 1), (1.5, 1), (2, 2), (2.5, 2), (3, 3), (9, 3)]
)
def test_a_probed_worker_goes_back_to_where_it_was(idle_since: float, position: int) -> None:
    """Its `idle_since` says where; of equals, the one that comes last is the last."""
    roster = new_roster()
    for time in (1, 2, 3):
        add(roster, IDLE, idle_since=time)
    entry = add(roster, SERVICING, idle_since=idle_since)
    roster.move(entry, IDLE)
    assert roster.idle.index(entry) == position
    roster.check()


@pytest.mark.parametrize("times", [(1, 2, 3), (1, 1, 1), (-math.inf, 2, 2)])
@pytest.mark.parametrize("state", [IN_USE, SERVICING, CLOSING])
def test_a_worker_that_is_idle_no_more(state: State, times: tuple[float, ...]) -> None:
    """It is the one that leaves the idle ones, wherever it is among them, and among its equals."""
    roster = new_roster()
    first, entry, last = (add(roster, IDLE, idle_since=time) for time in times)
    roster.mark(entry, "check_failed")
    roster.move(entry, state)
    assert list(roster.idle) == [first, last]
    roster.check()


def test_the_next_to_be_replaced() -> None:
    """An idle one, whether fewer workers are idle or fewer are to be replaced."""
    roster = new_roster()
    assert roster.next_expiring() is None
    busy = [add(roster, state) for state in (IN_USE, IN_USE, SERVICING)]
    idle = [add(roster, IDLE, idle_since=time) for time in (1, 2)]
    for entry in busy:
        roster.mark(entry, "retire_all")
    assert roster.next_expiring() is None
    roster.mark(idle[1], "retire_all")
    assert roster.next_expiring() is idle[1]
    for entry in busy[1:]:
        roster.mark(entry, "crashed")
    add(roster, IDLE, idle_since=3)
    assert roster.next_expiring() is idle[1]
    roster.mark(idle[1], "crashed")
    assert roster.next_expiring() is None


@pytest.mark.parametrize("fewer", ["idle", "expiring"])
def test_the_next_to_be_replaced_is_looked_for_among_the_fewer(fewer: str) -> None:
    """Either may be long: all are idle, or all that are to be replaced are in use."""

    class Untouched(OrderedDict[Any, None]):
        def __iter__(self) -> Any:
            pytest.fail("all of them were gone through")

    class UntouchedToo(deque[Any]):
        def __iter__(self) -> Any:
            pytest.fail("all of them were gone through")

    roster = new_roster()
    if fewer == "idle":
        for entry in (add(roster, IN_USE), add(roster, IN_USE)):
            roster.mark(entry, "retire_all")
        add(roster, IDLE)
        roster.expiring = Untouched.fromkeys(roster.expiring)
    else:
        for _ in range(2):
            add(roster, IDLE)
        roster.mark(add(roster, IN_USE), "retire_all")
        roster.idle = UntouchedToo(roster.idle)
    assert roster.next_expiring() is None


# -- Falsified books -----------------------------------------------------------------------------------


def new_books() -> RosterOf:
    """Make a roster with something to falsify in each of its books."""
    roster = new_roster()
    for state in State:
        add(roster, state, idle_since=1)
    add(roster, IDLE, idle_since=2)
    roster.mark(add(roster, IN_USE), "lifetime")
    roster.check()
    return roster


def one(roster: RosterOf, state: State) -> Entry[str]:
    return next(entry for entry in roster.entries if entry.state is state)


def miscount_a_state(roster: RosterOf) -> None:
    roster._in_state[SERVICING] += 1


def take_one_state_for_another(roster: RosterOf) -> None:
    # The numbers still add up: both are workers that are not open.
    roster._in_state[OPENING] += 1
    roster._in_state[CLOSING] -= 1


def change_a_state_beside_the_roster(roster: RosterOf) -> None:
    one(roster, IN_USE).state = SERVICING


def forget_an_idle_worker(roster: RosterOf) -> None:
    roster.idle.pop()


def keep_a_worker_in_use_among_the_idle(roster: RosterOf) -> None:
    roster.idle[-1].state = IN_USE


def enter_an_idle_worker_twice(roster: RosterOf) -> None:
    # The numbers still add up: one idle worker is there twice, another is missing.
    roster.idle[0] = roster.idle[1]


def exchange_an_idle_worker_for_a_busy_one(roster: RosterOf) -> None:
    roster.idle[-1] = one(roster, IN_USE)
    roster.idle[-1].idle_since = math.inf


def exchange_an_idle_worker_for_a_stranger(roster: RosterOf) -> None:
    stranger: Entry[str] = Entry()
    stranger.state, stranger.idle_since = IDLE, math.inf
    roster.idle[-1] = stranger


def forget_one_that_is_to_be_replaced(roster: RosterOf) -> None:
    roster.expiring.popitem()


def mark_beside_the_roster(roster: RosterOf) -> None:
    roster.idle[0].evict_reason = "idle"


def confuse_the_order_of_use(roster: RosterOf) -> None:
    roster.idle.reverse()


def keep_an_idle_worker_among_the_probed(roster: RosterOf) -> None:
    roster.probes[roster.idle[0]] = 1


def count_a_start_too_many(roster: RosterOf) -> None:
    roster._counters["started"] += 1


def forget_a_departure(roster: RosterOf) -> None:
    roster._counters["destroyed"] -= 1


FALSIFICATIONS: list[Callable[[RosterOf], None]] = [
    miscount_a_state,
    take_one_state_for_another,
    change_a_state_beside_the_roster,
    forget_an_idle_worker,
    keep_a_worker_in_use_among_the_idle,
    enter_an_idle_worker_twice,
    exchange_an_idle_worker_for_a_busy_one,
    exchange_an_idle_worker_for_a_stranger,
    forget_one_that_is_to_be_replaced,
    mark_beside_the_roster,
    confuse_the_order_of_use,
    keep_an_idle_worker_among_the_probed,
    count_a_start_too_many,
    forget_a_departure,
]


@pytest.mark.parametrize("falsify", FALSIFICATIONS)
def test_falsified_books_are_found(falsify: Callable[[RosterOf], None]) -> None:
    """By `check`, which finds nothing wrong before."""
    roster = new_books()
    falsify(roster)
    with pytest.raises(AssertionError):
        roster.check()
