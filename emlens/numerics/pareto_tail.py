"""The upper tail of sampled sums by a generalised Pareto distribution, many columns at once.

For probabilities that hardly a sample was drawn beyond. A fit to the 250 largest of 10,000 is right
to about a factor of two at 1e-4 and of five at 1e-5: there are no digits in it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from emlens.numerics.validation import check_matrix, check_same

_LONGEST = 0.5
"""Largest shape that two moments can give: with a longer tail there is no variance."""


@dataclass(frozen=True, kw_only=True)
class ParetoTail:
    """P(S > s) = share (1 + shape (s - threshold) / scale)^(-1 / shape), above the threshold."""

    threshold: Float64[Tensor, " column"]
    """Where the tail begins."""
    share: float
    """Probability of lying beyond it."""
    scale: Float64[Tensor, " column"]
    """In the units of the sums."""
    shape: Float64[Tensor, " column"]
    """0 for an exponential tail; a negative one ends at threshold - scale / shape."""

    def survival(self, sums: Float64[Tensor, " column"]) -> Float64[Tensor, " column"]:
        """Probability of a sum at least as large, in each column; `share` below the threshold."""
        excess = ((sums - self.threshold) / self.scale).clamp(min=0).nan_to_num(nan=0.0)
        small = self.shape.abs() < 1e-8  # where the power has lost its digits to rounding
        shape = torch.where(small, 1.0, self.shape)
        left = (1 + shape * excess).clamp(min=0).pow(-1 / shape)
        return self.share * torch.where(small, (-excess).exp(), left)


def fit_pareto_tail(
    top: Float64[Tensor, "rank column"], *, n: int, largest: Float64[Tensor, " column"]
) -> ParetoTail:
    """Fit the tail to the largest sampled sums, by their mean and variance.

    With m and v of the excesses over the threshold, shape = (1 - m^2 / v) / 2 and
    scale = m (1 - shape). A negative shape is raised to where the tail ends at the largest sum that
    is possible at all, so that no possible sum has probability 0.

    Source: Hosking and Wallis 1987, Technometrics 29, 339 (moments); Knijnenburg et al. 2009,
        Bioinformatics 25, i161 (threshold halfway between two sums).
    Differs: the bound on the shape; no test of the fit.

    Args:
        top: the largest sampled sums, largest first; the last is only used for the threshold.
        n: how many sums were sampled.
        largest: the largest possible sum.

    Raises:
        WidthError: fewer than three sums, or a bound for another number of columns.
    """
    check_matrix("top", top)
    check_same("columns of top", top.shape[1], "entries of largest", len(largest))
    if len(top) < 3:
        check_same("rows of top", len(top), "fewest sums a tail can be fitted to", 3)
    threshold = (top[-2] + top[-1]) / 2
    excess = top[:-1] - threshold
    mean, variance = excess.mean(0), excess.var(0, correction=0)
    shape = (0.5 * (1 - mean.square() / variance)).clamp(max=_LONGEST)
    room = (largest - threshold - mean).clamp(min=0)
    shape = shape.maximum(-mean / room).nan_to_num(nan=0.0, neginf=0.0)
    return ParetoTail(
        threshold=threshold, share=(len(top) - 1) / n, scale=mean * (1 - shape), shape=shape
    )
