"""What a case is: one measurement of several peers, and what whitepool should reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from .peers import Peer


@dataclass(frozen=True)
class Bound:
    """What whitepool's figure should be, divided by a peer's, or by itself."""

    limit: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:,g}"


at_least = partial(Bound, at_least=True)
at_most = partial(Bound, at_least=False)


@dataclass(frozen=True)
class Figure:
    """One of the numbers that a case measures."""

    title: str
    unit: str
    bounds: Mapping[Peer, Bound] = field(default_factory=dict)
    """Of whitepool's figure divided by a peer's; under WHITEPOOL, of the figure as it is."""
    plot: str = ""
    """The plot in which it appears, at `x`; none where that is empty."""
    x: float = 0
    of: Callable[[list[float]], float] = statistics.median
    """What becomes of the rounds. Of what takes nothing but the processor, the best round counts: other
    work on the machine only ever makes it worse."""


@dataclass(frozen=True)
class Case:
    """One measurement of several peers, which gives a number for each figure."""

    group: str
    figures: tuple[Figure, ...]
    peers: tuple[Peer, ...]
    measure: Callable[[Peer, str], tuple[float, ...]]
    rounds: int = 3
    at_once: bool = False
    """Whether all peers are measured at the same time: they spend it asleep."""
    prepare: Callable[[str], None] | None = None
    """What has to be done to the database once, before the first round."""

    @property
    def title(self) -> str:
        return self.figures[0].title
