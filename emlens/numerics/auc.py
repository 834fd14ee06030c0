"""How well a score tells two groups apart: the area under the curve, with its interval.

Not for choosing a threshold, and not for scores whose order means nothing.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from emlens.numerics.intervals import Interval, Numbers


def area_under_curve(
    negative: Numbers,
    positive: Numbers,
    *,
    pairs: tuple[Sequence[str], Sequence[str]] | None = None,
    level: float = 0.95,
) -> Interval:
    """P(positive > negative) + P(equal) / 2 over all pairs of one of each, with DeLong limits.

    The variance is DeLong's, from the placement of each score among those of the other group; with
    `pairs`, texts of one cluster (such as two answers to one question) may be dependent, and
    placements are summed by cluster first. Where the groups do not overlap DeLong's variance is 0
    and proves nothing: the limits are then Newcombe's score limits, of independent texts.

    Source: DeLong et al. 1988, Biometrics 44, 837; Obuchowski 1997, Biometrics 53, 567 (clusters);
    Newcombe 2006, Stat. Med. 25, 559, method 5 (no overlap).

    Args:
        negative: scores of the group that should score lower.
        positive: scores of the other group.
        pairs: a cluster's name for each negative and for each positive score.
        level: of the interval.

    Raises:
        ValueError: a group of fewer than two, a score that is not finite, or names that do not
            belong to the scores one by one.
    """
    x, y = _check(negative, "negative"), _check(positive, "positive")
    wins = (y[:, None] > x[None, :]) + 0.5 * (y[:, None] == x[None, :])
    area = float(wins.mean())
    if pairs is None:
        pairs = ([f"-{i}" for i in range(len(x))], [f"+{i}" for i in range(len(y))])
    elif len(pairs[0]) != len(x) or len(pairs[1]) != len(y):
        raise ValueError(
            f"pairs names {len(pairs[0])} and {len(pairs[1])} clusters for {len(x)} and {len(y)}"
        )
    variance = _clustered_variance(wins, area, pairs)
    if variance <= 0:
        low, high = _score_limits(area, len(x), len(y), level)
        return Interval(area, low, high, level, "Newcombe's score limits: DeLong's variance is 0")
    half = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    clusters = len(set(pairs[0]) | set(pairs[1]))
    method = f"DeLong over {len(x)} and {len(y)} texts in {clusters} clusters"
    return Interval(area, max(0.0, area - half), min(1.0, area + half), level, method)


def _clustered_variance(
    wins: np.ndarray, area: float, pairs: tuple[Sequence[str], Sequence[str]]
) -> float:
    names = {name: i for i, name in enumerate(dict.fromkeys([*pairs[0], *pairs[1]]))}
    # By cluster: the sum of its placements, less what it would be if all were the mean.
    below, above = np.zeros(len(names)), np.zeros(len(names))
    for name, placement in zip(pairs[0], wins.mean(axis=0), strict=True):
        below[names[name]] += placement - area
    for name, placement in zip(pairs[1], wins.mean(axis=1), strict=True):
        above[names[name]] += placement - area
    n_below, n_above = len(set(pairs[0])), len(set(pairs[1]))
    m, n = len(pairs[0]), len(pairs[1])
    variance = _inflate(n_below) * float(below @ below) / m**2
    variance += _inflate(n_above) * float(above @ above) / n**2
    return variance + 2 * _inflate(len(names)) * float(below @ above) / (m * n)


def _inflate(clusters: int) -> float:
    return clusters / max(1, clusters - 1)


def _score_limits(area: float, m: int, n: int, level: float) -> tuple[float, float]:
    """Where the area lies z standard errors off, by the variance at the limit itself."""
    z, mean_size = float(stats.norm.ppf((1 + level) / 2)), (m + n) / 2

    def distance(limit: float) -> float:
        spread = 1 + (mean_size - 1) * ((1 - limit) / (2 - limit) + limit / (1 + limit))
        return abs(area - limit) - z * math.sqrt(limit * (1 - limit) * spread / (m * n))

    edge = 1e-12
    inside = float(np.clip(area, edge, 1 - edge))
    low = 0.0 if area <= edge else float(optimize.brentq(distance, edge, inside - edge))  # pyright: ignore[reportArgumentType]
    high = 1.0 if area >= 1 - edge else float(optimize.brentq(distance, inside + edge, 1 - edge))  # pyright: ignore[reportArgumentType]
    return low, high


def _check(scores: Numbers, name: str) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{name}: got {values.size} scores, expected at least two")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: a score is not finite; leave unscored texts out and count them")
    return values
