"""Two models' next-token distributions compared row by row, each exponential taken once.

The hot path of a whole comparison; for one quantity alone, or gradients, use ``divergence``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from emlens.numerics.blocks import split_blocks
from emlens.numerics.validation import WidthError


@dataclass(frozen=True, kw_only=True)
class PredictionPair:
    """What two distributions over the next token have in common, row by row; in nats."""

    kl: Float[Tensor, " n"]
    """KL(p || q)."""
    kl_back: Float[Tensor, " n"]
    """KL(q || p)."""
    entropy_p: Float[Tensor, " n"]
    entropy_q: Float[Tensor, " n"]
    same_top: Bool[Tensor, " n"]
    """Whether both rank the same token first."""
    mass_p: Float64[Tensor, " d_vocab"]
    """Sum of p over the rows."""
    mass_q: Float64[Tensor, " d_vocab"]


def compare_predictions(
    log_p: Float[Tensor, "n d_vocab"], log_q: Float[Tensor, "n d_vocab"]
) -> PredictionPair:
    """Compare finite log-probabilities of two models at the same positions.

    KL(p || q) = sum p (log p - log q), clamped at 0; its error in float32 is about 1e-6 nats.

    Raises:
        WidthError: the shapes differ.
        ValueError: a divergence that is not finite: NaN or infinite log-probabilities.
    """
    if log_p.shape != log_q.shape:
        raise WidthError(f"log_p {tuple(log_p.shape)} and log_q {tuple(log_q.shape)} differ")
    mass = torch.zeros(2, log_p.shape[1], dtype=torch.float64, device=log_p.device)
    columns: list[tuple[Tensor, ...]] = []
    for rows_p, rows_q in zip(*map(split_blocks, (log_p, log_q)), strict=True):
        p, q = rows_p.exp(), rows_q.exp()
        gap = rows_p - rows_q
        columns.append(
            (
                (p * gap).sum(-1),
                -(q * gap).sum(-1),
                -(p * rows_p).sum(-1),
                -(q * rows_q).sum(-1),
                rows_p.argmax(-1) == rows_q.argmax(-1),
            )
        )
        mass[0] += p.sum(0)
        mass[1] += q.sum(0)
    empty = (log_p.new_zeros(0),) * 4 + (log_p.new_zeros(0, dtype=torch.bool),)
    kl, kl_back, entropy_p, entropy_q, same = map(
        torch.cat, zip(*(columns or [empty]), strict=True)
    )
    if not bool(torch.isfinite(kl + kl_back).all()):
        raise ValueError("log_p or log_q holds NaN or infinite values: the model overflowed")
    return PredictionPair(
        kl=kl.clamp(min=0),
        kl_back=kl_back.clamp(min=0),
        entropy_p=entropy_p,
        entropy_q=entropy_q,
        same_top=same,
        mass_p=mass[0],
        mass_q=mass[1],
    )
