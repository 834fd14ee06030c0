"""Streaming covariance of samples; not for widths whose square does not fit in memory.

At every site of a large model the matrices would be gigabytes: `CovarianceSketch` keeps only their
top directions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emlens.numerics.moments import CentredChunk, centred_chunks
from emlens.numerics.validation import (
    EmptyAccumulatorError,
    check_finite,
    check_same,
    check_samples,
)


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Count, mean and covariance of the samples seen."""

    count: int
    """Number of samples."""
    mean: Float64[Tensor, " d"]
    """Mean per coordinate, in the units of the samples."""
    covariance: Float64[Tensor, "d d"]
    """Population covariance (divided by `count`, not `count - 1`), exactly symmetric."""


@dataclass(frozen=True)
class _Scatter:
    """What is known of the samples so far: replaced, never changed in place."""

    count: int
    mean: Tensor  # [d] float64
    products: Tensor  # [d d] float64, sum of (x - mean) (x - mean)^T

    def combined(self, other: "_Scatter") -> "_Scatter":
        """Scatter of both sets of samples, by Chan's update of the products."""
        device = self.mean.device
        count = self.count + other.count
        gap = other.mean.to(device) - self.mean
        bridge = torch.outer(gap, gap) * (self.count * other.count / count)
        return _Scatter(
            count=count,
            mean=self.mean + gap * (other.count / count),
            products=self.products + other.products.to(device) + bridge,
        )


def _scatter_chunk(chunk: CentredChunk) -> _Scatter:
    products = (chunk.centred.T @ chunk.centred).double()
    return _Scatter(
        count=chunk.count,
        mean=chunk.shift.double() + chunk.sums / chunk.count,
        products=products - torch.outer(chunk.sums, chunk.sums) / chunk.count,
    )


class CovarianceAccumulator:
    """Streaming mean and covariance: products in the dtype of the samples, sums in float64.

    Args:
        width: Width d of every sample; width x width values are kept.

    Source: Chan, Golub and LeVeque 1979, eq. 2.1, for products instead of squares.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"width is {width}, expected at least 1")
        self.width = width
        self._scatter: _Scatter | None = None

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return 0 if self._scatter is None else self._scatter.count

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Take in a batch of samples; a batch of no rows changes nothing.

        Args:
            x: Samples [n width].

        Raises:
            WidthError: x is not a matrix of this width.
            NonFiniteError: x holds NaN or infinity. What was accumulated before stays as it was.
        """
        check_samples("x", x, self.width)
        batch: _Scatter | None = None
        for chunk in centred_chunks(x):
            scatter = _scatter_chunk(chunk)
            batch = scatter if batch is None else batch.combined(scatter)
        if batch is None:
            return
        check_finite("x", batch.mean, batch.products)
        self._absorb(batch)

    def merge(self, other: "CovarianceAccumulator") -> None:
        """Take in what another accumulator of the same width has seen; it stays as it was."""
        check_same("width of other", other.width, "width of this accumulator", self.width)
        if other._scatter is not None:
            self._absorb(other._scatter)

    def result(self) -> Covariance:
        """Covariance of all samples seen so far.

        Raises:
            EmptyAccumulatorError: No sample was seen.
        """
        if self._scatter is None:
            raise EmptyAccumulatorError(
                "CovarianceAccumulator has seen no sample: the positions asked for are probably "
                "empty"
            )
        products = self._scatter.products / self._scatter.count
        return Covariance(
            count=self._scatter.count,
            mean=self._scatter.mean.clone(),
            covariance=(products + products.T) / 2,
        )

    def _absorb(self, scatter: _Scatter) -> None:
        self._scatter = scatter if self._scatter is None else self._scatter.combined(scatter)
