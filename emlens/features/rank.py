"""Latents in an order, such as by how much more active they are in a fine-tune.

Both ends of an order matter: what a fine-tune turned down may count as much as what it turned up.
An order says nothing of cause, and the largest change need not be the one that acts.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.features.results import SHOWN, FeatureDiff
from emlens.numerics.validation import check_finite

Order = Literal["delta", "abs_delta", "t", "cosine", "attribution"]
_FIELDS: Mapping[str, str] = MappingProxyType(
    {"delta": "delta", "abs_delta": "delta", "t": "t", "cosine": "decoder_cosine"}
)
"""Order -> the field of a comparison that it goes by."""


@dataclass(frozen=True, kw_only=True)
class FeatureRanking(Result):
    """Latents of a codec in the order of a score, highest first.

    Raises:
        WidthError: not one score a latent.
        NonFiniteError: a score is NaN.
        ValueError: scores that rise.
    """

    kind: ClassVar[str] = "feature_ranking"

    by: Order
    """What was ordered by."""
    latents: Int[Tensor, " n"]
    """Latents, the highest score first."""
    scores: Float[Tensor, " n"]
    """The score of each."""
    codec: str
    """The codec's source."""
    codec_fingerprint: str
    models: tuple[str, ...]
    """Fine-tunes whose scores were averaged, or the one model that was attributed."""
    left_out: tuple[str, ...] = ()
    """Fine-tunes that had no part in it, to be told apart by it later."""
    underpowered: bool | None = None
    """Whether the codec explains too little of one of the models for the order to mean much; None
    where nobody has looked."""

    def __post_init__(self) -> None:
        if self.latents.shape != self.scores.shape:
            raise ValueError(
                f"scores has shape {tuple(self.scores.shape)}, latents "
                f"{tuple(self.latents.shape)}: expected one score a latent"
            )
        if bool(self.scores.isnan().any()):
            check_finite("scores", self.scores)
        if bool((self.scores[1:] > self.scores[:-1]).any()):
            raise ValueError("scores: they rise somewhere, expected the highest first")

    def top(self, n: int) -> list[int]:
        """The n latents with the highest scores, highest first."""
        return self.latents[: self._check(n)].tolist()

    def bottom(self, n: int) -> list[int]:
        """The n latents with the lowest scores, lowest first."""
        return self.latents.flip(0)[: self._check(n)].tolist()

    def rank_of(self, latent: int) -> int:
        """Place of a latent, 1 for the highest score.

        Raises:
            ValueError: a latent that was not ranked.
        """
        found = (self.latents == latent).nonzero()
        if not len(found):
            raise ValueError(f"latent: {latent} is none of the {len(self.latents)} ranked")
        return int(found[0, 0]) + 1

    def rows(self) -> list[dict[str, Any]]:
        """One row a latent from either end, with its rank."""
        n = len(self.latents)
        places = range(n) if n <= 2 * SHOWN else (*range(SHOWN), *range(n - SHOWN, n))
        return [
            {"rank": i + 1, "latent": int(self.latents[i]), self.by: float(self.scores[i])}
            for i in places
        ]

    def _check(self, n: int) -> int:
        if not 1 <= n <= len(self.latents):
            raise ValueError(f"n: got {n}, expected 1 to {len(self.latents)}, the latents ranked")
        return n


def rank_features(
    diff: FeatureDiff | Sequence[FeatureDiff], *, by: Order, leave_out: Sequence[str] = ()
) -> FeatureRanking:
    """Order all latents of a codec by how they differ between base and fine-tune.

    Args:
        diff: one comparison, or several of one base and codec, whose scores are averaged.
        by: `delta`; `abs_delta`, the absolute value of the average delta; `t`; or `cosine` of the
            decoder vector to the mean difference of activations.
        leave_out: names of fine-tunes (`tuned`) that are to have no part in the order, so that they
            may be told apart by it afterwards.

    Raises:
        ValueError: an unknown order or name, nothing left, or comparisons that do not go together.
        NonFiniteError: a score is NaN, as t is for a single prompt.
    """
    diffs = [diff] if isinstance(diff, FeatureDiff) else list(diff)
    kept = leave_models_out(diffs, leave_out)
    scores = score_latents(kept, by=by)
    order = scores.argsort(descending=True, stable=True)
    return FeatureRanking(
        by=by,
        latents=order,
        scores=scores[order],
        codec=kept[0].codec,
        codec_fingerprint=kept[0].codec_fingerprint,
        models=tuple(own.tuned for own in kept),
        left_out=tuple(dict.fromkeys(leave_out)),
        underpowered=any(own.health.underpowered for own in kept),
    )


def leave_models_out(diffs: Sequence[FeatureDiff], names: Sequence[str]) -> list[FeatureDiff]:
    """The comparisons of all other fine-tunes, all of one base and codec.

    Raises:
        ValueError: a name that no comparison has (the nearest three are listed), nothing left, or
            comparisons that do not go together.
    """
    if isinstance(names, str):
        raise ValueError(f"leave_out: got one str, expected a sequence; write [{names!r}]")
    known = [own.tuned for own in diffs]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise ValueError(f"leave_out: no fine-tune is {name!r}; nearest: {', '.join(near)}")
    kept = [own for own in diffs if own.tuned not in names]
    if not kept:
        raise ValueError(
            f"diff: nothing is left of {len(diffs)} comparisons; expected at least one"
        )
    for own in kept[1:]:
        kept[0].check_aligned(own)
    return kept


def score_latents(diffs: Sequence[FeatureDiff], *, by: Order) -> Float64[Tensor, " d_sae"]:
    """The score of every latent, averaged over comparisons.

    Raises:
        ValueError: an unknown order, or one that comparisons do not hold.
        NonFiniteError: a score is NaN.
    """
    check_order("by", by)
    name = _FIELDS[by]
    found = torch.stack([getattr(own, name).double() for own in diffs]).mean(0)
    if bool(found.isnan().any()):
        check_finite(f"{name} of diff", found)
    return found.abs() if by == "abs_delta" else found


def check_order(argument: str, by: str) -> None:
    """Refuse an order that comparisons do not hold.

    Raises:
        ValueError: attribution, or an unknown one; the nearest three are listed.
    """
    if by == "attribution":
        raise ValueError(
            f"{argument}: attribution needs gradients of one model, which a comparison does not "
            "hold; attribute_features gives that order"
        )
    if by not in _FIELDS:
        near = difflib.get_close_matches(by, get_args(Order), n=3, cutoff=0.0)
        raise ValueError(f"{argument}: got {by!r}; nearest: {', '.join(near)}")
