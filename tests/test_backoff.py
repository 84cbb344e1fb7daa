"""Failed starts are tried again, ever more slowly, and not in step; early deaths count as such."""

from __future__ import annotations

import pytest

from whitepool._backoff import (
    EARLY_DEATH_WINDOW,
    FAILURE_RESET_AFTER,
    FIRST_BOUND,
    LONGEST_BOUND,
    Backoff,
    EarlyDeaths,
    draw_pause_full,
    longest_pause,
)

# -- Pauses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(1, 0.05), (2, 0.1), (3, 0.2), (4, 0.4), (5, 0.8), (6, 0.8), (11, 0.8), (12, 0.8), (10**6, 0.8)],
)
def test_the_longest_pause(failures: int, seconds: float) -> None:
    """Each failure doubles it, up to a bound; after a weekend of failures, too."""
    assert longest_pause(failures) == pytest.approx(seconds)
    assert FIRST_BOUND <= longest_pause(failures) <= LONGEST_BOUND


def test_the_pauses_grow_and_are_bounded() -> None:
    """Drawn between zero and a bound that doubles, up to a bound below one second."""
    longest = [0.0] * 40
    for _ in range(200):
        backoff = Backoff()
        now = 0.0
        for failure in range(40):
            now += 1
            backoff.failed(OSError(), begun=now, now=now)
            pause = backoff.retry_at - now
            assert 0 <= pause <= LONGEST_BOUND < 1
            longest[failure] = max(longest[failure], pause)
    assert longest[0] < 0.051
    assert longest[0] < longest[2] < longest[5]


@pytest.mark.parametrize(
    ("workers", "failures", "shortest", "longest"),
    [
        pytest.param(0, 9, 0.25, 0.75, id="none: twice a second"),
        pytest.param(0, 10, 0.5, 1.5, id="none, after ten times: once a second"),
        (1, 0, 0.75, 1.5),
        (2, 0, 1.5, 3),
        (2, 99, 1.5, 3),
        (6, 0, 4, 8),
        (99, 0, 4, 8),
    ],
)
def test_the_pause_where_the_server_is_full(
    workers: int, failures: int, shortest: float, longest: float
) -> None:
    """The fewer workers a pool has, the sooner it tries again."""
    pauses = [draw_pause_full(workers, failures) for _ in range(1000)]
    assert shortest <= min(pauses) < max(pauses) <= longest
    assert sum(pauses) / 1000 == pytest.approx((shortest + longest) / 2, rel=0.05)


def test_a_pause_may_be_given() -> None:
    """Then no other is drawn."""
    backoff = Backoff()
    backoff.failed(OSError(), begun=0, now=1, pause=7)
    assert backoff.retry_at == 8


def test_a_thousand_failures_do_no_harm() -> None:
    """A server may be down over the weekend."""
    backoff = Backoff()
    for now in range(2000):
        backoff.failed(OSError(), begun=now, now=now)
    assert backoff.retry_at - 1999 <= LONGEST_BOUND


def test_failures_of_one_wave_count_once() -> None:
    """Starts that were under way together say no more than one of them."""
    backoff = Backoff()
    for _ in range(20):
        backoff.failed(OSError(), begun=0, now=1)
    assert backoff.retry_at - 1 <= 0.05


def test_success_lets_the_others_follow() -> None:
    """At once, and without an error to report."""
    backoff = Backoff()
    backoff.failed(OSError(), begun=0, now=0)
    backoff.succeeded(begun=0)
    assert backoff.last_error is None
    assert backoff.retry_at < 0


def test_a_success_of_the_same_wave_ends_no_pause() -> None:
    """It was under way when the other one failed: it says nothing of what the server does now."""
    backoff = Backoff()
    backoff.failed(OSError(), begun=0, now=1)
    retry_at = backoff.retry_at
    backoff.succeeded(begun=0.9)
    assert backoff.last_error is None
    assert backoff.retry_at == retry_at


def test_the_last_error_is_kept() -> None:
    """Also that of a start which was under way when another failed."""
    backoff = Backoff()
    assert backoff.last_error is None
    for error in (OSError("first"), OSError("second")):
        backoff.failed(error, begun=0, now=1)
        assert backoff.last_error is error
    assert backoff.failures == 1


@pytest.mark.parametrize(("later", "is_told"), [(34.9, True), (35, True), (35.1, False)])
def test_how_long_a_failure_is_the_reason(later: float, is_told: bool) -> None:
    """Until a start that began after the pause has had its time, `start_timeout`, to succeed."""
    backoff = Backoff()
    error = OSError()
    backoff.failed(error, begun=0, now=1)
    assert (backoff.recent_error(1 + later, start_timeout=30) is error) is is_told


@pytest.mark.parametrize(
    ("begun", "failures"),
    [(0.9, 1), (1, 2), (1.1, 2)],
    ids=["it was under way", "it began in that instant", "it began later"],
)
def test_whether_a_failure_counts(begun: float, failures: int) -> None:
    """It does where its start began when the last failure was known."""
    backoff = Backoff()
    backoff.failed(OSError(), begun=0, now=1)
    retry_at = backoff.retry_at
    backoff.failed(OSError(), begun=begun, now=2)
    assert backoff.failures == failures
    assert (backoff.retry_at == retry_at) is (failures == 1)


@pytest.mark.parametrize(("calm", "failures"), [(4.9, 2), (5, 2), (5.1, 1)])
def test_how_long_calm_has_to_last(calm: float, failures: int) -> None:
    """Longer than `FAILURE_RESET_AFTER`; then the next failure counts as the first again."""
    assert FAILURE_RESET_AFTER == 5
    backoff = Backoff()
    backoff.failed(OSError(), begun=0, now=1)
    backoff.failed(OSError(), begun=1, now=1 + calm)
    assert backoff.failures == failures


def test_a_server_that_drops_what_it_takes_is_no_better() -> None:
    """Success and failure in turn make for longer pauses, too."""
    longest = 0.0
    for _ in range(50):
        backoff = Backoff()
        for now in range(1, 10):
            backoff.succeeded(begun=now - 0.1)
            backoff.failed(OSError(), begun=now - 0.1, now=now)
        longest = max(longest, backoff.retry_at - 9)
    assert longest > 0.4


def test_calm_forgets_everything() -> None:
    """After a while without failures the next is a first one."""
    backoff = Backoff()
    for now in range(10):
        backoff.failed(OSError(), begun=now, now=now)
    backoff.failed(OSError(), begun=20, now=20)
    assert backoff.retry_at - 20 <= 0.05


# -- Early deaths --------------------------------------------------------------------------------------


def die(deaths: EarlyDeaths, most: int, *, at: float, age: float = 0.5) -> bool:
    """Have a worker of this age die, and say whether there have been too many."""
    return deaths.too_many(most, opened_at=at - age, now=at)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_as_many_as_there_are_workers_may_be_accidents(most: int) -> None:
    """The next early death is that of a successor: there are too many from then on."""
    deaths = EarlyDeaths()
    assert [die(deaths, most, at=time) for time in range(most + 2)] == [False] * most + [True] * 2


@pytest.mark.parametrize(("age", "is_early"), [(0, True), (0.99, True), (1, False), (60, False)])
def test_what_an_early_death_is(age: float, is_early: bool) -> None:
    """One that comes sooner than `EARLY_DEATH_WINDOW` after the worker was opened."""
    assert EARLY_DEATH_WINDOW == 1
    assert die(EarlyDeaths(), 0, at=100, age=age) is is_early


@pytest.mark.parametrize(("at", "too_many"), [(5, True), (5.1, False)])
def test_a_late_death_changes_nothing(at: float, too_many: bool) -> None:
    """Neither does it count, nor does it end the series, nor does it prolong it."""
    deaths = EarlyDeaths()
    assert not die(deaths, 1, at=0)
    for time in range(1, 5):
        assert not die(deaths, 1, at=time, age=30)
    assert die(deaths, 1, at=at) is too_many


@pytest.mark.parametrize(("calm", "too_many"), [(4.9, True), (5, True), (5.1, False)])
def test_calm_ends_a_series_of_early_deaths(calm: float, too_many: bool) -> None:
    """Where it lasts for longer than `FAILURE_RESET_AFTER`, counted from the last of them."""
    deaths = EarlyDeaths()
    assert not die(deaths, 2, at=0)
    assert not die(deaths, 2, at=3)
    assert die(deaths, 2, at=3 + calm) is too_many
