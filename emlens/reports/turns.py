"""A turn, and behaviour along a training, as a report words them from their JSON alone.

Figures are in `paths`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from emlens.reports.document import kind_of
from emlens.reports.sections import Json, short_name
from emlens.reports.visible import read_number, show_change, show_number

UNITS = MappingProxyType({"odds": "nats a token", "share": "per cent of responses"})
_NO_TURN = {
    "none": "did not turn: its sharpest bend has a prominence of {prominence}, and paths of noise "
    "reach {critical}",
    "nothing measured": "nothing measured: within a window the path nowhere moves more than the "
    "threshold; a larger --window or a smaller --threshold keeps more points",
    "too few checkpoints": "too few checkpoints to tell a turn from noise (100 are needed)",
}
"""Verdicts without a turn, in words."""


@dataclass(frozen=True, kw_only=True)
class TurnReport:
    """A trace, or one path of weights alone, in the shape that figures and tables take."""

    heading: str
    paths: list[Json]
    """PhaseTransitions' fields."""
    training: Json | None
    """TrainingCurves' fields; None where a path stands alone."""
    likeness: list[Json]
    """LastScores' fields."""
    curves: list[Json]
    """BehaviourCurves' fields."""
    points: list[Json]
    """BehaviourPoints' fields."""
    claim: str
    """What the share may be called."""
    meaning: str
    """A sentence on what it is; empty where nothing was sampled."""


def read_turn(document: Json) -> TurnReport:
    """Read the JSON of a TransitionTrace or of a PhaseTransition.

    Raises:
        KeyError: a field is missing.
    """
    if kind_of(document) == "phase_transition":
        document = {"source": document["source"], "transitions": [document]}
    return TurnReport(
        heading=short_name(str(document["source"])),
        paths=list(document["transitions"]),
        training=document.get("training"),
        likeness=list(document.get("likeness", ())),
        curves=list(document.get("curves", ())),
        points=list(document.get("points", ())),
        claim=str(document.get("claim") or "share"),
        meaning=str(document.get("meaning") or ""),
    )


_CENTRED = {
    "none": "",
    "adapters": ", centred over adapters",
    "steps": ", centred over steps",
}


def name_likeness(one: Json) -> str:
    """Which score it is, and what was taken off first."""
    return f"{one['score']}{_CENTRED.get(str(one['centring']), '')}"


def name_path(path: Json) -> str:
    """Whose path it is, and how it was looked at."""
    return f"{path['factor']}{', norms taken out' if path['normalised'] else ''}"


def say_turn(path: Json) -> str:
    """The clause about one path: the step of its turn, or why there is none."""
    prominence, critical = (show_number(path[name]) for name in ("prominence", "critical"))
    name, window = name_path(path), f"window {path['window']}"
    if path["step"] is not None:
        return (
            f"{name} turned at step {path['step']} ({window}): prominence {prominence}, and 95 % "
            f"of null paths stay below {critical}"
        )
    verdict = str(path["verdict"])
    words = _NO_TURN.get(verdict)
    said = verdict if words is None else words.format(prominence=prominence, critical=critical)
    return f"{name} ({window}): {said}"


def say_looks(paths: Sequence[Json]) -> str:
    """The clause about the first look at a path, and those about looks that say otherwise."""
    first, *others = paths
    turned = first["step"] is not None
    against = [say_turn(one) for one in others if (one["step"] is not None) != turned]
    return "; but ".join([say_turn(first), *against])


def name_scale(holder: Json) -> str:
    """By what an adapter was multiplied."""
    return f"{read_number(holder['scale']):g} ×"


def say_curve(curve: Json) -> str:
    """When one measure of behaviour is half-way, and how long after the turn."""
    scale = f"at {name_scale(curve)}"
    if curve["onset"] is None:
        return f"{scale} no change ({_say(curve['change'], signed=True)})"
    half_way = f"{scale} half-way at step {_say(curve['onset'])}{_say_spacing(curve)}"
    lag = curve["lag"]
    return half_way if lag is None else f"{half_way}, {_say(lag, signed=True)} steps from the turn"


def say_trace(document: Json) -> str:
    """The sentence about a trace: the turn, then behaviour by scale."""
    found = read_turn(document)
    sentence = f"{found.heading}: {say_looks(found.paths)}"
    measures = {str(curve["measure"]) for curve in found.curves}
    shown = "share" if "share" in measures else "odds"
    clauses = [say_curve(c) for c in found.curves if c["measure"] == shown]
    if not clauses:
        return sentence
    return f"{sentence}; {found.claim if shown == 'share' else shown}: {', '.join(clauses)}"


def _say_spacing(curve: Json) -> str:
    """Between which points a step lies that is told more exactly than they lie apart."""
    onset, steps = curve["onset"], [int(step) for step in curve["steps"]]
    value, low, high = (read_number(onset[name]) for name in ("value", "low", "high"))
    before = max((step for step in steps if step <= value), default=None)
    after = min((step for step in steps if step > value), default=None)
    if before is None or after is None or after - before <= high - low:
        return ""
    return f" (drawn in between the points at {before} and {after})"


def _say(interval: Mapping[str, object], *, signed: bool = False) -> str:
    show = show_change if signed else show_number
    value, low, high = (show(read_number(interval[name])) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
