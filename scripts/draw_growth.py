"""Draw the row `growth` of a benchmark suite for the documentation.

    python -m benchmarks --suite cpu --size full --only growth --out runs/growth.json
    python scripts/draw_growth.py runs/growth.json docs/growth.svg

Writes one SVG, which a page includes as an image: seconds and bytes of every curve, both axes
logarithmic, so that a straight line of slope 1 is what grows in proportion.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from emlens.reports.theme import LINES

Points = Sequence[tuple[float, float]]

MIB = 2**20
WIDTH, HEIGHT = 380, 190
"""Of a panel, in pixels; the plot lies within its margins."""
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 26, 34
ROOM = 1.25
"""Of an axis beyond its least and largest value, as a factor."""
MOST_TICKS = 5
INK, FAINT = "#2a2f36", "#e4e4df"
DASHED = ("none", "6 4")
"""What was measured, and what was planned."""


def draw_growth(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One row of panels a curve: seconds, and bytes over those of an idle process.

    Args:
        curves: name -> points, as the benchmark's record has them under `sizes`.
    """
    width, height = 2 * WIDTH, HEIGHT * len(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" fill="{INK}">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for row, (name, points) in enumerate(curves.items()):
        seconds = [(p["x"], p["seconds"]) for p in points]
        measured = [(p["x"], (p.get("tensors") or p["peak"] - p["floor"]) / MIB) for p in points]
        planned = [(p["x"], p["planned"] / MIB) for p in points if p["planned"]]
        bytes_title = f"{name}: MiB" + (" of tensors (dashed: planned)" if planned else "")
        for column, (title, lines) in enumerate(
            [(f"{name}: seconds", [seconds]), (bytes_title, [measured, planned])]
        ):
            parts.append(f'<g transform="translate({column * WIDTH} {row * HEIGHT})">')
            parts += [*_draw_panel(title, lines), "</g>"]
    return "\n".join([*parts, "</svg>"])


def _draw_panel(title: str, lines: Sequence[Points]) -> list[str]:
    shown = [[(x, y) for x, y in line if y > 0] for line in lines]
    every = [point for line in shown for point in line]
    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    if not every:
        return parts
    across = _Axis([x for x, _ in every], LEFT, WIDTH - RIGHT)
    up = _Axis([y for _, y in every], HEIGHT - BOTTOM, TOP)
    for value in up.ticks():
        y = up.place(value)
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{FAINT}"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    for value in sorted({x for x, _ in every}):
        parts.append(
            f'<text x="{across.place(value):.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{value:,}</text>'
        )
    for line, colour, dashes in zip(shown, LINES, DASHED, strict=False):
        if not line:
            continue
        places = [(across.place(x), up.place(y)) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'stroke-dasharray="{dashes}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    for x, y in shown[0]:
        parts.append(
            f'<text x="{across.place(x):.1f}" y="{up.place(y) - 8:.1f}" '
            f'text-anchor="middle">{float(f"{y:.3g}"):g}</text>'
        )
    return parts


class _Axis:
    """A logarithmic axis between two pixels."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        self.low, self.high = min(values) / ROOM, max(values) * ROOM
        self.start, self.stop = start, stop

    def place(self, value: float) -> float:
        """Its pixel."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round numbers on it: 1, 2 and 5 of each power of ten, or 1 alone where there is room."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [
            [step * 10.0**power for power in powers for step in steps]
            for steps in ((1, 2, 5), (1, 5), (1,))
        ]
        inside = [[v for v in values if self.low <= v <= self.high] for values in found]
        return next((values for values in inside if len(values) <= MOST_TICKS), inside[-1])


def read_curves(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The curves of a suite's file.

    Raises:
        SystemExit: it holds no such row, or one of toy size, whose memory is not measured.
    """
    rows = {row["row"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    if "growth" not in rows or rows["growth"]["size"] != "full":
        raise SystemExit(f"{path}: expected a suite run with --size full --only growth")
    return rows["growth"]["sizes"]


def main() -> None:
    """Read one file and write the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.write_text(draw_growth(read_curves(given.suite)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
