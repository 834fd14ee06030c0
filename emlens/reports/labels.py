"""Texts of results within figures: plotly reads tags in texts, and these must not be read."""

import html

from emlens.reports.visible import shorten, show_text


def label(text: object, limit: int = 80) -> str:
    """A text for a figure: shown as it is, whatever tags it holds."""
    line = shorten(show_text(str(text)).replace("\n", "⏎"), limit)
    return html.escape(line, quote=False)
