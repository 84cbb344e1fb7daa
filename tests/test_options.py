"""The options: what they are without being set, what they may be, and how a bad one is refused."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from workshop import Workshop

import whitepool
from whitepool import Hooks
from whitepool._checks import check_count, check_seconds
from whitepool._options import Options

DEFAULTS: dict[str, Any] = {
    "pool_size": 5,
    "max_overflow": 10,
    "strategy": "lifo",
    "lazy": False,
    "overflow_ttl": 10,
    "idle_timeout": math.inf,
    "max_lifetime": math.inf,
    "check_interval": 30,
    "checkout_timeout": 5,
    "min_ready": None,
    "start_timeout": 30,
    "reset_timeout": 5,
    "close_timeout": 5,
    "shutdown_timeout": 30,
    "max_starting": 4,
    "max_waiting": math.inf,
    "patience": 0.4,
    "held_warning": math.inf,
    "hooks": Hooks(),
}

GOOD_OPTIONS: list[tuple[str, Any]] = [
    ("pool_size", 0),
    ("max_overflow", 0),
    ("max_starting", 1),
    ("max_waiting", 0),
    ("max_waiting", math.inf),
    ("strategy", "fifo"),
    ("name", "shop"),
    ("lazy", True),
    ("overflow_ttl", 0),
    ("overflow_ttl", math.inf),
    ("idle_timeout", 1),
    ("max_lifetime", 0.001),
    ("check_interval", math.inf),
    ("check_interval", 0),
    ("checkout_timeout", 0),
    ("checkout_timeout", math.inf),
    ("min_ready", 0),
    ("min_ready", 5),
    ("start_timeout", math.inf),
    ("reset_timeout", 0),
    ("close_timeout", math.inf),
    ("shutdown_timeout", 0.0),
    ("patience", 0.001),
    ("patience", 1),
    ("held_warning", 0.001),
    ("held_warning", math.inf),
    ("hooks", Hooks(on_create=print)),
]

BAD_OPTIONS: list[tuple[str, Any, type[Exception]]] = [
    ("pool_size", "5", TypeError),
    ("pool_size", 5.0, TypeError),
    ("pool_size", True, TypeError),
    ("pool_size", -1, ValueError),
    ("max_overflow", None, TypeError),
    ("max_overflow", -3, ValueError),
    ("max_starting", 0, ValueError),
    ("max_starting", math.inf, TypeError),
    ("max_waiting", 1.5, TypeError),
    ("max_waiting", -1, ValueError),
    ("strategy", "random", ValueError),
    ("strategy", 1, TypeError),
    ("name", 7, TypeError),
    ("lazy", 1, TypeError),
    ("overflow_ttl", "10", TypeError),
    ("overflow_ttl", -0.1, ValueError),
    ("overflow_ttl", math.nan, ValueError),
    ("start_timeout", 0, ValueError),
    ("start_timeout", None, TypeError),
    ("reset_timeout", -1, ValueError),
    ("close_timeout", False, TypeError),
    ("shutdown_timeout", -1, ValueError),
    ("patience", 0, ValueError),
    ("patience", 1.5, ValueError),
    ("patience", math.nan, ValueError),
    ("patience", "0.4", TypeError),
    ("idle_timeout", 0, ValueError),
    ("max_lifetime", -1, ValueError),
    ("check_interval", None, TypeError),
    ("check_interval", -1, ValueError),
    ("checkout_timeout", -1, ValueError),
    ("checkout_timeout", None, TypeError),
    ("min_ready", 6, ValueError),
    ("min_ready", -1, ValueError),
    ("min_ready", 1.0, TypeError),
    ("held_warning", 0, ValueError),
    ("held_warning", "60", TypeError),
    ("hooks", [], TypeError),
]


@pytest.mark.parametrize(
    ("lazy", "min_ready", "problem"),
    [
        pytest.param(False, 6, "min_ready is 6, but pool_size is 5", id="more than there are"),
        pytest.param(True, 1, "min_ready is 1, but a lazy pool opens none", id="one of none"),
        pytest.param(True, 0, None, id="none of none"),
    ],
)
def test_how_many_may_have_to_be_ready(lazy: bool, min_ready: int, problem: str | None) -> None:
    """As many as the pool opens by itself: it could not be opened otherwise."""
    with nullcontext() if problem is None else pytest.raises(ValueError, match=f"^{problem}$"):
        Options(lazy=lazy, min_ready=min_ready)


@pytest.mark.parametrize(("option", "value", "error"), BAD_OPTIONS)
def test_a_bad_option_is_refused_by_name(option: str, value: Any, error: type[Exception]) -> None:
    """The message names the option and the value, and nothing has been opened."""
    shop = Workshop()
    with pytest.raises(error, match=option) as caught:
        whitepool.Pool(shop.make, **{option: value})
    assert repr(value) in str(caught.value)
    with pytest.raises(error):
        whitepool.open_pool(shop.make, **{option: value})
    assert shop.attempts == 0


@pytest.mark.parametrize(
    ("option", "bound"), [("start_timeout", "more than 0"), ("overflow_ttl", "0 or more")]
)
def test_the_message_says_whether_zero_is_allowed(option: str, bound: str) -> None:
    """It is where waiting for no time means something."""
    with pytest.raises(ValueError, match=f"{option} must be {bound} seconds, not -1"):
        whitepool.Pool(Workshop().make, **{option: -1})  # type: ignore[arg-type]


def test_an_unknown_option_is_refused() -> None:
    """A misspelt name does not go unnoticed."""
    with pytest.raises(TypeError, match="poolsize"):
        whitepool.Pool(Workshop().make, poolsize=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(("option", "value"), GOOD_OPTIONS)
def test_a_good_option_is_kept_as_it_is(option: str, value: Any) -> None:
    """The bounds of each range belong to it; a number of seconds may be an int."""
    assert getattr(Options(**{option: value}), option) is value


def test_the_defaults() -> None:
    """Those that the documents name; and each option has one."""
    found = vars(Options())
    name = found.pop("name")
    assert found == DEFAULTS
    assert name.startswith("pool-")


def test_options_do_not_change() -> None:
    """A pool that runs would not notice."""
    with pytest.raises(FrozenInstanceError):
        Options().pool_size = 7  # type: ignore[misc]


def test_names_are_generated() -> None:
    """Two pools without a name can be told apart."""
    one, other = Options().name, Options().name
    assert one is not None
    assert one.startswith("pool-")
    assert one != other
    assert Options(name="shop").name == "shop"


# -- The checks that others use ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "least", "expected"),
    [
        (0, 0, None),
        (1, 1, None),
        (7, 1, None),
        (-1, 0, ValueError),
        (0, 1, ValueError),
        (True, 0, TypeError),
        (1.0, 0, TypeError),
        ("1", 0, TypeError),
        (None, 0, TypeError),
    ],
)
def test_what_a_count_is(value: Any, least: int, expected: type[Exception] | None) -> None:
    """An int that is large enough, and no bool."""
    if expected is None:
        check_count("x", value, least=least)
    else:
        with pytest.raises(expected, match=f"^x must be .*not {value!r}"):
            check_count("x", value, least=least)


@pytest.mark.parametrize(
    ("value", "more_than_zero", "expected"),
    [
        (0, False, None),
        (0.0, False, None),
        (3, True, None),
        (0.001, True, None),
        (math.inf, True, None),
        (0, True, ValueError),
        (0.0, True, ValueError),
        (-0.001, False, ValueError),
        (-math.inf, False, ValueError),
        (math.nan, False, ValueError),
        (True, False, TypeError),
        ("5", False, TypeError),
        (None, False, TypeError),
    ],
)
def test_what_a_number_of_seconds_is(
    value: Any, more_than_zero: bool, expected: type[Exception] | None
) -> None:
    """An int or a float that is not negative; infinity is one."""
    if expected is None:
        check_seconds("x", value, more_than_zero=more_than_zero)
    else:
        with pytest.raises(expected, match=f"^x must be .*not {value!r}"):
            check_seconds("x", value, more_than_zero=more_than_zero)
