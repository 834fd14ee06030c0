"""Statistics of activations from tensors alone: against numpy, in shards, in any order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.activations import ActivationAccumulator, StatisticsAccumulator
from emlens.activations.accumulate import NORM_LEVELS
from emlens.numerics.validation import NonFiniteError

EVERYTHING = ("mean", "variance", "covariance", "norm")


def samples(n, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, width, generator=generator, dtype=torch.float64) + 5


@pytest.mark.parametrize("statistics", [EVERYTHING, ("mean", "variance", "norm")])
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=5), back=st.booleans())
def test_shards_in_any_order_give_what_numpy_gives_on_the_whole(statistics, cuts, back):
    x = samples(50)
    shards = []
    for a, b in pairwise([0, *sorted(cuts), 50]):
        shards.append(ActivationAccumulator(4, statistics))
        shards[-1].update(x[a:b])
    if back:
        shards.reverse()
    for other in shards[1:]:
        shards[0].merge(other)
    got = shards[0].values()
    assert shards[0].count == 50
    np.testing.assert_allclose(got["mean"], x.numpy().mean(0), rtol=1e-10)
    np.testing.assert_allclose(got["variance"], x.numpy().var(0), rtol=1e-10)
    quantiles = np.quantile(np.linalg.norm(x.numpy(), axis=1), NORM_LEVELS)
    np.testing.assert_allclose(got["norm"], quantiles, rtol=0.005)
    if "covariance" in statistics:
        expected = np.cov(x.numpy(), rowvar=False, bias=True)
        np.testing.assert_allclose(got["covariance"], expected, rtol=1e-10)


def test_a_bad_batch_changes_no_statistic():
    found = ActivationAccumulator(4, EVERYTHING)
    found.update(samples(5))
    before = found.values()
    bad = samples(5)
    bad[2, 1] = float("nan")
    with pytest.raises(NonFiniteError):
        found.update(bad)
    for name, value in found.values().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("statistics", [EVERYTHING, ("mean", "norm")])
def test_norms_too_large_to_count_change_no_statistic(statistics):
    found = ActivationAccumulator(4, statistics)
    found.update(samples(5))
    before = found.values()
    with pytest.raises(NonFiniteError, match=r"less than 2\^128"):
        found.update(1e60 * samples(5))  # squares of these are numbers still
    assert found.count == 5
    for name, value in found.values().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e60])
def test_a_bad_stream_leaves_the_others_as_they_were(bad):
    found = make_accumulator(statistics=EVERYTHING)
    for site in range(2):
        found.update(site, 0, [samples(6), samples(6, seed=1)])
    before = {name: found.stacked(name) for name in EVERYTHING}
    second = samples(6)
    second[3, 2] = bad
    with pytest.raises(NonFiniteError):
        found.update(0, 0, [samples(6, seed=2), second])
    assert found.count_tokens().tolist() == [6]
    for name, value in before.items():
        after = found.stacked(name)
        assert value is not None
        assert after is not None
        assert torch.equal(after, value)


def test_statistics_are_checked_by_name():
    with pytest.raises(ValueError, match=r"'varance' is not known; nearest: variance"):
        ActivationAccumulator(4, ["mean", "varance"])
    with pytest.raises(ValueError, match=r"expected some of"):
        ActivationAccumulator(4, [])


def make_accumulator(sites=("a", "b"), statistics=("mean",)):
    return StatisticsAccumulator(
        streams=("base", "tuned"),
        sites=sites,
        positions=("all",),
        width=4,
        statistics=statistics,
    )


def test_cells_are_kept_apart_and_merged_cell_by_cell():
    first, second = make_accumulator(), make_accumulator()
    x = [samples(6, seed=k) for k in range(4)]
    first.update(0, 0, [x[0], x[1]])
    first.update(1, 0, [x[2], x[3]])
    second.update(0, 0, [x[0] + 1, x[1] + 2])
    second.update(1, 0, [x[2] + 3, x[3] + 4])
    first.merge(second)
    mean = first.stacked("mean")
    assert mean is not None
    expected = torch.stack(
        [torch.stack([x[0] + 0.5, x[2] + 1.5]), torch.stack([x[1] + 1, x[3] + 2])]
    )
    assert torch.allclose(mean[:, :, 0], expected.mean(2), rtol=1e-12)
    assert first.count_tokens().tolist() == [12]
    assert first.stacked("variance") is None


@pytest.mark.parametrize(
    "other", [make_accumulator(sites=("a", "c")), make_accumulator(statistics=("variance",))]
)
def test_accumulators_of_other_arguments_are_refused(other):
    with pytest.raises(ValueError, match=r"must be made with the same arguments"):
        make_accumulator().merge(other)
