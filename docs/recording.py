"""A recording of `make demo`, as a picture that moves: an SVG, animated by CSS alone.

    python docs/recording.py [file [transfers]]

runs `examples/quickstart.py` on a console that remembers when it was shown what.
"""

from __future__ import annotations

import io
import re
import sys
from html import escape
from pathlib import Path
from time import perf_counter

import trio
from rich.color import Color
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

# They are examples, which the line above has made importable.
import quickstart  # noqa: E402
from embedded_postgres import database_url  # noqa: E402

COLUMNS, SIZE = 92, 14
CELL, LINE, MARGIN = 8.4, 19, 12  # pixels
PERIOD = 0.25
"""Seconds between two pictures."""
LAST = 6
"""Seconds for which the last picture stays."""
PAPER, INK = "#16181d", "#d7dae0"

CODE = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])")


class Screen(io.StringIO):
    """As much of a terminal as rich's live display needs; it remembers its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = [""]
        self.row = 0
        self.pictures: list[tuple[float, list[str]]] = []
        """Each with the second since the beginning."""
        self.began = perf_counter()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        end = 0
        for found in CODE.finditer(text):
            self.put(text[end : found.start()])
            end = found.end()
            argument, command, control = found.groups()
            if control == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append("")
            elif command == "A":
                self.row -= int(argument or 1)
            elif command == "K":
                self.lines[self.row] = ""
            elif command == "m":
                self.put(found[0])
        self.put(text[end:])
        now = perf_counter() - self.began
        if not self.pictures or now - self.pictures[-1][0] >= PERIOD:
            self.remember()
        return len(text)

    def put(self, text: str) -> None:
        self.lines[self.row] += text

    def remember(self) -> None:
        self.pictures.append((perf_counter() - self.began, self.lines.copy()))


def draw_line(line: str) -> str:
    """Draw one line of the terminal; its characters stay in their columns, whatever the font."""
    text = Text.from_ansi(line)
    drawn = []
    column = 0
    for part in text.divide(sorted({edge for span in text.spans for edge in (span.start, span.end)})):
        begins, column = column, column + len(part)
        if not part.plain.strip():
            continue
        attributes = f'x="{begins * CELL:.1f}" textLength="{len(part) * CELL:.1f}"'
        style = part.get_style_at_offset(Console(), 0)
        if style.color is not None and not style.color.is_default:
            attributes += f' fill="{colour(style.color)}"'
        if style.bold:
            attributes += ' font-weight="bold"'
        if style.dim:
            attributes += ' opacity=".6"'
        drawn.append(f"<text {attributes}>{escape(part.plain)}</text>")
    return "".join(drawn)


def colour(of: Color) -> str:
    return of.get_truecolor(DIMMED_MONOKAI).hex


def draw(pictures: list[tuple[float, list[str]]]) -> str:
    """Draw the pictures beside each other, as a strip that jumps from one to the next."""
    rows = max(len(lines) for _, lines in pictures)
    width, height = round(COLUMNS * CELL + 2 * MARGIN), rows * LINE + 2 * MARGIN
    length = pictures[-1][0] + LAST
    known: dict[str, str] = {}
    strip, steps = [], []
    for number, (second, lines) in enumerate(pictures):
        strip.append(f'<g transform="translate({number * width + MARGIN} {MARGIN})">')
        for row, line in enumerate(lines):
            if drawn := draw_line(line):
                name = known.setdefault(drawn, f"l{len(known)}")
                strip.append(f'<use href="#{name}" y="{row * LINE + SIZE}"/>')
        strip.append("</g>")
        at = 0 if number == 0 else 100 * second / length
        steps.append(f"{at:.2f}% {{ transform: translateX({-number * width}px) }}")
    last = -(len(pictures) - 1) * width
    definitions = "\n".join(f'<g id="{name}">{drawn}</g>' for drawn, name in known.items())
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"
role="img" aria-labelledby="title-demo" fill="{INK}" font-size="{SIZE}"
font-family="ui-monospace, 'DejaVu Sans Mono', 'Liberation Mono', Menlo, Consolas, monospace">
<title id="title-demo">A recording of make demo. Transfers go on while tasks are cancelled and
connections are killed; the pool replaces the connections, and at the end not a cent is missing.</title>
<style>
text {{ white-space: pre }}
#strip {{ transform: translateX({last}px); animation: play {length:.2f}s step-end infinite }}
@keyframes play {{
{chr(10).join(steps)}
100% {{ transform: translateX({last}px) }}
}}
@media (prefers-reduced-motion: reduce) {{ #strip {{ animation: none }} }}
</style>
<defs>
{definitions}
</defs>
<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>
<svg width="{width}" height="{height}"><g id="strip">
{chr(10).join(strip)}
</g></svg>
</svg>
"""


def record(dsn: str, transfers: int) -> str:
    screen = Screen()
    console = Console(
        file=screen,
        force_terminal=True,
        color_system="truecolor",
        width=COLUMNS,
        height=60,
        _environ={},
    )
    if not trio.run(quickstart.run, dsn, console, transfers):
        raise SystemExit("the demo has failed")
    screen.remember()
    return draw(screen.pictures)


def main() -> None:
    file = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "docs/pictures/demo.svg")
    transfers = int(sys.argv[2]) if len(sys.argv) > 2 else quickstart.TRANSFERS
    with database_url() as dsn:
        picture = record(dsn, transfers)
    Path(file).write_text(picture)


if __name__ == "__main__":
    main()
