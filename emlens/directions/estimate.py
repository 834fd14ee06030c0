"""Directions of one site from streaming sums: the estimate and what chance would give.

Tensors in, tensors out; the shell that meets models is `fit`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.directions.design import HALVES, FitDesign
from emlens.numerics.histogram import SizeHistogramAccumulator
from emlens.numerics.moments import MomentsAccumulator
from emlens.numerics.projection import cosine_similarity
from emlens.numerics.weighted import WeightedSums, WeightedSumsAccumulator

LARGE_DIMENSIONS = 3
"""Dimensions of largest variance in whose share of a direction damage shows."""


@dataclass(frozen=True, kw_only=True)
class SiteEstimate:
    """What a fit found at one site."""

    vector: Float[Tensor, " d"]
    """The difference of means."""
    split_half_cosine: float | None
    """Between the estimates from two halves of the texts; None where a half is empty or zero."""
    shuffled: Float[Tensor, "m d"] | None
    """The estimate with shuffled labels; None where there is one text only."""
    covariance_matched: Float[Tensor, "k d"]
    """g^T X_centred / sqrt(n) with normal g: random, with the activations' covariance."""
    top3_share: float
    """Share of the squared vector in the three dimensions of largest variance; NaN of zero."""
    resid_norm: float | None
    """Median norm of the base's activations; None where it is zero."""


class DirectionAccumulator:
    """Sums at one site from which the direction and its baselines are made.

    Args:
        design: which sums every text goes into.
        width: values of one token.
    """

    def __init__(self, design: FitDesign, width: int) -> None:
        self.design = design
        self.effects = WeightedSumsAccumulator(len(design.effects), width)
        self.draws = WeightedSumsAccumulator(1 + design.n_random, width)
        self.moments = MomentsAccumulator(width)
        self.sizes = SizeHistogramAccumulator()

    def update(
        self,
        averaged: Float[Tensor, "n d"],
        varying: Float[Tensor, "n d"],
        base: Float[Tensor, "n d"],
        effects: Float[Tensor, "sums n"],
        draws: Float[Tensor, "draws n"],
    ) -> None:
        """Take in some tokens.

        Args:
            averaged: what the direction is a mean, or a difference of means, of.
            varying: activations whose covariance the random directions get.
            base: the base's activations, for the residual norm.
            effects: columns of `design.effects`, one a token.
            draws: what `design.draws` gave for the tokens.

        Raises:
            WidthError: a tensor of another width, or weights of other tokens.
            NonFiniteError: a tensor holds NaN or infinity, or norms too large to count. What was
                counted before stays as it was.
        """
        # Counted apart first: whatever one part refuses, no other has taken in.
        found = DirectionAccumulator(self.design, self.effects.width)
        found.effects.update(averaged, effects)
        found.draws.update(varying, draws)
        found.moments.update(varying)
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        found.sizes.update(torch.linalg.vector_norm(wide, dim=1))
        self.merge(found)

    def merge(self, other: "DirectionAccumulator") -> None:
        """Take in what was counted over other tokens of the same design; it stays as it was."""
        self.effects.merge(other.effects)
        self.draws.merge(other.draws)
        self.moments.merge(other.moments)
        self.sizes.merge(other.sizes)

    def result(self) -> SiteEstimate:
        """The direction and its baselines.

        Raises:
            EmptyAccumulatorError: no token was seen.
        """
        effects = self.effects.result()
        vector = _difference(effects, (0, 1), (2, 3), self.design.paired)
        median = self.sizes.result().median
        return SiteEstimate(
            vector=vector,
            split_half_cosine=_split_half_cosine(effects, self.design.paired),
            shuffled=_shuffled(effects, self.design.paired) if self.design.n_shuffled else None,
            covariance_matched=_random_directions(self.draws.result()),
            top3_share=large_dimension_share(vector, self.moments.result().variance),
            resid_norm=median if median > 0 else None,
        )


def large_dimension_share(vector: Float[Tensor, " d"], variance: Float[Tensor, " d"]) -> float:
    """Share of a squared vector in the three dimensions of largest variance; NaN of zero."""
    kept = variance.topk(min(LARGE_DIMENSIONS, len(variance))).indices.to(vector.device)
    return float(vector[kept].square().sum() / vector.square().sum())


def _difference(
    found: WeightedSums, positive: tuple[int, ...], negative: tuple[int, ...], paired: bool
) -> Tensor:
    """Mean of the positive sums less mean of the negative ones; of paired texts one mean."""
    if paired:
        return _mean(found, positive + negative)
    return _mean(found, positive) - _mean(found, negative)


def _mean(found: WeightedSums, rows: tuple[int, ...]) -> Tensor:
    chosen = list(rows)
    return found.sums[chosen].sum(0) / found.weights[chosen].sum()


def _split_half_cosine(found: WeightedSums, paired: bool) -> float | None:
    halves = (_difference(found, (0,), (2,), paired), _difference(found, (1,), (3,), paired))
    if not all(bool(half.isfinite().all()) and bool(half.any()) for half in halves):
        return None  # an empty half divides by zero, and zero has no direction
    return float(cosine_similarity(*halves))


def _shuffled(found: WeightedSums, paired: bool) -> Tensor:
    """The estimate under each shuffling; the texts not called positive are all the others."""
    total, weight = found.sums[:HALVES].sum(0), found.weights[:HALVES].sum()
    sums, weights = found.sums[HALVES:], found.weights[HALVES:, None]
    if paired:
        return (2 * sums - total) / weight
    return sums / weights - (total - sums) / (weight - weights)


def _random_directions(found: WeightedSums) -> Tensor:
    """sum_i sqrt(w_i) g_i (x_i - mean) / sqrt(sum_i w_i), centred after the sum."""
    count = found.weights[0]
    mean = found.sums[0] / count
    return (found.sums[1:] - found.weights[1:, None] * mean) / count.sqrt()
