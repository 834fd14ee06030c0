"""Plotly figures of results, from their JSON alone; not for token views, which are text.

Every text from a result goes through `label`: plotly reads tags in texts.
"""

import difflib
import html
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emlens.artifacts import Result
from emlens.reports.brief import WITH_ROWS, describe_briefly
from emlens.reports.curves import plot_preference, plot_solutions
from emlens.reports.document import kind_of, reading
from emlens.reports.feature_figures import plot_overview, plot_screen, plot_warning
from emlens.reports.labels import label
from emlens.reports.paths import plot_path, plot_trace
from emlens.reports.sections import (
    DIFFERENCE_KIND,
    EVALUATION_KINDS,
    IN_ORDER,
    REMOVAL_KIND,
    TRAINING_KINDS,
    Json,
    Series,
    find_span,
    first_shares,
    list_series,
)
from emlens.reports.shares import plot_difference, plot_evaluation, plot_organisms, plot_shares
from emlens.reports.theme import BAND, DASHES, FAILED, LINES, TEMPLATES
from emlens.reports.visible import (
    finite,
    read_number,
    show_number,
    show_share,
    show_token,
)

_ROW_HEIGHT = 28
"""Pixels of a row of modules."""
_LOG_TICKS = [digit * 10.0**power for power in range(-12, 4) for digit in (1, 2, 5)]
_USUAL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Rows in the order in which a block uses them; others follow as they come."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number that is drawn over the sites."""

    field: str
    null_field: str
    """Its name in a NullBand."""
    title: str
    meaning: str
    from_zero: bool = True
    digits: int = 3
    """Significant ones in a table."""


MEASURES = (
    Measure(
        field="relative_difference",
        null_field="relative_difference",
        title="Relative difference of means",
        meaning="distance of the mean activations / rms norm of the base's",
    ),
    Measure(
        field="relative_rms",
        null_field="relative_rms",
        title="Relative rms change",
        meaning="typical change of one token's activation / rms norm of the base's",
    ),
    Measure(
        field="cosine_of_means",
        null_field="cosine_of_means",
        title="Cosine of means",
        meaning="cosine of the two models' mean activations",
        from_zero=False,
        digits=5,
    ),
    Measure(
        field="top_shares",
        null_field="top_share",
        title="Share of the top direction",
        meaning="share of the difference's variance that lies in its first direction",
    ),
)


def plot(result: Result | Mapping[str, Any]) -> go.Figure:
    """Draw a result, or the JSON object of one.

    Raises:
        TypeError: There is no figure of its kind.
        ReportError: It is not as emlens writes it.
    """
    document: Json = _describe(result) if isinstance(result, Result) else result
    draw = _FIGURES.get(kind := kind_of(document))
    if draw is None:
        near = ", ".join(difflib.get_close_matches(kind, _FIGURES, 3, cutoff=0))
        raise TypeError(f"result: there is no figure of the kind {kind!r}; nearest: {near}")
    with reading(kind):
        return draw(document).update_layout(template=go.layout.Template(TEMPLATES["light"]))


def _describe(result: Result) -> Json:
    return describe_briefly(result) if result.kind in WITH_ROWS else result.to_dict()


def plot_adapter(proof: Json) -> go.Figure:
    """Heat map of ||dW|| / ||W||, modules by layers; every module not in effect is crossed out."""
    cells = _place_modules(proof["modules"])
    rows = sorted(dict.fromkeys(row for row, _ in cells), key=_place_in_block)
    columns = sorted({column for _, column in cells})
    figure = go.Figure(_heat_map(cells, rows, columns))
    crossed = [key for key, m in cells.items() if m["verdict"] not in IN_ORDER]
    figure.add_scatter(
        x=[column for _, column in crossed],
        y=[rows.index(row) for row, _ in crossed],
        mode="markers",
        marker={"symbol": "x", "size": 11, "color": FAILED, "line": {"color": "white", "width": 1}},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.update_xaxes(title="layer", **_layer_ticks(columns), showline=False, ticks="")
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[label(row, 32) for row in rows],
        ticklabelstandoff=6,
        autorange="reversed",
        showgrid=False,
        showline=False,
        ticks="",
    )
    return figure.update_layout(height=70 + _ROW_HEIGHT * max(len(rows), 2))


def _heat_map(cells: dict[tuple[str, int], Json], rows: list[str], columns: list[int]) -> Any:
    grid = [[cells.get((row, column)) for column in columns] for row in rows]
    sizes = [finite(module["relative_norm"]) for module in cells.values()]
    low, high = _log_range([size for size in sizes if size])

    def shade(module: Json | None) -> float | None:
        size = None if module is None else finite(module["relative_norm"])
        return None if size is None else (math.log10(size) if size > 0 else low)

    ticks = [t for t in _LOG_TICKS if low <= math.log10(t) <= high]
    return go.Heatmap(
        x=columns,
        y=list(range(len(rows))),
        z=[[shade(module) for module in line] for line in grid],
        zmin=low,
        zmax=high,
        xgap=1,
        ygap=1,
        customdata=[["" if m is None else _describe_module(m) for m in line] for line in grid],
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorbar={
            "title": {"text": "‖ΔW‖/‖W‖, log scale", "side": "right"},
            "tickvals": [math.log10(tick) for tick in ticks],
            "ticktext": [f"{tick:g}" for tick in ticks],
        },
    )


def _log_range(sizes: list[float]) -> tuple[float, float]:
    """Ends of a logarithmic scale over the sizes: a decade at least, so that like looks alike."""
    high = math.log10(max(sizes, default=1.0))
    return min(math.log10(min(sizes, default=1.0)), high - 1), high


def _place_modules(modules: list[Json]) -> dict[tuple[str, int], Json]:
    """Modules by row and layer (-1 without one), under the shortest names that keep them apart."""
    layers = [-1 if m["layer"] is None else int(m["layer"]) for m in modules]
    long = [_without_layer(str(m["name"]), m["layer"]) for m in modules]
    short = [str(m["module"]) for m in modules]
    pairs = [".".join(name.split(".")[-2:]) for name in long]
    for names in (short, pairs, long):
        if len(set(zip(names, layers, strict=True))) == len(modules):
            return dict(zip(zip(names, layers, strict=True), modules, strict=True))
    raise ValueError("modules: two have the same name and layer")


def _place_in_block(row: str) -> int:
    return _USUAL_ORDER.index(row) if row in _USUAL_ORDER else len(_USUAL_ORDER)


def _without_layer(name: str, layer: object) -> str:
    parts = name.split(".")
    return ".".join("*" if part == str(layer) else part for part in parts)


def _describe_module(module: Json) -> str:
    lines = (
        f"<b>{label(module['name'])}</b>",
        f"{'✓' if module['verdict'] in IN_ORDER else '✗'} {label(module['verdict'])}",
        f"‖ΔW‖/‖W‖ {show_number(module['relative_norm'])}, rank {label(module['rank'])}",
        f"measured/intended {show_number(module['ratio'], 4)}",
        f"surviving share {show_share(module['surviving_share'])}",
    )
    return "<br>".join(lines)


def _layer_ticks(columns: list[int]) -> dict[str, Any]:
    blocks = [column for column in columns if column >= 0]
    step = 1 if len(blocks) <= 12 else (5 if len(blocks) <= 60 else 10)
    shown = [column for column in blocks if column % step == 0]
    if -1 not in columns:
        return {"tickvals": shown, "ticktext": [str(column) for column in shown]}
    return {"tickvals": [-1, *shown], "ticktext": ["emb.", *(str(column) for column in shown)]}


def plot_measure(activations: Json, measure: Measure, *, null: Json | None = None) -> go.Figure:
    """One measure over the layers, with the span of the null adapters shaded."""
    figure = go.Figure()
    series = list_series(activations)
    for line in series:
        figure.add_traces(_band(line, measure, null))
    for index, line in enumerate(series):
        figure.add_trace(_line(line, activations, measure, index, legend=len(series) > 1))
    return _finish_axes(figure, measure, series).update_layout(
        height=260 + 20 * len(series) * (len(series) > 1), hovermode="x unified"
    )


def measure_grid(activations: Json, measure: Measure) -> Any:
    """A measure as a `[site, position]` grid of an ActivationDiff's JSON."""
    return (
        first_shares(activations) if measure.field == "top_shares" else activations[measure.field]
    )


def _line(line: Series, activations: Json, measure: Measure, index: int, *, legend: bool) -> Any:
    values = line.values(measure_grid(activations, measure))
    return go.Scatter(
        x=line.x,
        y=[finite(value) for value in values],
        mode="lines+markers",
        marker={"size": 5},
        line={
            "width": 2,
            "color": LINES[index % len(LINES)],
            "dash": DASHES[index // len(LINES) % len(DASHES)],
        },
        name=label(line.label, 40),
        customdata=[
            [label(site), show_number(v, measure.digits)]
            for site, v in zip(line.sites, values, strict=True)
        ],
        hovertemplate="%{customdata[0]}: %{customdata[1]}<extra></extra>",
        showlegend=legend,
    )


def _band(line: Series, measure: Measure, null: Json | None) -> list[Any]:
    if null is None:
        return []
    grids = null[measure.null_field]
    values = ([grid[row][line.column] for grid in grids] for row in line.rows)
    spans = [find_span(row) or (None, None) for row in values]
    low, high = zip(*spans, strict=True)
    shared = {"x": line.x, "mode": "lines", "line": {"width": 0}, "showlegend": False}
    show = partial(show_number, digits=measure.digits)
    texts = [f"{len(grids)} random: {show(a)} to {show(b)}" for a, b in spans]
    upper = {"fill": "tonexty", "fillcolor": BAND, "customdata": texts}
    return [
        go.Scatter(y=low, hoverinfo="skip", **shared),
        go.Scatter(y=high, hovertemplate="%{customdata}<extra></extra>", **shared, **upper),
    ]


def _finish_axes(figure: go.Figure, measure: Measure, series: tuple[Series, ...]) -> go.Figure:
    numbered = all(s.sites == tuple(f"{s.stream}.{x}" for x in s.x) for s in series)
    figure.update_xaxes(title="layer" if numbered else "site")
    figure.update_yaxes(rangemode="tozero" if measure.from_zero else "normal")
    return figure


def plot_losses(training: Json) -> go.Figure:
    """Loss of every optimiser step, and what extra terms added to it."""
    losses = [finite(loss) for loss in training["losses"]]
    steps = list(range(1, len(losses) + 1))
    template = "step %{x}: %{y:.3f} nats<extra></extra>"
    line = {"color": LINES[0], "width": 2}
    figure = go.Figure(
        go.Scatter(x=steps, y=losses, mode="lines+markers", line=line, hovertemplate=template)
    )
    extra = [finite(value) for value in training.get("penalty_values", ())]
    if extra:
        figure.data[0].name = "loss"
        dashed = {"color": LINES[1], "width": 2, "dash": "dash"}
        figure.add_scatter(x=steps, y=extra, mode="lines", line=dashed, name="penalties, weighted")
    figure.update_xaxes(title="optimiser step")
    figure.update_yaxes(title="loss, nats a token", rangemode="tozero")
    return figure.update_layout(height=260, showlegend=bool(extra))


def plot_tokens(logits: Json) -> go.Figure:
    """Mean probability of the most-changed next tokens, base to tuned."""
    changes = [*logits["risen_tokens"], *reversed(logits["fallen_tokens"])]
    places = list(range(len(changes)))
    names = [html.escape(show_token(str(change["token"])), quote=False) for change in changes]
    figure = go.Figure()
    for field, symbol in (("base", "circle-open"), ("tuned", "circle")):
        values = [read_number(change[field]) for change in changes]
        marker = {"symbol": symbol, "size": 9}
        figure.add_scatter(x=values, y=places, mode="markers", name=field, marker=marker)
    figure.update_xaxes(title="mean probability", rangemode="tozero")
    figure.update_yaxes(tickvals=places, ticktext=names, autorange="reversed")
    return figure.update_layout(height=90 + 20 * len(changes))


def _plot_model_diff(document: Json) -> go.Figure:
    return _plot_activations(document["activations"])


def _plot_activations(activations: Json) -> go.Figure:
    figure = make_subplots(2, 2, subplot_titles=[measure.title for measure in MEASURES])
    series = list_series(activations)
    for place, measure in enumerate(MEASURES):
        for index, line in enumerate(series):
            trace = _line(line, activations, measure, index, legend=place == 0 and len(series) > 1)
            figure.add_trace(trace, row=place // 2 + 1, col=place % 2 + 1)
    return figure.update_layout(height=620)


def _plot_null(null: Json) -> go.Figure:
    figure = make_subplots(2, 2, subplot_titles=[measure.title for measure in MEASURES])
    for place, measure in enumerate(MEASURES):
        for line in list_series(null):
            for trace in _band(line, measure, null):
                figure.add_trace(trace, row=place // 2 + 1, col=place % 2 + 1)
    return figure.update_layout(height=620)


_FIGURES: dict[str, Callable[[Json], go.Figure]] = {
    "adapter_proof": plot_adapter,
    "activation_diff": _plot_activations,
    "logit_diff": plot_tokens,
    "model_diff": _plot_model_diff,
    "null_band": _plot_null,
    REMOVAL_KIND: plot_shares,
    DIFFERENCE_KIND: plot_difference,
    "phase_transition": plot_path,
    "transition_trace": plot_trace,
    "solution_comparison": plot_solutions,
    "gradient_preference": plot_preference,
    "narrowness": plot_organisms,
    "persona_features": plot_overview,
    "feature_screen": plot_screen,
    "early_warning": plot_warning,
    **dict.fromkeys(EVALUATION_KINDS, plot_evaluation),
    **dict.fromkeys(TRAINING_KINDS, plot_losses),
}


def figure_json(figure: go.Figure) -> dict[str, Any]:
    """The figure as plain JSON values, without a template: the page has its own."""
    document = json.loads(cast(str, figure.to_json()))
    document["layout"].pop("template", None)
    return document
