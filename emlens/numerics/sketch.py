"""Top directions of the variance from one pass over samples; not for exact covariances.

The covariance itself (width x width at every site) is never formed: only its product with a few
random test vectors is kept.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emlens.numerics.moments import CentredChunk, Moments, Totals, centred_chunks
from emlens.numerics.projection import with_canonical_signs
from emlens.numerics.validation import (
    EmptyAccumulatorError,
    check_finite,
    check_same,
    check_samples,
)

# Eigenvalues within this many regularising shifts of zero are rounding, not variance.
_ROUNDING_SHIFTS = 10.0
# Sets of test vectors kept for the sketches that are still to come: 1.3 MB each at width 5120.
_KEPT_SETS = 16


class SketchMismatchError(ValueError):
    """Two sketches were made with different test vectors, so their sums mean nothing."""


@dataclass(frozen=True, kw_only=True)
class TopDirections:
    """Directions that carry most variance, largest first.

    Attributes:
        directions: Orthonormal rows, the largest entry of each positive. A row is zero, with zero
            variance, where the data has no further direction above rounding.
        variances: Variance along each direction, in squared units of the samples.
        shares: Part of the total variance that each direction carries, in [0, 1].
        total_variance: Trace of the (population) covariance.
        isotropic_share: Largest share expected of isotropic noise with as many samples; a top share
            near it means that nothing stands out.
    """

    directions: Float64[Tensor, "k d"]
    variances: Float64[Tensor, " k"]
    shares: Float64[Tensor, " k"]
    total_variance: float
    isotropic_share: float


def isotropic_share(count: int, width: int) -> float:
    """Largest share of the variance that one direction of isotropic noise is expected to carry.

    (1 + sqrt(width / count))^2 / width, at most 1.

    Args:
        count: Number of samples.
        width: Width d of a sample.

    Source: Marchenko and Pastur 1967, the upper edge of the spectrum.
    """
    if count < 1 or width < 1:
        raise ValueError(f"count and width are {count} and {width}, expected at least 1")
    return min(1.0, (1 + math.sqrt(width / count)) ** 2 / width)


@dataclass(frozen=True)
class _SketchTotals:
    """Centred totals: the moments and the covariance, times count, applied to the test vectors."""

    moments: Totals
    image: Tensor  # [d k] float64

    def combined(self, other: "_SketchTotals", test: Tensor) -> "_SketchTotals":
        device = self.image.device
        gap = other.moments.mean.to(device) - self.moments.mean
        moments = self.moments.combined(other.moments)
        weight = self.moments.count * other.moments.count / moments.count
        bridge = weight * torch.outer(gap, gap @ test.to(device))
        return _SketchTotals(moments, self.image + other.image.to(device) + bridge)


def _sketch_chunk(chunk: CentredChunk, test: Tensor) -> _SketchTotals:
    rows = chunk.centred
    image = (rows.T @ (rows @ test.to(rows))).double()
    sums = chunk.sums
    image = image - torch.outer(sums, sums @ test.to(sums)) / chunk.count
    return _SketchTotals(chunk.totals(), image)


@lru_cache(maxsize=_KEPT_SETS)
def _test_vectors(width: int, rank: int, seed: int, device: torch.device) -> Tensor:
    """Orthonormal test vectors [width rank] float64, drawn and factored on the CPU.

    All sketches of these numbers, such as those of all layers, share one tensor: not to be written.
    """
    here = torch.device("cpu")
    # It outlives the caller: made in inference mode, it could not take part in a gradient later.
    with torch.inference_mode(False):
        if device != here:
            return _test_vectors(width, rank, seed, here).to(device)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(width, rank, generator=generator, dtype=torch.float64, device=here)
        return torch.linalg.qr(draws).Q


class CovarianceSketch:
    """Mergeable Nystroem sketch of a covariance: Y = sum (x - mean) (x - mean)^T Omega.

    Exact, to rounding, where the covariance has at most `rank` directions; else the variances are
    lower bounds, sharpest for the top directions.

    Args:
        width: Width d of every sample.
        rank: Number of test vectors; more than `width` are not used.
        seed: Seed of the test vectors. Only sketches of equal width, rank and seed merge.

    Source: Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1706.05736, algorithm 3.
    Differs: kept centred by Chan's update, so that a large mean costs no digits; the eigenvalues of
        the small matrix are cut off instead of a Cholesky factor that rounding could refuse.
    """

    def __init__(self, width: int, rank: int = 32, seed: int = 0) -> None:
        if width < 1 or rank < 1:
            raise ValueError(f"width and rank are {width} and {rank}, expected at least 1")
        self.width = width
        self.rank = min(rank, width)
        self.seed = seed
        self._totals: _SketchTotals | None = None
        self._epsilon = torch.finfo(torch.float64).eps

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return 0 if self._totals is None else self._totals.moments.count

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Take in a batch of samples; a batch of no rows changes nothing.

        Args:
            x: Samples [n width].

        Raises:
            WidthError: x is not a matrix of this width.
            NonFiniteError: x holds NaN or infinity. What was accumulated before stays as it was.
        """
        check_samples("x", x, self.width)
        batch: _SketchTotals | None = None
        test = self._test(x.device)
        for chunk in centred_chunks(x):
            totals = _sketch_chunk(chunk, test)
            batch = totals if batch is None else batch.combined(totals, test)
        if batch is None:
            return
        check_finite("x", batch.moments.mean, batch.moments.squares, batch.image)
        dtype = torch.promote_types(x.dtype, torch.float32)
        self._absorb(batch, torch.finfo(dtype).eps)

    def merge(self, other: "CovarianceSketch") -> None:
        """Take in what another sketch has seen; it stays as it was.

        Raises:
            WidthError: The other sketch has another width.
            SketchMismatchError: The other sketch has another rank or seed.
        """
        check_same("width of other", other.width, "width of this sketch", self.width)
        if (other.rank, other.seed) != (self.rank, self.seed):
            raise SketchMismatchError(
                f"other has rank {other.rank} and seed {other.seed}, this sketch rank {self.rank} "
                f"and seed {self.seed}: make all shards' sketches with the same two numbers"
            )
        if other._totals is not None:
            self._absorb(other._totals, other._epsilon)

    def moments(self) -> Moments:
        """Mean and variance of the same samples, which the sketch keeps anyway."""
        return self._seen().moments.moments()

    def result(self) -> TopDirections:
        """Top directions of all samples seen so far.

        Raises:
            EmptyAccumulatorError: No sample was seen.
        """
        totals = self._seen()
        count = totals.moments.count
        total = float(totals.moments.squares.sum()) / count
        image = totals.image / count
        # Samples that differ by no more than the rounding of their mean do not vary.
        floor = float(totals.moments.mean.square().sum()) * self._epsilon**2
        test = self._test(image.device)
        directions, variances = _top_directions(image, test, self._epsilon, floor)
        return TopDirections(
            directions=directions,
            variances=variances,
            shares=variances / total if total > 0 else torch.zeros_like(variances),
            total_variance=total,
            isotropic_share=isotropic_share(count, self.width),
        )

    def _seen(self) -> _SketchTotals:
        if self._totals is None:
            raise EmptyAccumulatorError(
                "CovarianceSketch has seen no sample: the positions asked for are probably empty"
            )
        return self._totals

    def _test(self, device: torch.device) -> Tensor:
        return _test_vectors(self.width, self.rank, self.seed, device)

    def _absorb(self, totals: _SketchTotals, epsilon: float) -> None:
        own = self._totals
        if own is None:
            self._totals = totals
        else:
            self._totals = own.combined(totals, self._test(own.image.device))
        self._epsilon = max(self._epsilon, epsilon)


def _top_directions(
    image: Tensor, test: Tensor, epsilon: float, floor: float
) -> tuple[Tensor, Tensor]:
    """Eigenvectors [k d] and eigenvalues [k] of image (test^T image)^+ image^T."""
    width, rank = image.shape
    shift = math.sqrt(width) * epsilon * float(torch.linalg.matrix_norm(image, 2))
    if shift == 0:
        return image.new_zeros(rank, width), image.new_zeros(rank)
    shifted = image + shift * test
    core = test.T @ shifted
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > shift / 2
    root = shifted @ (vectors[:, kept] / values[kept].sqrt())
    left, singular, _ = torch.linalg.svd(root, full_matrices=False)
    found = singular.square() - shift
    found = torch.where(
        found > max(_ROUNDING_SHIFTS * shift, floor), found, torch.zeros_like(found)
    )
    directions = image.new_zeros(rank, width)
    variances = image.new_zeros(rank)
    directions[: len(found)] = with_canonical_signs(left.T) * (found > 0)[:, None]
    variances[: len(found)] = found
    return directions, variances
