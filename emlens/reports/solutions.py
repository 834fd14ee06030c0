"""Two solutions of one task as a report words them from their JSON alone; figures are in `curves`.

`read_solutions` also takes the shares of base, general and narrow organism alone.
"""

from dataclasses import dataclass

from emlens.reports.document import kind_of
from emlens.reports.sections import Json, short_name
from emlens.reports.turns import name_scale
from emlens.reports.visible import read_number, show_change, show_number

SIZE = 0.4
"""Size of the perturbation that the sentence names; the nearest one measured is taken."""
_VERDICTS = {
    "narrow": "nothing is left at any scale",
    "spills over": "more than the base's",
    "undecided": "undecided",
}
SIDES = {"in": "in its domain", "out": "outside of it"}


@dataclass(frozen=True, kw_only=True)
class SolutionReport:
    """What is known of two solutions; parts that were not measured are None."""

    heading: str
    comparison: Json | None
    """A SolutionComparison's fields."""
    preference: Json | None
    """A GradientPreference's fields."""
    behaviour: Json | None
    """A Narrowness's fields."""


def read_solutions(document: Json) -> SolutionReport:
    """Read the JSON of a SolutionComparison or of a Narrowness.

    Raises:
        KeyError: a field is missing.
    """
    if kind_of(document) == "narrowness":
        heading = "general and narrow organism"
        return SolutionReport(heading=heading, comparison=None, preference=None, behaviour=document)
    names = [short_name(str(document[name]["name"])) for name in ("general", "narrow")]
    return SolutionReport(
        heading=f"{names[0]} (general) and {names[1]} (narrow)",
        comparison=document,
        preference=document["preference"],
        behaviour=document["behaviour"],
    )


def say_pair(document: Json) -> str:
    """The sentence about two solutions: cost, stability, effect, then behaviour."""
    found = read_solutions(document)
    parts = [] if found.comparison is None else [say_solutions(found.comparison)]
    parts += [] if found.behaviour is None else [say_narrowness(found.behaviour)]
    return f"{found.heading}: {'; '.join(parts)}"


def say_solutions(comparison: Json) -> str:
    """At how many norms the general solution is cheaper and does more, and what it withstands."""
    general, narrow = comparison["general"], comparison["narrow"]
    cheaper, n = _count_below(general["losses"], narrow["losses"])
    stronger, _ = _count_below(narrow["kl"], general["kl"])
    sizes = [read_number(size) for size in general["epsilons"]]
    place = min(range(len(sizes)), key=lambda i: abs(sizes[i] - SIZE))
    lost = [show_number(100 * _mean(one["loss_increase"][place])) for one in (general, narrow)]
    random = comparison["random"]["kl"]
    above = [_count_above_random(one["kl"], random) for one in (general, narrow)]
    return (
        f"the general solution has the lower loss at {cheaper} of {n} norms; perturbed by "
        f"{sizes[place]:g} it loses {lost[0]} % of its gain, the narrow one {lost[1]} %; it does "
        f"more to general text at {stronger} of {n} norms, more than every random adapter at "
        f"{above[0]} (the narrow one at {above[1]})"
    )


def say_narrowness(behaviour: Json) -> str:
    """What is left outside of the domain, scale by scale, and what stands inside."""
    verdict = str(behaviour["verdict"])
    clauses = [
        f"at {name_scale(one)} {one['equivalence']['verdict']} "
        f"({show_points(one['difference']['em_difference'])})"
        for one in behaviour["differences"]
        if one["where"] == "out"
    ]
    inside = next((d for d in behaviour["differences"] if d["where"] == "in"), None)
    sentence = (
        f"{behaviour['claim']} of the narrow organism outside of its domain, less the base's: "
        f"{_VERDICTS.get(verdict, verdict)}: {', '.join(clauses)}"
    )
    if inside is not None:
        points = show_points(inside["difference"]["em_difference"])
        sentence = f"{sentence}; in its domain, at {name_scale(inside)}: {points}"
    # Results written before the rule said why have no reason.
    reason = behaviour.get("reason") if verdict == "undecided" else None
    return f"{sentence}; undecided because {reason}" if reason else sentence


def show_points(interval: Json) -> str:
    """A difference in percentage points with its limits."""
    value, low, high = (show_change(interval[name]) for name in ("value", "low", "high"))
    return f"{value} points [{low}, {high}]"


def _count_below(first: list[object], second: list[object]) -> tuple[int, int]:
    pairs = [(read_number(a), read_number(b)) for a, b in zip(first, second, strict=True)]
    return sum(a < b for a, b in pairs), len(pairs)


def _count_above_random(values: list[object], random: list[list[object]]) -> int:
    return sum(
        read_number(value) > max(map(read_number, row))
        for value, row in zip(values, random, strict=True)
    )


def _mean(values: list[object]) -> float:
    return sum(map(read_number, values)) / len(values)
