"""Interventions at one site that contradict each other on tokens they may share; refused by name.

Only what no order of acting could satisfy: taking a vector out and adding it again is allowed.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

from torch import Tensor

from emlens.data import Positions
from emlens.interventions.operators import Ablate, Cap, Operator, Replace, as_affine, unit
from emlens.numerics.affine import ConflictingTargetsError
from emlens.sites import Site

Acts = Sequence[tuple[Operator, Positions]]
"""What happens at a site, on which tokens, in the order given."""

PARALLEL = 1e-10
"""How far the cosine of two parallel vectors may be from 1: one vector, rounded to float32."""


class ContradictoryInterventionsError(ValueError):
    """Interventions at one site of which one makes another pointless."""


def check_contradictions(site: Site, acts: Acts) -> None:
    """Refuse interventions of which one makes another pointless, wherever they may share a token.

    Args:
        site: where they meet, for the message.
        acts: all of them, those of contexts around included.

    Raises:
        ContradictoryInterventionsError: a replacement beside anything else; ablations that move
            one vector, or vectors that depend on each other, toward different values; or a cap
            from above that lies below a cap from below along the same vector.
    """
    _check_replacements(site, acts)
    for group in _overlapping({where for _, where in acts}):
        together = [operator for operator, where in acts if where in group]
        named = ", ".join(sorted(map(str, group)))
        _check_targets(site, named, [one for one in together if isinstance(one, Ablate)])
        _check_caps(site, named, [one for one in together if isinstance(one, Cap)])


def _check_replacements(site: Site, acts: Acts) -> None:
    for index, (operator, where) in enumerate(acts):
        if not isinstance(operator, Replace):
            continue
        for other_index, (other, elsewhere) in enumerate(acts):
            if other_index == index or not may_overlap(where, elsewhere):
                continue
            raise ContradictoryInterventionsError(
                f"interventions: {site} is replaced at {where} and also meets "
                f"{type(other).__name__} at {elsewhere}: one of the two would be without effect. "
                "Keep one, or give them positions that share no token"
            )


def _check_targets(site: Site, named: str, ablations: Sequence[Ablate]) -> None:
    if len(ablations) < 2 or all(one.toward is None for one in ablations):
        return
    try:
        as_affine(ablations)
    except ConflictingTargetsError as error:
        raise ContradictoryInterventionsError(
            f"interventions: {len(ablations)} ablations at {site} (positions {named}) move one "
            "vector, or vectors that depend on each other, toward different values: the last would "
            "undo the others. Keep one, give them the same mean, or positions that share no token"
        ) from error


def _check_caps(site: Site, named: str, caps: Sequence[Cap]) -> None:
    limits = [_as_upper_limit(cap) for cap in caps]
    for (one, (u, most)), (other, (w, less)) in combinations(zip(caps, limits, strict=True), 2):
        # u . x <= most and -u . x <= less, which is u . x >= -less.
        if float(u @ w) <= PARALLEL - 1 and most < -less:
            raise ContradictoryInterventionsError(
                f"interventions: at {site} (positions {named}) the caps {one.side} "
                f"{one.threshold:g} and {other.side} {other.threshold:g} along one vector leave no "
                "value between them: the last would undo the other. Let the limit from above be "
                "the greater, or give them positions that share no token"
            )


def _as_upper_limit(cap: Cap) -> tuple[Tensor, float]:
    """Unit vector and threshold with u . x <= threshold: v . x >= t is -v . x <= -t."""
    sign = 1.0 if cap.side == "above" else -1.0
    return sign * unit(cap.vector), sign * cap.threshold


def _overlapping(named: Iterable[Positions]) -> list[frozenset[Positions]]:
    """The largest sets of positions that may all share a token."""
    groups: list[frozenset[Positions]] = []
    for new in named:
        grown = [frozenset({*(p for p in group if may_overlap(p, new)), new}) for group in groups]
        found = list(dict.fromkeys([*groups, *grown, frozenset({new})]))
        groups = [group for group in found if not any(group < other for other in found)]
    return groups


def may_overlap(a: Positions, b: Positions) -> bool:
    """Whether two named positions can share a token, as far as their names tell."""
    prompt, response = {"prompt", "last_prompt"}, {"response", "response+eot"}
    if (a.span in prompt and b.span in response) or (a.span in response and b.span in prompt):
        return False
    same = a.span == b.span or {a.span, b.span} == response
    edges = [edge for p in (a, b) for edge in (p.start, p.stop) if edge is not None]
    if not same or any(edge < 0 for edge in edges):
        return True
    first, second = sorted((a, b), key=lambda p: p.start or 0)
    return first.stop is None or first.stop > (second.start or 0)
