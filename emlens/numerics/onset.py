"""When a curve has come half way, with an interval over what it is the mean of.

For curves that go from one level to another. One that comes and goes again has no onset here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.numerics.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class Onset:
    """Half-way step of a mean curve, and how far it went.

    Attributes:
        step: Where it crosses the middle between its first and last level; None where the interval
            of its change holds 0, so that there is nothing to be half way of.
        change: Last level less first.
    """

    step: Interval | None
    change: Interval


def find_half_way(steps: Int[Tensor, " t"], curve: Float[Tensor, " t"]) -> float:
    """The step at which a curve first crosses the middle between its first and its last value.

    Linear between points; NaN where the two values are equal.
    """
    x, y = steps.double().numpy(), curve.double().numpy()
    first, last = y[0], y[-1]
    if first == last:
        return float("nan")
    risen = (y - first) / (last - first)
    place = int(np.argmax(risen >= 0.5))
    if place == 0:
        return float(x[0])
    share = (0.5 - risen[place - 1]) / (risen[place] - risen[place - 1])
    return float(x[place - 1] + share * (x[place] - x[place - 1]))


def smooth_curve(values: Float[Tensor, "*n t"], *, width: int) -> Float[Tensor, "*n t"]:
    """Rolling mean over `width` points, fewer at the ends; `width` is odd.

    Raises:
        ValueError: an even width, or one below 1.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width: got {width}, expected an odd number of points")
    side = width // 2
    size = values.shape[-1]
    parts = [values[..., max(0, i - side) : min(size, i + side + 1)].mean(-1) for i in range(size)]
    return torch.stack(parts, dim=-1)


def estimate_onset(
    steps: Int[Tensor, " t"],
    values: Float[Tensor, "n t"],
    *,
    width: int = 1,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Onset:
    """Half-way step of the mean of n curves, with percentile intervals over draws of the curves.

    Args:
        steps: ascending.
        values: one curve a text or question, which are what is drawn with replacement.
        width: points of the rolling mean that is taken first.
        draws: of n curves each.
        level: of the intervals.
        seed: of the draws.

    Raises:
        ValueError: fewer than two curves or points, steps that do not ascend, NaN, an even width.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if values.ndim != 2 or len(values) < 2 or values.shape[1] != len(steps) or len(steps) < 2:
        raise ValueError(
            f"values has shape {tuple(values.shape)} for {len(steps)} steps, expected [n, t] with "
            "at least two curves and two steps"
        )
    if not bool((steps[1:] > steps[:-1]).all()) or not bool(values.isfinite().all()):
        raise ValueError("expected ascending steps and finite values")
    curves = smooth_curve(values.double(), width=width)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(curves), (draws, len(curves)), generator=generator)
    means = curves[rows].mean(1)
    changes = means[:, -1] - means[:, 0]
    whole = curves.mean(0)
    method = f"percentiles of {draws} draws of {len(curves)} curves"
    change = _interval(float(whole[-1] - whole[0]), changes.numpy(), level, method)
    if change.low <= 0 <= change.high:
        return Onset(step=None, change=change)
    half_way = np.array([find_half_way(steps, mean) for mean in means])
    known = half_way[~np.isnan(half_way)]
    return Onset(step=_interval(find_half_way(steps, whole), known, level, method), change=change)


def _interval(value: float, drawn: np.ndarray, level: float, method: str) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, min(float(low), value), max(float(high), value), level, method)
