"""What comparing two models by the latents of one codec leaves.

Plain frozen results; `health` and `compare` make them. A latent is a number in the codec that the
result names by its fingerprint, and means nothing in another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int, Int8
from torch import Tensor

from emlens.artifacts import Result
from emlens.numerics.intervals import Interval
from emlens.numerics.sign_flips import METHODS

ENOUGH_EXPLAINED = 0.6
"""Explained variance below which a codec is too blind at a model for a search among its latents to
mean much: two fifths of what happens is in no latent at all."""
FEWEST_PROMPTS = 12
"""Prompts that a latent must fire on to be tested. With 5 the smallest p-value is .0625; with 12 it
is .0005, small enough to survive among hundreds."""
SHOWN = 50
"""Latents in the rows of a comparison, the largest changes first."""

Responses = Literal["same", "own"]
"""`same`: both models read the same text; `own`: each its own responses, so that a difference of
texts mixes with a difference of representations."""


def is_underpowered(explained_variance: Float[Tensor, " stream"]) -> bool:
    """Whether too little is explained on one of the models, or it cannot be told."""
    return not bool((explained_variance >= ENOUGH_EXPLAINED).all())


def value_or_none(value: Tensor | float) -> float | None:
    """A number of a row; None where there is none, such as the p-value of what was not tested."""
    number = float(value)
    return None if math.isnan(number) else number


@dataclass(frozen=True, kw_only=True)
class SaeHealth(Result):
    """How well a codec's latents say what happens inside one model, or a base and its fine-tune."""

    kind: ClassVar[str] = "sae_health"

    base: str
    """The base's source, or the only model's."""
    base_fingerprint: str
    tuned: str | None
    """The fine-tune's source, of a pair."""
    tuned_fingerprint: str | None
    """Of a full checkpoint."""
    adapter_fingerprint: str | None
    codec: str
    """The codec's source."""
    codec_fingerprint: str
    architecture: str
    site: str
    positions: str
    """Tokens that were counted."""
    same_base: bool | None
    """Whether the codec was trained on the very weights of this base; None where nobody knows, or
    it was loaded for any."""
    streams: tuple[str, ...]
    """Labels of the first axes: `model`, or `base` and `tuned`."""
    n_prompts: int
    n_tokens: Int[Tensor, " stream"]
    explained_variance: Float[Tensor, " stream"]
    """1 - sum |x - reconstruction|^2 / sum |x - mean x|^2 over tokens; NaN for a token alone."""
    l0: Float[Tensor, " stream"]
    """Latents active at a token, on average."""
    dead_share: Float[Tensor, " stream"]
    """Share of latents that were active at no token of this text: not the same as dead in training,
    and falling with the number of tokens."""
    captured_share: float | None
    """1 - sum |change - change of reconstructions|^2 / sum |change|^2 over tokens, change being
    tuned - base: how much of what the fine-tune did here any latent can show. None for one model,
    where nothing differs, and where the models read different texts."""
    explained_change: Interval | None
    """Explained variance of tuned less base's; None for one model or a single prompt."""

    underpowered: bool
    """Whether so little is explained on either model that a search means little."""
    worse_on_tuned: bool | None
    """Whether clearly less is explained on the tuned model; None where it cannot be said."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a model."""
        return [
            {
                "model": stream,
                "n_tokens": int(self.n_tokens[i]),
                "explained_variance": value_or_none(self.explained_variance[i]),
                "l0": float(self.l0[i]),
                "dead_share": float(self.dead_share[i]),
                "captured_share": self.captured_share,
                "underpowered": self.underpowered,
                "worse_on_tuned": self.worse_on_tuned,
            }
            for i, stream in enumerate(self.streams)
        ]

    @property
    def cautions(self) -> tuple[str, ...]:
        """What must be known of the fit before any latent is believed, in sentences."""
        found = []
        for name, explained in zip(self.streams, self.explained_variance.tolist(), strict=True):
            # Turned round, so that a variance that cannot be told counts as too little.
            if not explained >= ENOUGH_EXPLAINED:
                who = self.tuned if name == "tuned" else self.base
                found.append(
                    f"the codec explains {explained:.2f} of the variance in {who}, less than "
                    f"{ENOUGH_EXPLAINED}: whatever is found, or not found, among its latents is "
                    "underpowered"
                )
        if self.worse_on_tuned and self.explained_change is not None:
            found.append(
                f"the codec explains clearly less of {self.tuned} than of its base "
                f"({self.explained_change.value:+.3f}): part of what changed is in no latent"
            )
        if self.same_base is False:
            found.append(f"the codec was trained on other weights than those of {self.base}")
        if self.same_base is None:
            found.append(
                f"whether the codec was trained on the weights of {self.base} is not known"
            )
        if self.n_prompts < FEWEST_PROMPTS:
            found.append(
                f"only {self.n_prompts} prompts were read: what latents do on others, and how well "
                "the codec fits there, is open"
            )
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class FeatureDiff(Result):
    """How the codes of a base and its fine-tune differ, latent by latent.

    Means are over prompts, each the mean of its tokens. p-values say that the two models differ on
    such prompts, which they do truly after any fine-tune: what is special to a harmful one, only
    several fine-tunes can say (`contrast_features`).
    """

    kind: ClassVar[str] = "feature_diff"

    base: str
    """The base's source."""
    base_fingerprint: str
    tuned: str
    """The fine-tune's source."""
    tuned_fingerprint: str | None
    """Of a full checkpoint."""
    adapter_fingerprint: str | None
    tokenizer_fingerprint: str
    dtype: str
    """In which the models ran."""
    interventions: tuple[str, ...]
    """What acted on the models, one JSON object each."""
    codec: str
    """The codec's source."""
    codec_fingerprint: str
    site: str
    positions: str
    """Tokens that were counted."""
    responses: Responses
    """Whether both models read the same text."""
    prompts: tuple[str, ...] = field(repr=False)
    """Hashes of the prompts, in order."""
    n_prompts: int
    """Different prompts, the unit of the statistics; several responses to one are one unit."""
    n_tokens: Int[Tensor, " stream"]
    """Tokens counted of base and tuned."""
    mean_base: Float[Tensor, " d_sae"]
    """Mean code in the base."""
    mean_tuned: Float[Tensor, " d_sae"]
    """Mean code in the fine-tune."""
    delta: Float[Tensor, " d_sae"]
    """mean_tuned - mean_base, in units of the codes."""
    frequency_base: Float[Tensor, " d_sae"]
    """Share of tokens at which the latent is active in the base."""
    frequency_tuned: Float[Tensor, " d_sae"]
    """The same in the fine-tune."""
    prompts_fired: Int[Tensor, " d_sae"]
    """Prompts on which it is active in either model."""
    t: Float[Tensor, " d_sae"]
    """delta over its standard error over prompts; 0 where no prompt differs."""
    p_value: Float[Tensor, " d_sae"]
    """Two-sided, by flipping base and tuned within prompts; NaN where nothing was tested."""
    q_value: Float[Tensor, " d_sae"]
    """Benjamini-Hochberg over the latents tested; NaN where nothing was tested."""
    p_method: Int8[Tensor, " d_sae"]
    """How each p-value came about, an index into `emlens.numerics.sign_flips.METHODS`."""
    decoder_cosine: Float[Tensor, " d_sae"]
    """Cosine of the latent's decoder vector with `mean_difference`; 0 where either is zero."""
    mean_difference: Float[Tensor, " d_in"]
    """Mean activation of tuned less base's, weighted as the codes are: the baseline without any
    codec."""
    flips: int
    """Sign vectors drawn."""
    seed: int
    """Of the sign vectors."""
    health: SaeHealth
    """How well the codec fits both models on the same tokens."""

    n_tested: int
    """Latents that have a p-value."""
    why_untested: str
    """Why none has; empty where some have."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a latent, the largest changes first."""
        order = self.delta.abs().argsort(descending=True, stable=True)[:SHOWN]
        numbers = ("delta", "mean_base", "mean_tuned", "frequency_base", "frequency_tuned", "t")
        numbers += ("p_value", "q_value", "decoder_cosine")
        return [
            {"latent": latent}
            | {name: value_or_none(getattr(self, name)[latent]) for name in numbers}
            | {
                "prompts_fired": int(self.prompts_fired[latent]),
                "p_method": METHODS[int(self.p_method[latent])],
                "underpowered": self.health.underpowered,
            }
            for latent in order.tolist()
        ]

    @property
    def weights(self) -> str:
        """What tells this fine-tune from others: a fingerprint, or its source without one."""
        return self.adapter_fingerprint or self.tuned_fingerprint or self.tuned

    def check_aligned(self, other: "FeatureDiff") -> None:
        """Raise unless another comparison is of the same latents under the same conditions.

        Raises:
            ValueError: it was made with another codec, base, site, positions or kind of responses.
        """
        for name in ("codec_fingerprint", "base_fingerprint", "site", "positions", "responses"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs:
                raise ValueError(
                    f"diffs: {name} is {own!r} for {self.tuned} and {theirs!r} for {other.tuned}; "
                    "their latents cannot be put side by side"
                )


def check_different(argument: str, diffs: Sequence[FeatureDiff]) -> None:
    """Raise where one fine-tune was compared more than once, by its weights, whatever its name.

    Raises:
        ValueError: two of them are one, and would count as independent.
    """
    weights = [own.weights for own in diffs]
    for own in diffs:
        if weights.count(own.weights) > 1:
            raise ValueError(
                f"{argument}: {own.tuned!r} comes more than once, so that fine-tunes would not be "
                "independent units"
            )
