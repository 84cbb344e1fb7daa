"""What comes out of a measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A figure of one peer, and how whitepool's compares."""

    group: str
    figure: str
    unit: str
    peer: str
    value: float
    ratio: float | None
    """whitepool's divided by it."""
    target: str
    met: bool | None
    plot: str
    """The plot in which it appears, at `x`; none where that is empty."""
    x: float

    @property
    def beside(self) -> str:
        """With what whitepool is compared: nothing, where the target is for the figure as it is."""
        return "" if self.ratio is None else self.peer

    @property
    def judged(self) -> str:
        """What is compared with the target."""
        return short(self.value, self.unit) if self.ratio is None else short(self.ratio)

    @property
    def times(self) -> str:
        """How many times as much whitepool does in the same time; empty where it is not about that."""
        if self.ratio is None or self.unit not in ("/s", "µs", "ms"):
            return ""
        times = self.ratio if self.unit == "/s" else 1 / self.ratio
        return f"{times:.{0 if times >= 10 else 1 if times >= 2 else 2}f}"


def short(value: float | None, unit: str = "") -> str:
    """Write a number with three digits, or with all that it has before the point."""
    if value is None:
        return "–"
    digits = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{digits} {unit}".strip()
