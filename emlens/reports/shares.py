"""Figures of how often a model shows a behaviour, from their JSON alone: bars with intervals."""

from typing import Any

import plotly.graph_objects as go

from emlens.reports.labels import label
from emlens.reports.sections import Json
from emlens.reports.theme import LINES
from emlens.reports.visible import read_number, show_number

_ROW_HEIGHT = 34
"""Pixels of a bar with its gap."""


def plot_shares(removal: Json) -> go.Figure:
    """Share of each arm with its interval, and how many of its responses are coherent."""
    arms = list(reversed(removal["arms"]))
    names = [label(arm["name"], 60) for arm in arms]
    claim = str(removal["claim"])
    figure = go.Figure(_bars(arms, names, claim))
    coherent = [read_number(arm["coherent_percent"]["value"]) for arm in arms]
    figure.add_scatter(
        x=coherent,
        y=names,
        mode="markers",
        marker={"symbol": "diamond-open", "size": 10, "color": LINES[1], "line": {"width": 2}},
        name="coherent",
        customdata=[_say(arm["coherent_percent"]) for arm in arms],
        hovertemplate="%{y}: coherent %{customdata}<extra></extra>",
    )
    figure.update_xaxes(title="per cent of all responses", range=[0, 102], showgrid=True)
    figure.update_yaxes(showgrid=False, ticks="", ticklabelstandoff=6)
    return figure.update_layout(height=110 + _ROW_HEIGHT * len(arms), bargap=0.35)


def _bars(arms: list[Json], names: list[str], claim: str) -> Any:
    values = [read_number(arm["em_percent"]["value"]) for arm in arms]
    highs = [read_number(arm["em_percent"]["high"]) for arm in arms]
    lows = [read_number(arm["em_percent"]["low"]) for arm in arms]
    return go.Bar(
        x=values,
        y=names,
        orientation="h",
        marker={"color": LINES[0]},
        name=label(claim),
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - value for high, value in zip(highs, values, strict=True)],
            "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
            "thickness": 1.5,
            "width": 5,
        },
        customdata=[f"{_say(arm['em_percent'])}, {arm['n']} responses" for arm in arms],
        hovertemplate="%{y}: %{customdata}<extra></extra>",
    )


def _say(interval: Json) -> str:
    value, low, high = (read_number(interval[name]) for name in ("value", "low", "high"))
    return f"{show_number(value)} % [{show_number(low)}, {show_number(high)}]"
