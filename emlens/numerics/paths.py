"""Geometry of a path of vectors through training: where it turns, and the plane it lies in.

Everything is read off the Gram matrix of the path's points, so that paths of any width cost the
same; differences shorter than about 1e-6 of the points' norms are lost to rounding.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from emlens.numerics.validation import WidthError, check_finite

_ROUNDING = 1e-12
"""Squares of differences of points of norm |v|, as they come out of a Gram matrix in float64, carry
rounding of about 1e-15 |v|^2; below this part of |v|^2 they mean nothing."""


@dataclass(frozen=True, kw_only=True)
class LocalCosine:
    """How sharply a path bends at each of its points: -1 straight, 0 a right angle, 1 a reversal.

    Attributes:
        index: Points that were kept, as places on the path.
        cosine: At each of them.
        n_uneven: Points left out because one of the two neighbours is no point of the path.
        n_small: Points left out because neither side moves far enough.
    """

    index: Int[Tensor, " n"]
    cosine: Float64[Tensor, " n"]
    n_uneven: int
    n_small: int

    @property
    def median(self) -> float:
        """Of the cosines: how straight the path is where nothing happens; NaN of none."""
        return float(self.cosine.median()) if len(self.cosine) else float("nan")

    @property
    def prominence(self) -> float:
        """The largest cosine minus the median; NaN where no point was kept."""
        return float(self.cosine.max()) - self.median if len(self.cosine) else float("nan")


def gram_of_path(vectors: Float[Tensor, "t d"]) -> Float64[Tensor, "t t"]:
    """Inner products of a path's points; add those of several parts for the path of all parts."""
    if vectors.ndim != 2:
        raise WidthError(f"vectors has shape {tuple(vectors.shape)}, expected [t, d]")
    check_finite("vectors", vectors)
    rows = vectors.detach().double()
    return rows @ rows.T


def normalise_gram(gram: Float64[Tensor, "t t"]) -> Float64[Tensor, "t t"]:
    """Inner products of the points divided by their norms; 0 where a point is zero."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return gram * inverse[:, None] * inverse[None, :]


def local_cosine(
    gram: Float64[Tensor, "t t"],
    steps: Int[Tensor, " t"],
    *,
    window: int,
    threshold: float,
) -> LocalCosine:
    """Compute cos(v[t-k] - v[t], v[t+k] - v[t]) along a path.

    A point is kept where t-k and t+k are both on the path, and the longer of the two differences
    exceeds `threshold` times the norm of the last point: below that, noise alone bends a path.

    Args:
        gram: Inner products of the points.
        steps: The training step of each point, ascending.
        window: k, in training steps.
        threshold: Least movement, as a share of the last point's norm.

    Raises:
        ValueError: A window below 1, a negative threshold, or steps that do not ascend.
        WidthError: As many steps as points were expected.

    Source: Turner et al. 2025, arXiv 2506.11613, section 4.
    Differs: the threshold is relative to the last norm.
    """
    _check_path(gram, steps)
    _check_settings(window, threshold)
    here, found = _bend(gram, steps, window, threshold)
    kept = ~found.isnan()
    return LocalCosine(
        index=here[kept],
        cosine=found[kept],
        n_uneven=len(steps) - len(here),
        n_small=int((~kept).sum()),
    )


def bend_prominences(
    grams: Float64[Tensor, "n t t"],
    steps: Int[Tensor, " t"],
    *,
    window: int,
    threshold: float,
) -> Float64[Tensor, " n"]:
    """Prominence of the sharpest bend of many paths at once, as `local_cosine` measures it.

    0 where no point moves far enough. Arguments and errors are those of `local_cosine`.
    """
    _check_path(grams, steps)
    _check_settings(window, threshold)
    _, found = _bend(grams, steps, window, threshold)
    if not found.shape[1]:
        return torch.zeros(len(grams), dtype=torch.float64)
    largest = found.nan_to_num(nan=-torch.inf).amax(1)
    return (largest - found.nanmedian(1).values).where(largest.isfinite(), 0.0)


def path_coordinates(
    gram: Float64[Tensor, "t t"], *, n: int
) -> tuple[Float64[Tensor, "t n"], Float64[Tensor, " n"]]:
    """Principal components of the points about their mean, and the share of variance of each.

    The sign of a component is such that the last point is not negative; shares are 0 where nothing
    moves.
    """
    size = len(gram)
    centring = torch.eye(size, dtype=gram.dtype) - 1 / size
    values, vectors = torch.linalg.eigh(centring @ gram @ centring)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    kept = min(n, size)
    points = torch.zeros(size, n, dtype=gram.dtype)
    points[:, :kept] = vectors[:, :kept] * values[:kept].sqrt()
    points = torch.where(points[-1] < 0, -points, points)
    shares = torch.zeros(n, dtype=gram.dtype)
    if (total := float(values.sum())) > 0:
        shares[:kept] = values[:kept] / total
    return points, shares


def find_plane_turn(gram: Float64[Tensor, "t t"]) -> int | None:
    """Place of the point that is farthest from the line between a path's ends, in its main plane.

    Where a path that goes one way and then another changes over. A random walk has one as well.

    Args:
        gram: Inner products of the path's points.

    Returns:
        None where no point leaves that line in the plane of the first two principal components.
    """
    points = path_coordinates(gram, n=2)[0]
    away = points - points[0]
    chord = away[-1]
    along = away @ chord / chord.square().sum().clamp(min=torch.finfo(chord.dtype).tiny)
    squares = (away - along[:, None] * chord).square().sum(1)
    farthest = int(squares.argmax())
    return farthest if float(squares[farthest]) > _ROUNDING * float(gram.diagonal().max()) else None


def step_lengths(gram: Float64[Tensor, "t t"]) -> Float64[Tensor, " t-1"]:
    """Distance of each point from the one before."""
    squares = gram.diagonal()
    return (squares[1:] + squares[:-1] - 2 * gram.diagonal(1)).clamp(min=0).sqrt()


def step_cosines(gram: Float64[Tensor, "t t"]) -> Float64[Tensor, "t-1 t-1"]:
    """Cosines between all steps of a path; NaN where one has no length."""
    moves = gram[1:, 1:] - gram[1:, :-1] - gram[:-1, 1:] + gram[:-1, :-1]
    norms = moves.diagonal().clamp(min=0).sqrt()
    return (moves / (norms[:, None] * norms[None, :])).clamp(-1, 1)


def noise_dimension(gram: Float64[Tensor, "t t"], *, largest: int) -> int:
    """Dimensions that the noise of a path's steps spreads over, whatever trend it is laid upon.

    Steps are taken at length one, so that no schedule of their lengths counts, then their second
    differences, to which neither a straight trend nor one that curves evenly adds much, and which
    momentum leaves all but uncorrelated. Between directions of isotropic noise the squared cosine
    is on average one over the dimension: that mean is taken for each difference, over those that
    share no step with it, and the answer is one over the median of the means, so that the few
    differences at a turn, at the warm-up or among the last tiny steps do not rule it.

    Args:
        gram: Inner products of the path's points.
        largest: What to answer where there is no noise; more is never answered.

    Source: this project.
    """
    size = len(gram)
    if size < 8:
        return largest
    lengths = step_lengths(gram)
    # Shorter ones are what is left of the points' squares, and rounding.
    rounding = _ROUNDING * gram.diagonal().max()
    real = lengths.square() > rounding
    place = torch.nonzero(real[2:] & real[1:-1] & real[:-2])[:, 0]
    changes = torch.zeros(len(place), size - 1, dtype=gram.dtype)
    row = torch.arange(len(place))
    for shift, sign in enumerate((1.0, -2.0, 1.0)):
        changes[row, place + shift] = sign / lengths[place + shift]
    on_points = _steps_to_points(changes)
    inner = on_points @ gram @ on_points.T
    shortest = torch.stack([lengths[place + shift] for shift in range(3)]).amin(0)
    kept = inner.diagonal() * shortest.square() > rounding
    inner, place = inner[kept][:, kept], place[kept]
    apart = (place[:, None] - place[None, :]).abs() > 2
    count = apart.sum(1)
    if not bool((count > 0).any()):
        return largest
    norms = inner.diagonal().sqrt()
    squares = (inner / (norms[:, None] * norms[None, :])).square()
    means = (squares * apart).sum(1)[count > 0] / count[count > 0]
    typical = float(means.median())
    return largest if typical * largest <= 1 else max(2, round(1 / typical))


def _steps_to_points(weights: Float64[Tensor, "n m"]) -> Float64[Tensor, "n m+1"]:
    """Sums of steps as sums of points: a step is its second point less its first."""
    nothing = weights.new_zeros(len(weights), 1)
    return torch.cat([nothing, weights], dim=1) - torch.cat([weights, nothing], dim=1)


@lru_cache(maxsize=8)
def _triples(steps: tuple[int, ...], window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places of t-k, t and t+k, where all three are on the path; asked for by every null path."""
    places = {step: place for place, step in enumerate(steps)}
    found = [
        (places[step - window], place, places[step + window])
        for step, place in places.items()
        if step - window in places and step + window in places
    ]
    before, here, after = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return before, here, after


def _inner(gram: Tensor, first: Tensor, origin: Tensor, second: Tensor) -> Tensor:
    """<v[first] - v[origin], v[second] - v[origin]>, of one path or many."""
    return (
        gram[..., first, second]
        - gram[..., first, origin]
        - gram[..., origin, second]
        + gram[..., origin, origin]
    )


def _bend(gram: Tensor, steps: Tensor, window: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Places with both neighbours, and the cosines there [... p]; NaN where too little moves."""
    before, here, after = _triples(tuple(steps.tolist()), window)
    first = _inner(gram, before, here, before)
    second = _inner(gram, after, here, after)
    longer = torch.maximum(first, second).clamp(min=0).sqrt()
    squares = gram.diagonal(dim1=-2, dim2=-1)
    # A side that does not move, but for rounding, has no angle.
    still = _ROUNDING * squares.amax(-1, keepdim=True) if len(steps) else 0.0
    moves = (first > still) & (second > still)
    kept = moves & (longer > threshold * squares[..., -1:].clamp(min=0).sqrt())
    norms = (first * second).where(kept, 1.0).sqrt()
    cosine = (_inner(gram, before, here, after) / norms).clamp(-1, 1)
    return here, cosine.where(kept, torch.nan)


def _check_settings(window: int, threshold: float) -> None:
    if window < 1:
        raise ValueError(f"window: got {window}, expected at least 1 training step")
    if not threshold >= 0:
        raise ValueError(f"threshold: got {threshold}, expected 0 or more")


def _check_path(gram: Tensor, steps: Tensor) -> None:
    if gram.shape[-2:] != (len(steps), len(steps)):
        raise WidthError(
            f"gram has shape {tuple(gram.shape)} for {len(steps)} steps, expected a square of them"
        )
    if len(steps) and not bool((steps[1:] > steps[:-1]).all()):
        raise ValueError("steps: expected ascending training steps, each once")
