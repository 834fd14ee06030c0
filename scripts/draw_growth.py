"""Draw the row `growth` of a benchmark suite for the documentation.

    python -m benchmarks --suite cpu --size full --only growth --out runs/growth.json
    python scripts/draw_growth.py runs/growth.json docs/growth.html

Writes an HTML fragment: seconds and bytes of every curve, both axes logarithmic.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emlens.reports.theme import DASHES, LINES

ROW_HEIGHT = 230
MIB = 2**20


def draw_growth(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One row of panels a curve: seconds, and bytes over those of an idle process.

    Args:
        curves: name -> points, as the benchmark's record has them under `sizes`.
    """
    titles = [title for name in curves for title in (f"{name}: seconds", f"{name}: MiB")]
    figure = make_subplots(
        rows=len(curves), cols=2, subplot_titles=titles, vertical_spacing=0.35 / len(curves)
    )
    for row, (name, points) in enumerate(curves.items(), start=1):
        x = [point["x"] for point in points]
        lines = {
            "measured": [(p["peak"] - p["floor"]) / MIB for p in points],
            "planned": [p["planned"] / MIB for p in points if p["planned"]],
        }
        _add(figure, x, [p["seconds"] for p in points], row=row, col=1, name="measured", style=0)
        for style, (line, values) in enumerate(lines.items()):
            if values:
                _add(figure, x, values, row=row, col=2, name=line, style=style)
        figure.update_xaxes(title_text=name, tickvals=x, row=row)
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", rangemode="tozero")
    figure.update_layout(
        template="plotly_white", height=ROW_HEIGHT * len(curves), showlegend=False, margin={"t": 40}
    )
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id="growth")


def _add(
    figure: Any, x: Sequence[int], y: Sequence[float], *, row: int, col: int, name: str, style: int
) -> None:
    line = {"color": LINES[style], "dash": DASHES[style]}
    trace = go.Scatter(x=x, y=y, name=name, mode="lines+markers", line=line)
    figure.add_trace(trace, row=row, col=col)


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
