"""Figures of how often a model shows a behaviour, from their JSON alone: bars with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from emlens.reports.behaviour import DIFFERENCES, Behaviour, read_behaviour, say_interval
from emlens.reports.labels import label, name_rows
from emlens.reports.sections import Json
from emlens.reports.theme import LINES
from emlens.reports.turns import name_scale
from emlens.reports.visible import read_number, show_change

_ROW_HEIGHT = 34
"""Pixels of a bar with its gap."""
ALL_QUESTIONS = "all questions"


@dataclass(frozen=True, kw_only=True)
class _Bar:
    name: str
    n: int
    share: Json
    """Interval, per cent of all responses."""
    coherent: float
    """Per cent of all responses."""
    coherent_says: str


def plot_shares(removal: Json) -> go.Figure:
    """Share of each arm with its interval, and how many of its responses are coherent."""
    bars = [_total(str(arm["name"]), arm["n"], arm) for arm in removal["arms"]]
    return _draw_bars(bars, str(removal["claim"]))


def plot_organisms(narrowness: Json) -> go.Figure:
    """Share of base, general and narrow organism in the domain and outside of it."""
    bars = [_total(name_organism(share), share["n"], share) for share in narrowness["shares"]]
    return _draw_bars(bars, str(narrowness["claim"]))


def name_organism(share: Json) -> str:
    """Who answered, at which scale, on which side of the domain."""
    scale = "" if share["organism"] != "narrow" else f" at {name_scale(share)}"
    side = {"in": "in the domain", "out": "outside"}
    return f"{share['organism']}{scale}, {side.get(str(share['where']), share['where'])}"


def plot_evaluation(document: Json) -> go.Figure:
    """Share over all questions and of each, and how many responses are coherent."""
    found = read_behaviour(document)
    bars = [_total(ALL_QUESTIONS, found.summary["n_rows"], found.summary)]
    return _draw_bars([*bars, *map(_question, found.summary["questions"])], found.claim)


def plot_together(found: Sequence[Behaviour]) -> go.Figure:
    """Share over all questions of several evaluations by one judge, one bar each."""
    bars = [_total(one.heading, one.summary["n_rows"], one.summary) for one in found]
    return _draw_bars(bars, found[0].claim)


def plot_difference(document: Json) -> go.Figure:
    """Second evaluation minus first, in percentage points, each difference with its interval."""
    rows = [
        (label(name.format(document["claim"])), document[key])
        for key, name in DIFFERENCES.items()
        if document.get(key) is not None
    ]
    ends = [[read_number(row[name]) for _, row in rows] for name in ("value", "low", "high")]
    values, lows, highs = ends
    places = list(range(len(rows)))
    figure = go.Figure(
        go.Scatter(
            x=values,
            y=places,
            mode="markers",
            marker={"size": 10, "color": LINES[0]},
            error_x=_whiskers(values, lows, highs),
            customdata=[_say_points(name, row) for name, row in rows],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    figure.update_xaxes(title="percentage points, second minus first", zeroline=True)
    return _stack_rows(figure, [name for name, _ in rows])


def _total(name: str, n: int, holder: Json) -> _Bar:
    coherent = holder["coherent_percent"]
    return _Bar(
        name=name,
        n=n,
        share=holder["em_percent"],
        coherent=read_number(coherent["value"]),
        coherent_says=say_interval(coherent),
    )


def _question(part: Json) -> _Bar:
    n, coherent = int(part["rows"]), int(part["coherent"])
    return _Bar(
        name=str(part["question_id"]),
        n=n,
        share=part["em_percent"],
        coherent=100 * coherent / n,
        coherent_says=f"{coherent} of {n}",
    )


def _draw_bars(bars: Sequence[_Bar], claim: str) -> go.Figure:
    places, names = list(range(len(bars))), [label(bar.name, 60) for bar in bars]
    ends = [[read_number(bar.share[name]) for bar in bars] for name in ("value", "low", "high")]
    values, lows, highs = ends
    figure = go.Figure(
        go.Bar(
            x=values,
            y=places,
            orientation="h",
            marker={"color": LINES[0]},
            name=label(claim),
            error_x=_whiskers(values, lows, highs),
            customdata=[
                f"{name}: {say_interval(bar.share)}, {bar.n} responses"
                for name, bar in zip(names, bars, strict=True)
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=[bar.coherent for bar in bars],
        y=places,
        mode="markers",
        marker={"symbol": "diamond-open", "size": 10, "color": LINES[1], "line": {"width": 2}},
        name="coherent",
        customdata=[
            f"{name}: coherent {bar.coherent_says}" for name, bar in zip(names, bars, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_xaxes(title="per cent of all responses", range=[0, 102], showgrid=True)
    return _stack_rows(figure, names).update_layout(bargap=0.35)


def _whiskers(values: list[float], lows: list[float], highs: list[float]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for high, value in zip(highs, values, strict=True)],
        "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
        "thickness": 1.5,
        "width": 5,
    }


def _stack_rows(figure: go.Figure, names: list[str]) -> go.Figure:
    """Named rows, and a height that has room for them."""
    name_rows(figure, names)
    return figure.update_layout(height=110 + _ROW_HEIGHT * len(names))


def _say_points(name: str, interval: Json) -> str:
    value, low, high = (show_change(interval[end]) for end in ("value", "low", "high"))
    return f"{name}: {value} points [{low}, {high}], {label(interval['method'])}"
