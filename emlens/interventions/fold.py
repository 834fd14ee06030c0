"""Interventions made part of a model's weights, where that is exact; all others are refused.

Cap, Shift and Replace, named positions, and ablations between writes have no such form: use
`intervene`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from emlens.interventions.active import describe_interventions
from emlens.interventions.intervention import EVERYWHERE, Intervention
from emlens.interventions.plan import Fused, SitePlan, plan_interventions
from emlens.models.attach import attached_adapter
from emlens.models.changes import name_changes
from emlens.models.layout import from_matrix, to_matrix
from emlens.models.lora import architecture_of, read_parameter
from emlens.models.merge import merge_adapter
from emlens.models.protocol import HookedModel
from emlens.models.views import origin_of, share_model
from emlens.numerics.affine import LowRankAffine, compose
from emlens.sites import Site

AnyModel = TypeVar("AnyModel", bound=HookedModel)

_TABLES = {"embed": "embed.W_E", "pos_embed": "pos_embed.W_pos"}
_LINEAR = {"attn_out": ("attn.W_O", "attn.b_O"), "mlp_out": ("mlp.W_out", "mlp.b_out")}


class FoldError(ValueError):
    """An intervention has no exact form as weights."""


def fold_into_weights(model: AnyModel, interventions: Sequence[Intervention]) -> AnyModel:
    """Return a new model whose weights do what the interventions would do by hooks.

    A map y -> M y + c of what a matrix writes becomes M W and M b + c. So ablations and additions
    fold at `embed`, `pos_embed`, `attn_out` and `mlp_out`; an addition to a residual stream folds
    into the bias of what was written to it last. An attached adapter is merged first. What is
    touched is copied, everything else shared; a tied unembedding keeps the embedding's old values.

    Args:
        model: a model loaded by emlens; it stays as it was.
        interventions: affine, on all tokens.

    Raises:
        FoldError: an intervention that is not exact as weights, and why; a model with norms after
            its writes (Gemma); interventions or hooks of unknown effect that act on the model at
            the moment.
        ValueError: whatever `intervene` would refuse.
    """
    if changes := name_changes(model):
        raise FoldError(
            f"model: {changes}. Folding would not see what they do; what is to become weights is "
            "passed as interventions="
        )
    host: Any = model
    if interventions and (architecture := architecture_of(host)).post_norms:
        raise FoldError(
            f"model: {architecture.name} norms what its attention and MLPs write before it joins "
            "the residual stream, so that no change of weights has the same effect; use intervene"
        )
    maps = _collect_maps(plan_interventions(model, interventions))
    name = origin_of(host).name
    adapter = attached_adapter(host)
    if adapter is not None:
        # `share_model` leaves the adapter's hooks behind: what is merged into is the base.
        host = merge_adapter(share_model(host), adapter)
    replaced: dict[str, Tensor] = {}
    for site, map_ in maps.items():
        replaced |= _fold_site(host, site, map_)
    folded: Any = share_model(host, replaced, name=f"{name} + {_short_name(interventions)}")
    return folded


def _collect_maps(plans: Mapping[Site, SitePlan]) -> dict[Site, LowRankAffine]:
    """The map of each write, what is added to the residual stream right after it included."""
    own, after = {}, []
    fused: Fused = {}
    for site, plan in plans.items():
        map_ = _map_of(plan, fused)
        if site.stream in _TABLES or site.stream in _LINEAR:
            own[site] = map_
        else:
            after.append((_last_write(site, map_), map_))
    for write, map_ in after:
        own[write] = own[write].then(map_) if write in own else map_
    return own


def _map_of(plan: SitePlan, fused: Fused) -> LowRankAffine:
    maps = []
    for step in plan.steps(fused):
        if not isinstance(step.does, LowRankAffine):
            kind = type(step.does).__name__
            raise FoldError(
                f"interventions: {kind} at {plan.site} is not an affine map, and weights are "
                "nothing else; use intervene"
            )
        if step.positions != EVERYWHERE:
            raise FoldError(
                f"interventions: positions {step.positions} at {plan.site}, and weights act on "
                "every token; use intervene, or positions='all'"
            )
        maps.append(step.does)
    return compose(maps)


def _last_write(site: Site, map_: LowRankAffine) -> Site:
    """The write whose bias stands for an addition to a residual stream."""
    layer = site.layer
    if layer is None or site.stream not in ("resid_pre", "resid_mid", "resid_post"):
        raise FoldError(
            f"interventions: {site} is no output of weights alone; what folds acts at embed, "
            "pos_embed, attn_out and mlp_out, or adds to a residual stream"
        )
    if map_.rank:
        raise FoldError(
            f"interventions: an ablation at {site} reads the sum of all earlier writes, which no "
            "one weight makes; ablate at='writes', which folds, or use intervene"
        )
    if site.stream == "resid_mid":
        return Site(layer, "attn_out")
    if site.stream == "resid_post":
        return Site(layer, "mlp_out")
    return Site(layer - 1, "mlp_out") if layer else Site(None, "embed")


def _fold_site(model: Any, site: Site, map_: LowRankAffine) -> dict[str, Tensor]:
    if site.stream in _TABLES:
        name = _TABLES[site.stream]
        return {name: _fold_table(read_parameter(model, name), map_)}
    weight, bias = (f"blocks.{site.layer}.{leaf}" for leaf in _LINEAR[site.stream])
    place = next(
        place for place in architecture_of(model).places if place.writes == (f"hook_{site.stream}",)
    )
    matrix = to_matrix(read_parameter(model, weight), place.kind)
    b = read_parameter(model, bias)
    if not map_.rank:
        return {bias: map_.fold_into(b[None], b)[1]}
    folded, b = map_.fold_into(matrix.mT, b)
    if not place.conv1d:
        folded = folded.mT.contiguous().mT  # keep the checkpoint's own storage order
    return {weight: from_matrix(folded.mT, place.kind, model.cfg.d_head), bias: b}


def _fold_table(table: Tensor, map_: LowRankAffine) -> Tensor:
    """Every row of a table is an output, so that what is added is added to each of them."""
    wide = torch.promote_types(table.dtype, torch.float32)
    folded, added = map_.fold_into(table.to(wide), table.new_zeros(map_.width, dtype=wide))
    return (folded + added).to(table.dtype)


def _short_name(interventions: Sequence[Intervention]) -> str:
    """A name by which models folded from other interventions can be told apart."""
    text = json.dumps(describe_interventions(interventions), sort_keys=True)
    return f"interventions {hashlib.sha256(text.encode()).hexdigest()[:12]}"
