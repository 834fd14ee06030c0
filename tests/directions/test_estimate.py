"""Estimates of one site from tensors alone: planted truth, chance, and any chunking and order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.directions.design import HALVES, N_RANDOM, N_SHUFFLED, make_design
from emlens.directions.estimate import DirectionAccumulator, large_dimension_share
from emlens.numerics.validation import NonFiniteError

WIDTH = 12


def make_run(n_positive=40, n_negative=50, *, size=0.0, seed=0, width=WIDTH, paired=False):
    """Anisotropic tokens of texts of several lengths; positives are shifted by a planted vector."""
    generator = torch.Generator().manual_seed(seed)
    n = n_positive + n_negative
    lengths = torch.randint(1, 9, (n,), generator=generator)
    rows = torch.repeat_interleave(torch.arange(n), lengths)
    tokens = torch.cat([torch.arange(int(k)) + 3 for k in lengths])
    scales = torch.linspace(4.0, 0.25, width, dtype=torch.float64)
    noise = torch.randn(len(rows), width, generator=generator, dtype=torch.float64)
    planted = torch.nn.functional.normalize(torch.arange(width).double() - width / 3, dim=0)
    positive = [True] * n_positive + [False] * n_negative
    share = torch.ones(len(rows)) if paired else torch.tensor(positive)[rows].double()
    x = scales * noise + 10 + size * share[:, None] * planted
    return x - 10 * paired, rows, tokens, positive, lengths.tolist(), planted


def design_of(positive, lengths, *, response=False, paired=False, **more):
    return make_design(
        [f"text {k}" for k in range(len(lengths))],
        positive,
        lengths,
        response_weighted=response,
        paired=paired,
        **{"seed": 0, **more},
    )


def accumulated(design, x, rows, tokens, parts):
    found = DirectionAccumulator(design, x.shape[1])
    for part in parts:
        effects, draws = design.effects[:, rows[part]], design.draws(rows[part], tokens[part])
        found.update(x[part], x[part], x[part], effects, draws)
    return found


def estimate(x, rows, tokens, design):
    return accumulated(design, x, rows, tokens, [torch.arange(len(x))]).result()


@pytest.mark.parametrize("response", [False, True])
def test_the_vector_is_the_difference_of_means_that_numpy_gives(response):
    x, rows, tokens, positive, lengths, _ = make_run(size=2.0)
    got = estimate(x, rows, tokens, design_of(positive, lengths, response=response))
    by_text = [x[rows == k].numpy() for k in range(len(lengths))]

    def mean(label):
        texts = [t for t, own in zip(by_text, positive, strict=True) if own == label]
        if response:
            return np.mean([t.mean(0) for t in texts], axis=0)
        return np.concatenate(texts).mean(0)

    np.testing.assert_allclose(got.vector, mean(True) - mean(False), rtol=1e-10, atol=1e-12)
    assert got.resid_norm == pytest.approx(np.median(np.linalg.norm(x.numpy(), axis=1)), rel=0.005)


def test_a_planted_direction_is_recovered_and_stands_out_from_shuffled_labels():
    x, rows, tokens, positive, lengths, planted = make_run(400, 400, size=3.0)
    got = estimate(x, rows, tokens, design_of(positive, lengths))
    assert float(torch.cosine_similarity(got.vector, planted, dim=0)) > 0.98
    assert got.split_half_cosine is not None
    assert got.split_half_cosine > 0.95
    assert got.shuffled is not None
    assert float(got.vector.norm()) > 4 * float(got.shuffled.norm(dim=1).max())


@pytest.mark.parametrize("paired", [False, True])
def test_nothing_is_found_when_nothing_is_planted(paired):
    halves, ranks = [], []
    for seed in range(40):
        x, rows, tokens, positive, lengths, _ = make_run(40, 0 if paired else 40, seed=seed)
        x = x - 10 if paired else x
        got = estimate(x, rows, tokens, design_of(positive, lengths, paired=paired))
        assert got.split_half_cosine is not None
        assert got.shuffled is not None
        halves.append(got.split_half_cosine)
        ranks.append(float((got.shuffled.norm(dim=1) < got.vector.norm()).double().mean()))
    # The spectrum has about 6 effective dimensions: cosines spread by 0.4, their mean by 0.07.
    assert abs(np.mean(halves)) < 0.25
    assert 0.3 < np.mean(ranks) < 0.7


def test_of_paired_texts_the_mean_is_the_estimate_and_shuffling_flips_signs():
    x, rows, tokens, positive, lengths, planted = make_run(60, 0, size=3.0, paired=True)
    design = design_of(positive, lengths, paired=True)
    got = estimate(x, rows, tokens, design)
    np.testing.assert_allclose(got.vector, x.mean(0), rtol=1e-10)
    assert float(torch.cosine_similarity(got.vector, planted, dim=0)) > 0.95
    assert got.shuffled is not None
    signs = 2 * design.effects[HALVES:, rows] - 1
    np.testing.assert_allclose(got.shuffled, signs @ x / len(x), rtol=1e-9, atol=1e-10)
    assert (design.effects[HALVES:] > 0).sum(1).tolist() == [30] * N_SHUFFLED


def test_shuffled_labels_give_the_mean_differences_that_numpy_gives():
    x, rows, tokens, positive, lengths, _ = make_run()
    design = design_of(positive, lengths)
    got = estimate(x, rows, tokens, design)
    assert got.shuffled is not None
    assert len(got.shuffled) == N_SHUFFLED >= 16
    assert len({tuple(row) for row in (design.effects[HALVES:] > 0).tolist()}) == N_SHUFFLED
    for dealt, vector in zip(design.effects[HALVES:] > 0, got.shuffled, strict=True):
        assert int(dealt.sum()) == 40
        token = dealt[rows]
        np.testing.assert_allclose(vector, x[token].mean(0) - x[~token].mean(0), atol=1e-10)


@pytest.mark.parametrize("response", [False, True])
def test_random_directions_have_the_covariance_of_the_activations(response):
    x, rows, tokens, positive, lengths, _ = make_run(size=6.0)
    design = design_of(positive, lengths, response=response, n_random=6000)
    got = estimate(x, rows, tokens, design).covariance_matched
    weights = design.weights[rows].numpy()
    expected = np.cov(x.numpy(), rowvar=False, bias=True, aweights=weights)
    found = (got.T @ got / len(got)).numpy()
    # Entries spread by sqrt(s_ii s_jj + s_ij^2) / sqrt(6000).
    spread = np.sqrt((np.outer(expected.diagonal(), expected.diagonal()) + expected**2) / 6000)
    assert np.abs((found - expected) / spread).max() < 5
    means = got.mean(0).numpy() / np.sqrt(expected.diagonal() / 6000)
    assert np.abs(means).max() < 5
    assert (
        len(estimate(x, rows, tokens, design_of(positive, lengths)).covariance_matched) == N_RANDOM
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), n_cuts=st.integers(0, 6), sharded=st.booleans())
def test_any_chunking_and_order_gives_the_same(seed, n_cuts, sharded):
    x, rows, tokens, positive, lengths, _ = make_run(12, 9, size=1.0)
    design = design_of(positive, lengths, response=True)
    whole = estimate(x, rows, tokens, design)
    generator = np.random.default_rng(seed)
    order = torch.from_numpy(generator.permutation(len(x)))
    cuts = [0, *sorted(generator.integers(0, len(x), n_cuts)), len(x)]
    parts = [order[a:b] for a, b in pairwise(cuts)]
    if sharded:
        shards = [accumulated(design, x, rows, tokens, [part]) for part in parts]
        for other in shards[1:]:
            shards[0].merge(other)
        got = shards[0].result()
    else:
        got = accumulated(design, x, rows, tokens, parts).result()
    for name in ("vector", "shuffled", "covariance_matched"):
        assert torch.allclose(getattr(got, name), getattr(whole, name), rtol=1e-9, atol=1e-10)
    assert got.split_half_cosine == pytest.approx(whole.split_half_cosine, abs=1e-10)
    assert got.top3_share == pytest.approx(whole.top3_share, abs=1e-10)
    assert got.resid_norm == whole.resid_norm


@pytest.mark.parametrize(
    ("part", "bad"),
    [(0, float("nan")), (1, float("inf")), (2, float("nan")), (2, 1e60)],  # 1e60: beyond all bins
)
def test_what_any_part_refuses_changes_no_sum(part, bad):
    x, rows, tokens, positive, lengths, _ = make_run(12, 9, size=1.0)
    design = design_of(positive, lengths)
    found = accumulated(design, x, rows, tokens, [torch.arange(len(x))])
    before = found.result()
    averaged, varying, base = given = [x.clone() for _ in range(3)]
    given[part][4, 1] = bad
    effects, draws = design.effects[:, rows], design.draws(rows, tokens)
    with pytest.raises(NonFiniteError):
        found.update(averaged, varying, base, effects, draws)
    after = found.result()
    for name in ("vector", "shuffled", "covariance_matched"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert (after.top3_share, after.resid_norm) == (before.top3_share, before.resid_norm)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(10)), st.booleans())
def test_the_order_of_the_texts_decides_nothing(order, paired):
    hashes = [f"text {min(k, 7)}" for k in range(10)]  # three of them say the same
    positive = [True] * 10 if paired else [k % 2 == 0 for k in range(10)]
    more = {"response_weighted": True, "paired": paired, "seed": 3}
    lengths = list(range(1, 11))
    first = make_design(hashes, positive, lengths, **more)
    again = make_design(
        [hashes[k] for k in order],
        [positive[k] for k in order],
        [lengths[k] for k in order],
        **more,
    )
    # Equal texts are interchangeable, so that only the ones that differ must be dealt alike.
    place = [(index, k) for index, k in enumerate(order) if k < 7]
    here, there = [k for _, k in place], [index for index, _ in place]
    assert torch.equal(first.keys[here], again.keys[there])
    assert torch.equal(first.effects[:, here], again.effects[:, there])
    assert sorted(first.keys.tolist()) == sorted(again.keys.tolist())
    assert len(set(first.keys.tolist())) == 10


def test_halves_part_each_class_in_two():
    design = design_of([True] * 21 + [False] * 30, [3] * 51)
    halves = design.effects[:HALVES] > 0
    assert halves.sum(1).tolist() == [11, 10, 15, 15]
    assert torch.equal(halves.sum(0), torch.ones(51, dtype=torch.long))
    assert torch.equal(halves[0] | halves[1], design.positive)


def test_one_text_has_neither_halves_nor_shufflings():
    x, rows, tokens, _, lengths, _ = make_run(1, 0, size=1.0, paired=True)
    got = estimate(x, rows, tokens, design_of([True], lengths, paired=True))
    assert got.split_half_cosine is None
    assert got.shuffled is None


def test_two_equal_models_have_a_zero_vector_and_say_so():
    _, rows, tokens, positive, lengths, _ = make_run(30, 0, paired=True)
    design = design_of(positive, lengths, paired=True)
    got = estimate(torch.zeros(len(rows), 4, dtype=torch.float64), rows, tokens, design)
    assert float(got.vector.abs().max()) == 0
    assert got.split_half_cosine is None
    assert got.resid_norm is None
    assert np.isnan(got.top3_share)


def test_the_share_of_the_large_dimensions_is_of_those_with_most_variance():
    vector = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    variance = torch.tensor([9.0, 1.0, 8.0, 2.0, 7.0])
    assert large_dimension_share(vector, variance) == pytest.approx((1 + 9 + 25) / 55)
    assert large_dimension_share(vector[:2], variance[:2]) == 1
