"""Sums and sketches of what lies on a device are those of the CPU, and merge with those of another.

On the CPU the same tests run by default, which keeps them from rotting; with ``-m gpu`` on CUDA.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from emlens.features.accumulate import FeatureAccumulator
from emlens.features.attribute import AttributionSums
from emlens.features.compare import decoder_cosines
from emlens.features.reading import count_rows
from emlens.numerics.sketch import CovarianceSketch
from emlens.numerics.validation import NonFiniteError, check_finite
from emlens.numerics.weighted import WeightedSumsAccumulator
from tests.codecs.builders import draw, make_sae

X = draw(3000, 12, seed=1) + 3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_same(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert (found.cpu() - expected).abs().max() <= relative * expected.abs().max()


def shards(device: str) -> tuple[Tensor, Tensor]:
    """Half of the samples there, half here."""
    return X[:1500].to(device), X[1500:]


def test_a_sketch_of_shards_is_that_of_the_whole(device: str):
    whole = CovarianceSketch(12, rank=4)
    whole.update(X)
    for order in (1, -1):
        first, second = (CovarianceSketch(12, rank=4) for _ in range(2))
        parts = shards(device)[::order]
        first.update(parts[0])
        second.update(parts[1])
        first.merge(second)
        assert_same(first.result().variances, whole.result().variances, 1e-4)


def test_weighted_sums_of_shards_are_those_of_the_whole(device: str):
    weights = draw(2, 3000, seed=2, dtype=torch.float64)
    whole = WeightedSumsAccumulator(2, 12)
    whole.update(X, weights)
    parts = [WeightedSumsAccumulator(2, 12) for _ in range(2)]
    for part, x, own in zip(parts, shards(device), weights.split(1500, 1), strict=True):
        part.update(x, own)
    parts[0].merge(parts[1])
    assert_same(parts[0].result().sums, whole.result().sums, 1e-10)


def test_attributions_of_shards_are_those_of_the_whole(device: str):
    directions, slopes = draw(20, 12, seed=3), draw(3000, 12, seed=4)
    whole = AttributionSums(12)
    for rows in (slice(0, 1500), slice(1500, 3000)):
        whole.update(X[rows], slopes[rows], weight=0.5)
    for order in (1, -1):
        first, second = AttributionSums(12), AttributionSums(12)
        parts = list(zip(shards(device), (slopes[:1500], slopes[1500:]), strict=True))[::order]
        for sums, (x, slope) in zip((first, second), parts, strict=True):
            sums.update(x, slope.to(x.device), weight=0.5)
        first.merge(second)
        for place in ("cpu", device):
            found = first.result(directions.to(place))
            assert found.device.type == "cpu"
            assert_same(found, whole.result(directions), 1e-8)


def test_cosines_of_a_decoder_are_those_of_the_cpu(device: str):
    W_dec, direction = draw(50, 12, seed=5), draw(12, seed=6, dtype=torch.float64)
    found = decoder_cosines(W_dec.to(device), direction)
    assert found.device.type == "cpu"
    assert_same(found, decoder_cosines(W_dec, direction), 1e-10)


def test_codes_of_all_rows_at_once_are_those_of_a_processors_chunks(device: str):
    codec: Any = make_sae("jumprelu")
    prompts = torch.arange(3000) % 7
    found = []
    for own in (codec, codec.to(device)):
        sums = FeatureAccumulator(2, n_prompts=7, d_in=12, d_sae=96)
        x = torch.stack([X, X + 1]).to(own.W_dec.device)
        count_rows(sums, own, prompts=prompts, x=x)
        found.append(sums.models[1].result())
    expected, there = found
    assert_same(there.activations, expected.activations)
    assert_same(there.missed, expected.missed, 1e-4)
    assert (there.firings - expected.firings).abs().max() <= 1  # within rounding of a threshold


def test_a_value_that_is_none_is_found_on_either_device(device: str):
    good, bad = torch.zeros(3), torch.full((3,), torch.inf)
    check_finite("x", good, good.to(device))
    for given in ((good, bad.to(device)), (bad, good.to(device)), (good.to(device), good, bad)):
        with pytest.raises(NonFiniteError):
            check_finite("x", *given)
