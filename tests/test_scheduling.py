"""When other tasks get their turn, and what can be awaited without going through the scheduler."""

from __future__ import annotations

import math

import pytest

from whitepool._scheduling import NOOP, TimeSlice


@pytest.fixture
def clock() -> list[float]:
    """A clock that stands still: the time is the one number in the list."""
    return [1000.0]


def test_a_new_slice_is_over(clock: list[float]) -> None:
    """The first task that asks lets others run."""
    assert TimeSlice(5, lambda: clock[0]).is_over()


@pytest.mark.parametrize(("passed", "is_over"), [(0, False), (4.5, False), (5, False), (5.5, True)])
def test_a_slice_ends(passed: float, is_over: bool, clock: list[float]) -> None:
    """When more than its seconds have passed since it began."""
    slice = TimeSlice(5, lambda: clock[0])
    slice.restart()
    clock[0] += passed
    assert slice.is_over() is is_over


def test_a_slice_begins_again(clock: list[float]) -> None:
    """Where it is restarted, and not where it would have ended."""
    slice = TimeSlice(5, lambda: clock[0])
    slice.restart()
    clock[0] += 3
    slice.restart()
    assert slice.ends == 1008
    clock[0] += 4
    assert not slice.is_over()


@pytest.mark.parametrize(("seconds", "is_over"), [(-1, True), (math.inf, False)])
def test_a_slice_of_no_time_and_one_without_an_end(
    seconds: float, is_over: bool, clock: list[float]
) -> None:
    """Tests make every checkout give way, or none."""
    slice = TimeSlice(seconds, lambda: clock[0])
    slice.restart()
    assert slice.is_over() is is_over


def test_nothing_can_be_awaited() -> None:
    """It never suspends, so it needs no event loop; and it can be awaited again."""

    async def wait_for_nothing() -> str:
        await NOOP
        await NOOP
        return "done"

    with pytest.raises(StopIteration, match="done"):
        wait_for_nothing().send(None)
