"""Weighted sums against numpy, in any chunking and order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.numerics import weighted
from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError, WidthError
from emlens.numerics.weighted import WeightedSumsAccumulator


def drawn(n, seed=0, m=3, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64) + 3
    return x.to(dtype), torch.randn(m, n, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 2**20), split=st.booleans()
)
def test_streaming_equals_numpy_on_the_whole_for_any_chunking(cuts, seed, split):
    x, weights = drawn(60, seed)
    shards = [WeightedSumsAccumulator(3, 5)]
    for a, b in pairwise([0, *sorted(cuts), 60]):
        if split:
            shards.append(WeightedSumsAccumulator(3, 5))
        shards[-1].update(x[a:b], weights[:, a:b])
    whole = shards.pop()
    for other in shards:
        whole.merge(other)
    got = whole.result()
    np.testing.assert_allclose(got.sums, weights.numpy() @ x.numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got.weights, weights.numpy().sum(1), rtol=1e-10, atol=1e-12)


def test_float32_samples_are_summed_without_further_rounding():
    x, weights = drawn(5000, dtype=torch.float32)
    accumulator = WeightedSumsAccumulator(3, 5)
    accumulator.update(x, weights)
    expected = weights.numpy() @ x.double().numpy()
    np.testing.assert_allclose(accumulator.result().sums, expected, rtol=1e-10)


def test_what_does_not_fit_is_refused_and_leaves_everything_as_it_was():
    x, weights = drawn(6)
    accumulator = WeightedSumsAccumulator(3, 5)
    with pytest.raises(EmptyAccumulatorError, match="no sample"):
        accumulator.result()
    accumulator.update(x, weights)
    before = accumulator.result()
    with pytest.raises(WidthError, match=r"weights has shape \(2, 6\), expected \[3, 6\]"):
        accumulator.update(x, weights[:2])
    with pytest.raises(WidthError, match=r"expected \[n, 5\]"):
        accumulator.update(x[:, :4], weights)
    with pytest.raises(NonFiniteError):
        accumulator.update(x.index_fill(0, torch.tensor([3]), float("nan")), weights)
    with pytest.raises(WidthError, match="m of other is 2"):
        accumulator.merge(WeightedSumsAccumulator(2, 5))
    accumulator.result().sums.zero_()
    accumulator.update(x[:0], weights[:, :0])
    assert torch.equal(accumulator.result().sums, before.sums)


def test_an_accelerator_sums_larger_chunks(monkeypatch: pytest.MonkeyPatch):
    chunks: list[int] = []
    plain = torch.Tensor.addmm_

    def counting(sums: torch.Tensor, part: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        chunks.append(len(rows))
        return plain(sums, part, rows)

    monkeypatch.setattr(torch.Tensor, "addmm_", counting)
    monkeypatch.setattr(weighted, "check_finite", lambda *_: None)  # no value lies on that device
    for device, expected in (("cpu", [1024] * 9 + [784]), ("meta", [8192, 1808])):
        x, weights = (given.to(device) for given in drawn(10_000))
        WeightedSumsAccumulator(3, 5).update(x, weights)
        assert chunks == expected
        chunks.clear()
