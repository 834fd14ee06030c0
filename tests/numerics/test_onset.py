"""Half-way steps of planted curves, and none where nothing changes."""

import numpy as np
import pytest
import torch

from emlens.numerics.onset import estimate_onset, find_half_way, smooth_curve

STEPS = torch.arange(0, 100, 5)


def sigmoid(at: float) -> torch.Tensor:
    return 1 / (1 + torch.exp(-(STEPS.double() - at) / 4))


@pytest.mark.parametrize("at", [30.0, 52.0, 71.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_planted_onset_is_found_within_its_interval(at: float, sign: float):
    generator = torch.Generator().manual_seed(int(at))
    noise = torch.randn(20, len(STEPS), generator=generator, dtype=torch.float64)
    found = estimate_onset(STEPS, sign * sigmoid(at) + 0.1 * noise, seed=1)
    assert found.step is not None
    assert found.step.value == pytest.approx(at, abs=3)
    assert found.step.high - found.step.low < 10
    assert found.change.value == pytest.approx(sign, abs=0.2)


def test_intervals_hold_the_planted_step_about_as_often_as_they_say():
    held = 0
    for seed in range(40):
        noise = torch.randn(20, len(STEPS), generator=torch.Generator().manual_seed(seed))
        step = estimate_onset(STEPS, sigmoid(50.0) + 0.2 * noise, draws=400).step
        held += step is not None and step.low <= 50 <= step.high
    assert held >= 33


def test_without_a_change_there_is_no_onset():
    flat = 0
    for seed in range(40):
        noise = torch.randn(12, len(STEPS), generator=torch.Generator().manual_seed(seed))
        flat += estimate_onset(STEPS, noise, draws=400).step is None
    # Percentile intervals over twelve curves cover a little less than 95 %.
    assert flat >= 34


def test_half_way_is_between_points():
    steps = torch.tensor([0, 10, 30])
    assert find_half_way(steps, torch.tensor([0.0, 0.25, 1.0])) == pytest.approx(10 + 20 / 3)
    assert find_half_way(steps, torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(5)
    assert np.isnan(find_half_way(steps, torch.zeros(3)))


def test_smoothing_is_a_rolling_mean():
    values = torch.tensor([[1.0, 2.0, 6.0, 0.0]])
    np.testing.assert_allclose(smooth_curve(values, width=3), [[1.5, 3.0, 8 / 3, 3.0]], rtol=1e-6)
    assert torch.equal(smooth_curve(values, width=1), values)
    with pytest.raises(ValueError, match="width: got 2"):
        smooth_curve(values, width=2)


def test_bad_curves_are_refused():
    with pytest.raises(ValueError, match="at least two curves"):
        estimate_onset(STEPS, torch.zeros(1, len(STEPS)))
    with pytest.raises(ValueError, match="ascending"):
        estimate_onset(STEPS.flip(0), torch.zeros(3, len(STEPS)))
    with pytest.raises(ValueError, match="finite"):
        estimate_onset(STEPS, torch.full((3, len(STEPS)), float("nan")))
