"""Checks of what a codec is given: activations, latents, sparse codes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.codecs.codec import ActiveCodes, CodecError, Codes, SparseCodes
from emlens.codecs.frozen import HALF, is_finite


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
    if not is_finite(x):
        raise CodecError(
            f"{name} holds NaN or infinity: look for padding that was not left out, or for a model "
            "that overflows in float16"
        )


def place_rows(x: Float[Tensor, "*any d_in"], codec: Any) -> Float[Tensor, "*any d_in"]:
    """Activations where a codec's weights are, in float32 at least.

    Rounding them to half precision is the codec's own affair: it normalises first, says which value
    it cannot hold, and whoever sums activations beside codes keeps their digits.

    Args:
        x: of any model and dtype.
        codec: that is to encode them.
    """
    like = codec.W_dec
    return x.to(like.device, torch.promote_types(like.dtype, torch.float32))


def cast_rows(name: str, rows: Tensor, codec: Any, *, given: torch.dtype) -> Tensor:
    """Prepared rows in the dtype of a codec's weights, none lost to its range.

    Args:
        name: of the argument that they were made of.
        rows: in float32 at least.
        codec: whose weights.
        given: dtype of that argument.

    Raises:
        CodecError: a value is beyond what the dtype can hold.
    """
    own = codec.W_enc.dtype
    cast = rows.to(own)
    if (own in HALF or given != own) and not is_finite(cast):
        raise CodecError(
            f"{name} holds values beyond {own}, in which {codec.name} computes: "
            f"{_suggest_wider(own)}, or leave out tokens of extreme norm, such as the first ones"
        )
    return cast


def check_range(what: str, made: Tensor, codec: Any) -> Tensor:
    """What a codec made, unless half precision could not hold it.

    Wider results are not looked at: they leave their range only where activations are near it.

    Raises:
        CodecError: NaN or infinity.
    """
    if made.dtype in HALF and not is_finite(made):
        raise CodecError(
            f"{what} of {codec.name} hold NaN or infinity: they are beyond {made.dtype}, in which "
            f"it computes; {_suggest_wider(made.dtype)}"
        )
    return made


def _suggest_wider(dtype: torch.dtype) -> str:
    wider = "bfloat16 or float32" if dtype == torch.float16 else "a wider dtype"
    return f"load it in {wider}"


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


def check_codes(codes: Codes | SparseCodes | ActiveCodes, d_sae: int) -> None:
    """Raise unless codes are of a codec with so many latents.

    Raises:
        CodecError: they are not.
    """
    shape = tuple(codes.values.shape)
    if isinstance(codes, Codes):
        if len(shape) != 2 or shape[1] != d_sae:
            raise CodecError(
                f"codes: values have shape {shape}, expected [n, {d_sae}]: they are of "
                "another codec"
            )
        return
    indices = codes.latents if isinstance(codes, ActiveCodes) else codes.indices
    if codes.d_sae != d_sae or tuple(indices.shape) != shape:
        raise CodecError(
            f"codes: {tuple(indices.shape)} indices and {shape} values of {codes.d_sae} "
            f"latents, expected as many of each, of {d_sae} latents: they are of another codec"
        )
    if isinstance(codes, ActiveCodes) and int(codes.counts.sum()) != len(indices):
        raise CodecError(
            f"codes: counts sum to {int(codes.counts.sum())}, and there are {len(indices)} codes"
        )
    if indices.numel():
        lowest, highest = int(indices.min()), int(indices.max())
        if lowest < 0 or highest >= d_sae:
            raise CodecError(f"codes: indices {lowest} to {highest}, expected 0 to {d_sae - 1}")
