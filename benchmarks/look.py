"""How plots look: on white and on black, so without a background, and in colours of middling light."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, ORANGE, BLUE, GREEN, TEAL = "#808080", "#e8590c", "#4c8dd6", "#3a9e5f", "#25a5a5"

LOOK: Any = {  # matplotlib types the keys one by one
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "whitepool",  # the same figures make the same file
    "font.family": "sans-serif",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def canvas(title: str, x: str, y: str) -> Axes:
    axes = Figure(figsize=(8, 3.8), layout="constrained").add_subplot()
    label(axes, title, x, y)
    return axes


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True)
    axes.set_axisbelow(True)


def panels(rows: int, title: str) -> list[Axes]:
    """Make plots one below the other, with the same x axis."""
    figure = Figure(figsize=(8, 1.2 + 1.3 * rows), layout="constrained")
    figure.suptitle(title, color=GREY, fontsize="medium")
    column: list[Axes] = list(figure.subplots(rows, 1, sharex=True))
    for axes in column:
        axes.grid(True)
        axes.set_axisbelow(True)
    return column


def save(axes: Axes, path: Path) -> None:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
