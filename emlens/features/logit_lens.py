"""Which tokens a vector in the residual stream promotes and suppresses, two ways.

For vectors that are added to the stream. What is read from them elsewhere, such as by attention in
later layers, no lens of the output shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.models.unembed import compute_logits
from emlens.numerics.blocks import slice_rows
from emlens.numerics.validation import WidthError
from emlens.sites import Site

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "pos_embed")
"""Sites whose vectors are in the residual stream, or are added to it."""


@dataclass(frozen=True, kw_only=True)
class TokenWeight:
    """One token of the vocabulary and how much a vector favours it."""

    token: int
    text: str
    """As the tokenizer writes it alone."""
    value: float


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """Tokens that a vector promotes and suppresses, the most extreme first."""

    promoted: tuple[TokenWeight, ...]
    """By logit: final norm and unembedding of the vector itself, less the mean over the
    vocabulary."""
    suppressed: tuple[TokenWeight, ...]
    aligned: tuple[TokenWeight, ...]
    """By cosine of the vector with the token's column of the unembedding."""
    opposed: tuple[TokenWeight, ...]


def writes_residual(site: Site) -> bool:
    """Whether vectors at a site are in the residual stream, or are added to it."""
    return site.stream in STREAMS


@torch.no_grad()
def read_logit_lens(
    model: Any, vectors: Float[Tensor, "n d_model"], *, n_tokens: int
) -> list[LogitLens]:
    """Look at vectors through the output of a model.

    Args:
        model: a model loaded by emlens, with its tokenizer.
        vectors: in its residual stream; their length does not matter where the final norm has no
            bias.
        n_tokens: how many of either end.

    Raises:
        WidthError: vectors of another width.
        ValueError: more tokens than the vocabulary has, or none.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    W_U = model.unembed.W_U.detach()
    if vectors.ndim != 2 or vectors.shape[1] != len(W_U):
        raise WidthError(
            f"vectors: got shape {tuple(vectors.shape)}, expected [n, {len(W_U)}]: the logit lens "
            "looks at the residual stream"
        )
    if not 1 <= n_tokens <= W_U.shape[1]:
        raise ValueError(f"n_tokens: got {n_tokens}, expected 1 to {W_U.shape[1]}")
    found = []
    norms = W_U.float().norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    for rows in slice_rows(len(vectors), W_U.shape[1], copies=2):
        part = vectors[rows].to(W_U.device, W_U.dtype)
        logits = compute_logits(model, part).float()
        logits = logits - logits.mean(1, keepdim=True)
        unit = torch.nn.functional.normalize(part.float(), dim=1)
        cosines = (unit.to(W_U.dtype) @ W_U).float() / norms
        for own, angle in zip(logits, cosines, strict=True):
            promoted, suppressed = _ends(model.tokenizer, own, n_tokens)
            aligned, opposed = _ends(model.tokenizer, angle, n_tokens)
            found.append(
                LogitLens(
                    promoted=promoted, suppressed=suppressed, aligned=aligned, opposed=opposed
                )
            )
    return found


def _ends(
    tokenizer: Any, values: Float[Tensor, " d_vocab"], n: int
) -> tuple[tuple[TokenWeight, ...], tuple[TokenWeight, ...]]:
    order = values.sort(descending=True, stable=True).indices
    highest, lowest = order[:n].tolist(), order.flip(0)[:n].tolist()
    return _name(tokenizer, values, highest), _name(tokenizer, values, lowest)


def _name(tokenizer: Any, values: Tensor, tokens: Sequence[int]) -> tuple[TokenWeight, ...]:
    return tuple(
        TokenWeight(token=token, text=tokenizer.decode([token]), value=float(values[token]))
        for token in tokens
    )
