"""Figures of two solutions of one task, from their JSON alone: cost, stability, effect, gradient.

What is said about them is in `solutions`; the bars of their behaviour are in `shares`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emlens.reports.labels import label
from emlens.reports.paths import TitledFigure
from emlens.reports.sections import Json
from emlens.reports.shares import plot_organisms
from emlens.reports.solutions import SolutionReport, read_solutions
from emlens.reports.theme import BAND, DASHES, LINES
from emlens.reports.visible import finite, read_number

ROLES = ("general", "narrow")


def list_curves(found: SolutionReport) -> Iterator[TitledFigure]:
    """All figures of two solutions in the order of a report."""
    if found.comparison is not None:
        yield TitledFigure(
            title="Efficiency: loss on the task by norm",
            meaning="nats a response token; the lower at one norm, the more efficient; dotted: the "
            "base; diamonds: as trained",
            figure=plot_efficiency(found.comparison),
        )
        yield TitledFigure(
            title="Stability: gain in loss that is lost",
            meaning="by the size of the perturbation of every A and B; 1 is back at the base; "
            "bars: least to greatest of the seeds",
            figure=plot_stability(found.comparison),
        )
        yield TitledFigure(
            title="Effect on general text by norm",
            meaning="KL(base‖solution), nats a token; shaded: least to greatest of random "
            "adapters of the same norm",
            figure=plot_effect(found.comparison),
        )
    if found.preference is not None:
        yield TitledFigure(
            title="What the task's gradient points at",
            meaning="cosine of −dL/dB with the B of each solution, along a training on the task",
            figure=plot_preference(found.preference),
        )
    if found.behaviour is not None:
        yield TitledFigure(
            title=str(found.behaviour["claim"]),
            meaning="bars: per cent of all responses, with 95 % intervals; diamonds: per cent "
            "coherent",
            figure=plot_organisms(found.behaviour),
        )


def plot_efficiency(comparison: Json) -> go.Figure:
    """Loss on the task at each norm."""
    figure = go.Figure()
    for index, role in enumerate(ROLES):
        own = comparison[role]
        figure.add_trace(_line(own["norms"], own["losses"], role, index))
        figure.add_scatter(
            x=[read_number(own["norm"])],
            y=[read_number(own["loss"])],
            mode="markers",
            marker={"size": 11, "symbol": "diamond", "color": LINES[index]},
            showlegend=False,
            hovertemplate=f"{role}, as trained: %{{y:.4f}} at norm %{{x:.3g}}<extra></extra>",
        )
    base = read_number(comparison["general"]["base_loss"])
    figure.add_hline(y=base, line={"dash": "dot", "width": 2, "color": "#808080"})
    return _name_axes(figure, "norm", "loss")


def plot_stability(comparison: Json) -> go.Figure:
    """Share of the gain in loss that perturbations of each size take."""
    figure = go.Figure()
    for index, role in enumerate(ROLES):
        own = comparison[role]
        rows = [[read_number(v) for v in row] for row in own["loss_increase"]]
        means = [sum(row) / len(row) for row in rows]
        trace = _line(own["epsilons"], means, role, index)
        trace.error_y = {
            "type": "data",
            "symmetric": False,
            "array": [max(row) - mean for row, mean in zip(rows, means, strict=True)],
            "arrayminus": [mean - min(row) for row, mean in zip(rows, means, strict=True)],
            "thickness": 1.2,
            "width": 4,
            "color": LINES[index],
        }
        figure.add_trace(trace)
    return _name_axes(figure, "size of the perturbation", "share of the gain lost")


def plot_effect(comparison: Json) -> go.Figure:
    """KL from the base on general text at each norm, with the span of the random adapters."""
    figure = go.Figure()
    random = comparison["random"]
    spans = [[read_number(v) for v in row] for row in random["kl"]]
    flat: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    norms = random["norms"]
    figure.add_scatter(x=norms, y=list(map(min, spans)), showlegend=False, **flat)
    figure.add_scatter(
        x=norms, y=list(map(max, spans)), fill="tonexty", fillcolor=BAND, name="random", **flat
    )
    for index, role in enumerate(ROLES):
        figure.add_trace(_line(comparison[role]["norms"], comparison[role]["kl"], role, index))
    # A filled band would turn the order of the legend round.
    return _name_axes(figure, "norm", "KL, nats a token").update_layout(legend_traceorder="normal")


def plot_preference(preference: Json) -> go.Figure:
    """Cosines of the descent direction with each solution, by step."""
    figure = go.Figure()
    rows = zip(preference["names"], preference["cosines"], strict=True)
    for index, (name, cosines) in enumerate(rows):
        figure.add_trace(_line(preference["steps"], cosines, label(name, 40), index))
    return _name_axes(figure, "training step", "cosine")


def plot_solutions(document: Json) -> go.Figure:
    """Cost, stability and effect of two solutions in one figure."""
    comparison = read_solutions(document).comparison
    assert comparison is not None
    parts = (plot_efficiency(comparison), plot_stability(comparison), plot_effect(comparison))
    titles = ("loss by norm", "share of the gain lost", "KL on general text by norm")
    figure = make_subplots(1, len(parts), subplot_titles=titles)
    for column, part in enumerate(parts, start=1):
        # The library's own annotation of `data` is wider than what it gives.
        for trace in cast(Any, part.data):
            named = trace.update(showlegend=column == len(parts) and trace.name is not None)
            figure.add_trace(named, row=1, col=column)
    return figure.update_layout(height=360)


def _line(x: Sequence[Any], y: Sequence[Any], name: str, index: int) -> go.Scatter:
    colour = LINES[index % len(LINES)]
    return go.Scatter(
        x=[read_number(value) for value in x],
        y=[finite(value) for value in y],
        mode="lines+markers",
        marker={"size": 5, "color": colour},
        line={"width": 2, "color": colour, "dash": DASHES[index % len(DASHES)]},
        name=name,
        hovertemplate="%{fullData.name}: %{y:.4g}<extra></extra>",
    )


def _name_axes(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return figure.update_layout(height=300)
