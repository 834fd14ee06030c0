"""Paths on which nothing happens, with the step lengths of a given one, to judge a turn by.

Drawn in as many coordinates as a path has points, which for isotropic noise of any width is exact.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from emlens.numerics.paths import (
    LocalCosine,
    bend_prominences,
    local_cosine,
    noise_dimension,
    normalise_gram,
    step_cosines,
    step_lengths,
)

NullKind = Literal["straight", "random_walk", "growth", "decay", "momentum"]
"""A straight line with noise; no trend at all; a line without noise; a straight line with noise
whose steps shrink to nothing; a straight line whose noise an optimiser with momentum has averaged
since step 0, so that its first steps are less alike than later ones."""
KINDS: tuple[NullKind, ...] = get_args(NullKind)
MOMENTUM = 0.9
"""Share of the running mean of gradients that a training step keeps: beta_1 of Adam (Kingma and Ba
2015, arXiv 1412.6980, section 2), which fine-tunes seldom change."""
_NOISE_RANGE = (-4.0, 4.0)
"""Decimal logarithms of noise over trend in a gradient, between which it is looked for."""
_TOGETHER = 25
"""Paths that are drawn at once: memory grows with them and with the square of the points."""


@dataclass(frozen=True, kw_only=True)
class BendSettings:
    """How bends are looked for; see `local_cosine`."""

    window: int
    """k, in training steps."""
    threshold: float
    """Least movement, as a share of the last point's norm."""
    normalised: bool = False
    """Whether each point is divided by its norm first."""


@dataclass(frozen=True, kw_only=True)
class PathShape:
    """What null paths take over from a path."""

    lengths: Float64[Tensor, " n"]
    """Of its steps."""
    steps: Int[Tensor, " t"]
    """Training step of each point."""
    start: float
    """Norm of its first point."""
    straightness: float
    """Median cosine of one step with the next, in [0, 1]."""
    dimension: int
    """That its noise spreads over."""


def shape_of_path(
    gram: Float64[Tensor, "t t"], steps: Int[Tensor, " t"], *, width: int
) -> PathShape:
    """Measure what null paths need.

    Args:
        gram: Inner products of the path's points.
        steps: The training step of each point, ascending.
        width: Numbers in a point.
    """
    cosines = step_cosines(gram).diagonal(1)
    known = cosines[~cosines.isnan()]
    return PathShape(
        lengths=step_lengths(gram),
        steps=steps,
        start=math.sqrt(max(0.0, float(gram[0, 0]))),
        straightness=min(1.0, max(0.0, float(known.median()))) if len(known) else 0.0,
        dimension=noise_dimension(gram, largest=width),
    )


def sample_null_paths(
    shape: PathShape, kind: NullKind, *, n: int, generator: torch.Generator
) -> Float64[Tensor, "n t c"]:
    """Points of paths without a turn, in coordinates of their own."""
    moved = len(shape.lengths)
    noise = _random_directions(n, moved + 1, shape.dimension, generator)
    # A coordinate of its own for the trend: in many dimensions noise has no part in it.
    noise = torch.cat([noise, torch.zeros(n, moved + 1, 1, dtype=torch.float64)], dim=2)
    if kind == "momentum":
        trend, mixing = _average(shape)
        moves = mixing @ noise[:, 1:]
        moves[..., -1] = trend
    else:
        kept = {"random_walk": 0.0, "growth": 1.0}.get(kind, shape.straightness)
        moves = math.sqrt(1 - kept) * noise[:, 1:]
        moves[..., -1] = math.sqrt(kept)
    lengths = shape.lengths
    if kind == "decay":
        lengths = lengths * torch.linspace(1, 0, moved + 1, dtype=torch.float64)[:-1]
    moves *= lengths[:, None] / torch.linalg.vector_norm(moves, dim=2, keepdim=True)
    start = shape.start * noise[:, :1]
    return torch.cat([start, start + moves.cumsum(1)], dim=1)


def null_prominences(
    gram: Float64[Tensor, "t t"],
    steps: Int[Tensor, " t"],
    settings: BendSettings,
    *,
    width: int,
    n: int = 200,
    seed: int = 0,
) -> dict[str, Float64[Tensor, " n"]]:
    """Prominence of the sharpest bend of null paths, by kind; 0 where no point moves far enough."""
    shape = shape_of_path(gram, steps, width=width)
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(part) for part in torch.arange(n).split(_TOGETHER)]
    return {
        kind: torch.cat(
            [
                prominences_of_paths(
                    sample_null_paths(shape, kind, n=size, generator=generator), steps, settings
                )
                for size in sizes
            ]
        )
        for kind in KINDS
    }


def prominences_of_paths(
    points: Float64[Tensor, "n t c"], steps: Int[Tensor, " t"], settings: BendSettings
) -> Float64[Tensor, " n"]:
    """Prominence of the sharpest bend of each path; 0 where no point moves far enough."""
    if settings.normalised:
        norms = torch.linalg.vector_norm(points, dim=2)
        real = (norms > 0).all(0)
        points, steps = points[:, real] / norms[:, real, None], steps[real]
    grams = points @ points.transpose(1, 2)
    return bend_prominences(grams, steps, window=settings.window, threshold=settings.threshold)


def measure_bends(
    gram: Float64[Tensor, "t t"],
    steps: Int[Tensor, " t"],
    settings: BendSettings,
) -> LocalCosine:
    """Local cosines of a path, or of its points at length one; points of norm zero are left out."""
    window, threshold = settings.window, settings.threshold
    if not settings.normalised:
        return local_cosine(gram, steps, window=window, threshold=threshold)
    real = torch.nonzero(gram.diagonal() > 0)[:, 0]
    unit = normalise_gram(gram[real][:, real])
    found = local_cosine(unit, steps[real], window=window, threshold=threshold)
    return LocalCosine(
        index=real[found.index],
        cosine=found.cosine,
        n_uneven=found.n_uneven + len(steps) - len(real),
        n_small=found.n_small,
    )


def _average(shape: PathShape) -> tuple[Float64[Tensor, " n"], Float64[Tensor, "n n"]]:
    """What momentum makes of gradients between points: their trend, and the mixing of their noise.

    Noise is as strong as the path's straightness says; where the noise alone would be straighter
    than the path, there is next to no trend. The mixing is a root of the covariance of the moves,
    which gives Gaussian noise its law without a draw for each training step.
    """
    until = torch.arange(1, int(shape.steps[-1]) + 1)
    # A gradient's weight in the point `age` steps on, its own step included: the sum of its shares.
    age = (shape.steps[:, None] - until + 1).clamp(min=0)
    weights = (1 - MOMENTUM ** age.double()).diff(dim=0)
    trend, covariance = weights.sum(1), weights @ weights.T
    low, high = _NOISE_RANGE
    for _ in range(40):
        middle = (low + high) / 2
        moved = trend[:, None] * trend + 10 ** (2 * middle) * covariance
        norms = moved.diagonal().sqrt()
        found = float((moved.diagonal(1) / (norms[1:] * norms[:-1])).median())
        low, high = (middle, high) if found > shape.straightness else (low, middle)
    return trend, 10**low * torch.linalg.cholesky(covariance)


def _random_directions(
    paths: int, n: int, dimension: int, generator: torch.Generator
) -> Float64[Tensor, "paths n c"]:
    """Isotropic unit vectors of `dimension`, turned so that the first span the first coordinates.

    Of each path row i has min(i + 1, dimension) coordinates: normal ones, and last the length of
    what is left.

    Source: Bartlett 1933, Proc. R. Soc. Edinburgh 53, 260 (the factor of a Wishart matrix).
    """
    columns = min(n, dimension)
    rows = torch.randn(paths, n, columns, generator=generator, dtype=torch.float64).tril(-1)
    place = torch.arange(columns)
    # torch draws no chi-squared numbers from a generator; numpy's is seeded by it.
    seed = int(torch.randint(2**62, (1,), generator=generator))
    drawn = np.random.default_rng(seed).chisquare((dimension - place).numpy(), (paths, columns))
    rows[:, place, place] = torch.from_numpy(drawn).sqrt()
    return rows / torch.linalg.vector_norm(rows, dim=2, keepdim=True)
