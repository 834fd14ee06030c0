"""Parts of a page that compare a base with its fine-tune: an adapter, layers, predictions.

`page` puts them into their order; other sections have files of their own.
"""

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from emlens.reports.plots import (
    MEASURES,
    Measure,
    figure_json,
    measure_grid,
    plot_adapter,
    plot_measure,
)
from emlens.reports.sections import (
    Comparison,
    Json,
    failing_modules,
    find_span,
    list_series,
    short_name,
)
from emlens.reports.tokens import TokenViews, view_tokens

NULL_MEANS = ("kl_base_tuned", "kl_tuned_base", "entropy_change", "agreement")
"""What a NullBand holds of predictions."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure, its place in the page and what it says to those who cannot see it."""

    id: str
    figure: Json
    height: int
    label: str


@dataclass(frozen=True, kw_only=True)
class AdapterBlock:
    """A proof: its strip, and the modules that are not in effect."""

    name: str
    proof: Json
    failing: list[Json]
    plot: Plot


@dataclass(frozen=True, kw_only=True)
class LayersBlock:
    """How activations differ: a figure a measure, and the numbers."""

    heading: str
    plots: list[tuple[Measure, Plot]]
    rows: list[list[Any]]
    n_nulls: int
    null_seed: int | None


@dataclass(frozen=True, kw_only=True)
class OutputBlock:
    """How predictions differ: means, tokens, chats, and examples token by token."""

    heading: str
    logits: Json
    spans: dict[str, tuple[float, float] | None]
    """Least and greatest of the null adapters, by the names of their means."""
    n_nulls: int
    tokens: TokenViews


class Plots:
    """Numbers the figures of a page, so that no id comes from a result."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, figure: go.Figure, label: str) -> Plot:
        """A figure with the next number, and a label for those who cannot see it."""
        document = figure_json(figure)
        height = int(document["layout"]["height"])
        return Plot(id=f"plot-{self.number()}", figure=document, height=height, label=label)

    def number(self) -> int:
        """The next number of the page."""
        self._count += 1
        return self._count


def make_adapter_block(proof: Json, plots: Plots) -> AdapterBlock:
    """The strip of a proof, and what is not in effect."""
    failing = failing_modules(proof)
    total = len(proof["modules"])
    says = f"Relative update size by module and layer; {len(failing)} of {total} not in effect"
    plot = plots.add(plot_adapter(proof), says)
    return AdapterBlock(
        name=short_name(str(proof["adapter"])), proof=proof, failing=failing, plot=plot
    )


def make_layers_block(comparison: Comparison, plots: Plots) -> LayersBlock:
    """Figures and numbers of activations, with the span of the null adapters."""
    activations, null = comparison.activations or {}, comparison.null
    figures = []
    for measure in MEASURES:
        figure = plot_measure(activations, measure, null=null)
        figures.append((measure, plots.add(figure, f"{measure.title} by layer: {measure.meaning}")))
    return LayersBlock(
        heading=comparison.heading,
        plots=figures,
        rows=_layer_rows(activations, null),
        n_nulls=0 if null is None else len(null["relative_rms"]),
        null_seed=None if null is None else null["seed"],
    )


def _layer_rows(activations: Json, null: Json | None) -> list[list[Any]]:
    """Site, positions, and for each measure its number and the span of the null adapters."""
    parts = [
        (m, measure_grid(activations, m), null[m.null_field] if null else ()) for m in MEASURES
    ]

    def list_cells(row: int, column: int) -> list[tuple[Measure, Any, Any]]:
        return [
            (m, grid[row][column], find_span(n[row][column] for n in nulls))
            for m, grid, nulls in parts
        ]

    return [
        [site, series.position, list_cells(row, series.column)]
        for series in list_series(activations)
        for site, row in zip(series.sites, series.rows, strict=True)
    ]


def make_output_block(comparison: Comparison) -> OutputBlock:
    """Means over predictions, with the span of the null adapters, and examples."""
    logits, null = comparison.logits or {}, comparison.null
    spans = {name: find_span(null[name]) if null else None for name in NULL_MEANS}
    return OutputBlock(
        heading=comparison.heading,
        logits=logits,
        spans=spans,
        n_nulls=0 if null is None else len(null["kl_base_tuned"]),
        tokens=view_tokens(logits),
    )
