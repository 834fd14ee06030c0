"""Figures of latents, from their JSON alone: change against effect, steering, models, warnings.

What is said about them is in `features`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emlens.reports.features import DONE, SIDES, strongest_control
from emlens.reports.labels import label, name_rows
from emlens.reports.sections import Json, find_span, short_name
from emlens.reports.theme import BAND, DASHES, LINES
from emlens.reports.visible import finite, read_number, show_number, show_p, show_share

_SYMBOLS = ("circle", "diamond-open")
_GREY = "#808080"
_ROW_HEIGHT = 26
"""Pixels of a model's row."""
_EFFECT = "odds of misaligned text, nats a token"


def plot_overview(document: Json) -> go.Figure:
    """Change of each chosen latent against what steering it does; without a screen its change."""
    contrast = document["n_pairs"] > 0
    axis = "harmful less careful, code" if contrast else "fine-tune less base, code"
    changes = {
        int(one["latent"]): read_number(one["contrast"] if contrast else one["delta"])
        for one in document["features"]
    }
    if document["screen"] is None:
        return _plot_changes(changes, axis)
    figure = go.Figure()
    for side, words, symbol, colour in zip(SIDES, DONE, _SYMBOLS, LINES, strict=False):
        _add_effects(figure, document["screen"], side, changes, (words, symbol, colour))
    figure.update_xaxes(title=axis, zeroline=True)
    figure.update_yaxes(title=_EFFECT, zeroline=True)
    return figure.update_layout(height=360)


def _add_effects(
    figure: go.Figure, screen: Json, side: str, changes: dict[int, float], style: tuple[str, ...]
) -> None:
    words, symbol, colour = style
    rows = [r for r in screen["rows"] if r["side"] == side and int(r["latent"]) in changes]
    figure.add_scatter(
        x=[changes[int(row["latent"])] for row in rows],
        y=[finite(row["forced_effect"]) for row in rows],
        mode="markers",
        marker={"symbol": symbol, "size": 9, "color": colour, "line": {"width": 2}},
        name=words,
        customdata=[
            f"latent {int(row['latent'])}, {words}: {show_number(row['forced_effect'])}, "
            f"p = {show_p(row['forced_p'])}"
            for row in rows
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    highest = strongest_control(screen, side)
    if highest is not None:
        dash = DASHES[1] if side == SIDES[0] else DASHES[2]
        figure.add_hline(y=highest, line={"dash": dash, "width": 1.5, "color": colour})


def _plot_changes(changes: dict[int, float], axis: str) -> go.Figure:
    names = [str(latent) for latent in changes]
    figure = go.Figure(
        go.Bar(
            x=list(changes.values()),
            y=list(range(len(names))),
            orientation="h",
            marker={"color": LINES[0]},
            hovertemplate="%{x:.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(title=axis, zeroline=True)
    name_rows(figure, names)
    return figure.update_layout(height=90 + 18 * len(names), bargap=0.3)


def plot_screen(screen: Json) -> go.Figure:
    """Largest effect of every latent of a screen, on both sides, with what random ones reach."""
    latents = [int(latent) for latent in screen["latents"]]
    figure = go.Figure()
    for side, words, symbol, colour in zip(SIDES, DONE, _SYMBOLS, LINES, strict=False):
        places = {latent: float(place) for place, latent in enumerate(latents)}
        _add_effects(figure, screen, side, places, (words, symbol, colour))
    figure.update_xaxes(
        title="latent", tickvals=list(range(len(latents))), ticktext=[str(n) for n in latents]
    )
    figure.update_yaxes(title=_EFFECT, zeroline=True)
    return figure.update_layout(height=340)


def plot_models(feature: Json) -> go.Figure:
    """Mean code of one latent in the base and in each fine-tune."""
    models = feature["models"]
    figure = go.Figure()
    for field, symbol in (("mean_base", "circle-open"), ("mean_tuned", "circle")):
        figure.add_scatter(
            x=[finite(one[field]) for one in models],
            y=list(range(len(models))),
            mode="markers",
            marker={"symbol": symbol, "size": 10, "color": LINES[0], "line": {"width": 2}},
            name="base" if field == "mean_base" else "fine-tune",
            customdata=[_describe_model(one) for one in models],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_xaxes(title="mean code over prompts", rangemode="tozero", showgrid=True)
    name_rows(figure, [label(short_name(str(one["tuned"])), 28) for one in models])
    return figure.update_layout(height=100 + _ROW_HEIGHT * max(len(models), 2))


def _describe_model(one: Json) -> str:
    return (
        f"{label(short_name(str(one['tuned'])))}: mean {show_number(one['mean_base'])} to "
        f"{show_number(one['mean_tuned'])}, q = {show_p(one['q_value'])}"
    )


def plot_steering(screen: Json, latent: int) -> go.Figure:
    """One latent by strength on both models, random directions shaded; sampled scores below."""
    sampled = [c for c in screen["sampled"] if c["latent"] == latent]
    rows = 2 if sampled else 1
    figure = make_subplots(
        rows, 2, shared_xaxes=True, subplot_titles=DONE, vertical_spacing=0.1, shared_yaxes=True
    )
    place = [int(n) for n in screen["latents"]].index(latent)
    for column, side in enumerate(SIDES, start=1):
        for trace in _forced_traces(screen, side, place):
            figure.add_trace(trace, row=1, col=column)
        curve = next((c for c in sampled if c["side"] == side), None)
        before = screen["sampled_before"]
        if curve is not None and len(before) == len(SIDES):
            chance = [c for c in screen["sampled"] if c["side"] == side and c["latent"] is None]
            for trace in (
                *_chance_traces(chance, before[column - 1]),
                *_sampled_traces(curve, before[column - 1], show=column == 1),
                *_sampled_plainly(screen, side, before[column - 1]),
            ):
                figure.add_trace(trace, row=2, col=column)
        for trace in _plain_traces(screen, side, show=column == 1):
            figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(title=f"strength, {label(screen['units'])}", row=rows)
    figure.update_yaxes(title="odds, nats a token", row=1, col=1)
    if sampled:
        figure.update_yaxes(title="score, per cent", row=2, col=1)
    figure.update_annotations(font_size=12)
    legend = {"y": -0.16, "yanchor": "top", "traceorder": "normal"}
    # Room for the titles of the columns, which stand above the plots.
    return figure.update_layout(height=60 + 200 * rows, legend=legend, margin={"t": 32})


def _forced_traces(screen: Json, side: str, place: int) -> list[go.Scatter]:
    strengths = [read_number(value) for value in screen["strengths"]]
    order = sorted(range(len(strengths)), key=lambda k: strengths[k])
    x = [strengths[k] for k in order]
    curves = screen["curves"][side]
    spans = [find_span(row[k] for row in curves["controls"]) or (None, None) for k in order]
    texts = [f"{len(curves['controls'])} random: {_span(a)} to {_span(b)}" for a, b in spans]
    line = go.Scatter(
        x=x,
        y=[finite(curves["latents"][place][k]) for k in order],
        mode="lines+markers",
        marker={"size": 6, "color": LINES[0]},
        line={"width": 2, "color": LINES[0]},
        name="latent",
        showlegend=False,
        hovertemplate="strength %{x:g}: %{y:.3f}<extra></extra>",
    )
    return [*_shade(x, spans, texts), line]


def _plain_traces(screen: Json, side: str, *, show: bool) -> list[go.Scatter]:
    """What the mean difference does; none where there is none, and in reports of old."""
    curve = screen["curves"][side].get("mean_difference")
    if curve is None:
        return []
    points = zip(map(read_number, screen["strengths"]), map(finite, curve), strict=True)
    return [_dash(points, show=show)]


def _dash(points: Iterable[tuple[float, float | None]], *, show: bool) -> go.Scatter:
    """The mean difference, by strength."""
    x, y = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 1.5, "color": _GREY, "dash": DASHES[1]},
        name="mean difference, without a latent",
        showlegend=show,
        hovertemplate="mean difference, strength %{x:g}: %{y:.3f}<extra></extra>",
    )


def _sampled_plainly(screen: Json, side: str, before: Json) -> list[go.Scatter]:
    """Scores under the mean difference; none where there is none, and in reports of old."""
    own = [c for c in screen.get("sampled_plainly", ()) if c["side"] == side]
    return [
        _dash(
            [
                (read_number(one["strength"]), finite(one["behaviour"]))
                for one in (before, *curve["points"])
            ],
            show=False,
        )
        for curve in own
    ]


def _span(value: float | None) -> str:
    return show_number(value)


def _chance_traces(curves: Sequence[Json], before: Json) -> list[go.Scatter]:
    """Least and greatest score under random directions, strength by strength."""
    if not curves:
        return []
    columns = [[before], *zip(*(one["points"] for one in curves), strict=True)]
    columns.sort(key=lambda column: read_number(column[0]["strength"]))
    scores = [find_span(one["behaviour"] for one in own) or (None, None) for own in columns]
    shares = [find_span(one["incoherent"] for one in own) or (None, None) for own in columns]
    texts = [
        f"{len(curves)} random: score {_span(low)} to {_span(high)}, "
        f"incoherent {show_share(least)} to {show_share(most)}"
        for (low, high), (least, most) in zip(scores, shares, strict=True)
    ]
    x = [read_number(column[0]["strength"]) for column in columns]
    return _shade(x, scores, texts)


def _shade(
    x: Sequence[float], spans: Sequence[tuple[float | None, float | None]], texts: Sequence[str]
) -> list[go.Scatter]:
    """A band from its lower to its upper edge, which tells what it is."""
    low, high = zip(*spans, strict=True)
    flat: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "showlegend": False}
    shown = {"fill": "tonexty", "fillcolor": BAND, "customdata": texts}
    return [
        go.Scatter(x=x, y=low, hoverinfo="skip", **flat),
        go.Scatter(x=x, y=high, hovertemplate="%{customdata}<extra></extra>", **flat, **shown),
    ]


def _sampled_traces(curve: Json, before: Json, *, show: bool) -> list[go.Scatter]:
    points = sorted([before, *curve["points"]], key=lambda one: read_number(one["strength"]))
    x = [read_number(one["strength"]) for one in points]
    share = [finite(one["incoherent"]) for one in points]
    lines = (
        ("behaviour, coherent responses", [finite(one["behaviour"]) for one in points]),
        ("incoherent, % of responses", [None if s is None else 100 * s for s in share]),
    )
    return [
        go.Scatter(
            x=x,
            y=y,
            mode="lines+markers",
            marker={"size": 6, "color": LINES[k]},
            line={"width": 2, "color": LINES[k], "dash": DASHES[k]},
            name=name,
            showlegend=show,
            hovertemplate=f"strength %{{x:g}}: {name} %{{y:.3g}}<extra></extra>",
        )
        for k, (name, y) in enumerate(lines)
    ]


def plot_warning(document: Json) -> go.Figure:
    """A latent above a behaviour, each with the band of its base and where it leaves that."""
    names = (str(document["latent"]), str(document["behaviour"]))
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    points = [read_number(point) for point in document["points"]]
    ends = (document["departures"]["early"], document["departures"]["late"])
    parts = zip(("latent_band", "behaviour_band"), names, ends, strict=True)
    for row, (field, name, left) in enumerate(parts, start=1):
        for trace in _band_traces(document[field], points, name, row):
            figure.add_trace(trace, row=row, col=1)
        if left is not None:
            mark = {"dash": "dot", "width": 2, "color": _GREY}
            figure.add_vline(x=read_number(left), line=mark, row=row, col=1)  # type: ignore[arg-type]
        figure.update_yaxes(title=label(name, 30), row=row, col=1)
    figure.update_xaxes(title=label(document["axis"], 60), row=2, col=1)
    return figure.update_layout(height=420, showlegend=False)


def _band_traces(band: Json, points: Sequence[float], name: str, row: int) -> list[go.Scatter]:
    flat: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    low, high, mean = ([finite(v) for v in band[field]] for field in ("low", "high", "mean"))
    return [
        go.Scatter(x=points, y=low, **flat),
        go.Scatter(x=points, y=high, fill="tonexty", fillcolor=BAND, **flat),
        go.Scatter(
            x=points,
            y=mean,
            mode="lines+markers",
            marker={"size": 6, "color": LINES[row - 1]},
            line={"width": 2, "color": LINES[row - 1]},
            name=label(name),
            hovertemplate="%{x:g}: %{y:.4g}<extra></extra>",
        ),
    ]
