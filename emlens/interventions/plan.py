"""From interventions to what happens at each hook point of one model, where they can act in it.

What they may not do together is in `contradictions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from emlens.data import Positions
from emlens.interventions.contradictions import check_contradictions
from emlens.interventions.intervention import WRITES, Intervention
from emlens.interventions.operators import Ablate, Add, Affine, Operator, PerLayer, as_affine
from emlens.interventions.other_model import check_model
from emlens.models.protocol import HookedModel
from emlens.numerics.affine import LowRankAffine
from emlens.numerics.validation import WidthError
from emlens.sites import Site, SiteError, check_sites, expand_sites

Fused = dict[tuple[int, ...], LowRankAffine]
"""Identities of operators that meet at a site -> the one map they make."""


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
        SiteError: a site the model does not have, that has no vector for each token, or whose axes
            are not those of the site that the vector was made at.
        WidthError: a vector of another width than its site.
        OtherModelError: a vector made from another model, fine-tune, tokenizer or processing.
        ContradictoryInterventionsError: see `check_contradictions`.
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
            _check_fit(model, site, operator)
            _check_axes(intervention, site)
            plans.setdefault(site, SitePlan(site)).acts.append((operator, intervention.where))
    for plan in plans.values():
        check_contradictions(plan.site, plan.acts)
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


def _check_fit(model: HookedModel, site: Site, operator: Operator) -> None:
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


def _check_axes(intervention: Intervention, site: Site) -> None:
    """Widths may agree by chance: as many values over heads as there are in the residual stream."""
    made = intervention.made_for
    if made is not None and made.axes and made.axes != site.axes:
        raise SiteError(
            f"interventions: the {intervention.label} vector was made at a site with axes "
            f"{made.axes}, and {site} has {site.axes}: their entries mean different things. Name a "
            "site with the axes of its own, or fit a direction there"
        )
