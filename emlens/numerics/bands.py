"""When a series leaves a base for good: bands that hold at all points at once, and leads.

Series are of units (prompts, questions, or pairs of fine-tunes) at points (shares of bad data, or
steps), and are paired with the base's by unit. Not for one point alone: `sign_flips` tests that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from emlens.numerics.intervals import Interval
from emlens.numerics.sign_flips import draw_signs, smallest_p
from emlens.numerics.validation import WidthError, check_finite

FLIPS = 10_000
"""Sign vectors behind a critical value."""
RESAMPLES = 2_000
"""Bootstrap samples behind the interval of a lead."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where the means of a series lie at all points at once if it is no other than the base."""

    mean: Float64[Tensor, " point"]
    """Of the series over its units."""
    centre: Float64[Tensor, " point"]
    """Of the base over the same units."""
    low: Float64[Tensor, " point"]
    """Lower edge."""
    high: Float64[Tensor, " point"]
    """Upper edge."""
    level: float
    """Chance that a series no other than the base lies inside at every point."""
    critical: float
    """Half width in standard errors of the mean difference."""

    def outside(self) -> Bool[Tensor, " point"]:
        """Where the series lies outside."""
        return (self.mean < self.low) | (self.mean > self.high)


def simultaneous_band(
    base: Float[Tensor, "unit point"],
    series: Float[Tensor, "unit point"],
    *,
    level: float = 0.95,
    seed: int,
) -> Band:
    """Find the band that a series no other than the base leaves at some point in 1 - level of runs.

    The edges are mean base -+ c s_k / sqrt n, s_k the standard deviation over the n units of
    series - base at point k. c is the quantile of max_k |t_k| when base and series are exchanged
    within units, at all points of a unit together.

    Source: Westfall and Young 1993, Resampling-Based Multiple Testing, section 2.6 (the largest
        statistic).

    Args:
        base: of each unit at each point; the same numbers at all points for a base that stays.
        series: of the same units at the same points.
        level: of the band.
        seed: of the exchanges.

    Raises:
        WidthError: two series of different shapes.
        NonFiniteError: a value is NaN or infinite.
        ValueError: so few units that no series could leave the band.
    """
    d = _pair(base, series)
    n = len(d)
    if smallest_p(n) > 1 - level:
        raise ValueError(
            f"units: got {n}; the smallest p-value of so many is {smallest_p(n):.3g}, so that no "
            f"series can leave a band of level {level}; expected at least "
            f"{1 + math.ceil(-math.log2(1 - level))}"
        )
    signs = draw_signs(n, seed=seed, flips=FLIPS).double()
    flipped = _studentised(signs @ d / n, d.square().sum(0), n).abs().amax(1)
    critical = float(torch.quantile(flipped, level, interpolation="higher"))
    half = critical * d.std(0, correction=1) / math.sqrt(n)
    centre = base.double().mean(0)
    # From the mean difference, so that a series equal to its base lies on the centre exactly.
    mean = centre + d.mean(0)
    low, high = centre - half, centre + half
    return Band(mean=mean, centre=centre, low=low, high=high, level=level, critical=critical)


def first_departure(
    outside: Bool[Tensor, "*batch point"], points: Sequence[float]
) -> Float64[Tensor, "*batch"]:
    """First of two consecutive points that both lie outside, as its place; infinity if none.

    One point alone is not believed, and so the last one cannot be the first.

    Args:
        outside: for one series, or for many at once.
        points: where the points lie, rising.

    Raises:
        ValueError: points that do not rise, or not one for each entry.
    """
    places = torch.tensor(points, dtype=torch.float64)
    if outside.shape[-1] != len(places) or bool((places.diff() <= 0).any()):
        raise ValueError(f"points: got {list(points)}, expected {outside.shape[-1]} rising numbers")
    twice = outside[..., :-1] & outside[..., 1:]
    # Infinity stands behind the last point, so that there is always something to choose from.
    found = torch.where(twice, places[:-1], math.inf)
    return torch.cat([found, found.new_full((*found.shape[:-1], 1), math.inf)], -1).amin(-1)


@dataclass(frozen=True, kw_only=True)
class Lead:
    """How much earlier one series leaves its base than another."""

    early: float | None
    """Where the first one leaves; None if it does not."""
    late: float | None
    """Where the other leaves; None if it does not."""
    lead: Interval | None
    """Late minus early, in units of the points; None unless both leave. A limit is infinite where
    more resamples than it allows never leave."""


def measure_lead(
    early: tuple[Float[Tensor, "unit point"], Float[Tensor, "unit point"]],
    late: tuple[Float[Tensor, "other point"], Float[Tensor, "other point"]],
    *,
    points: Sequence[float],
    level: float = 0.95,
    seed: int,
) -> Lead:
    """Measure by how much one series leaves its base's band earlier than another leaves its own.

    The interval is that of quantiles over bootstrap samples of the units, drawn for the two series
    apart, with the critical values of the bands kept.

    Args:
        early: base and series that may warn, such as a latent's over prompts.
        late: base and series that are warned of, such as a behaviour's over questions.
        points: where the points of both lie, rising.
        level: of bands and interval.
        seed: of exchanges and resamples.

    Raises:
        ValueError: points that do not rise, or as `simultaneous_band` raises.
    """
    bands = [simultaneous_band(*pair, level=level, seed=seed) for pair in (early, late)]
    found = [float(first_departure(band.outside(), points)) for band in bands]
    start, stop = (place if math.isfinite(place) else None for place in found)
    lead = None
    if start is not None and stop is not None:
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            _resample(_pair(*pair), band.critical, points, generator)
            for pair, band in zip((early, late), bands, strict=True)
        ]
        lead = _interval(stop - start, drawn[0], drawn[1], level)
    return Lead(early=start, late=stop, lead=lead)


def _pair(base: Tensor, series: Tensor) -> Tensor:
    if base.ndim != 2 or base.shape != series.shape or not base.numel():
        raise WidthError(
            f"base has shape {tuple(base.shape)} and series {tuple(series.shape)}, expected both "
            "[unit, point]: repeat a base that stays the same at every point"
        )
    check_finite("base or series", base, series)
    return series.double() - base.double()


def _studentised(means: Tensor, squares: Tensor, n: int) -> Tensor:
    """Means over their standard errors, from the sum of n squares; 0 where all values are 0."""
    variance = (squares - n * means.square()).clamp(min=0) / (n - 1)
    return torch.where(squares > 0, means / (variance / n).sqrt(), 0.0)


def _resample(
    d: Tensor, critical: float, points: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Departures of bootstrap samples."""
    n = len(d)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    t = _studentised(counts @ d / n, counts @ d.square(), n)
    return first_departure(t.abs() > critical, points)


def _interval(value: float, early: Tensor, late: Tensor, level: float) -> Interval:
    # A sample in which neither leaves says nothing of which comes first: it widens both limits.
    neither = early.isinf() & late.isinf()
    leads = late - early
    low, high = (
        float(torch.quantile(leads.where(~neither, end), q, interpolation=side))
        for end, q, side in (
            (torch.tensor(-math.inf), (1 - level) / 2, "lower"),
            (torch.tensor(math.inf), (1 + level) / 2, "higher"),
        )
    )
    method = f"bootstrap of units, {RESAMPLES} resamples, critical values kept"
    return Interval(value, min(low, value), max(high, value), level, method)
