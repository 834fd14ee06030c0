"""A latent that is planted to lead, one that lags, and one that does nothing."""

import pytest
import torch

from emlens.features.early_warning import EarlyWarning, Series, measure_early_warning
from emlens.numerics.validation import NonFiniteError
from emlens.results import load_result

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


def make_series(name: str, first: int, *, units: int = 30, seed: int = 0) -> Series:
    """Units that leave a base that stays at one of the points."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(units, 1, generator=generator).expand(-1, len(FRACTIONS))
    step = torch.tensor([float(max(0, 2 + k - first) if k >= first else 0) for k in range(7)])
    noise = torch.randn(units, len(FRACTIONS), generator=generator)
    return Series(name=name, units="units", base=base, values=base + step + 0.5 * noise)


def warn(latent: Series, behaviour: Series) -> EarlyWarning:
    return measure_early_warning(latent, behaviour, points=FRACTIONS, axis="share of bad data")


def test_a_latent_that_leaves_before_the_behaviour_warns():
    found = warn(make_series("latent 10", 1), make_series("misaligned", 4, units=20, seed=1))
    lead = found.departures.lead
    assert lead is not None
    assert (found.departures.early, found.departures.late) == (0.05, 0.5)
    assert lead.value == pytest.approx(0.45)
    assert lead.low > 0
    assert found.verdict.endswith("share of bad data: the latent warns")
    assert [row["latent_outside"] for row in found.rows()] == [False] + [True] * 6
    assert [row["behaviour_outside"] for row in found.rows()] == [False] * 4 + [True] * 3


def test_what_lags_or_does_nothing_does_not_warn():
    early, late = make_series("a", 1), make_series("b", 4, seed=1)
    assert warn(late, early).verdict.endswith("it warns too late")
    still = make_series("c", 9, seed=2)
    assert warn(still, late).verdict == "c does not leave its band: it warns of nothing"
    assert "nothing to warn of" in warn(early, still).verdict
    assert warn(early, make_series("d", 1, seed=5)).verdict.endswith("undecided")


def test_bad_series_are_refused():
    series = make_series("a", 1)
    with pytest.raises(ValueError, match="at least two"):
        measure_early_warning(series, series, points=[0.0], axis="step")
    with pytest.raises(ValueError, match="rising"):
        measure_early_warning(series, series, points=FRACTIONS[::-1], axis="step")
    with pytest.raises(ValueError, match="got 5"):
        warn(make_series("a", 1, units=5), series)
    broken = Series(name="x", units="", base=series.base, values=series.values * torch.nan)
    with pytest.raises(NonFiniteError):
        warn(series, broken)


def test_a_warning_survives_saving(tmp_path):
    found = warn(make_series("a", 1), make_series("b", 4, seed=1))
    again = load_result(found.save(tmp_path / "warning"))
    assert isinstance(again, EarlyWarning)
    assert again.rows() == found.rows()
    assert again.verdict == found.verdict
    assert found.underpowered is None
    assert found.rows()[0]["underpowered"] is None
