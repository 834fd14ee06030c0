"""Streaming moments against numpy, in any chunking and order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.numerics.moments import Moments, MomentsAccumulator, centred_chunks
from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError, WidthError


def samples(n: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)


def accumulated(*batches: torch.Tensor) -> Moments:
    accumulator = MomentsAccumulator(batches[0].shape[1])
    for batch in batches:
        accumulator.update(batch)
    return accumulator.result()


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 2**20))
def test_streaming_equals_numpy_on_the_whole_for_any_chunking(cuts: list[int], seed: int):
    x = samples(60, 5, seed) * 3 + 7
    bounds = [0, *sorted(cuts), 60]
    got = accumulated(*(x[a:b] for a, b in pairwise(bounds)))
    assert got.count == 60
    np.testing.assert_allclose(got.mean, x.numpy().mean(0), rtol=1e-10)
    np.testing.assert_allclose(got.variance, x.numpy().var(0), rtol=1e-10)
    np.testing.assert_allclose(got.mean_square_norm, (x.numpy() ** 2).sum(1).mean(), rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(6)), tree=st.booleans())
def test_merging_shards_in_any_order_and_tree_equals_numpy(order: list[int], tree: bool):
    x = samples(63, 4) + 100
    sizes = [0, 1, 2, 10, 20, 30]
    shards = []
    for rows in x.split(sizes):
        shard = MomentsAccumulator(4)
        shard.update(rows)
        shards.append(shard)
    shards = [shards[i] for i in order]
    while len(shards) > 1:
        first, second = (shards.pop(0), shards.pop(0)) if tree else (shards.pop(), shards.pop())
        first.merge(second)
        shards.append(first)
    got = shards[0].result()
    assert got.count == 63
    np.testing.assert_allclose(got.mean, x.numpy().mean(0), rtol=1e-10)
    np.testing.assert_allclose(got.variance, x.numpy().var(0), rtol=1e-10)


@pytest.mark.parametrize("rows", [1000, 20_000])
def test_float32_variance_is_exact_to_about_one_rounding(rows: int):
    x = samples(rows, 64, dtype=torch.float32)
    got = accumulated(x)
    exact = x.double().numpy().var(0)
    np.testing.assert_allclose(got.variance, exact, rtol=4e-7)
    np.testing.assert_allclose(got.mean, x.double().numpy().mean(0), rtol=1e-10, atol=1e-7)


@pytest.mark.parametrize("batch", [7, 500])
def test_a_huge_mean_costs_no_digits_of_the_variance(batch: int):
    x = (samples(2000, 8, dtype=torch.float32) + 30_000).float()
    got = accumulated(*x.split(batch))
    np.testing.assert_allclose(got.variance, x.double().numpy().var(0), rtol=1e-6)
    np.testing.assert_allclose(got.mean, x.double().numpy().mean(0), rtol=1e-12)


def test_bfloat16_samples_are_summed_in_float32():
    x = samples(3000, 6, dtype=torch.bfloat16) + 2
    got = accumulated(x)
    np.testing.assert_allclose(got.variance, x.double().numpy().var(0), rtol=1e-6)
    assert got.mean.dtype is torch.float64


def test_constant_samples_have_exactly_zero_variance():
    got = accumulated(torch.full((300, 3), 0.1), torch.full((77, 3), 0.1))
    assert torch.equal(got.variance, torch.zeros(3, dtype=torch.float64))


def test_a_batch_with_nan_is_refused_and_leaves_everything_as_it_was():
    accumulator = MomentsAccumulator(3)
    accumulator.update(samples(10, 3))
    before = accumulator.result()
    bad = samples(2000, 3, seed=1)
    bad[1999, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="x holds NaN"):
        accumulator.update(bad)
    after = accumulator.result()
    assert after.count == before.count == 10
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.variance, before.variance)


def test_infinity_and_overflowing_squares_are_refused():
    for value in (float("inf"), 1e30):
        with pytest.raises(NonFiniteError):
            accumulated(torch.tensor([[value, 0.0], [0.0, 1.0]]))


def test_another_width_is_refused_by_name():
    with pytest.raises(WidthError, match=r"\(4, 5\), expected \[n, 3\]"):
        MomentsAccumulator(3).update(torch.zeros(4, 5))
    with pytest.raises(WidthError, match="width of other is 5"):
        MomentsAccumulator(3).merge(MomentsAccumulator(5))


def test_no_samples_have_no_result():
    accumulator = MomentsAccumulator(3)
    accumulator.update(torch.zeros(0, 3))
    accumulator.merge(MomentsAccumulator(3))
    assert accumulator.count == 0
    with pytest.raises(EmptyAccumulatorError, match="no sample"):
        accumulator.result()


def test_a_result_cannot_be_used_to_change_the_accumulator():
    accumulator = MomentsAccumulator(3)
    accumulator.update(samples(10, 3))
    accumulator.result().mean.zero_()
    assert accumulator.result().mean.abs().min() > 0


@pytest.mark.parametrize(
    ("device", "sizes"), [("cpu", [1024] * 32 + [1]), ("meta", [1 << 14] * 2 + [1])]
)
def test_an_accelerator_gets_larger_chunks(device: str, sizes: list[int]):
    rows = torch.zeros((1 << 15) + 1, 1, device=device)
    assert [chunk.count for chunk in centred_chunks(rows)] == sizes
