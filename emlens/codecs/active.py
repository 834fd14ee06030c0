"""The codes that are not 0, without a matrix of all of them; not for the k largest (`topk`).

Of 16,384 codes some dozens are active at a token. Whoever sums them, or reconstructs from them,
goes over the dense matrix once, to find them, and never again.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.codec import ActiveCodes, SparseCodes
from emlens.models.products import multiply

DENSE_SHARE = 1 / 16
"""Share of active codes from which on multiplying by the whole decoder is the faster way."""


def list_above(pre: Float[Tensor, "n d_sae"], floor: Float[Tensor, " d_sae"]) -> ActiveCodes:
    """Those that are above the floor of their latent, or are no number."""
    if _is_fast(pre):
        # Turned round, so that NaN is found, and numpy's, since torch's comparison takes five times
        # as long and its search ten times.
        active = np.less_equal(pre.numpy(), floor.numpy())
        flat = torch.from_numpy(np.flatnonzero(np.logical_not(active, out=active)))
    else:
        flat = (~(pre <= floor)).flatten().nonzero()[:, 0]
    return _take(pre, flat)


def list_active(values: Float[Tensor, "n d_sae"]) -> ActiveCodes:
    """Those that are not 0; NaN is not 0."""
    if _is_fast(values):
        return _take(values, torch.from_numpy(np.flatnonzero(values.numpy() != 0)))
    return _take(values, values.flatten().nonzero()[:, 0])


def drop_inactive(codes: SparseCodes) -> ActiveCodes:
    """Sparse codes without the places that nothing active fills."""
    active = codes.values != 0
    return ActiveCodes(
        counts=active.sum(1),
        latents=codes.indices[active],
        values=codes.values[active],
        d_sae=codes.d_sae,
    )


def decode_active(
    codes: ActiveCodes, *, W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"]
) -> Float[Tensor, "n d_in"]:
    """Return b_dec + codes W_dec."""
    n = len(codes.counts)
    if not n:
        return b_dec.new_zeros(0, len(b_dec))
    if len(codes.latents) > DENSE_SHARE * n * codes.d_sae:
        dense = codes.values.new_zeros(n, codes.d_sae)
        dense[codes.rows, codes.latents] = codes.values
        return multiply(dense, W_dec.mT, b_dec, loose=True)
    starts = codes.counts.cumsum(0) - codes.counts
    found = F.embedding_bag(
        codes.latents, W_dec, starts, per_sample_weights=codes.values, mode="sum"
    )
    return found.add_(b_dec)


def _take(values: Tensor, flat: Tensor) -> ActiveCodes:
    """Codes at places of the matrix, rows laid end to end."""
    n, d_sae = values.shape
    starts = torch.arange(n + 1, device=flat.device) * d_sae
    counts = torch.searchsorted(flat, starts).diff()
    return ActiveCodes(
        counts=counts,
        latents=flat - starts[:-1].repeat_interleave(counts),
        values=values.flatten()[flat],
        d_sae=d_sae,
    )


def _is_fast(values: Tensor) -> bool:
    """Whether numpy can look at the values as they lie in memory."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
