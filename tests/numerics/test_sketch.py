"""The covariance sketch against numpy's eigendecomposition, and on noise."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from emlens.numerics.moments import MomentsAccumulator
from emlens.numerics.sketch import (
    CovarianceSketch,
    SketchMismatchError,
    TopDirections,
    isotropic_share,
)
from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError, WidthError


def noise(n: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def low_rank(n: int, width: int, rank: int) -> torch.Tensor:
    scales = torch.arange(rank, 0, -1, dtype=torch.float64)
    return (noise(n, rank, 1) * scales) @ noise(rank, width, 2) + 5 * noise(1, width, 3)


def sketched(x: torch.Tensor, rank: int = 32, seed: int = 0) -> TopDirections:
    sketch = CovarianceSketch(x.shape[1], rank=rank, seed=seed)
    sketch.update(x)
    return sketch.result()


@pytest.mark.parametrize(("dtype", "part"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_covariance_within_the_sketch_rank_is_recovered_exactly(dtype: torch.dtype, part: float):
    x = low_rank(500, 40, 6).to(dtype)
    got = sketched(x, rank=12)
    exact = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(got.variances[:6], exact[:6], rtol=0, atol=part * exact[0])
    np.testing.assert_allclose(got.total_variance, exact.sum(), rtol=part)
    np.testing.assert_allclose(got.shares[:6], exact[:6] / exact.sum(), rtol=0, atol=part)
    assert torch.count_nonzero(got.variances[6:]) == 0
    assert torch.count_nonzero(got.directions[6:]) == 0


def test_directions_are_those_of_scikit_learn_and_orthonormal():
    x = low_rank(500, 40, 6)
    got = sketched(x, rank=12).directions[:6].numpy()
    oracle = PCA(6).fit(x.numpy()).components_
    np.testing.assert_allclose(np.abs((got * oracle).sum(1)), 1, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(got @ got.T, np.eye(6), rtol=1e-10, atol=1e-10)


def test_planted_directions_are_found_in_noise_with_their_variances():
    width, planted = 128, torch.linalg.qr(noise(128, 2, 5)).Q.T
    coefficients = noise(5000, 2, 6) * torch.tensor([12.0, 8.0])
    got = sketched((noise(5000, width, 7) + coefficients @ planted).float())
    cosines = (got.directions[:2] * planted).sum(1).abs()
    assert cosines.min() > 0.99
    np.testing.assert_allclose(got.variances[:2], [145, 65], rtol=0.1)
    assert got.shares[0] > 10 * got.isotropic_share
    assert got.shares[2] < got.isotropic_share


@pytest.mark.parametrize(("n", "width"), [(4000, 64), (300, 128)])
def test_nothing_stands_out_where_nothing_is_planted(n: int, width: int):
    got = sketched(noise(n, width).float())
    assert got.shares[0] <= 1.1 * isotropic_share(n, width)
    assert got.shares.sum() < 1
    assert got.isotropic_share == isotropic_share(n, width)


def test_the_isotropic_share_is_what_the_exact_covariance_of_noise_shows():
    exact = np.linalg.eigvalsh(np.cov(noise(2000, 200).numpy().T, bias=True))
    assert exact[-1] / exact.sum() == pytest.approx(isotropic_share(2000, 200), rel=0.05)
    assert isotropic_share(1, 10) == 1.0


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), merged=st.booleans())
def test_streaming_and_merging_equal_one_batch(cuts: list[int], merged: bool):
    x = low_rank(60, 10, 4) + 1000
    bounds = [0, *sorted(cuts), 60]
    whole = CovarianceSketch(10, rank=6)
    for a, b in pairwise(bounds):
        if merged:
            shard = CovarianceSketch(10, rank=6)
            shard.update(x[a:b])
            whole.merge(shard)
        else:
            whole.update(x[a:b])
    got, single = whole.result(), sketched(x, rank=6)
    np.testing.assert_allclose(got.variances, single.variances, rtol=1e-8)
    np.testing.assert_allclose(got.directions, single.directions, rtol=1e-10, atol=1e-7)
    assert got.total_variance == pytest.approx(single.total_variance, rel=1e-10)


def test_many_chunks_of_float32_with_a_huge_mean_still_show_the_direction():
    x = (low_rank(5000, 32, 1) / 10 + 3000).float()
    exact = np.linalg.eigh(np.cov(x.double().numpy().T, bias=True))
    got = sketched(x, rank=8)
    assert abs(float(got.directions[0] @ torch.from_numpy(exact[1][:, -1].copy()))) > 1 - 1e-6
    np.testing.assert_allclose(got.variances[0], exact[0][-1], rtol=1e-4)


def test_the_moments_of_a_sketch_are_those_of_the_accumulator():
    x = low_rank(2500, 10, 3)
    sketch, accumulator = CovarianceSketch(10), MomentsAccumulator(10)
    sketch.update(x)
    accumulator.update(x)
    got, expected = sketch.moments(), accumulator.result()
    assert got.count == expected.count == 2500
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(got.variance, expected.variance, rtol=1e-12)


def test_identical_samples_have_no_direction_and_no_variance():
    got = sketched(torch.full((50, 6), 0.1))
    assert got.total_variance == 0
    for tensor in (got.directions, got.variances, got.shares):
        assert torch.count_nonzero(tensor) == 0
    assert got.directions.shape == (6, 6)


def test_a_batch_with_nan_is_refused_and_leaves_everything_as_it_was():
    sketch = CovarianceSketch(5)
    sketch.update(noise(20, 5))
    before = sketch.result()
    bad = noise(20, 5, 1)
    bad[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="x holds NaN"):
        sketch.update(bad)
    assert sketch.count == 20
    assert torch.equal(sketch.result().variances, before.variances)


def test_sketches_with_other_test_vectors_do_not_merge():
    sketch = CovarianceSketch(8, rank=4, seed=0)
    for other in (CovarianceSketch(8, rank=4, seed=1), CovarianceSketch(8, rank=3, seed=0)):
        with pytest.raises(SketchMismatchError, match="same two numbers"):
            sketch.merge(other)
    with pytest.raises(WidthError):
        sketch.merge(CovarianceSketch(9, rank=4, seed=0))


def test_no_samples_have_no_result():
    sketch = CovarianceSketch(4)
    sketch.update(torch.zeros(0, 4))
    with pytest.raises(EmptyAccumulatorError):
        sketch.result()
    with pytest.raises(EmptyAccumulatorError):
        sketch.moments()
    with pytest.raises(WidthError):
        sketch.update(torch.zeros(2, 5))


def test_sketches_of_the_same_numbers_share_their_test_vectors(monkeypatch: pytest.MonkeyPatch):
    factored: list[tuple[int, ...]] = []
    plain = torch.linalg.qr

    def counting(matrix: torch.Tensor) -> object:
        factored.append(tuple(matrix.shape))
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "qr", counting)
    x = low_rank(300, 11, 5).float() + 3
    with torch.inference_mode():
        first = sketched(x, rank=4, seed=910)
    for y in (2 * x, x + 1000, x.double()):
        sketched(y, rank=4, seed=910)
    again = sketched(x, rank=4, seed=910)
    assert factored == [(11, 4)]
    assert torch.equal(first.variances, again.variances)
    assert torch.equal(first.directions, again.directions)
    assert not torch.equal(sketched(x, rank=4, seed=911).variances, first.variances)
