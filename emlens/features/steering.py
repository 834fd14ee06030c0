"""Vectors that latents are steered with, and random ones as long: units, controls; no model is run.

Not for directions that were estimated: those carry how they were made (`emlens.vectors`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.codec import CodecError, SparseCodec
from emlens.numerics.counter import counter_normal, derive_key
from emlens.numerics.projection import unit_vectors


def check_latents(codec: SparseCodec, latents: Sequence[int]) -> tuple[int, ...]:
    """Return latents of a codec, each once and in the order given.

    Raises:
        CodecError: none at all, one that is no latent of the codec, or one that comes twice; or a
            crosscoder, which has no codes of one model alone.
    """
    require_autoencoder(codec)
    chosen = tuple(int(latent) for latent in latents)
    if not chosen:
        raise CodecError("latents: got none, expected at least one")
    outside = [latent for latent in chosen if not 0 <= latent < codec.d_sae]
    if outside:
        raise CodecError(
            f"latents: {codec.name} has {codec.d_sae}, numbered from 0, and got {outside[:3]}; are "
            "they latents of another codec?"
        )
    twice = sorted({latent for latent in chosen if chosen.count(latent) > 1})
    if twice:
        raise CodecError(f"latents: {twice[:3]} come more than once")
    return chosen


def require_autoencoder(codec: SparseCodec) -> None:
    """Refuse a crosscoder, which has no codes of one model alone.

    Raises:
        CodecError: it is one.
    """
    if codec.W_dec.ndim != 2:
        raise CodecError(
            f"codec: {codec.name} has decoder vectors of shape {tuple(codec.W_dec.shape)}, one for "
            "each model: a crosscoder reads two models at once, and here one is read at a time"
        )


def decoder_directions(codec: SparseCodec, latents: Sequence[int]) -> Float[Tensor, "latents d_in"]:
    """Unit vectors of what latents write, in float64 on the CPU.

    Raises:
        CodecError: a latent that writes nothing, which no steering can try.
    """
    rows = codec.W_dec[list(latents)].detach().double().cpu()
    silent = [latent for latent, row in zip(latents, rows, strict=True) if not bool(row.any())]
    if silent:
        raise CodecError(
            f"latents: {silent[:3]} have a decoder vector of zero and add nothing anywhere; leave "
            "them out"
        )
    return unit_vectors(rows)


def draw_directions(codec: SparseCodec, *, n: int, seed: int) -> Float[Tensor, "n d_in"]:
    """Random unit vectors, isotropic, in float64: a function of seed, site and number alone."""
    key = torch.tensor([derive_key("emlens.features.controls", seed, str(codec.site))])
    return unit_vectors(torch.cat([counter_normal(key, k, codec.d_in) for k in range(n)]))


def spread_strengths(
    directions: Float[Tensor, "n d"], strengths: Sequence[float | int], unit: float
) -> Float[Tensor, "n_strengths d"]:
    """Every direction at every strength, the strengths of one beside each other.

    Args:
        directions: unit vectors.
        strengths: how many units of each.
        unit: what one unit is, in activation units.
    """
    amounts = unit * torch.tensor(list(strengths), dtype=torch.float64)
    return (directions[:, None] * amounts[None, :, None]).flatten(0, 1)
