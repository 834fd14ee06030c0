"""Colours and lines of the figures, for light and for dark; they read without telling hues apart.

Lines from Okabe and Ito's palette, told apart by dashes too; maps run from faint to strong in one
hue. The page around the figures has its own colours, in the style sheet.
"""

from typing import Any

FAILED = "#d55e00"
"""Mark of a module that is not in effect: on every shade of both maps."""
BAND = "rgba(128,128,128,0.36)"
DASHES = ("solid", "dash", "dot", "dashdot")
LINES = ["#0072b2", "#d55e00", "#007d5b", "#9a4f85"]
"""Lines on a light ground; a page in the dark scheme puts its own in their places."""
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def _make_template(
    *, ink: str, faint: str, paper: str, lines: list[str], shades: list[str]
) -> dict[str, Any]:
    scale = [[i / (len(shades) - 1), shade] for i, shade in enumerate(shades)]
    axis = {
        "gridcolor": faint,
        "zerolinecolor": faint,
        "linecolor": ink,
        "tickcolor": ink,
        "ticks": "outside",
        "ticklen": 4,
        "showline": True,
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8},
    }
    layout = {
        "font": {"family": _FONT, "size": 12, "color": ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": lines,
        "xaxis": {**axis, "showgrid": False},
        "yaxis": axis,
        "hoverlabel": {
            "bgcolor": paper,
            "bordercolor": ink,
            "align": "left",
            "font": {"family": _FONT, "size": 12, "color": ink},
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    }
    bar = {"outlinewidth": 0, "thickness": 10, "len": 1.0, "tickcolor": ink, "ticks": "outside"}
    return {"layout": layout, "data": {"heatmap": [{"colorscale": scale, "colorbar": bar}]}}


TEMPLATES = {
    "light": _make_template(
        ink="#2a2f36",
        faint="#e4e4df",
        paper="#ffffff",
        lines=LINES,
        shades=["#eef3f8", "#bcd3e8", "#7fabd2", "#3f7db5", "#1b5490", "#0b2f5c"],
    ),
    "dark": _make_template(
        ink="#d6d9dd",
        faint="#30353c",
        paper="#1d2126",
        lines=["#56b4e9", "#e69f00", "#2fc79a", "#d993c0"],
        shades=["#1c2733", "#1f4266", "#2a659c", "#4b8ecb", "#86bdec", "#d3eaff"],
    ),
}
"""Templates in plotly's form; figures on their own carry the light one."""
