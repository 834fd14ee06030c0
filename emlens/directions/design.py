"""How each text enters the sums of a fit: its class, its half, its shuffled labels, its weight.

Decided by the texts alone: neither their order nor the batches change anything.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens.numerics.counter import counter_normal, derive_key

N_SHUFFLED = 16
"""Mean differences of shuffled labels."""
N_RANDOM = 16
"""Random directions with the activations' covariance."""
HALVES = 4
"""Sums of positive and negative texts, first and second half of each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FitDesign:
    """Which sums every text goes into, and with which weight each of its tokens."""

    positive: Bool[Tensor, " rows"]
    """Class of each text."""
    weights: Float[Tensor, " rows"]
    """Weight of each token of a text: 1, or 1 / its number of tokens."""
    effects: Float[Tensor, "sums rows"]
    """Weight of the text's tokens in each sum: positive first and second half, negative first and
    second half, then one sum for each shuffling, of the texts that it calls positive."""
    keys: Int[Tensor, " rows"]
    """Of the random numbers of each text's tokens."""
    paired: bool
    """Whether texts are of one class, and what is averaged is a difference of two models."""
    n_random: int
    """Random directions drawn."""

    @property
    def n_shuffled(self) -> int:
        """Number of shufflings; none where there are too few texts to shuffle."""
        return len(self.effects) - HALVES

    def draws(self, rows: Int[Tensor, " n"], tokens: Int[Tensor, " n"]) -> Float[Tensor, "draws n"]:
        """Weights of tokens in the sums that random directions are made of.

        Row 0 is the weight itself, for the mean; row k is its root times a normal number that is a
        function of the text, the token and k.

        Args:
            rows: text of each token.
            tokens: index of each token in its text.
        """
        weights = self.weights[rows]
        normal = counter_normal(self.keys[rows], tokens, self.n_random)
        return torch.cat([weights[None], weights.sqrt() * normal.T])


def make_design(
    hashes: Sequence[str],
    positive: Sequence[bool],
    n_tokens: Sequence[int],
    *,
    response_weighted: bool,
    paired: bool,
    seed: int,
    n_random: int = N_RANDOM,
) -> FitDesign:
    """Deal texts to halves and shuffled labels.

    Args:
        hashes: names of the texts by what they say; equal ones are told apart by counting.
        positive: class of each.
        n_tokens: tokens that are averaged in each.
        response_weighted: whether each text counts the same, however long.
        paired: whether all are of one class; then shuffling flips the sign of half of them.
        seed: of halves, shuffled labels and random directions.
        n_random: random directions to draw.
    """
    named = _number(hashes)
    order = sorted(range(len(named)), key=named.__getitem__)
    labels = torch.tensor(list(positive), dtype=torch.bool)
    generator = Random(seed)
    first = _deal_halves(order, labels, generator)
    members = [labels & first, labels & ~first, ~labels & first, ~labels & ~first]
    if len(order) > 1:
        members += [_shuffle(order, labels, paired, generator) for _ in range(N_SHUFFLED)]
    counts = torch.tensor(list(n_tokens), dtype=torch.float64)
    weights = 1 / counts if response_weighted else torch.ones_like(counts)
    keys = [derive_key("emlens.directions", seed, name, number) for name, number in named]
    return FitDesign(
        positive=labels,
        weights=weights,
        effects=torch.stack(members).double() * weights,
        keys=torch.tensor(keys, dtype=torch.int64),
        paired=paired,
        n_random=n_random,
    )


def _number(hashes: Sequence[str]) -> list[tuple[str, int]]:
    """Each hash with how often it came before."""
    seen: Counter[str] = Counter()
    named = []
    for name in hashes:
        named.append((name, seen[name]))
        seen[name] += 1
    return named


def _deal_halves(order: Sequence[int], labels: Tensor, generator: Random) -> Tensor:
    """Which texts are in the first half of their class."""
    first = torch.zeros(len(order), dtype=torch.bool)
    for label in (True, False):
        own = [row for row in order if bool(labels[row]) == label]
        generator.shuffle(own)
        first[own[: (len(own) + 1) // 2]] = True
    return first


def _shuffle(order: Sequence[int], labels: Tensor, paired: bool, generator: Random) -> Tensor:
    """Labels dealt anew: as many positive ones as there are, or half of all where classes pair."""
    n_positive = len(order) // 2 if paired else int(labels.sum())
    dealt = torch.zeros(len(order), dtype=torch.bool)
    dealt[generator.sample(list(order), n_positive)] = True
    return dealt
