"""Streaming covariance against numpy, in any chunking and order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.numerics.covariance import CovarianceAccumulator
from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError, WidthError


def samples(n, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return (x @ torch.randn(width, width, generator=generator, dtype=torch.float64) + 7).to(dtype)


def accumulated(*batches):
    accumulator = CovarianceAccumulator(batches[0].shape[1])
    for batch in batches:
        accumulator.update(batch)
    return accumulator


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 2**20), split=st.booleans()
)
def test_streaming_equals_numpy_on_the_whole_for_any_chunking(cuts, seed, split):
    x = samples(60, 5, seed)
    parts = [x[a:b] for a, b in pairwise([0, *sorted(cuts), 60])]
    if split:  # every chunk a shard of its own, merged last to first
        shards = [accumulated(part) for part in parts][::-1]
        for other in shards[1:]:
            shards[0].merge(other)
        got = shards[0].result()
    else:
        got = accumulated(*parts).result()
    assert got.count == 60
    np.testing.assert_allclose(got.mean, x.numpy().mean(0), rtol=1e-10)
    expected = np.cov(x.numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(got.covariance, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(got.covariance, got.covariance.T)


@pytest.mark.parametrize("batch", [7, 3000])
def test_a_huge_mean_costs_no_digits_in_float32(batch):
    x = samples(3000, 6, dtype=torch.float32) + 30_000
    got = accumulated(*x.split(batch)).result()
    expected = np.cov(x.double().numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(got.covariance, expected, atol=2e-6 * np.abs(expected).max())


def test_a_batch_with_nan_is_refused_and_leaves_everything_as_it_was():
    accumulator = accumulated(samples(10, 3))
    before = accumulator.result()
    bad = samples(2000, 3, seed=1)
    bad[1999, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="x holds NaN"):
        accumulator.update(bad)
    assert torch.equal(accumulator.result().covariance, before.covariance)
    assert accumulator.count == 10


def test_another_width_and_no_samples_are_refused_by_name():
    with pytest.raises(WidthError, match=r"\(4, 5\), expected \[n, 3\]"):
        CovarianceAccumulator(3).update(torch.zeros(4, 5))
    with pytest.raises(WidthError, match="width of other is 5"):
        CovarianceAccumulator(3).merge(CovarianceAccumulator(5))
    empty = accumulated(torch.zeros(0, 3))
    empty.merge(CovarianceAccumulator(3))
    with pytest.raises(EmptyAccumulatorError, match="no sample"):
        empty.result()


def test_merging_leaves_the_other_as_it_was():
    first, second = accumulated(samples(10, 3)), accumulated(samples(12, 3, seed=1))
    before = second.result()
    first.merge(second)
    first.update(samples(5, 3, seed=2))
    assert second.count == 12
    assert torch.equal(second.result().covariance, before.covariance)
