"""The options of a pool: their defaults, and what is wrong with a bad one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, TypedDict

from ._hooks import Hooks

_generated = count(1)

Strategy = Literal["lifo", "fifo"]


class PoolOptions(TypedDict, total=False):
    """The keywords of `open_pool` and `Pool`, for type checkers. See `Pool` for their meaning."""

    pool_size: int
    max_overflow: int
    strategy: Strategy
    name: str | None
    lazy: bool
    overflow_ttl: float
    idle_timeout: float
    max_lifetime: float
    check_interval: float
    start_timeout: float
    reset_timeout: float
    close_timeout: float
    shutdown_timeout: float
    max_starting: int
    max_waiting: float
    patience: float
    hooks: Hooks


@dataclass(frozen=True)
class Options:
    """The same with their defaults, checked."""

    pool_size: int = 5
    max_overflow: int = 10
    strategy: Strategy = "lifo"
    name: str | None = None
    lazy: bool = False
    overflow_ttl: float = 10.0
    idle_timeout: float = math.inf
    max_lifetime: float = math.inf
    check_interval: float = 30.0
    start_timeout: float = 30.0
    reset_timeout: float = 5.0
    close_timeout: float = 5.0
    shutdown_timeout: float = 30.0
    max_starting: int = 4
    max_waiting: float = math.inf
    patience: float = 0.4
    hooks: Hooks = field(default_factory=Hooks)

    def __post_init__(self) -> None:
        check_count("pool_size", self.pool_size)
        check_count("max_overflow", self.max_overflow)
        check_count("max_starting", self.max_starting, least=1)
        if self.max_waiting != math.inf:
            check_count("max_waiting", self.max_waiting)
        for option in ("overflow_ttl", "reset_timeout", "close_timeout", "shutdown_timeout"):
            check_seconds(option, getattr(self, option))
        for option in ("start_timeout", "idle_timeout", "max_lifetime", "check_interval"):
            check_seconds(option, getattr(self, option), more_than_zero=True)
        if not isinstance(self.patience, (int, float)) or isinstance(self.patience, bool):
            raise TypeError(f"patience must be a number, not {self.patience!r}")
        if not 0 < self.patience <= 1:
            raise ValueError(f"patience must be more than 0 and at most 1, not {self.patience!r}")
        if not isinstance(self.lazy, bool):
            raise TypeError(f"lazy must be a bool, not {self.lazy!r}")
        if not isinstance(self.strategy, str):
            raise TypeError(f"strategy must be a str, not {self.strategy!r}")
        if self.strategy not in ("lifo", "fifo"):
            raise ValueError(f"strategy must be 'lifo' or 'fifo', not {self.strategy!r}")
        if not isinstance(self.hooks, Hooks):
            raise TypeError(f"hooks must be a whitepool.Hooks, not {self.hooks!r}")
        if self.name is None:
            object.__setattr__(self, "name", f"pool-{next(_generated)}")
        elif not isinstance(self.name, str):
            raise TypeError(f"name must be a str, not {self.name!r}")


def check_count(option: str, value: object, *, least: int = 0) -> None:
    """Raise unless `value` is an int, and `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{option} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{option} must be {least} or more, not {value!r}")


def check_seconds(option: str, value: object, *, more_than_zero: bool = False) -> None:
    """Raise unless `value` is a number of seconds; `math.inf` is one."""
    if value.__class__ is float and value > 0:  # the usual case, fast
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{option} must be a number of seconds, not {value!r}")
    if math.isnan(value) or value < 0 or (more_than_zero and value == 0):
        bound = "more than 0" if more_than_zero else "0 or more"
        raise ValueError(f"{option} must be {bound} seconds, not {value!r}")
