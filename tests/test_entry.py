"""The record of one worker: which state may follow which, and when which reason lets a worker go."""

from __future__ import annotations

from typing import get_args

import pytest

from whitepool import Reason
from whitepool._entry import REASONS, TRANSITIONS, Departure, Entry, State
from whitepool._statistics import COUNTERS

OPENING, SERVICING, IDLE, IN_USE, CLOSING = State

AT_ONCE, ON_RETURN, WHEN_REPLACED = Departure

Row = tuple[Reason, str, Departure]

EXPECTED: list[Row] = [
    ("overflow", "retired", AT_ONCE),
    ("idle", "retired", WHEN_REPLACED),
    ("lifetime", "retired", WHEN_REPLACED),
    ("retire_all", "retired", WHEN_REPLACED),
    ("shutdown", "retired", AT_ONCE),
    ("crashed", "lost", AT_ONCE),
    ("hung_up", "lost", ON_RETURN),
    ("check_failed", "lost", AT_ONCE),
    ("dead", "lost", AT_ONCE),
    ("destroyed", "destroyed", AT_ONCE),
    ("reset_failed", "destroyed", AT_ONCE),
    ("hook_failed", "destroyed", AT_ONCE),
    ("leaked", "leaked", AT_ONCE),
]


def test_a_new_entry_is_opening() -> None:
    """It may stay, and has never been opened, used or probed."""
    entry: Entry[object] = Entry()
    assert entry.state is OPENING
    assert entry.evict_reason is None
    assert entry.opened_at == entry.in_use_since == entry.idle_since == entry.probed_at < 0


def test_the_jitter_is_a_tenth_at_most() -> None:
    """And workers that are opened together differ in it."""
    factors = [Entry[object]().jitter for _ in range(200)]
    assert all(0.9 <= factor <= 1 for factor in factors)
    assert max(factors) - min(factors) > 0.05


def test_every_state_has_its_successors() -> None:
    """The table is complete, and every state can be reached from the first."""
    assert set(TRANSITIONS) == set(State)
    assert set().union(*TRANSITIONS.values()) == set(State) - {OPENING}


@pytest.mark.parametrize("state", [OPENING, SERVICING, IDLE, IN_USE])
def test_every_worker_can_be_closed(state: State) -> None:
    """From whatever state, and then it stays closed."""
    assert CLOSING in TRANSITIONS[state]
    assert not TRANSITIONS[CLOSING]


@pytest.mark.parametrize(
    ("state", "is_open"),
    [(OPENING, False), (SERVICING, True), (IDLE, True), (IN_USE, True), (CLOSING, False)],
)
def test_when_a_worker_is_open(state: State, is_open: bool) -> None:
    """From when it has been opened until it is being closed."""
    entry: Entry[object] = Entry()
    entry.state = state
    assert entry.is_open is is_open


@pytest.mark.parametrize(("reason", "counter", "departure"), EXPECTED)
def test_what_follows_from_a_reason(reason: Reason, counter: str, departure: Departure) -> None:
    """The statistic that counts the worker, and when it may go."""
    assert REASONS[reason] == (counter, departure)
    assert counter in COUNTERS


def test_every_reason_is_in_the_table() -> None:
    """Here, and in the code."""
    assert [reason for reason, _, _ in EXPECTED] == list(REASONS) == list(get_args(Reason))


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("reason", [None, *REASONS])
def test_a_worker_is_expiring_while_it_is_open_and_well(state: State, reason: Reason | None) -> None:
    """And has to leave only when another is there in its place."""
    entry: Entry[object] = Entry()
    entry.state, entry.evict_reason = state, reason
    expected = reason in ("idle", "lifetime", "retire_all") and state in (SERVICING, IDLE, IN_USE)
    assert entry.is_expiring is expected
