"""Sorts the results of a report into what is shown together; computes nothing and draws nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emlens.reports.document import kind_of, reading
from emlens.reports.visible import finite, read_number

IN_ORDER = ("in effect", "does nothing")
"""Verdicts of a module with which a proof passes."""
COMPARISON_KINDS = ("model_diff", "activation_diff", "logit_diff")
TRAINING_KINDS = ("training_run", "training")
REMOVAL_KIND = "direction_removal"
EVALUATION_KINDS = ("evaluation", "behaviour_summary")
DIFFERENCE_KIND = "behaviour_difference"
TURN_KINDS = ("transition_trace", "phase_transition")
SOLUTION_KINDS = ("solution_comparison", "narrowness")
FEATURE_KINDS = (
    *("persona_features", "feature_diff", "feature_contrast", "model_classification"),
    *("feature_screen", "feature_cards", "sae_health", "plain_difference", "early_warning"),
    *("feature_ranking", "latent_codes"),
)
_HEADER = ("schema", "emlens_version")
_ORIGIN = ("base", "base_fingerprint", "tuned", "tuned_fingerprint", "n_chats", "method")

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One base beside one fine-tune: what was measured, and what chance would do."""

    origin: Json
    """Names, fingerprints and how it was compared; empty for a part measured alone."""
    activations: Json | None
    logits: Json | None
    null: Json | None
    """A NullBand's JSON."""
    chats: str | None
    """What it was compared on, in words, if the writer of the report said so."""

    @property
    def name(self) -> str | None:
        """Name of the fine-tune, if the result knows it."""
        tuned = self.origin.get("tuned")
        return None if tuned is None else short_name(str(tuned))

    @property
    def heading(self) -> str:
        """What tells it from other comparisons of the report."""
        n_chats = self.origin.get("n_chats")
        chats = self.chats or (None if n_chats is None else f"{n_chats} chats")
        return ", ".join(part for part in (self.name, chats) if part)


@dataclass(frozen=True, kw_only=True)
class Sections:
    """A report's results by what they are."""

    proofs: tuple[Json, ...]
    comparisons: tuple[Comparison, ...]
    trainings: tuple[Json, ...]
    removals: tuple[Json, ...]
    """Behaviour with and without a direction, arm by arm."""
    evaluations: tuple[Json, ...]
    """Judged responses of one model each, or their summaries alone."""
    differences: tuple[Json, ...]
    """Two evaluations each, the second less the first."""
    turns: tuple[Json, ...]
    """Paths of weights through a training, with behaviour beside them or alone."""
    solutions: tuple[Json, ...]
    """Two solutions of one task, or their behaviour alone."""
    features: tuple[Json, ...]
    """Searches among latents, or their parts alone."""
    others: tuple[Json, ...]
    """Kinds that have no figure: shown as tables of their plain fields."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line over the sites of one stream, at one choice of positions."""

    stream: str
    position: str
    x: tuple[int, ...]
    """Layers; places in the list where a site has none."""
    sites: tuple[str, ...]
    rows: tuple[int, ...]
    """Indices of the sites."""
    column: int
    """Index of the positions."""

    @property
    def label(self) -> str:
        """Name in a legend."""
        return f"{self.stream}, {self.position}"

    def values(self, grid: Sequence[Sequence[Any]]) -> list[float]:
        """The line's numbers from a `[site, position]` grid."""
        return [read_number(grid[row][self.column]) for row in self.rows]


def short_name(name: str) -> str:
    """A source as people call it: without the folder it lies in, or the package it comes with."""
    if name.startswith(("/", "./", "../", "~")):
        return name.rstrip("/").rpartition("/")[2]
    return name.removeprefix("emlens:")


def sort_results(results: Sequence[Json], chats: Sequence[str] = ()) -> Sections:
    """Results by what they are, comparisons with their null bands.

    Args:
        results: JSON objects of results.
        chats: What each comparison was made on, in their order; shorter if it was not said.

    Raises:
        ReportError: A comparison or null band lacks what it is sorted by.
    """
    comparisons: list[Comparison] = []
    results = leave_out_parts(results)
    with reading("results"):
        bands = [r for r in results if kind_of(r) == "null_band"]
        for index, result in enumerate(results):
            if (found := _compare(result)) is not None:
                activations, logits, origin = found
                null = _find_null(results, index, bands, activations)
                said = chats[len(comparisons)] if len(comparisons) < len(chats) else None
                comparison = Comparison(
                    origin=origin, activations=activations, logits=logits, null=null, chats=said
                )
                comparisons.append(comparison)
    known = {"adapter_proof", "null_band", REMOVAL_KIND, DIFFERENCE_KIND}
    known.update(COMPARISON_KINDS, TRAINING_KINDS, EVALUATION_KINDS, TURN_KINDS, SOLUTION_KINDS)
    known.update(FEATURE_KINDS)
    return Sections(
        proofs=tuple(r for r in results if kind_of(r) == "adapter_proof"),
        comparisons=tuple(comparisons),
        trainings=tuple(r for r in results if kind_of(r) in TRAINING_KINDS),
        removals=tuple(r for r in results if kind_of(r) == REMOVAL_KIND),
        evaluations=tuple(r for r in results if kind_of(r) in EVALUATION_KINDS),
        differences=tuple(r for r in results if kind_of(r) == DIFFERENCE_KIND),
        turns=tuple(r for r in results if kind_of(r) in TURN_KINDS),
        solutions=tuple(r for r in results if kind_of(r) in SOLUTION_KINDS),
        features=tuple(r for r in results if kind_of(r) in FEATURE_KINDS),
        others=tuple(r for r in results if kind_of(r) not in known),
    )


def leave_out_parts(results: Sequence[Json]) -> list[Json]:
    """Results without those that another of them holds: stages of a study beside the whole."""
    wholes = (TURN_KINDS[0], SOLUTION_KINDS[0], FEATURE_KINDS[0])
    whole = [r for r in results if kind_of(r) in wholes]
    held = [part for result in whole for value in result.values() for part in _list_parts(value)]
    return [
        result
        for result in results
        if {k: v for k, v in result.items() if k not in _HEADER} not in held
    ]


def _list_parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _compare(result: Json) -> tuple[Json | None, Json | None, Json] | None:
    kind = kind_of(result)
    if kind == "model_diff":
        origin = {name: result[name] for name in (*_ORIGIN, "shared_layers") if name in result}
        return result["activations"], result["logits"], origin
    if kind == "activation_diff":
        return result, None, {}
    return (None, result, {}) if kind == "logit_diff" else None


def _find_null(
    results: Sequence[Json], index: int, bands: Sequence[Json], activations: Json | None
) -> Json | None:
    """The band that follows a comparison, or the only one of the only one; of the same sites."""
    n_comparisons = sum(kind_of(r) in COMPARISON_KINDS for r in results)
    null = bands[0] if len(bands) == n_comparisons == 1 else None
    for later in results[index + 1 :] if null is None else ():
        if kind_of(later) == "null_band":
            null = later
        if kind_of(later) in (*COMPARISON_KINDS, "null_band"):
            break
    if null is None or activations is None:
        return null
    return null if all(null[name] == activations[name] for name in ("sites", "positions")) else None


def list_series(activations: Json) -> tuple[Series, ...]:
    """One line for every stream and choice of positions, in the order of the sites."""
    streams: dict[str, list[int]] = {}
    for row, site in enumerate(activations["sites"]):
        stream, _, layer = str(site).rpartition(".")
        streams.setdefault(stream if layer.isdecimal() else str(site), []).append(row)
    return tuple(
        _make_series(activations, stream, rows, column)
        for stream, rows in streams.items()
        for column in range(len(activations["positions"]))
    )


def _make_series(activations: Json, stream: str, rows: list[int], column: int) -> Series:
    sites = [str(activations["sites"][row]) for row in rows]
    layers = [site.rpartition(".")[2] for site in sites]
    numbered = all(layer.isdecimal() for layer in layers)
    return Series(
        stream=stream,
        position=str(activations["positions"][column]),
        x=tuple(int(layer) for layer in layers) if numbered else tuple(rows),
        sites=tuple(sites),
        rows=tuple(rows),
        column=column,
    )


def first_shares(activations: Json) -> list[list[Any]]:
    """The top direction's share as a `[site, position]` grid; NaN where none was found."""
    return [[(k[0] if k else "NaN") for k in row] for row in activations["top_shares"]]


def failing_modules(proof: Json) -> list[Json]:
    """Modules of a proof that are not in effect though they should be."""
    return [m for m in proof["modules"] if m["verdict"] not in IN_ORDER]


def find_span(values: Iterable[Any]) -> tuple[float, float] | None:
    """Least and greatest of a JSON list's finite numbers; None where there is none."""
    found = [number for value in values if (number := finite(value)) is not None]
    return (min(found), max(found)) if found else None
