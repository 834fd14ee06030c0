"""Intervals of shares, of their differences, and of areas under curves.

Rows that answer one question are not independent: take the question as the cluster. Nothing here
corrects for having looked at many comparisons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

Numbers = Sequence[float | int] | np.ndarray

SIGN_FLIP_BELOW = 20
"""With fewer clusters than this, paired differences use the exact sign-flip test, which needs no
normal distribution of their means; the number of flips doubles with each cluster."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the limits that hold it at a level.

    Raises:
        ValueError: the limits do not enclose the value, or the level is none.
    """

    value: float
    """The estimate."""
    low: float
    """Lower limit, in the units of the value."""
    high: float
    """Upper limit, in the units of the value."""
    level: float
    """Share of such intervals that hold the true value, such as 0.95."""
    method: str
    """How the limits were made, in words."""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"value {self.value} lies outside its limits {self.low}, {self.high}")
        _check_level(self.level)

    def scaled(self, factor: float) -> "Interval":
        """The interval in other units, such as per cent for shares (factor 100)."""
        if factor <= 0:
            raise ValueError(f"factor is {factor}, expected a positive number")
        return replace(
            self, value=self.value * factor, low=self.low * factor, high=self.high * factor
        )


def wilson(count: int, n: int, *, level: float = 0.95) -> Interval:
    """Score interval of a share of independent rows.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209; without continuity correction.

    Raises:
        ValueError: no rows, a count that is negative or above n, or a level outside (0, 1).
    """
    _check_count(count, n)
    z, p = _normal_quantile(level), count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the limit is exact; rounding must not move it past the value.
    low = 0.0 if count == 0 else centre - half
    high = 1.0 if count == n else centre + half
    return Interval(p, low, high, level, f"Wilson over {n} rows")


def newcombe(
    count: int, n: int, *, minus_count: int, minus_n: int, level: float = 0.95
) -> Interval:
    """Interval of the difference of two shares of independent rows, first minus second.

    Source: Newcombe 1998, Stat. Med. 17, 873, method 10 (Wilson limits of both, joined).

    Raises:
        ValueError: as for `wilson`.
    """
    first, second = wilson(count, n, level=level), wilson(minus_count, minus_n, level=level)
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    low, high = max(-1.0, value - below), min(1.0, value + above)
    return Interval(value, low, high, level, f"Newcombe over {n} and {minus_n} rows")


def cluster_t(means: Numbers, *, level: float = 0.95) -> Interval:
    """Interval of the mean over clusters: Student's t with one degree of freedom less than means.

    Args:
        means: one number a cluster (a question), all of one weight.
        level: of the interval.

    Raises:
        ValueError: fewer than two clusters, or a number that is not finite.
    """
    values = _check_means(means)
    q, value = len(values), float(values.mean())
    half = float(stats.t.ppf((1 + level) / 2, q - 1) * values.std(ddof=1) / math.sqrt(q))
    return Interval(value, value - half, value + half, level, f"t over {q} questions")


def sign_flip(differences: Numbers, *, level: float = 0.95) -> Interval:
    """Interval of the centre of paired differences by the exact sign-flip test, turned round.

    With all 2^q - 1 means of subsets of the differences in order, the limits are the k-th from
    below and from above, k = floor(2^q (1 - level) / 2). The centres between them are those that
    the two-sided test, which flips the signs of the centred differences in all 2^q ways, does not
    reject. Where k = 0 (fewer than six differences at .95) no centre can be rejected and the limits
    are infinite.

    Source: Hartigan 1969, J. Am. Stat. Assoc. 64, 1303 (typical values).

    Args:
        differences: one a cluster (a question), symmetric about the centre.
        level: of the interval.

    Raises:
        ValueError: fewer than two differences, `SIGN_FLIP_BELOW` or more of them, or one that is
            not finite.
    """
    values = _check_means(differences)
    q = len(values)
    if q >= SIGN_FLIP_BELOW:
        raise ValueError(f"differences: got {q}, expected fewer than {SIGN_FLIP_BELOW}: use t")
    sums, sizes = np.zeros(1), np.zeros(1)
    for x in values:
        sums, sizes = np.concatenate([sums, sums + x]), np.concatenate([sizes, sizes + 1])
    typical = np.sort(sums[1:] / sizes[1:])
    # The nudge: 1 - .95 is not exactly .05.
    k = math.floor(2**q * (1 - level) / 2 + 1e-9)
    low, high = (typical[k - 1], typical[-k]) if k else (-math.inf, math.inf)
    value = float(values.mean())
    # Where all differences are equal, rounding may put their mean beside the limits.
    low, high = min(float(low), value), max(float(high), value)
    return Interval(value, low, high, level, f"exact sign-flip over {q} questions")


def share_of_clusters(
    counts: Sequence[int], sizes: Sequence[int], *, level: float = 0.95
) -> Interval:
    """Interval of the share of rows that count, where rows come in clusters (questions).

    The limits are the wider ones of t over the questions and Wilson over the rows, clipped to
    [0, 1]. Where all questions have the same share, or there is only one, the first of the two
    proves nothing (0 of 400 would give [0, 0]) and Wilson stands alone.

    With unequal sizes the questions' means are those of the linearised ratio, so that the value is
    always the share of all rows; with equal sizes they are the plain means.

    Args:
        counts: rows that count, by question.
        sizes: all rows, by question.
        level: of the interval.

    Raises:
        ValueError: no rows at all, or a count that does not fit its size.
    """
    total, n = _check_clusters(counts, sizes)
    rows = wilson(total, n, level=level)
    counts, sizes = zip(*[pair for pair in zip(counts, sizes, strict=True) if pair[1]], strict=True)
    shares = [c / s for c, s in zip(counts, sizes, strict=True)]
    if _all_equal(shares):
        why = "only one question" if len(shares) == 1 else "all questions have the same share"
        return replace(rows, method=f"{rows.method} alone: {why}")
    clustered = cluster_t(_linearised(counts, sizes) + total / n, level=level)
    return _wider(rows, clustered, (0.0, 1.0))


def difference_of_clusters(
    first: tuple[Sequence[int], Sequence[int]],
    second: tuple[Sequence[int], Sequence[int]],
    *,
    level: float = 0.95,
) -> Interval:
    """Interval of the difference of two shares, first minus second, paired by question.

    As `share_of_clusters`, with Newcombe over the rows, and over the questions' differences the
    exact sign-flip (t from `SIGN_FLIP_BELOW` questions on), clipped to [-1, 1].

    Args:
        first: counts and sizes by question.
        second: the same for the same questions in the same order.
        level: of the interval.

    Raises:
        ValueError: as for `share_of_clusters`, questions that do not pair, or one without rows.
    """
    (total, n), (minus_total, minus_n) = _check_clusters(*first), _check_clusters(*second)
    if len(first[0]) != len(second[0]):
        raise ValueError(f"first has {len(first[0])} questions, second {len(second[0])}: not pairs")
    if not all((*first[1], *second[1])):
        raise ValueError("sizes: a question has no rows on one side, so its difference is unknown")
    rows = newcombe(total, n, minus_count=minus_total, minus_n=minus_n, level=level)
    plain = [a / m - b / k for a, m, b, k in zip(*first, *second, strict=True)]
    if _all_equal(plain):
        why = "only one question" if len(plain) == 1 else "all questions differ by the same share"
        return replace(rows, method=f"{rows.method} alone: {why}")
    paired = _linearised(*first) - _linearised(*second) + rows.value
    over_questions = sign_flip if len(paired) < SIGN_FLIP_BELOW else cluster_t
    return _wider(rows, over_questions(paired, level=level), (-1.0, 1.0))


def _linearised(counts: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """What each question adds to the share of all rows, less its mean, times the questions."""
    count, size = np.asarray(counts, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    return len(count) * (count - size * count.sum() / size.sum()) / size.sum()


def _wider(rows: Interval, clustered: Interval, bounds: tuple[float, float]) -> Interval:
    return Interval(
        rows.value,
        max(bounds[0], min(rows.low, clustered.low)),
        min(bounds[1], max(rows.high, clustered.high)),
        rows.level,
        f"wider of {clustered.method} and {rows.method}",
    )


def _all_equal(values: Sequence[float]) -> bool:
    # Shares of small whole numbers: apart by far more than this, or equal.
    return max(values) - min(values) < 1e-12


def _normal_quantile(level: float) -> float:
    _check_level(level)
    return float(stats.norm.ppf((1 + level) / 2))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a share between 0 and 1, such as 0.95")


def _check_count(count: int, n: int) -> None:
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"count is {count} of n = {n}, expected 0 <= count <= n with n at least 1")


def _check_clusters(counts: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    if len(counts) != len(sizes):
        raise ValueError(f"counts has {len(counts)} questions, sizes {len(sizes)}")
    for count, size in zip(counts, sizes, strict=True):
        if not 0 <= count <= size:
            raise ValueError(f"a question counts {count} of {size} rows")
    _check_count(sum(counts), sum(sizes))
    return sum(counts), sum(sizes)


def _check_means(means: Numbers) -> np.ndarray:
    values = np.asarray(means, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"got {values.size} clusters, expected at least two")
    if not np.isfinite(values).all():
        raise ValueError("a cluster's mean is not finite: rows without a score have none")
    return values
