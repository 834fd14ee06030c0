"""Streaming sums of samples under many weightings at once; not for products of samples.

One pass gives every mean that is a ratio of such sums: of classes, halves, shuffled labels, or
random draws.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emlens.numerics.by_device import ByDevice
from emlens.numerics.validation import (
    EmptyAccumulatorError,
    WidthError,
    check_finite,
    check_same,
    check_samples,
)

# Rows converted to float64 at a time: 4 MB at width 576, which a processor's cache holds, or
# 320 MiB at width 5120.
_CHUNK_ROWS = ByDevice(cpu=1024, elsewhere=1 << 13)


@dataclass(frozen=True, kw_only=True)
class WeightedSums:
    """Sums over the samples seen, one row a weighting."""

    sums: Float64[Tensor, "m d"]
    """Sum of weight times sample."""
    weights: Float64[Tensor, " m"]
    """Sum of weights."""


class WeightedSumsAccumulator:
    """Streaming sum_i w_i x_i for m weightings, all in float64.

    Args:
        m: Number of weightings.
        width: Width d of every sample.
    """

    def __init__(self, m: int, width: int) -> None:
        if m < 1 or width < 1:
            raise ValueError(f"m and width are {m} and {width}, expected at least 1")
        self.m = m
        self.width = width
        self._sums: Tensor | None = None

    def update(self, x: Float[Tensor, "n d"], weights: Float[Tensor, "m n"]) -> None:
        """Take in a batch of samples; a batch of no rows changes nothing.

        Args:
            x: Samples [n width].
            weights: Weight of each sample in each of the m sums; any sign.

        Raises:
            WidthError: x or weights have another shape.
            NonFiniteError: one of them holds NaN or infinity. What was accumulated before stays as
                it was.
        """
        check_samples("x", x, self.width)
        if weights.shape != (self.m, len(x)):
            raise WidthError(
                f"weights has shape {tuple(weights.shape)}, expected [{self.m}, {len(x)}]: one "
                "weight a sample in each sum"
            )
        if len(x) == 0:
            return
        wide = weights.to(x.device, torch.float64)
        batch = torch.cat(
            [x.new_zeros(self.m, self.width, dtype=torch.float64), wide.sum(1)[:, None]], 1
        )
        step = _CHUNK_ROWS.of(x.device)
        for rows, part in zip(x.detach().split(step), wide.split(step, 1), strict=True):
            batch[:, :-1].addmm_(part, rows.double())
        check_finite("x or weights", batch)
        self._sums = batch if self._sums is None else self._sums + batch

    def merge(self, other: "WeightedSumsAccumulator") -> None:
        """Take in what another accumulator of the same sizes has seen; it stays as it was."""
        check_same("width of other", other.width, "width of this accumulator", self.width)
        check_same("m of other", other.m, "m of this accumulator", self.m)
        if other._sums is not None:
            theirs = other._sums
            self._sums = theirs if self._sums is None else self._sums + theirs.to(self._sums.device)

    def result(self) -> WeightedSums:
        """Sums over all samples seen so far, on the CPU.

        Raises:
            EmptyAccumulatorError: No sample was seen.
        """
        if self._sums is None:
            raise EmptyAccumulatorError(
                "WeightedSumsAccumulator has seen no sample: the positions asked for are probably "
                "empty"
            )
        sums = self._sums.cpu()
        return WeightedSums(sums=sums[:, :-1].clone(), weights=sums[:, -1].clone())
