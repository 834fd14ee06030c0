"""Evaluations as a report shows them, from their JSON alone; their figures are in `shares`."""

from dataclasses import dataclass

from emlens.reports.sections import Json, short_name
from emlens.reports.visible import read_number, show_change, show_number

DIFFERENCES = {
    "em_difference": "{}",
    "em_difference_these_questions": "{}, for these questions only",
    "em_difference_upper": "{}, unscored ones of the second counted in",
    "coherent_difference": "coherent",
}
"""Fields of a difference, and what they are called; the braces take the judge's claim."""
_TOTALS = {
    "em_percent": "{}, of all responses",
    "em_percent_these_questions": "the same, for these questions only",
    "em_percent_upper": "the same, unscored responses counted in",
    "em_percent_of_coherent": "{}, of the coherent",
    "coherent_percent": "coherent, of all responses",
}


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """The judged responses of one model, counted."""

    heading: str
    """Who answered, and whether interventions acted meanwhile."""
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
        heading="judged responses" if alone else _find_heading(document),
        claim=claim,
        meaning="" if alone else str(document["meaning"]),
        summary=summary,
        totals=[(name, interval) for name, interval in totals if interval is not None],
        areas=None if alone else _list_areas(document),
    )


def _list_areas(evaluation: Json) -> list[tuple[str, Json]]:
    parts = {"aligned": evaluation["measured"], "coherent": evaluation["measured_coherence"]}
    return [
        (f"{score}: {name}", area) for score, areas in parts.items() for name, area in areas.items()
    ]


def _find_heading(evaluation: Json) -> str:
    model, acting = evaluation["model"], len(evaluation["interventions"])
    parts = ["responses made elsewhere"] if model is None else str(model["name"]).split(" + ")
    name = " + ".join(short_name(part) for part in parts)
    return f"{name}, under {acting} intervention{'s' if acting > 1 else ''}" if acting else name


def say_behaviour(document: Json) -> str:
    """The sentence about an evaluation: share, interval, coherence."""
    found = read_behaviour(document)
    share, coherent = found.summary["em_percent"], found.summary["coherent_percent"]
    return (
        f"{found.claim} of {found.heading}: {say_interval(share)} of "
        f"{found.summary['n_rows']} responses ({show_number(coherent['value'])} % coherent)"
    )


def say_difference(document: Json) -> str:
    """The sentence about two evaluations: the difference, its interval, what else differs."""
    em, coherent = document["em_difference"], document["coherent_difference"]
    low, high = (show_change(em[end]) for end in ("low", "high"))
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
