"""Streaming count, mean and variance of samples; not for data that fits in memory at once.

Within a chunk two passes run in the dtype of the samples (float32 at least), so that a large mean
costs no digits; chunks are combined in float64, so that batching, sharding and order do not matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emlens.numerics.by_device import ByDevice
from emlens.numerics.validation import (
    EmptyAccumulatorError,
    check_finite,
    check_same,
    check_samples,
)

# Rows reduced at a time. On a processor 2 MB of float32 at width 576, so that the second pass reads
# from cache: reductions down the rows at this size measured 4 to 8 times faster than
# `torch.var_mean(dim=0)`. Elsewhere a batch of the usual 16,384 tokens is one chunk.
_CHUNK_ROWS = ByDevice(cpu=1024, elsewhere=1 << 14)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and variance of the samples seen.

    Attributes:
        count: Number of samples.
        mean: Mean per coordinate, in the units of the samples.
        variance: Population variance per coordinate (divided by `count`, not `count - 1`).
        mean_square_norm: Mean of ||x||^2; its root is the root mean square norm of a sample.
    """

    count: int
    mean: Float64[Tensor, " d"]
    variance: Float64[Tensor, " d"]
    mean_square_norm: float


@dataclass(frozen=True)
class CentredChunk:
    """Rows less `shift`, which is near their mean; `sums` is what is left of them, summed."""

    shift: Tensor  # [d] in the dtype of the samples
    centred: Tensor  # [n d] in the dtype of the samples
    sums: Tensor  # [d] float64

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.centred.shape[0]

    def totals(self) -> "Totals":
        """Count, mean and centred squares of the chunk, corrected for the rounding of the shift."""
        squares = self.centred.square().sum(0).double() - self.sums.square() / self.count
        return Totals(
            count=self.count,
            mean=self.shift.double() + self.sums / self.count,
            squares=squares.clamp(min=0),
        )


@dataclass(frozen=True)
class Totals:
    """What is known of the samples so far: replaced, never changed in place."""

    count: int
    mean: Tensor  # [d] float64
    squares: Tensor  # [d] float64, sum of (x - mean)^2

    def combined(self, other: "Totals") -> "Totals":
        """Totals of both sets of samples.

        Source: Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm for
            Computing Sample Variances, eq. 2.1.
        """
        device = self.mean.device
        count = self.count + other.count
        gap = other.mean.to(device) - self.mean
        weight = self.count * other.count / count
        return Totals(
            count=count,
            mean=self.mean + gap * (other.count / count),
            squares=self.squares + other.squares.to(device) + weight * gap.square(),
        )

    def moments(self) -> Moments:
        """The same as a result."""
        variance = self.squares / self.count
        return Moments(
            count=self.count,
            mean=self.mean.clone(),
            variance=variance,
            mean_square_norm=float((variance + self.mean.square()).sum()),
        )


def centred_chunks(x: Float[Tensor, "n d"]) -> Iterator[CentredChunk]:
    """Yield the rows of x in chunks, each less its own mean, in float32 or the dtype of x if finer.

    Args:
        x: Samples [n d] of any floating-point dtype; no row yields no chunk.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    for rows in x.detach().split(_CHUNK_ROWS.of(x.device)):
        if rows.shape[0] == 0:
            continue
        rows = rows.to(dtype)
        shift = rows.sum(0) / rows.shape[0]
        centred = rows - shift
        yield CentredChunk(shift=shift, centred=centred, sums=centred.sum(0).double())


class MomentsAccumulator:
    """Streaming mean and variance per coordinate.

    Args:
        width: Width d of every sample.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"width is {width}, expected at least 1")
        self.width = width
        self._totals: Totals | None = None

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return 0 if self._totals is None else self._totals.count

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Take in a batch of samples; a batch of no rows changes nothing.

        Args:
            x: Samples [n width].

        Raises:
            WidthError: x is not a matrix of this width.
            NonFiniteError: x holds NaN or infinity. What was accumulated before stays as it was.
        """
        check_samples("x", x, self.width)
        batch: Totals | None = None
        for chunk in centred_chunks(x):
            totals = chunk.totals()
            batch = totals if batch is None else batch.combined(totals)
        if batch is None:
            return
        check_finite("x", batch.mean, batch.squares)
        self._absorb(batch)

    def merge(self, other: "MomentsAccumulator") -> None:
        """Take in what another accumulator of the same width has seen; it stays as it was."""
        check_same("width of other", other.width, "width of this accumulator", self.width)
        if other._totals is not None:
            self._absorb(other._totals)

    def result(self) -> Moments:
        """Moments of all samples seen so far.

        Raises:
            EmptyAccumulatorError: No sample was seen.
        """
        if self._totals is None:
            raise EmptyAccumulatorError(
                "MomentsAccumulator has seen no sample: the positions asked for are probably empty"
            )
        return self._totals.moments()

    def _absorb(self, totals: Totals) -> None:
        self._totals = totals if self._totals is None else self._totals.combined(totals)
