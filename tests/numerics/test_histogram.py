"""Quantiles from a log-histogram against numpy's, and merging."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.numerics.histogram import SizeHistogramAccumulator
from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError

SIZES = st.lists(st.one_of(st.just(0.0), st.floats(2.0**-140, 2.0**120)), min_size=1, max_size=40)


def accumulated(*batches):
    accumulator = SizeHistogramAccumulator()
    for batch in batches:
        accumulator.update(torch.as_tensor(batch, dtype=torch.float64))
    return accumulator


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, q=st.sampled_from([0.0, 0.05, 0.25, 0.5, 0.77, 1.0]))
def test_quantiles_are_those_of_numpy_to_half_a_percent(sizes, q):
    got = accumulated(sizes).result().quantile(q)
    assert got == pytest.approx(np.quantile(np.array(sizes), q), rel=0.00500001)


@pytest.mark.parametrize("seed", range(5))
def test_the_median_of_norms_is_good_to_a_percent(seed):
    norms = np.random.default_rng(seed).lognormal(3, 1.5, 5001).astype(np.float32)
    got = SizeHistogramAccumulator()
    got.update(torch.from_numpy(norms))
    assert got.result().median == pytest.approx(np.median(norms), rel=0.005)


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, cut=st.integers(0, 40), back=st.booleans())
def test_merged_parts_are_exactly_the_whole(sizes, cut, back):
    whole = accumulated(sizes).result()
    first, second = accumulated(sizes[:cut]), accumulated(sizes[cut:])
    if back:
        first, second = second, first
    first.merge(second)
    got = first.result()
    assert got.zeros == whole.zeros
    assert torch.equal(got.counts, whole.counts)
    assert got.count == len(sizes)


def test_the_edges_of_the_range_are_counted_and_what_lies_beyond_is_refused():
    tiny = float(torch.finfo(torch.float32).smallest_normal) / 2**23
    assert accumulated([tiny]).result().median == pytest.approx(tiny, rel=0.005)
    huge = torch.finfo(torch.float32).max
    assert accumulated([huge]).result().median == pytest.approx(huge, rel=0.005)
    for bad in (float("nan"), float("inf"), 2.0**128):
        accumulator = accumulated([1.0])
        with pytest.raises(NonFiniteError, match="expected less than"):
            accumulator.update(torch.tensor([1.0, bad], dtype=torch.float64))
        assert accumulator.count == 1
    with pytest.raises(ValueError, match="not negative"):
        accumulated([-1.0])


def test_nothing_seen_has_no_quantile():
    accumulator = SizeHistogramAccumulator()
    accumulator.update(torch.zeros(0))
    with pytest.raises(EmptyAccumulatorError, match="no size"):
        accumulator.result()
    with pytest.raises(ValueError, match=r"expected a probability"):
        accumulated([1.0]).result().quantile(1.5)


def test_a_result_cannot_be_used_to_change_the_accumulator():
    accumulator = accumulated([1.0, 2.0])
    accumulator.result().counts.zero_()
    assert accumulator.count == 2
