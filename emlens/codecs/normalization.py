"""Normalisation of activations before they are encoded, undone after; kept beside the codes only.

A codec stores nothing of it: two models' batches may alternate.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.codec import CodecError

Normalization = Literal["none", "constant_norm_rescale", "layer_norm"]
NORMALIZATIONS = get_args(Normalization)

EPSILON = 1e-5
"""Added to a standard deviation before dividing by it, as sae_lens does."""

Row = Float[Tensor, "n 1"]


def normalize(
    x: Float[Tensor, "n d_in"], how: str
) -> tuple[Float[Tensor, "n d_in"], Row | None, Row | None]:
    """Normalised rows, and the scale and shift that bring them back; of float32 or wider rows.

    `constant_norm_rescale` gives every row the norm sqrt(d_in); `layer_norm` takes off its mean and
    divides by its standard deviation (n - 1 in the denominator).

    Raises:
        CodecError: a row of norm zero, which has no direction to keep.
    """
    if how == "layer_norm":
        shift = x.mean(dim=1, keepdim=True)
        centred = x - shift
        scale = centred.std(dim=1, keepdim=True)
        return centred / (scale + EPSILON), scale, shift
    if how == "constant_norm_rescale":
        scale = torch.linalg.vector_norm(x, dim=1, keepdim=True) / x.shape[1] ** 0.5
        if not bool((scale > 0).all()):
            raise CodecError(
                f"x: row {int((scale[:, 0] <= 0).nonzero()[0])} is zero, and this codec divides "
                "each row by its norm: leave padding out"
            )
        return x / scale, scale, None
    return x, None, None


def restore(
    x: Float[Tensor, "n d_in"], scale: Row | None, shift: Row | None
) -> Float[Tensor, "n d_in"]:
    """Rows as they were before `normalize`."""
    x = x if scale is None else x * scale
    return x if shift is None else x + shift
