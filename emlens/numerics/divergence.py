"""Divergences between next-token distributions, in nats; not for logits, which must be normalised.

All functions take log-probabilities over the last axis; minus infinity is a probability of zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.numerics.blocks import split_blocks
from emlens.numerics.validation import WidthError

# Log-ratios up to this size neither overflow float32 (e^88) nor belong to probabilities below it.
_SAFE_EXPONENT = 80.0
# How far probabilities may sum from 1. bfloat16 and float16 carry log-probabilities of about 10 to
# 2^-8 and 2^-11 relative; float32 to 2^-24, of which a sum over any vocabulary leaves far less.
_SUM_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}


class NotLogProbabilitiesError(ValueError):
    """Values whose exponentials do not sum to 1 were given as log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class TopChanges:
    """Tokens whose probability changed most, largest change first.

    Attributes:
        risen: Ids of the tokens whose probability rose most from p to q.
        risen_by: q - p of these tokens.
        fallen: Ids of the tokens whose probability fell most.
        fallen_by: q - p of these tokens, negative where it fell.
    """

    risen: Int[Tensor, "*batch k"]
    risen_by: Float[Tensor, "*batch k"]
    fallen: Int[Tensor, "*batch k"]
    fallen_by: Float[Tensor, "*batch k"]


def kl_divergence(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence KL(p || q) = sum p log(p / q), in nats.

    Summed as p log(p / q) - p + q, of which no term is negative, so that rounding cannot make the
    divergence of near-equal distributions negative. Differentiable where all values are finite.

    Args:
        log_p: Log-probabilities.
        log_q: Log-probabilities of the same tokens.

    Returns:
        Divergences, at least 0; infinite where q excludes a token that p allows.

    Raises:
        WidthError: The shapes differ.
        NotLogProbabilitiesError: The exponentials of an argument do not sum to 1.
    """
    _check_same_shape(log_p, log_q)
    return _by_rows(_kl_rows, log_p, log_q)


def js_divergence(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.

    Args and errors as for `kl_divergence`.

    Returns:
        Divergences in nats, from 0 to ln 2.
    """
    _check_same_shape(log_p, log_q)
    return _by_rows(_js_rows, log_p, log_q)


def entropy(log_p: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    """Entropy -sum p log p, in nats, from 0 to ln d_vocab.

    Raises:
        NotLogProbabilitiesError: The exponentials do not sum to 1.
    """
    return _by_rows(_entropy_rows, log_p)


def top_changes(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"], k: int
) -> TopChanges:
    """The k tokens whose probability rose most from p to q, and the k whose fell most.

    Args:
        log_p: Log-probabilities, say of the base model.
        log_q: Log-probabilities of the same tokens, say of the tuned model.
        k: Number of tokens each way, at most d_vocab.
    """
    _check_same_shape(log_p, log_q)
    if not 1 <= k <= log_p.shape[-1]:
        raise ValueError(f"k is {k}, expected 1 to d_vocab = {log_p.shape[-1]}")
    rows_p, rows_q = (t.detach().reshape(-1, t.shape[-1]) for t in (log_p, log_q))
    parts = [
        _top_change_rows(p, q, k) for p, q in zip(*map(split_blocks, (rows_p, rows_q)), strict=True)
    ]
    shape = (*log_p.shape[:-1], k)
    risen, risen_by, fallen, fallen_by = (
        torch.cat(column).reshape(shape) for column in zip(*parts, strict=True)
    )
    return TopChanges(risen=risen, risen_by=risen_by, fallen=fallen, fallen_by=fallen_by)


def _top_change_rows(log_p: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, ...]:
    change = _probabilities("log_q", log_q) - _probabilities("log_p", log_p)
    risen, fallen = change.topk(k), change.topk(k, largest=False)
    return risen.indices, risen.values, fallen.indices, fallen.values


def _kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = _probabilities("log_p", log_p), _probabilities("log_q", log_q)
    return _kl_sum(p, q, log_q.to(p) - log_p.to(p))


def _kl_sum(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """KL(p || q), given also ratio = log(q / p).

    Every term is p (e^ratio - 1 - ratio), as q = p e^ratio and both sum to 1. It is never negative
    and, through expm1, cancels nothing near equality.
    """
    low, high = ratio.aminmax() if ratio.numel() else (ratio.sum(), ratio.sum())
    if bool((low > -_SAFE_EXPONENT) & (high < _SAFE_EXPONENT)):
        return torch.linalg.vecdot(p, torch.expm1(ratio) - ratio).clamp(min=0)
    near = p * (torch.expm1(ratio.clamp(max=1)) - ratio)
    terms = torch.where(ratio.abs() < 1, near, q - p - p * ratio)
    # A token that p excludes contributes only q, also where q excludes it too.
    return torch.where(p == 0, q, terms).clamp(min=0).sum(-1)


def _js_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = _probabilities("log_p", log_p), _probabilities("log_q", log_q)
    log_p, log_q = log_p.to(p), log_q.to(q)
    middle = (p + q) / 2
    log_middle = torch.logaddexp(log_p, log_q) - math.log(2)
    from_p = _kl_sum(p, middle, log_middle - log_p)
    return (from_p + _kl_sum(q, middle, log_middle - log_q)) / 2


def _entropy_rows(log_p: Tensor) -> Tensor:
    p = _probabilities("log_p", log_p)
    # The least finite number times a probability of zero is zero; minus infinity times it is not.
    finite = log_p.to(p).clamp(min=torch.finfo(p.dtype).min)
    return -torch.linalg.vecdot(p, finite).clamp(max=0)


def _probabilities(name: str, log_p: Tensor) -> Tensor:
    """Exponentials in float32 at least, once they are known to sum to 1."""
    tolerance = _SUM_TOLERANCE.get(log_p.dtype, 1e-3)
    p = log_p.to(torch.promote_types(log_p.dtype, torch.float32)).exp()
    off = (p.sum(-1) - 1).abs()
    # Written so that NaN fails too.
    if not bool((off <= tolerance).all()):
        raise NotLogProbabilitiesError(
            f"the exponentials of {name} {tuple(log_p.shape)} do not sum to 1 (off by up to "
            f"{float(off.max()):.3g}): pass log_softmax of the logits, over the whole vocabulary"
        )
    return p


def _check_same_shape(log_p: Tensor, log_q: Tensor) -> None:
    if log_p.shape != log_q.shape or log_p.ndim == 0:
        raise WidthError(
            f"log_p has shape {tuple(log_p.shape)}, log_q {tuple(log_q.shape)}; they must be equal "
            "[..., d_vocab]: cut both to the same positions and to the shared vocabulary"
        )


def _by_rows(function: Callable[..., Tensor], *log_probs: Tensor) -> Tensor:
    """Apply a function of rows [n d_vocab] block by block, so that temporaries stay small."""
    shape = log_probs[0].shape[:-1]
    flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in log_probs)
    parts = [function(*block) for block in zip(*map(split_blocks, flat), strict=True)]
    return torch.cat(parts).reshape(shape)
