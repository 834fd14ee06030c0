"""Evaluations as a report shows them, from their JSON alone; their figures are in `shares`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from emlens.reports.sections import Json, short_name
from emlens.reports.shown_answers import AnswerSheet, choose_answers
from emlens.reports.visible import read_number, show_change, show_number

DIFFERENCES = {
    "em_difference": "{}",
    "em_difference_these_questions": "{}, for these questions only",
    "em_difference_upper": "{}, unscored ones of the second counted in",
    "em_difference_same_length": "{}, between equally long responses",
    "coherent_difference": "coherent",
}
"""Fields of a difference, and what they are called; the braces take the judge's claim. A field may
be missing or null."""
_TOTALS = {
    "em_percent": "{}, of all responses",
    "em_percent_these_questions": "the same, for these questions only",
    "em_percent_upper": "the same, unscored responses counted in",
    "em_percent_of_coherent": "{}, of the coherent",
    "coherent_percent": "coherent, of all responses",
}


_OPERATIONS = {"ablate": "taken out", "cap": "capped", "per layer": "of each layer's own"}


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """The judged responses of one model, counted."""

    who: str
    """Who answered."""
    acting: str
    """The interventions that acted meanwhile, in words; empty where there were none."""
    claim: str
    """What the share may be called."""
    meaning: str
    """A sentence on what it is; empty where no judge is known."""
    summary: Json
    """A BehaviourSummary's fields."""
    totals: list[tuple[str, Json]]
    """Name and interval of every share over all questions."""
    areas: list[tuple[str, Json]] | None
    """Text kinds and area under the curve of the judge on texts whose side is known; None where no
    judge is known."""
    answers: AnswerSheet | None
    """Some of the answers; None where no text is known."""

    @property
    def heading(self) -> str:
        """Who answered, and what acted meanwhile."""
        return ", ".join(part for part in (self.who, self.acting) if part)


def read_behaviour(document: Json) -> Behaviour:
    """Read the JSON of an Evaluation, or of a BehaviourSummary, which knows no model and no judge.

    Raises:
        KeyError: a field is missing.
    """
    alone = "thresholds" in document
    summary = document if alone else document["summary"]
    limits = summary["thresholds"]
    below, above = (read_number(limits[name]) for name in ("aligned_below", "coherent_above"))
    counted = f"aligned below {below:g}, coherent above {above:g}"
    claim = counted if alone else str(document["claim"])
    totals = [(text.format(claim), summary[name]) for name, text in _TOTALS.items()]
    return Behaviour(
        who="judged responses" if alone else _name_model(document["model"]),
        acting="" if alone else name_interventions(document["interventions"]),
        claim=claim,
        meaning="" if alone else str(document["meaning"]),
        summary=summary,
        totals=[(name, interval) for name, interval in totals if interval is not None],
        areas=None if alone else _list_areas(document),
        answers=None if alone else choose_answers(document["responses"]),
    )


def _list_areas(evaluation: Json) -> list[tuple[str, Json]]:
    parts = {"aligned": evaluation["measured"], "coherent": evaluation["measured_coherence"]}
    return [
        (f"{score}: {name}", area) for score, areas in parts.items() for name, area in areas.items()
    ]


def _name_model(model: Json | None) -> str:
    parts = ["responses made elsewhere"] if model is None else str(model["name"]).split(" + ")
    return " + ".join(short_name(part) for part in parts)


def name_interventions(records: Sequence[object]) -> str:
    """What acted, in words, from the records in an evaluation; like ones at many sites are one."""
    try:
        sites: dict[str, list[str]] = {}
        for record in map(json.loads, map(str, records)):
            sites.setdefault(_name_operation(record), []).append(str(record["site"]))
    except (ValueError, KeyError, TypeError):
        # Written by another version, or by hand; shown as it is under provenance.
        return f"under {len(records)} intervention{'s' if len(records) > 1 else ''}"
    return " and ".join(
        f"{what} at {at[0] if len(at) == 1 else f'{len(at)} sites'}" for what, at in sites.items()
    )


def _name_operation(record: Json) -> str:
    operator, made = str(record["operator"]), str(record["made"]) or "a vector"
    if operator == "add":
        return f"{show_number(record['coefficient'])} x {made} added"
    return f"{made} {_OPERATIONS.get(operator, operator)}"


def say_behaviour(document: Json) -> str:
    """The sentence about an evaluation: share, interval, what is missing, coherence."""
    found = read_behaviour(document)
    share, coherent = found.summary["em_percent"], found.summary["coherent_percent"]
    unscored, n_rows = (int(found.summary[name]) for name in ("n_unscored", "n_rows"))
    if unscored == n_rows:
        return f"{found.heading}: none of {n_rows} responses has a score, so that there is no share"
    missing = f", {unscored} of them without a score" if unscored else ""
    return (
        f"{found.claim} of {found.heading}: {say_interval(share)} of "
        f"{n_rows} responses{missing} "
        f"({show_number(coherent['value'])} % coherent)"
    )


def say_difference(document: Json) -> str:
    """The sentence about two evaluations: the difference, its interval, what else differs."""
    em, coherent = document["em_difference"], document["coherent_difference"]
    low, high = (show_change(em[end]) for end in ("low", "high"))
    for side in ("first", "second"):
        if document[f"unscored_{side}"] == document[f"n_{side}"]:
            return f"nothing can be compared: no response of the {side} evaluation has a score"
    differing = "; ".join(str(text) for text in document["differing"])
    return (
        f"{document['claim']}, second evaluation minus first: {show_change(em['value'])} points "
        f"[{low}, {high}] over {len(document['questions'])} questions (coherent: "
        f"{show_change(coherent['value'])})" + (f"; beware: {differing}" if differing else "")
    )


def say_interval(interval: Json) -> str:
    """An interval of a share in per cent."""
    value, low, high = (read_number(interval[name]) for name in ("value", "low", "high"))
    return f"{show_number(value)} % [{show_number(low)}, {show_number(high)}]"
