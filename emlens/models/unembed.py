"""Final norm, unembedding and soft cap: from the last residual stream to log-probabilities.

Logits over a large vocabulary are made in slices; ask for a whole tensor of short inputs only.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utilities.activation_functions import apply_softcap

from emlens.numerics.blocks import slice_rows


def compute_logits(
    model: HookedTransformer, resid: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """Return logits, soft cap included, of residual streams after the last block."""
    logits = model.unembed(model.ln_final(resid[None]))
    return apply_softcap(logits, model.cfg.output_logits_soft_cap)[0]


def log_probabilities(
    model: HookedTransformer, resid: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """Return log-probabilities in float32 at least; for inputs of one slice or less."""
    logits = compute_logits(model, resid)
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def log_prob_slices(
    model: HookedTransformer, resid: Float[Tensor, "n d_model"]
) -> Iterator[tuple[slice, Float[Tensor, "m d_vocab"]]]:
    """Yield (rows, log-probabilities of those rows), at most 2^26 values at a time."""
    for rows in slice_rows(len(resid), model.cfg.d_vocab):
        yield rows, log_probabilities(model, resid[rows])
