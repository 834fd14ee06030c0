"""What the template of a report is filled with: sections, figures and tables, ready to be laid out.

Texts are as they stand in the JSON here; the template engine makes them visible and escapes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emlens.reports.behaviour import Behaviour, read_behaviour, say_behaviour, say_difference
from emlens.reports.blocks import (
    AdapterBlock,
    LayersBlock,
    OutputBlock,
    Plot,
    Plots,
    make_adapter_block,
    make_layers_block,
    make_output_block,
)
from emlens.reports.curves import list_curves
from emlens.reports.document import reading
from emlens.reports.feature_blocks import FeatureBlock, make_feature_blocks
from emlens.reports.features import name_search
from emlens.reports.paths import TitledFigure, list_figures, plot_behaviour
from emlens.reports.plots import plot_losses
from emlens.reports.sections import Json, Sections, short_name, sort_results
from emlens.reports.shares import (
    name_organism,
    plot_difference,
    plot_evaluation,
    plot_shares,
    plot_together,
)
from emlens.reports.solutions import SolutionReport, read_solutions, say_pair
from emlens.reports.turns import UNITS, TurnReport, name_path, read_turn, say_trace
from emlens.reports.verdict import write_verdicts
from emlens.reports.visible import read_number

_SCALARS = (str, bool, int, float, type(None))
_SHOWN_IN_SECTIONS = ("answers", "chats", "title")


@dataclass(frozen=True, kw_only=True)
class TurnBlock:
    """A path of weights: figures of it, then of behaviour beside it, then numbers."""

    turn: TurnReport
    plots: list[tuple[TitledFigure, Plot]]
    behaviour: list[tuple[str, str, Plot]]
    """What is measured, its unit, and the figure."""
    paths: list[tuple[str, Json]]
    """Each path by its name."""


@dataclass(frozen=True, kw_only=True)
class SolutionBlock:
    """Two solutions of one task: figures and numbers."""

    solutions: SolutionReport
    plots: list[tuple[TitledFigure, Plot]]
    shares: list[tuple[str, Json]]
    """Each share by who answered what."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that a report shows, in its order."""

    title: str
    report: Json
    sections: Sections
    verdicts: list[str]
    adapters: list[AdapterBlock]
    layers: list[LayersBlock]
    outputs: list[OutputBlock]
    answer_names: list[str]
    answers: list[Json]
    trainings: list[tuple[Json, Plot]]
    removals: list[tuple[Json, Plot]]
    together: list[tuple[str, Plot]]
    """A claim, and all models that it is made of, where there are several."""
    evaluations: list[tuple[Behaviour, Plot]]
    differences: list[tuple[Json, Plot]]
    turns: list[TurnBlock]
    solutions: list[SolutionBlock]
    features: list[FeatureBlock]
    seconds: dict[str, float]
    facts: list[tuple[str, Any]]
    others: list[tuple[str, list[tuple[str, Any]]]]


def build_page(report: Json) -> Page:
    """Arrange a report's JSON.

    Raises:
        ReportError: A part is not as emlens writes it; the message names the part.
    """
    extra = report.get("extra", {})
    with reading("extra"):
        chats = [str(text) for text in check_list(extra.get("chats", []), "chats")]
    sections = sort_results(report["results"], chats)
    counter = Plots()
    with reading("adapter_proof"):
        adapters = [make_adapter_block(proof, counter) for proof in sections.proofs]
    with reading("activations"):
        compared = sections.comparisons
        layers = [make_layers_block(c, counter) for c in compared if c.activations is not None]
    with reading("logits"):
        outputs = [make_output_block(c) for c in sections.comparisons if c.logits is not None]
    with reading("training"):
        trainings = [(t, counter.add(plot_losses(t), _say_losses(t))) for t in sections.trainings]
    with reading("direction_removal"):
        removals = [(r, counter.add(plot_shares(r), _say_shares(r))) for r in sections.removals]
    with reading("evaluation"):
        together = _draw_together(sections.evaluations, counter)
        evaluations = [
            (read_behaviour(e), counter.add(plot_evaluation(e), say_behaviour(e)))
            for e in sections.evaluations
        ]
    with reading("behaviour_difference"):
        differences = [
            (d, counter.add(plot_difference(d), say_difference(d))) for d in sections.differences
        ]
    with reading("transition"):
        turns = [_turn_block(document, counter) for document in sections.turns]
    with reading("narrow"):
        solutions = [_solution_block(document, counter) for document in sections.solutions]
    with reading("features"):
        features = make_feature_blocks(sections.features, counter)
    with reading("extra"):
        answers = [check_answer(row) for row in check_list(extra.get("answers", []), "answers")]
        facts = [
            row
            for name in extra
            if name not in _SHOWN_IN_SECTIONS
            for row in _flatten(name, extra[name])
        ]
    with reading("seconds"):
        seconds = {str(k): read_number(v) for k, v in report.get("seconds", {}).items()}
    return Page(
        title=str(extra.get("title") or _find_title(sections)),
        report=report,
        sections=sections,
        verdicts=write_verdicts(sections),
        adapters=adapters,
        layers=layers,
        outputs=outputs,
        answer_names=list(dict.fromkeys(name for row in answers for name in row["answers"])),
        answers=answers,
        trainings=trainings,
        removals=removals,
        together=together,
        evaluations=evaluations,
        differences=differences,
        turns=turns,
        solutions=solutions,
        features=features,
        seconds=seconds,
        facts=facts,
        others=[(str(r.get("schema")), _plain_fields(r)) for r in sections.others],
    )


def check_list(value: Any, name: str) -> list[Any]:
    """A part of `extra` that must be a list, if it is one."""
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected a list")
    return value


def check_answer(row: Any) -> Json:
    """One question with its answers, if it is so."""
    if not isinstance(row["question"], str):
        raise TypeError("answers: question is not a text")
    if not all(isinstance(text, str) for text in row["answers"].values()):
        raise TypeError("answers: expected an object of model name -> text")
    return row


def _turn_block(document: Json, plots: Plots) -> TurnBlock:
    found, says = read_turn(document), say_trace(document)
    measures = list(dict.fromkeys(str(curve["measure"]) for curve in found.curves))
    return TurnBlock(
        turn=found,
        plots=[(one, plots.add(one.figure, f"{one.title}: {says}")) for one in list_figures(found)],
        behaviour=[
            (
                found.claim if measure == "share" else "Odds of fixed texts",
                UNITS.get(measure, measure),
                plots.add(plot_behaviour(found, measure), says),
            )
            for measure in measures
        ],
        paths=[(name_path(path), path) for path in found.paths],
    )


def _solution_block(document: Json, plots: Plots) -> SolutionBlock:
    found, says = read_solutions(document), say_pair(document)
    shares = [] if found.behaviour is None else found.behaviour["shares"]
    return SolutionBlock(
        solutions=found,
        plots=[(one, plots.add(one.figure, f"{one.title}: {says}")) for one in list_curves(found)],
        shares=[(name_organism(share), share) for share in shares],
    )


def _draw_together(evaluations: Sequence[Json], plots: Plots) -> list[tuple[str, Plot]]:
    by_judge: dict[tuple[str, str], list[Behaviour]] = {}
    for document, found in zip(evaluations, map(read_behaviour, evaluations), strict=True):
        # Summaries alone know no judge, and are taken to have one.
        by_judge.setdefault((found.claim, str(document.get("judge", ""))), []).append(found)
    return [
        (claim, plots.add(plot_together(found), f"{claim} of {len(found)} evaluations"))
        for (claim, _), found in by_judge.items()
        if len(found) > 1
    ]


def _say_losses(training: Json) -> str:
    return f"Training loss over {len(training['losses'])} steps"


def _say_shares(removal: Json) -> str:
    return f"{removal['claim']} and coherence of {len(removal['arms'])} arms"


def _find_title(sections: Sections) -> str:
    names = [c.name for c in sections.comparisons]
    names += [short_name(str(proof["adapter"])) for proof in sections.proofs]
    names += [read_behaviour(e).who for e in sections.evaluations]
    names += [read_turn(turn).heading for turn in sections.turns]
    names += [read_solutions(pair).heading for pair in sections.solutions]
    names += [name_search(found) for found in sections.features]
    known = list(dict.fromkeys(name for name in names if name is not None))
    return ", ".join(known) or "emlens report"


def _flatten(name: str, value: Any) -> list[tuple[str, Any]]:
    """Rows of a settings table: objects by dotted names, lists in one line."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flatten(f"{name}.{key}", item)]
    if isinstance(value, list):
        return [(name, ", ".join(str(item) for item in value))]
    return [(name, value)]


def _plain_fields(result: Json) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in result.items() if isinstance(v, _SCALARS) and k != "schema"]
