"""The options of a pool: the one list of their names, types, defaults and meanings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

from ._checks import check_count, check_seconds
from ._hooks import Hooks

_generated = count(1)

Strategy = Literal["lifo", "fifo"]

NO_HOOKS = Hooks()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Options:
    """The keywords of `Pool` and `open_pool`. Times are seconds, and each may be `math.inf`."""

    pool_size: int = 5
    """Workers kept alive."""

    max_overflow: int = 10
    """Workers started beyond those when all are busy."""

    strategy: Strategy = "lifo"
    """Which idle worker goes first. ``"lifo"`` keeps few of them warm, ``"fifo"`` spreads the use."""

    name: str | None = None
    """Appears in logs, statistics and errors. None: ``"pool-1"`` and so on."""

    lazy: bool = False
    """Start workers at the first need instead of at opening."""

    min_ready: int | None = None
    """How many workers must be open before opening the pool returns; the others follow. None: all
    `pool_size`, or none if the pool is `lazy`."""

    overflow_ttl: float = 10.0
    """How long an idle overflow worker lingers before it is retired. 0 retires it when it is returned,
    as poolboy does."""

    idle_timeout: float = math.inf
    """An idle worker that was not used for this long, less up to a tenth by chance, is retired, and
    replaced unless the pool is lazy."""

    max_lifetime: float = math.inf
    """A worker this old is retired once it is idle. Its replacement is opened first, if there is room.
    By chance it is retired earlier: one that replaces an old one by up to a tenth, any other one at
    between a twentieth of the time and all of it."""

    check_interval: float = 30.0
    """An idle worker is probed with `WorkerManager.check` this often, or up to a tenth more often.
    All are, at once, when one is found to be of no use. `math.inf`: never. 0: before each checkout,
    and only then."""

    checkout_timeout: float = 5.0
    """How long a checkout that names no timeout of its own may wait for a worker."""

    start_timeout: float = 30.0
    """How long opening the pool may take, retries included, before `PoolStartError`; and how long one
    attempt to start a worker may take, then and later."""

    reset_timeout: float = 5.0
    """How long one reset, one probe, or one hook in between may take before the worker is destroyed."""

    close_timeout: float = 5.0
    """How long closing one worker may take before it is abandoned; `on_destroy` has as long again."""

    shutdown_timeout: float = 30.0
    """How long `open_pool` waits for workers that are in use at a normal exit."""

    max_starting: int = 4
    """Workers being opened at once."""

    max_waiting: float = math.inf
    """Tasks that may wait for a client to return a worker. One more gets `PoolOverloaded` at once.
    Tasks for which the pool itself can open, reset or replace a worker do not count."""

    patience: float = 0.4
    """In a lasting overload, a task is shed with `PoolOverloaded` once it has waited this share of its
    own timeout, so that the tasks that are served have time left. 1 turns it off. No task is shed in
    a burst, nor from a queue that drains, nor one with ``timeout=math.inf``."""

    held_warning: float = math.inf
    """A worker that is checked out for this long is reported in the log, with what its task is doing.
    If that task has ended, the worker is reclaimed, unless `Resource.hand_over` was called."""

    hooks: Hooks = NO_HOOKS
    """Functions to be called in the life of a worker."""

    def __post_init__(self) -> None:
        check_size(self.pool_size, self.max_overflow)
        check_count("max_starting", self.max_starting, least=1)
        if self.max_waiting != math.inf:
            check_count("max_waiting", self.max_waiting)
        for option in (
            "overflow_ttl",
            "check_interval",
            "checkout_timeout",
            "reset_timeout",
            "close_timeout",
            "shutdown_timeout",
        ):
            check_seconds(option, getattr(self, option))
        for option in ("start_timeout", "idle_timeout", "max_lifetime", "held_warning"):
            check_seconds(option, getattr(self, option), more_than_zero=True)
        if not isinstance(self.patience, (int, float)) or isinstance(self.patience, bool):
            raise TypeError(f"patience must be a number, not {self.patience!r}")
        if not 0 < self.patience <= 1:
            raise ValueError(f"patience must be more than 0 and at most 1, not {self.patience!r}")
        if not isinstance(self.lazy, bool):
            raise TypeError(f"lazy must be a bool, not {self.lazy!r}")
        if self.min_ready is not None:
            check_count("min_ready", self.min_ready)
            if self.min_ready > (0 if self.lazy else self.pool_size):
                kind = "a lazy pool opens none" if self.lazy else f"pool_size is {self.pool_size}"
                raise ValueError(f"min_ready is {self.min_ready!r}, but {kind}")
        if not isinstance(self.strategy, str):
            raise TypeError(f"strategy must be a str, not {self.strategy!r}")
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy must be 'lifo' or 'fifo', not {self.strategy!r}")
        if not isinstance(self.hooks, Hooks):
            raise TypeError(f"hooks must be a whitepool.Hooks, not {self.hooks!r}")
        if self.name is None:
            object.__setattr__(self, "name", f"pool-{next(_generated)}")
        elif not isinstance(self.name, str):
            raise TypeError(f"name must be a str, not {self.name!r}")


def check_size(pool_size: object, max_overflow: object) -> None:
    """Raise `TypeError` or `ValueError` for bounds that no pool can have."""
    check_count("pool_size", pool_size)
    check_count("max_overflow", max_overflow)
    if pool_size == max_overflow == 0:
        raise ValueError("pool_size and max_overflow are both 0: the pool could have no worker")
