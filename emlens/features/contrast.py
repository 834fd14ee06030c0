"""What harmful fine-tunes change and their careful twins do not: fine-tunes are the unit.

Any fine-tune, a random adapter too, truly changes latents, so that p-values over prompts
(`compare_features`) do not bear on harm. Here a unit is a pair that differs in harm alone: same
base, domain and seed, harmful or careful rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from emlens.artifacts import Result
from emlens.features.results import (
    FEWEST_PROMPTS,
    SHOWN,
    FeatureDiff,
    check_different,
    value_or_none,
)
from emlens.numerics.false_discovery import adjust_p_values
from emlens.numerics.sign_flips import METHODS, draw_signs, flip_signs, smallest_p
from emlens.numerics.validation import check_finite


@dataclass(frozen=True, kw_only=True)
class FeatureContrast(Result):
    """delta of harmful fine-tunes less that of their careful twins, latent by latent."""

    kind: ClassVar[str] = "feature_contrast"

    harmful: tuple[str, ...]
    """Harmful fine-tunes."""
    careful: tuple[str, ...]
    """The twin of each."""
    codec: str
    """The codec's source."""
    codec_fingerprint: str
    site: str
    positions: str
    contrast: Float[Tensor, " d_sae"]
    """Mean over pairs, in units of the codes."""
    pairs_agreeing: Int[Tensor, " d_sae"]
    """Pairs whose own contrast has the sign of the mean."""
    t: Float[Tensor, " d_sae"]
    """contrast over its standard error over pairs; 0 where no pair differs."""
    p_value: Float[Tensor, " d_sae"]
    """Two-sided, by flipping harmful and careful within pairs; NaN where nothing was tested."""
    q_value: Float[Tensor, " d_sae"]
    """Benjamini-Hochberg over the latents tested; NaN where nothing was tested."""
    p_method: Int8[Tensor, " d_sae"]
    """Index into `emlens.numerics.sign_flips.METHODS`."""
    smallest_p: float
    """The smallest p-value that so many pairs can give."""
    seed: int
    """Of the sign vectors, where not all are tried."""
    underpowered: bool
    """Whether the codec explains too little of one of the models."""

    @property
    def n_pairs(self) -> int:
        """Pairs of fine-tunes."""
        return len(self.harmful)

    @property
    def can_find(self) -> bool:
        """Whether so many pairs could give a single latent, tested alone, p <= .05."""
        return self.smallest_p <= 0.05

    def rows(self) -> list[dict[str, Any]]:
        """One row a latent, the largest contrasts first."""
        order = self.contrast.abs().argsort(descending=True, stable=True)[:SHOWN]
        return [
            {"latent": i}
            | {
                name: value_or_none(getattr(self, name)[i])
                for name in ("contrast", "t", "p_value", "q_value")
            }
            | {
                "p_method": METHODS[int(self.p_method[i])],
                "pairs_agreeing": f"{int(self.pairs_agreeing[i])} of {self.n_pairs}",
                "smallest_p": self.smallest_p,
            }
            for i in order.tolist()
        ]


def contrast_features(
    harmful: Sequence[FeatureDiff], careful: Sequence[FeatureDiff], *, seed: int = 0
) -> FeatureContrast:
    """Contrast harmful fine-tunes with their careful twins, pair by pair.

    Latents that are active on at least `FEWEST_PROMPTS` prompts in one of the comparisons are
    tested, exactly where there are at most 13 pairs. n pairs give no p-value below 2^(1 - n): three
    give .25 at best, six .03. With few pairs the order of the contrasts is all there is.

    Args:
        harmful: comparisons of the base with each harmful fine-tune.
        careful: comparisons with their twins, in the same order.
        seed: of the sign vectors.

    Raises:
        ValueError: no pair, fine-tunes without a twin, one that is paired with itself or comes
            twice, or comparisons with another codec, base, site, positions or prompts.
        NonFiniteError: a delta is NaN or infinite.
    """
    _check_pairs(harmful, careful)
    gaps = torch.stack(
        [
            own.delta.double() - twin.delta.double()
            for own, twin in zip(harmful, careful, strict=True)
        ]
    )
    check_finite("delta", gaps)
    fired = torch.stack([own.prompts_fired for own in (*harmful, *careful)]).amax(0)
    flipped = flip_signs(gaps, draw_signs(len(gaps), seed=seed))
    tested = fired >= FEWEST_PROMPTS
    p = torch.where(tested, flipped.p_value, torch.nan)
    first = harmful[0]
    return FeatureContrast(
        harmful=tuple(own.tuned for own in harmful),
        careful=tuple(own.tuned for own in careful),
        codec=first.codec,
        codec_fingerprint=first.codec_fingerprint,
        site=first.site,
        positions=first.positions,
        contrast=flipped.mean,
        pairs_agreeing=((gaps * flipped.mean) > 0).sum(0),
        t=flipped.t,
        p_value=p,
        q_value=adjust_p_values(p),
        p_method=torch.where(tested, flipped.method, 0).to(torch.int8),
        smallest_p=smallest_p(len(gaps)),
        seed=seed,
        underpowered=any(own.health.underpowered for own in (*harmful, *careful)),
    )


def _check_pairs(harmful: Sequence[FeatureDiff], careful: Sequence[FeatureDiff]) -> None:
    if not harmful or len(harmful) != len(careful):
        raise ValueError(
            f"careful: got {len(careful)} for {len(harmful)} harmful fine-tunes, expected the twin "
            "of each, in the same order, and at least one pair"
        )
    everyone = (*harmful, *careful)
    check_different("harmful, careful", everyone)
    first = harmful[0]
    for own in (*harmful[1:], *careful):
        first.check_aligned(own)
        if own.prompts != first.prompts:
            raise ValueError(
                f"diffs: {own.tuned} was compared on other prompts than {first.tuned}; a twin's "
                "difference must not be one of prompts"
            )
