"""How the next token is chosen from logits; how logits are made is none of its business.

By Gumbel-max with noise keyed by row and step: argmax(logits / T + g) is a draw from
softmax(logits / T), and near-equal logits give equal tokens whatever rows stand beside.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens.numerics.blocks import slice_rows
from emlens.numerics.counter import counter_gumbel

_COPIES = 6
"""Tensors as large as float32 logits that choosing holds at once; int64 counts as two."""

_FEW = 1024
"""Tokens looked at first for a nucleus, where the vocabulary is far larger."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Raises:
        ValueError: a number out of its range.
    """

    n: int
    """Responses to each prompt."""
    temperature: float | int = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float | int = 1.0
    """Sample from the fewest likeliest tokens that together have at least this probability."""
    max_new_tokens: int = 600
    """Longest response, in tokens, the stop token included."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: got {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected more than 0 and at most 1")
        for name in ("temperature", "top_p"):  # 1 and 1.0 are one setting, also once written down
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: no random numbers are used."""
        return self.temperature == 0


def choose_tokens(
    logits: Float[Tensor, "n d_vocab"],
    *,
    keys: Int[Tensor, " n"] | None,
    step: int,
    sampling: Sampling,
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """Choose one token a row.

    Args:
        logits: of the last position.
        keys: int64, the key of each row's random numbers; None only if greedy.
        step: which token of the response this is, from 0.
        sampling: temperature and top-p; the rest is not looked at.

    Returns:
        The tokens, and whether each row's logits were numbers.

    Source: Gumbel 1954, Statistical theory of extreme values; Maddison, Tarlow, Minka 2014, A*
        sampling, section 2.
    """
    n, d_vocab = logits.shape
    parts = [
        _choose(logits[rows], None if keys is None else keys[rows], step, sampling)
        for rows in slice_rows(n, d_vocab, copies=1 if sampling.greedy else _COPIES)
    ]
    top, chosen = (torch.cat(found) for found in zip(*parts, strict=True))
    return chosen, top.isfinite()


def _choose(
    logits: Tensor, keys: Tensor | None, step: int, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    if sampling.greedy:
        return logits.max(dim=-1)
    assert keys is not None
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if sampling.top_p < 1:
        scaled = keep_top_p(scaled, sampling.top_p)
    return scaled.add_(counter_gumbel(keys, step, logits.shape[-1])).max(dim=-1)


def keep_top_p(logits: Float[Tensor, "n d_vocab"], top_p: float) -> Float[Tensor, "n d_vocab"]:
    """Set to -inf all but the fewest likeliest tokens whose probabilities add up to top_p.

    Source: Holtzman et al. 2020, The curious case of neural text degeneration, arXiv 1904.09751,
        section 3.1.
    """
    places, p = _likeliest(logits, top_p)
    # What the likelier tokens before it leave undone decides whether a token is needed.
    needed = p.cumsum(dim=-1, dtype=torch.float64) - p < top_p
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, places, needed)
    return logits.masked_fill(~kept, -torch.inf)


def _likeliest(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens by falling probability, at least as many as reach top_p, and their probabilities."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    if logits.shape[-1] > 4 * _FEW:
        # Nearly always so few tokens are enough, and finding them is no sort.
        ordered, places = logits.topk(_FEW)
        p = (ordered - total).exp()
        if bool((p.sum(dim=-1, dtype=torch.float64) >= top_p).all()):
            return places, p
    ordered, places = logits.sort(dim=-1, descending=True)
    return places, (ordered - total).exp()
