"""Bands against scipy's t, rates among nulls, planted departures and leads."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats

from emlens.numerics.bands import first_departure, measure_lead, simultaneous_band
from emlens.numerics.validation import NonFiniteError, WidthError

POINTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)


def draw(seed: int, units: int = 40, points: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(units, points, generator=generator, dtype=torch.float64)


def test_one_point_gives_students_band():
    base, series = draw(0, 200, 1), draw(1, 200, 1)
    band = simultaneous_band(base, series, seed=0)
    gap = (series - base)[:, 0].numpy()
    half = stats.t.ppf(0.975, 199) * stats.sem(gap)
    assert float((band.high - band.low)[0] / 2) == pytest.approx(half, rel=0.03)
    np.testing.assert_allclose(band.mean, series.mean(0), rtol=1e-12)
    np.testing.assert_allclose(band.centre, base.mean(0), rtol=1e-12)


def test_a_series_no_other_than_the_base_leaves_the_band_somewhere_as_often_as_it_says():
    left = 0
    for seed in range(60):
        shared = draw(3 * seed, 20)[:, :1]  # points of one unit go together
        base, series = shared + draw(3 * seed + 1, 20), shared + draw(3 * seed + 2, 20)
        band = simultaneous_band(base, series, seed=seed, level=0.8)
        left += bool(band.outside().any())
    assert stats.binomtest(left, 60, 0.2).pvalue > 0.01


def test_more_points_need_a_wider_band():
    base, series = draw(0), draw(1)
    one = simultaneous_band(base[:, :1], series[:, :1], seed=0).critical
    six = simultaneous_band(base, series, seed=0).critical
    assert six > one + 0.4


def test_a_series_equal_to_its_base_lies_on_it():
    base = draw(0)
    band = simultaneous_band(base, base.clone(), seed=0)
    for edge in (band.low, band.high, band.mean):
        assert torch.equal(edge, band.centre)
    assert not band.outside().any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_a_departure_is_the_first_of_two_consecutive_points(outside: list[bool]):
    text = "".join("x" if out else "." for out in outside)
    found = float(first_departure(torch.tensor(outside), [float(k) for k in range(len(text))]))
    assert found == (text.index("xx") if "xx" in text else math.inf)


def test_a_planted_lead_is_found():
    generator = torch.Generator().manual_seed(0)
    early_step = torch.tensor([0.0, 0, 1, 2, 3, 3])  # from .1 on
    late_step = torch.tensor([0.0, 0, 0, 0, 1, 2])  # from .5 on

    def series(units: int, step: torch.Tensor):
        base = torch.randn(units, 1, generator=generator).expand(-1, 6)
        return base, base + step + 0.5 * torch.randn(units, 6, generator=generator)

    found = measure_lead(series(40, early_step), series(30, late_step), points=POINTS, seed=0)
    assert (found.early, found.late) == (0.1, 0.5)
    assert found.lead is not None
    assert found.lead.value == pytest.approx(0.4)
    assert 0 < found.lead.low <= 0.4 <= found.lead.high < 1
    swapped = measure_lead(series(30, late_step), series(40, early_step), points=POINTS, seed=0)
    assert swapped.lead is not None
    assert swapped.lead.high < 0


def test_a_series_that_never_leaves_has_no_lead_and_a_doubtful_one_no_upper_limit():
    base = torch.zeros(12, 6)
    still = 0.5 * draw(0, 12)
    moved = still + 5 * torch.tensor([0.0, 0, 1, 1, 1, 1])
    never = measure_lead((base, moved), (base, still), points=POINTS, seed=0)
    assert (never.early, never.late, never.lead) == (0.1, None, None)
    # Only just outside: in many resamples it is not.
    doubtful = still + torch.tensor([0.0, 0, 0, 0, 0.5, 0.5])
    found = measure_lead((base, moved), (base, doubtful), points=POINTS, seed=0)
    assert found.lead is not None
    assert (found.lead.value, found.lead.high) == (pytest.approx(0.4), math.inf)


def test_what_cannot_be_banded_is_refused():
    with pytest.raises(ValueError, match=r"got 5.*0\.0625.*at least 6"):
        simultaneous_band(draw(0, 5), draw(1, 5), seed=0)
    assert simultaneous_band(draw(0, 6), draw(1, 6), seed=0).critical > 0
    with pytest.raises((WidthError, TypeCheckError), match=r"series \(40, 5\)|'series'"):
        simultaneous_band(draw(0), draw(1, 40, 5), seed=0)
    with pytest.raises(NonFiniteError):
        simultaneous_band(draw(0), draw(1).fill_(math.nan), seed=0)
    with pytest.raises(ValueError, match="rising"):
        first_departure(torch.tensor([True, True]), [1.0, 1.0])
