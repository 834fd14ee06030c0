"""Texts of results within figures: plotly reads tags in texts, and these must not be read."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from emlens.reports.visible import shorten, show_text


def label(text: object, limit: int = 80) -> str:
    """A text for a figure: shown as it is, whatever tags it holds."""
    line = shorten(show_text(str(text)).replace("\n", "⏎"), limit)
    return html.escape(line, quote=False)


def name_rows(figure: go.Figure, names: Sequence[str]) -> None:
    """Rows by their places, as two of one name are still two; the first on top."""
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=list(names),
        autorange="reversed",
        showgrid=False,
        ticks="",
        ticklabelstandoff=6,
    )
