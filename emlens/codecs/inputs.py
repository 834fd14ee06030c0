"""Checks of what a codec is given: activations, latents, sparse codes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from emlens.codecs.codec import CodecError, SparseCodes


def check_activations(name: str, x: Tensor, codec: Any) -> None:
    """Raise unless x is finite rows [n d_in] of floats on the codec's device.

    Raises:
        CodecError: it is not.
    """
    if x.ndim != 2 or x.shape[1] != codec.d_in:
        raise CodecError(
            f"{name} has shape {tuple(x.shape)}, expected [n, {codec.d_in}]: {codec.name} takes "
            f"rows of {codec.site}, batch and position in one axis; was it captured at another "
            "site, or from another model?"
        )
    if not x.is_floating_point():
        raise CodecError(f"{name} is {x.dtype}, expected floating-point activations")
    if x.device != codec.W_enc.device:
        raise CodecError(
            f"{name} is on {x.device} and {codec.name} on {codec.W_enc.device}: move the codec "
            f"with codec.to({str(x.device)!r})"
        )
    if not bool(x.isfinite().all()):
        raise CodecError(
            f"{name} holds NaN or infinity: look for padding that was not left out, or for a model "
            "that overflows in float16"
        )


def check_latents(latents: Sequence[int], d_sae: int) -> Int[Tensor, " k"]:
    """Latents as a tensor.

    Raises:
        CodecError: none, or one that is no whole number from 0 to d_sae - 1.
    """
    if not len(latents):
        raise CodecError("latents: got none, expected at least one")
    for latent in latents:
        if isinstance(latent, bool | float) or not 0 <= int(latent) < d_sae:
            raise CodecError(f"latents: got {latent}, expected whole numbers from 0 to {d_sae - 1}")
    return torch.tensor([int(latent) for latent in latents])


def check_sparse_codes(codes: SparseCodes, d_sae: int) -> None:
    """Raise unless sparse codes are of a codec with so many latents.

    Raises:
        CodecError: they are not.
    """
    if codes.d_sae != d_sae or codes.indices.shape != codes.values.shape:
        raise CodecError(
            f"codes: {tuple(codes.indices.shape)} indices and {tuple(codes.values.shape)} values "
            f"of {codes.d_sae} latents, expected as many of each, of {d_sae} latents"
        )
    if (
        codes.indices.numel()
        and not 0 <= int(codes.indices.min()) <= int(codes.indices.max()) < d_sae
    ):
        raise CodecError(f"codes: indices beyond the {d_sae} latents of this codec")
