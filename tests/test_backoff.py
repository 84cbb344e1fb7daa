"""Failed starts are tried again, ever more slowly, and not in step."""

from __future__ import annotations

from whitepool._backoff import LONGEST, Backoff


def test_the_pauses_grow_and_are_bounded() -> None:
    """Drawn between zero and a bound that doubles, up to a bound below one second."""
    longest = [0.0] * 40
    for _ in range(200):
        backoff = Backoff()
        now = 0.0
        for failure in range(40):
            now += 10
            backoff.failed(OSError(), begun=now, now=now)
            pause = backoff.retry_at - now
            assert 0 <= pause <= LONGEST < 1
            longest[failure] = max(longest[failure], pause)
    assert longest[0] < 0.051
    assert longest[0] < longest[2] < longest[5]


def test_a_thousand_failures_do_no_harm() -> None:
    """A server may be down over the weekend."""
    backoff = Backoff()
    for now in range(2000):
        backoff.failed(OSError(), begun=now, now=now)
    assert backoff.retry_at - 1999 <= LONGEST


def test_failures_of_one_wave_count_once() -> None:
    """Starts that were under way together say no more than one of them."""
    backoff = Backoff()
    for _ in range(20):
        backoff.failed(OSError(), begun=0, now=1)
    assert backoff.retry_at - 1 <= 0.05


def test_success_forgets_everything() -> None:
    """The next failure is a first one."""
    backoff = Backoff()
    for now in range(10):
        backoff.failed(OSError(), begun=now, now=now)
    backoff.succeeded()
    assert backoff.last_error is None
    assert backoff.retry_at < 0
    backoff.failed(OSError(), begun=20, now=20)
    assert backoff.retry_at - 20 <= 0.05
