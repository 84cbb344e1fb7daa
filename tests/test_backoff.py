"""Failed starts are tried again, ever more slowly, and not in step."""

from __future__ import annotations

from whitepool._backoff import LONGEST_BOUND, Backoff


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
    """At once, and with no error to tell of."""
    backoff = Backoff()
    backoff.failed(OSError(), begun=0, now=0)
    backoff.succeeded()
    assert backoff.last_error is None
    assert backoff.retry_at < 0


def test_a_server_that_drops_what_it_takes_is_no_better() -> None:
    """Success and failure in turn make for longer pauses, too."""
    longest = 0.0
    for _ in range(50):
        backoff = Backoff()
        for now in range(1, 10):
            backoff.succeeded()
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
