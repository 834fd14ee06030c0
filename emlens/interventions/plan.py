"""From interventions to what happens at each hook point of one model; refuses what contradicts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from emlens.data import Positions
from emlens.interventions.intervention import WRITES, Intervention
from emlens.interventions.operators import (
    Ablate,
    Add,
    Affine,
    Operator,
    PerLayer,
    Replace,
    as_affine,
)
from emlens.models.protocol import HookedModel
from emlens.models.views import origin_of
from emlens.numerics.affine import LowRankAffine
from emlens.numerics.validation import WidthError
from emlens.sites import Site, SiteError, check_sites, expand_sites

Fused = dict[tuple[int, ...], LowRankAffine]
"""Identities of operators that meet at a site -> the one map they make."""


class ContradictoryInterventionsError(ValueError):
    """Interventions at one site of which one makes another pointless."""


class OtherModelError(ValueError):
    """An intervention was made from another model than the one it is to act on."""


@dataclass(frozen=True)
class Step:
    """What is done at one site to the same tokens: one fused map, or one operator."""

    does: LowRankAffine | Operator
    positions: Positions


@dataclass
class SitePlan:
    """Everything that happens at one site, in the order given."""

    site: Site
    acts: list[tuple[Operator, Positions]] = field(default_factory=list)

    def steps(self, fused: Fused) -> tuple[Step, ...]:
        """Neighbouring affine operators on the same tokens, fused; the others one by one.

        Args:
            fused: maps made for other sites of the same model, to be used again and added to.
        """
        steps: list[Step] = []
        for (affine, where), group in groupby(self.acts, _kind):
            operators = [operator for operator, _ in group]
            if affine:
                together: list[Affine] = [o for o in operators if isinstance(o, Add | Ablate)]
                key = tuple(map(id, together))
                if key not in fused:
                    fused[key] = as_affine(together)
                steps.append(Step(fused[key], where))
            else:
                steps += [Step(operator, where) for operator in operators]
        return tuple(steps)


def _kind(act: tuple[Operator, Positions]) -> tuple[bool, Positions]:
    return isinstance(act[0], Add | Ablate), act[1]


def plan_interventions(
    model: HookedModel, interventions: Sequence[Intervention]
) -> dict[Site, SitePlan]:
    """Resolve where each intervention acts in a model, and check that it can.

    Args:
        model: a model loaded by emlens.
        interventions: in the order in which they act where they meet.

    Raises:
        SiteError: a site the model does not have, or that has no vector for each token.
        WidthError: a vector of another width than its site.
        OtherModelError: a vector made from another model.
        ContradictoryInterventionsError: a replacement beside anything else on the same tokens.
    """
    plans: dict[Site, SitePlan] = {}
    for intervention in interventions:
        check_model(model, intervention)
        sites = expand_places(model, intervention.site)
        check_sites(sites, model.hook_dict)
        for site in sites:
            operator = intervention.operator
            if isinstance(operator, PerLayer):
                operator = operator.at(site)
            _check_width(model, site, operator)
            plans.setdefault(site, SitePlan(site)).acts.append((operator, intervention.where))
    for plan in plans.values():
        check_contradictions(plan)
    return plans


def expand_places(model: HookedModel, where: Site | str) -> tuple[Site, ...]:
    """Return the sites that `writes`, a stream or a site stands for in a model."""
    if where == WRITES:
        return write_sites(model)
    return expand_sites(where, model.cfg)


def write_sites(model: HookedModel) -> tuple[Site, ...]:
    """Return every site whose value is added to the residual stream, in the model's order.

    With these ablated no residual stream has a component along the direction: the residual
    streams are their sums.
    """
    outside = [Site(None, "embed")]
    if model.cfg.positional_embedding_type == "standard":
        outside.append(Site(None, "pos_embed"))
    blocks = [
        Site(layer, stream)
        for layer in range(model.cfg.n_layers)
        for stream in ("attn_out", "mlp_out")
    ]
    return (*outside, *blocks)


def check_model(model: Any, intervention: Intervention) -> None:
    """Require that an intervention was made for a model's weights, or for any.

    Raises:
        OtherModelError: it was made for others.
    """
    origin = origin_of(model)
    # What was made on a model may act on what was merged or folded from it, as on what is attached.
    if intervention.made_for and not set(origin.lineage) & set(intervention.made_for):
        made = ", ".join(known or "no model that is on record" for known in intervention.made_for)
        raise OtherModelError(
            f"interventions: the {intervention.label} vector at {intervention.site} was made from "
            f"{made}, and {origin.name} is {origin.fingerprint}. Pass allow_other_model=True "
            "where transfer is what you want to see"
        )


def check_contradictions(plan: SitePlan) -> None:
    """Refuse a replacement that shares tokens with anything else at its site.

    Raises:
        ContradictoryInterventionsError: which, and where.
    """
    for index, (operator, where) in enumerate(plan.acts):
        if not isinstance(operator, Replace):
            continue
        for other_index, (other, elsewhere) in enumerate(plan.acts):
            if other_index == index or not may_overlap(where, elsewhere):
                continue
            raise ContradictoryInterventionsError(
                f"interventions: {plan.site} is replaced at {where} and also meets "
                f"{type(other).__name__} at {elsewhere}: one of the two would be without effect. "
                "Keep one, or give them positions that share no token"
            )


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


def _check_width(model: HookedModel, site: Site, operator: Operator) -> None:
    if not site.is_positional:
        raise SiteError(
            f"interventions: {site} has axes {site.axes}; expected a site with one vector (or one "
            "for each head) a token, such as resid_post"
        )
    width = site.width(model.cfg)
    if operator.width != width:
        raise WidthError(
            f"interventions: {type(operator).__name__} at {site} has vectors of width "
            f"{operator.width}, and the site has {width}: they come from another model or site"
        )
