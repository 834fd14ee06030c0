"""Holding the code of a latent at a limit while a model runs; in training, see `LatentPenalty`.

The code is moved by what the latent writes, and everything that the codec does not explain stays.
"""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from emlens.codecs import SparseCodec
from emlens.codecs.inputs import place_rows
from emlens.features.steering import check_latents
from emlens.interventions import Intervention, MadeFor, Shift


def cap_latent(
    codec: SparseCodec,
    latent: int,
    *,
    threshold: float | int,
    side: Literal["above", "below"],
    positions: str | None = None,
) -> tuple[Intervention, ...]:
    """Keep the code z of a latent from passing a threshold: x + (limited z - z) W_dec[latent].

    That is the codec's reconstruction with the one code set to its limit, plus what the codec does
    not reconstruct; all other latents keep their codes in it. The code that is read of the moved
    activation again is the limit only where the encoder reads exactly what the decoder writes.
    `Cap` along the decoder vector is another experiment: it limits a projection, which a latent's
    code is only where encoder and decoder vector are one of length 1.

    Args:
        codec: whose latent; at its own site.
        latent: which.
        threshold: of the code, 0 or more.
        side: `above` cuts what exceeds the threshold (0 turns the latent off), `below` fills up
            what falls short of it.
        positions: on which tokens; by default those that the codec was trained on.

    Returns:
        One intervention, on models whose site has the axes of the codec's; where the codec knows
        its weights, on these and on what was attached to them, merged or folded into them, unless
        it was loaded with allow_other_model=True.

    Raises:
        CodecError: a latent that the codec does not have.
        ValueError: a threshold below 0 or none, or an unknown side.

    Source: Templeton et al. 2024, Scaling Monosemanticity (features clamped to a value).
    Differs: a limit instead of one value.
    """
    (own,) = check_latents(codec, [latent])
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold: got {threshold}, expected a code, 0 or more")
    if side not in ("above", "below"):
        raise ValueError(f"side: got {side!r}, expected 'above' or 'below'")
    operator = Shift(
        codec.W_dec[own].detach().clone(),
        _Excess(codec, own, float(threshold), 1.0 if side == "above" else -1.0),
        f"latent {own} of codec {codec.fingerprint} held {side} {float(threshold)!r}",
    )
    where = codec.positions if positions is None else positions
    weights = () if codec.base_fingerprint is None else (codec.base_fingerprint,)
    made_for = MadeFor(weights=weights, axes=codec.site.axes)
    return (Intervention(codec.site, operator, where, made_for=made_for, label="latent"),)


class _Excess:
    """How much of a latent's decoder vector is to be added, negative above a limit."""

    def __init__(self, codec: SparseCodec, latent: int, threshold: float, sign: float) -> None:
        self.codec, self.latent, self.threshold, self.sign = codec, latent, threshold, sign
        self._scales: bool | None = None

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        rows = place_rows(x, self.codec)
        code = self.codec.encode_latents(rows, [self.latent])[:, 0].to(rows)
        moved = -self.sign * (self.sign * (code - self.threshold)).relu()
        return (moved * self._scale(rows)).to(x)

    def _scale(self, rows: Float[Tensor, "n d"]) -> Tensor | float:
        """What a codec that scales rows multiplies each one's reconstruction by."""
        if self._scales is None:  # asked of one row: to find the largest code is to make them all
            self._scales = self.codec.encode_sparse(rows[:1], k=1).scale is not None
        scale = self.codec.encode_sparse(rows, k=1).scale if self._scales else None
        return 1.0 if scale is None else scale[:, 0].to(rows)
