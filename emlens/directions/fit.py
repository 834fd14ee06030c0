"""Directions as differences of means between texts, between models, or both, in one pass.

Not for choosing a layer or a coefficient: that takes prompts of its own.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.activations.reading import (
    ReadingPlan,
    Selection,
    SitesLike,
    plan_reading,
    require_one,
)
from emlens.data import Batching, Chat, ContrastTexts, prompt_hashes, text_hash
from emlens.directions.design import FitDesign, make_design
from emlens.directions.estimate import DirectionAccumulator, SiteEstimate
from emlens.models.reading import Identity, Readable, base_of, count_models, identify
from emlens.sites import Site
from emlens.vectors import Direction, Directions, Provenance

Construction = Literal[
    "data", "data@tuned", "data@base", "model@positive", "model@negative", "both"
]
Weighting = Literal["token", "response"]
Stream = Literal["base", "tuned", "difference"]

MIN_TEXTS = 20
"""Texts a class needs for a difference between classes."""
SEED = 0
"""Of halves, shuffled labels and random directions."""


@dataclass(frozen=True)
class _Recipe:
    """What is averaged over the texts of each class; None leaves the class out."""

    positive: Stream | None
    negative: Stream | None

    @property
    def paired(self) -> bool:
        """Whether it compares models on one class of texts."""
        return "difference" in (self.positive, self.negative)


_RECIPES = {
    "data": _Recipe("base", "base"),
    "data@tuned": _Recipe("tuned", "tuned"),
    "data@base": _Recipe("base", "base"),
    "model@positive": _Recipe("difference", None),
    "model@negative": _Recipe(None, "difference"),
    "both": _Recipe("tuned", "base"),
}


def fit_directions(
    model: Readable,
    texts: ContrastTexts,
    *,
    construction: Construction,
    sites: SitesLike,
    positions: str = "response",
    weighting: Weighting = "token",
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> Directions:
    """Fit one direction a site, with the random directions that it must be compared with.

    v = mean of positive activations - mean of negative ones, not normalised, where `data@tuned` and
    `data@base` take misaligned minus aligned texts in one model, `model@positive` and
    `model@negative` tuned minus base on the texts of one class, and `both` tuned on positive minus
    base on negative texts.

    Args:
        model: a pair; or one model, whose only construction is `data`.
        texts: answered chats in two classes; a `model` construction needs only its own class.
        construction: which difference; there is no default, because they are different vectors.
        sites: where; all must have one width. The result has them in the model's order.
        positions: which tokens are averaged; `response+eot` takes the end of the turn as well.
        weighting: whether every `token` or every `response` counts the same.
        batching: tokens run at once, both models of a pair counted.

    Raises:
        ValueError: a construction that the model does not have, fewer than 20 texts in a class
            that is compared with the other, or positions that a text does not have.

    Source: Soligo et al. 2025, Convergent linear representations of emergent misalignment, arXiv
        2506.11618, section 3.
    Differs: the construction is named; norm, halves, shuffled labels and random directions with
        the activations' covariance come with every estimate.
    """
    check_texts(texts, construction, weighting, pair=count_models(model) == 2)
    recipe = _RECIPES[construction]
    positive = texts.positive if recipe.positive else ()
    negative = texts.negative if recipe.negative else ()
    chats = (*positive, *negative)
    one = require_one(positions)
    asked = plan_reading(model, chats, sites=sites, positions=one, batching=batching)
    plan = dataclasses.replace(asked, sites=_in_order(model, asked.sites))
    labels = [True] * len(positive) + [False] * len(negative)
    n_tokens = [plan.count_tokens(plan.positions[0], [row]) for row in range(len(chats))]
    design = make_design(
        [text_hash(chat) for chat in chats],
        labels,
        n_tokens,
        response_weighted=weighting == "response",
        paired=recipe.paired,
        seed=SEED,
    )
    estimates = _run(plan, design, recipe)
    identity = identify(model)
    made = Provenance(
        construction=construction,
        positions=str(plan.positions[0]),
        weighting=weighting,
        n_positive=len(positive),
        n_negative=len(negative),
        n_tokens_positive=sum(n_tokens[: len(positive)]),
        n_tokens_negative=sum(n_tokens[len(positive) :]),
        base_fingerprint=identity.base_fingerprint,
        tuned_fingerprint=identity.tuned_fingerprint,
        adapter_fingerprint=identity.adapter_fingerprint,
        tokenizer_fingerprint=identity.tokenizer_fingerprint,
        dtype=identity.dtype,
        interventions=identity.interventions,
        seed=SEED,
        note=_note(identity),
    )
    return _assemble(plan.sites, estimates, made, chats)


def check_texts(
    texts: ContrastTexts, construction: str, weighting: str = "token", *, pair: bool
) -> None:
    """Check that there are texts enough for a construction, before a model is loaded.

    Args:
        texts: both classes.
        construction: as in `fit_directions`.
        weighting: as in `fit_directions`.
        pair: whether there will be a base and a fine-tune, or one model alone.

    Raises:
        ValueError: an unknown construction or weighting, or a class of too few texts.
    """
    possible = [name for name in _RECIPES if (name == "data") != pair]
    if construction not in possible:
        raise ValueError(
            f"construction: got {construction!r}, expected one of {possible} for "
            + ("a pair" if pair else "one model; load a pair to compare with its base")
        )
    if weighting not in ("token", "response"):
        raise ValueError(f"weighting: got {weighting!r}, expected 'token' or 'response'")
    recipe = _RECIPES[construction]
    needed = 1 if recipe.paired else MIN_TEXTS
    for name in ("positive", "negative"):
        found = len(getattr(texts, name))
        if getattr(recipe, name) and found < needed:
            raise ValueError(
                f"texts: {found} {name} texts, {construction} needs at least {needed}: a mean of "
                "fewer is mostly noise"
                + (
                    ""
                    if recipe.paired
                    else "; model@positive or model@negative takes what there is"
                )
            )


def _in_order(model: Readable, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites in the order in which a forward pass reaches them."""
    names = {name: place for place, name in enumerate(base_of(model).hook_dict)}
    return tuple(sorted(sites, key=lambda site: names[site.hook_name]))


def _run(plan: ReadingPlan, design: FitDesign, recipe: _Recipe) -> list[SiteEstimate]:
    """Read every batch once; one estimate a site."""
    width = plan.common_width
    cells = {site: DirectionAccumulator(design, width) for site in plan.sites}
    batch = _Weights(design)

    def count(site: Site, x: Tensor, chosen: tuple[Selection, ...]) -> None:
        (selection,) = chosen
        effects, draws, positive = batch.of(selection, x.device)
        values = selection.take(x)
        averaged = _averaged(values, positive, recipe)
        varying = values[0] if recipe.paired else averaged
        cells[site].update(averaged, varying, values[0], effects, draws)

    for _ in plan.read(count, "fitting (tokens)"):
        pass
    return [cells[site].result() for site in plan.sites]


class _Weights:
    """The weights of a batch's tokens, made once for all its sites."""

    def __init__(self, design: FitDesign) -> None:
        self.design = design
        self.selection: Selection | None = None
        self.made: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, selection: Selection, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Effects [sums n], draws [draws n], and the class of each token."""
        if self.made is None or self.selection is not selection:
            rows = selection.rows
            weights = (
                self.design.effects[:, rows],
                self.design.draws(rows, selection.tokens),
                self.design.positive[rows],
            )
            effects, draws, positive = (part.to(device) for part in weights)
            self.selection, self.made = selection, (effects, draws, positive)
        return self.made


def _averaged(
    values: Float[Tensor, "models n d"], positive: Tensor, recipe: _Recipe
) -> Float[Tensor, "n d"]:
    """What each token contributes: an activation, or a difference in float32 at least."""
    if recipe.paired:
        wide = torch.promote_types(values.dtype, torch.float32)
        return values[1].to(wide) - values[0].to(wide)
    if recipe.positive == recipe.negative:
        return values[-1] if recipe.positive == "tuned" else values[0]
    return torch.where(positive[:, None], values[1], values[0])


def _note(identity: Identity) -> str:
    """Who the models are, in words."""
    tuned = "" if identity.tuned is None else f"; tuned: {identity.tuned}"
    hooked = "; with hooks of the user's in effect" if identity.hooked else ""
    return f"base: {identity.base}{tuned}; in {identity.dtype}{hooked}"


def _assemble(
    sites: Sequence[Site],
    estimates: Sequence[SiteEstimate],
    made: Provenance,
    chats: Sequence[Chat],
) -> Directions:
    directions = tuple(
        Direction(
            site=site,
            vector=found.vector,
            resid_norm=found.resid_norm,
            split_half_cosine=found.split_half_cosine,
            provenance=made,
        )
        for site, found in zip(sites, estimates, strict=True)
    )
    shuffled = [found.shuffled for found in estimates if found.shuffled is not None]
    return Directions(
        directions=directions,
        covariance_matched=torch.stack([found.covariance_matched for found in estimates]),
        shuffled=torch.stack(shuffled) if shuffled else None,
        top3_share=torch.tensor([found.top3_share for found in estimates], dtype=torch.float64),
        prompt_sets={"fit": prompt_hashes(chats)},
    )
