"""Streaming quantiles of positive sizes, such as norms, to half a percent; not for signed values.

A histogram with bins of equal width in the logarithm: counts add up, so any sharding and order
gives exactly the same one.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError, WidthError

BINS_PER_OCTAVE = 70
"""A bin ends 2^(1/70), about 1.00995, times higher than it starts: its middle is good to 0.5 %."""
LOWEST = -150
"""Power of two of the smallest size told from zero: below float32's smallest number."""
HIGHEST = 128
"""Power of two that no size reaches: where float32 ends."""
_N_BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE


@dataclass(frozen=True, kw_only=True)
class SizeHistogram:
    """How many of the sizes seen fell into each bin."""

    zeros: int
    """Sizes that were exactly zero."""
    counts: Int64[Tensor, " bins"]
    """Bin i holds the sizes in [2^(LOWEST + i / 70), 2^(LOWEST + (i + 1) / 70))."""

    @property
    def count(self) -> int:
        """Number of sizes seen."""
        return self.zeros + int(self.counts.sum())

    @property
    def median(self) -> float:
        """The middle size, good to half a percent."""
        return self.quantile(0.5)

    def quantile(self, q: float) -> float:
        """Quantile between order statistics, as numpy's default, good to half a percent.

        Args:
            q: Between 0 (the smallest) and 1 (the largest).
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q is {q}, expected a probability in [0, 1]")
        place = q * (self.count - 1)
        below = math.floor(place)
        low, high = (self._order_statistic(k) for k in (below, math.ceil(place)))
        return low + (high - low) * (place - below)

    def _order_statistic(self, k: int) -> float:
        """The k-th smallest size, counted from 0: zero, or the middle of its bin."""
        if k < self.zeros:
            return 0.0
        reached = self.counts.cumsum(0)
        index = int(torch.searchsorted(reached, k - self.zeros, right=True))
        return 2.0 ** (LOWEST + (index + 0.5) / BINS_PER_OCTAVE)


class SizeHistogramAccumulator:
    """Streaming quantiles of sizes from 2^-150 to 2^128, and zeros."""

    def __init__(self) -> None:
        self._zeros = 0
        self._counts = torch.zeros(_N_BINS, dtype=torch.int64)

    @property
    def count(self) -> int:
        """Number of sizes seen."""
        return self._zeros + int(self._counts.sum())

    def update(self, sizes: Float[Tensor, " n"]) -> None:
        """Take in sizes; none change nothing.

        Raises:
            WidthError: sizes has not exactly one axis.
            NonFiniteError: a size is NaN, infinite or beyond the bins. What was counted before
                stays as it was.
            ValueError: a size is negative.
        """
        if sizes.ndim != 1:
            raise WidthError(f"sizes has shape {tuple(sizes.shape)}, expected [n]: flatten it")
        if len(sizes) == 0:
            return
        wide = sizes.detach().double()
        smallest, largest = (float(edge) for edge in wide.aminmax())
        if smallest < 0:
            raise ValueError(f"sizes holds {smallest}: a size is not negative; pass norms")
        if not largest < 2.0**HIGHEST:
            raise NonFiniteError(
                f"sizes holds {largest}, expected less than 2^{HIGHEST}: look for padding "
                "positions that were not masked out"
            )
        positive = wide[wide > 0]
        bins = ((positive.log2() - LOWEST) * BINS_PER_OCTAVE).floor().long()
        counts = torch.bincount(bins.clamp(0, _N_BINS - 1), minlength=_N_BINS).cpu()
        self._zeros += len(wide) - len(positive)
        self._counts = self._counts + counts

    def merge(self, other: "SizeHistogramAccumulator") -> None:
        """Take in what another accumulator has seen; it stays as it was."""
        self._zeros += other._zeros
        self._counts = self._counts + other._counts

    def result(self) -> SizeHistogram:
        """Histogram of all sizes seen so far.

        Raises:
            EmptyAccumulatorError: No size was seen.
        """
        if not self.count:
            raise EmptyAccumulatorError(
                "SizeHistogramAccumulator has seen no size: the positions asked for are probably "
                "empty"
            )
        return SizeHistogram(zeros=self._zeros, counts=self._counts.clone())
