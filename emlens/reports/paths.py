"""Figures of a fine-tune's path: its bends, norms, losses, its plane, and behaviour beside it.

Drawn from JSON alone; what is said about them is in `turns`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emlens.reports.labels import label
from emlens.reports.sections import Json
from emlens.reports.theme import BAND, DASHES, FAILED, LINES
from emlens.reports.turns import (
    UNITS,
    TurnReport,
    name_likeness,
    name_path,
    name_scale,
    read_turn,
    say_turn,
)
from emlens.reports.visible import finite, read_number, show_number

_TURN = "#808080"
"""Line at a declared turn, on light and on dark ground."""


@dataclass(frozen=True, kw_only=True)
class TitledFigure:
    """A figure with what stands above it."""

    title: str
    meaning: str
    figure: go.Figure


def list_figures(found: TurnReport) -> Iterator[TitledFigure]:
    """All figures of a trace, or of a path alone, in the order of a report."""
    for path in found.paths:
        yield TitledFigure(
            title=f"Local cosine of {name_path(path)}, window {path['window']}",
            meaning="−1 straight, 0 a right angle, 1 a reversal; shaded: from the median to what "
            "the sharpest bend of 95 % of null paths stays within; a declared turn is a dotted "
            "line",
            figure=plot_bends(path),
        )
    if found.training is not None:
        yield TitledFigure(
            title="Norms of A and B",
            meaning="Frobenius, over all modules, at each checkpoint",
            figure=plot_norms(found.training),
        )
        for name, (title, meaning) in _LOGGED.items():
            if any(finite(value) is not None for value in found.training[name]):
                figure = plot_logged(found.training, name)
                yield TitledFigure(title=title, meaning=meaning, figure=figure)
    if found.likeness:
        yield TitledFigure(
            title="Likeness to the last step",
            meaning="of the adapters' factors, stacked: cross is signed; gram, as published, is "
            "blind to rotation, and of one adapter alone it is 1 throughout",
            figure=plot_likeness(found.likeness),
        )
    first = found.paths[0]
    shares = [show_number(100 * read_number(share)) for share in first["explained"][:2]]
    yield TitledFigure(
        title=f"Path of {name_path(first)} in its plane",
        meaning=f"first two principal components, {shares[0]} and {shares[1]} % of the variance",
        figure=plot_plane(first),
    )


_LOGGED = {
    "losses": ("Training loss", "nats a trained token, as it was logged"),
    "gradient_norms": ("Gradient norm", "L2, before clipping, as it was logged"),
}


def plot_bends(path: Json) -> go.Figure:
    """Local cosine by step, with the band of the null paths and the step of the turn."""
    figure = go.Figure()
    for trace in _bend_traces(path):
        figure.add_trace(trace)
    _mark_turn(figure, path)
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="local cosine")
    return figure.update_layout(height=280, showlegend=False)


def _bend_traces(path: Json) -> list[go.Scatter]:
    steps, cosines = list(path["steps"]), [read_number(v) for v in path["local_cosine"]]
    line = go.Scatter(
        x=steps,
        y=cosines,
        mode="lines+markers",
        marker={"size": 4, "color": LINES[0]},
        line={"width": 2, "color": LINES[0]},
        name="local cosine",
        showlegend=False,
        hovertemplate="step %{x}: %{y:.3f}<extra></extra>",
    )
    critical = finite(path["critical"])
    if not steps or critical is None:
        return [line]
    # The prominence is the largest less the median, which is not a field of its own.
    median = max(cosines) - read_number(path["prominence"])
    ends, flat = [steps[0], steps[-1]], {"mode": "lines", "line": {"width": 0}}
    low = go.Scatter(x=ends, y=[median] * 2, hoverinfo="skip", showlegend=False, **flat)
    high = go.Scatter(
        x=ends,
        y=[median + critical] * 2,
        fill="tonexty",
        fillcolor=BAND,
        hoverinfo="skip",
        showlegend=False,
        **flat,
    )
    return [low, high, line]


def plot_norms(training: Json) -> go.Figure:
    """Frobenius norms of both factors by checkpoint."""
    figure = go.Figure()
    for index, (field, name) in enumerate((("norms_A", "A"), ("norms_B", "B"))):
        figure.add_scatter(
            x=training["steps"],
            y=[finite(value) for value in training[field]],
            mode="lines+markers",
            marker={"size": 4, "color": LINES[index]},
            line={"width": 2, "color": LINES[index], "dash": DASHES[index]},
            name=f"‖{name}‖",
            hovertemplate=f"step %{{x}}: ‖{name}‖ %{{y:.4g}}<extra></extra>",
        )
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="norm", rangemode="tozero")
    return figure.update_layout(height=280)


def plot_likeness(scores: Sequence[Json]) -> go.Figure:
    """How like the last step the stacked factors are, one line a score."""
    figure = go.Figure()
    for index, one in enumerate(scores):
        name = name_likeness(one)
        figure.add_scatter(
            x=one["steps"],
            y=[finite(value) for value in one["values"]],
            mode="lines",
            line={"width": 2, "color": LINES[index % len(LINES)], "dash": DASHES[index]},
            name=name,
            hovertemplate=f"step %{{x}}: {name} %{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="against the last")
    return figure.update_layout(height=280)


def plot_logged(training: Json, field: str) -> go.Figure:
    """What a trainer logged, `losses` or `gradient_norms`, by step."""
    figure = go.Figure(
        go.Scatter(
            x=training["logged_steps"],
            y=[finite(value) for value in training[field]],
            mode="lines",
            line={"width": 2, "color": LINES[0]},
            hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="training step")
    figure.update_yaxes(rangemode="tozero")
    return figure.update_layout(height=280, showlegend=False)


def plot_plane(path: Json) -> go.Figure:
    """The path in the plane of its first two principal components, points coloured by step."""
    steps = list(path["all_steps"])
    x, y = ([read_number(point[axis]) for point in path["coordinates"]] for axis in (0, 1))
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=y,
            mode="lines+markers",
            line={"width": 1, "color": _TURN},
            marker={
                "size": 6,
                "color": steps,
                "colorscale": "Viridis",
                "colorbar": {"title": {"text": "step", "side": "right"}, "thickness": 10},
            },
            customdata=steps,
            hovertemplate="step %{customdata}<extra></extra>",
        )
    )
    if path["step"] is not None:
        place = steps.index(path["step"])
        figure.add_scatter(
            x=[x[place]],
            y=[y[place]],
            mode="markers",
            marker={"size": 16, "symbol": "circle-open", "color": FAILED, "line": {"width": 2}},
            hovertemplate=f"turn, step {label(path['step'])}<extra></extra>",
        )
    if (widest := path.get("plane_turn")) is not None:
        place = steps.index(widest)
        figure.add_scatter(
            x=[x[place]],
            y=[y[place]],
            mode="markers",
            marker={"size": 10, "symbol": "x-thin-open", "color": FAILED, "line": {"width": 1}},
            hovertemplate=f"farthest from the line between the ends, step {label(widest)}"
            "<extra></extra>",
        )
    figure.update_xaxes(title="first component")
    figure.update_yaxes(title="second component", scaleanchor="x")
    return figure.update_layout(height=320, showlegend=False)


def plot_behaviour(found: TurnReport, measure: str) -> go.Figure:
    """One measure of behaviour by scale below the local cosine, with onsets and the turn.

    Lines are rolling means, points the means themselves; a diamond is the half-way step with its
    interval.
    """
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.3, 0.7], vertical_spacing=0.06)
    path = found.paths[0]
    for trace in _bend_traces(path):
        figure.add_trace(trace, row=1, col=1)
    curves = [curve for curve in found.curves if curve["measure"] == measure]
    for index, curve in enumerate(curves):
        own = [point for point in found.points if point["scale"] == curve["scale"]]
        for trace in _curve_traces(curve, own if measure == "share" else (), index):
            figure.add_trace(trace, row=2, col=1)
    _mark_turn(figure, path)
    figure.update_xaxes(title="training step", row=2, col=1)
    figure.update_yaxes(title="local cosine", row=1, col=1)
    figure.update_yaxes(title=label(UNITS.get(measure, measure)), row=2, col=1)
    # A filled band would turn the order of the legend round.
    return figure.update_layout(height=460, legend_traceorder="normal")


def _curve_traces(curve: Json, points: Sequence[Json], index: int) -> list[go.Scatter]:
    colour = LINES[index % len(LINES)]
    dash = DASHES[index // len(LINES) % len(DASHES)]
    name = name_scale(curve)
    steps, rolling = list(curve["steps"]), [read_number(v) for v in curve["rolling"]]
    shared: dict[str, Any] = {"showlegend": False}
    means = go.Scatter(
        x=steps,
        y=[read_number(v) for v in curve["means"]],
        mode="markers",
        marker={"size": 5, "color": colour, "opacity": 0.6},
        error_y=_limits([point["em_percent"] for point in points], colour),
        hovertemplate=f"{name}, step %{{x}}: %{{y:.3g}}<extra></extra>",
        **shared,
    )
    line = go.Scatter(
        x=steps,
        y=rolling,
        mode="lines",
        line={"width": 2, "color": colour, "dash": dash},
        name=name,
        hoverinfo="skip",
    )
    onset = curve["onset"]
    if onset is None:
        return [means, line]
    diamond = go.Scatter(
        x=[read_number(onset["value"])],
        y=[(rolling[0] + rolling[-1]) / 2],
        mode="markers",
        marker={"size": 11, "symbol": "diamond", "color": colour},
        error_x=_limits([onset], colour),
        hovertemplate=f"{name}, half-way: step %{{x:.0f}}<extra></extra>",
        **shared,
    )
    return [means, line, diamond]


def _limits(intervals: Sequence[Json], colour: str) -> dict[str, Any] | None:
    """Bars from the lower to the upper limit of each interval; None of none."""
    if not intervals:
        return None
    ends = [[read_number(one[name]) for one in intervals] for name in ("value", "low", "high")]
    values, lows, highs = ends
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for high, value in zip(highs, values, strict=True)],
        "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
        "thickness": 1.2,
        "width": 4,
        "color": colour,
    }


def _mark_turn(figure: go.Figure, path: Json) -> None:
    if path["step"] is not None:
        figure.add_vline(x=path["step"], line={"dash": "dot", "width": 2, "color": _TURN})


def plot_path(document: Json) -> go.Figure:
    """One path of weights: its local cosine above the plane it lies in."""
    return _stack(
        [plot_bends(document), plot_plane(document)], [say_turn(document), "path in its plane"]
    )


def plot_trace(document: Json) -> go.Figure:
    """A trace: its bends and, where it was measured, behaviour beside them."""
    found = read_turn(document)
    measures = list(dict.fromkeys(str(curve["measure"]) for curve in found.curves))
    if measures:
        return plot_behaviour(found, measures[-1])
    return plot_path(found.paths[0])


def _stack(figures: Sequence[go.Figure], titles: Sequence[str]) -> go.Figure:
    """Figures below one another in one, without what only a page has room for."""
    stacked = make_subplots(len(figures), 1, subplot_titles=[label(t, 200) for t in titles])
    for row, figure in enumerate(figures, start=1):
        for trace in cast(Any, figure.data):  # the library's own annotation is wider
            stacked.add_trace(trace, row=row, col=1)
    return stacked.update_layout(height=320 * len(figures), showlegend=False)
