"""Divergences against scipy, at their bounds and at zero probabilities."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import entropy as scipy_entropy

from emlens.numerics import blocks
from emlens.numerics.by_device import ByDevice
from emlens.numerics.divergence import (
    NotLogProbabilitiesError,
    entropy,
    js_divergence,
    kl_divergence,
    top_changes,
)
from emlens.numerics.validation import WidthError


def log_probs(*shape: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def certain(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), vocab=st.integers(1, 40), spread=st.floats(0, 30))
def test_kl_is_scipys_and_not_negative(seed: int, vocab: int, spread: float):
    p = log_probs(3, vocab, seed=seed, spread=spread)
    q = log_probs(3, vocab, seed=seed + 1, spread=spread)
    got = kl_divergence(p, q)
    assert (got >= 0).all()
    expected = rel_entr(p.exp().numpy(), q.exp().numpy()).sum(-1)
    np.testing.assert_allclose(got, expected, atol=1e-10, rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([1e-7, 1e-4, 1.0]))
def test_kl_is_zero_for_equal_distributions_and_only_for_them(seed: int, size: float):
    p = log_probs(20, seed=seed)
    assert float(kl_divergence(p, p)) == 0
    change = log_probs(20, seed=seed + 1) * size
    q = (p + change).log_softmax(-1)
    assert float(kl_divergence(p, q)) > 0


@pytest.mark.parametrize("floor", [None, -300.0])
def test_a_tiny_divergence_keeps_its_digits_in_float32(floor: float | None):
    p = log_probs(4, 50_000)
    q = (p + 1e-3 * log_probs(4, 50_000, seed=1, spread=1.0)).log_softmax(-1)
    if floor is not None:
        # One token that only q allows takes the path for ratios that would overflow.
        p[:, 7], q[:, 7] = floor, -25.0
        p, q = p.log_softmax(-1), q.log_softmax(-1)
    exact = rel_entr(p.exp().numpy(), q.exp().numpy()).sum(-1)
    assert exact.max() < 1e-6
    np.testing.assert_allclose(kl_divergence(p.float(), q.float()), exact, rtol=1e-3)


def test_a_token_that_only_q_allows_costs_nothing_and_one_that_only_p_allows_costs_much():
    p = torch.tensor([0.0, -200.0], dtype=torch.float64).log_softmax(-1)
    q = torch.tensor([0.0, 0.0], dtype=torch.float64).log_softmax(-1)
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        there, back = (
            kl_divergence(p.to(dtype), q.to(dtype)),
            kl_divergence(q.to(dtype), p.to(dtype)),
        )
        assert float(there) == pytest.approx(math.log(2), rel=rel)
        assert float(back) == pytest.approx(100 - math.log(2), rel=rel)


def test_zero_probabilities_count_as_their_limits():
    p, q = certain(0.5, 0.5, 0.0, 0.0), certain(0.25, 0.5, 0.25, 0.0)
    assert float(kl_divergence(p, q)) == pytest.approx(0.5 * math.log(2), rel=1e-12)
    assert float(kl_divergence(q, p)) == math.inf
    assert float(kl_divergence(p, p)) == 0
    assert float(entropy(p)) == pytest.approx(math.log(2), rel=1e-12)
    assert float(entropy(certain(1.0, 0.0))) == 0


@settings(max_examples=30, deadline=None)
# Below a spread of 1e-6 scipy's own sum rounds to less than 0, and its root is no number.
@given(seed=st.integers(0, 2**20), spread=st.floats(1e-6, 20))
def test_js_is_scipys_symmetric_and_at_most_ln_2(seed: int, spread: float):
    p, q = (log_probs(2, 12, seed=seed + i, spread=spread) for i in (0, 1))
    got = js_divergence(p, q)
    expected = [
        jensenshannon(a, b) ** 2 for a, b in zip(p.exp().numpy(), q.exp().numpy(), strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(got, js_divergence(q, p), rtol=1e-10, atol=1e-12)
    assert (got <= math.log(2) + 1e-12).all()


def test_js_of_disjoint_distributions_is_ln_2():
    assert float(js_divergence(certain(1, 0), certain(0, 1))) == pytest.approx(math.log(2))


def test_entropy_is_scipys_and_largest_when_uniform():
    p = log_probs(4, 5, 30)
    np.testing.assert_allclose(entropy(p), scipy_entropy(p.exp().numpy(), axis=-1), rtol=1e-10)
    assert float(entropy(torch.zeros(7).log_softmax(-1))) == pytest.approx(math.log(7), rel=1e-6)


def test_top_changes_are_the_tokens_that_rose_and_fell_most():
    p, q = log_probs(2, 3, 10), log_probs(2, 3, 10, seed=1)
    got = top_changes(p, q, 3)
    change = (q.exp() - p.exp()).numpy()
    order = np.argsort(change, axis=-1)
    np.testing.assert_array_equal(got.risen, order[..., ::-1][..., :3])
    np.testing.assert_array_equal(got.fallen, order[..., :3])
    np.testing.assert_allclose(
        got.risen_by, np.take_along_axis(change, got.risen.numpy(), -1), rtol=1e-10
    )
    np.testing.assert_allclose(
        got.fallen_by, np.take_along_axis(change, got.fallen.numpy(), -1), rtol=1e-10
    )


def test_a_planted_change_is_the_top_change():
    p = torch.zeros(50).log_softmax(-1)
    logits = torch.zeros(50)
    logits[31], logits[7] = 2.0, -2.0
    got = top_changes(p, logits.log_softmax(-1), 1)
    assert (int(got.risen), int(got.fallen)) == (31, 7)
    assert got.risen_by > 0 > got.fallen_by


def test_work_in_small_blocks_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    p, q = log_probs(5, 3, 20), log_probs(5, 3, 20, seed=1)
    whole = [f(p, q) for f in (kl_divergence, js_divergence)], entropy(p), top_changes(p, q, 2)
    monkeypatch.setattr(blocks, "BLOCK_VALUES", ByDevice(cpu=40, elsewhere=40))
    parts = [f(p, q) for f in (kl_divergence, js_divergence)], entropy(p), top_changes(p, q, 2)
    for a, b in zip(whole[0], parts[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(whole[2].risen, parts[2].risen)
    assert torch.equal(whole[2].fallen_by, parts[2].fallen_by)


def test_no_rows_give_no_divergences():
    p = log_probs(0, 6)
    assert kl_divergence(p, p).shape == entropy(p).shape == (0,)
    assert top_changes(p, p, 2).risen.shape == (0, 2)


def test_half_precision_is_summed_in_float32():
    p, q = (log_probs(4, 300, seed=i, spread=1.0) for i in (0, 1))
    got = kl_divergence(p.bfloat16(), q.bfloat16())
    assert got.dtype is torch.float32
    np.testing.assert_allclose(got, kl_divergence(p, q), rtol=0.05)


def test_the_divergence_can_be_a_training_penalty():
    logits, target = log_probs(3, 6, seed=2), log_probs(3, 6)
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: kl_divergence(target, z.log_softmax(-1)), (logits,))


def test_logits_and_nan_are_not_taken_for_log_probabilities():
    p = log_probs(3, 6)
    with pytest.raises(NotLogProbabilitiesError, match=r"log_q .* do not sum to 1"):
        kl_divergence(p, p + 1)
    with pytest.raises(NotLogProbabilitiesError, match="log_p"):
        entropy(torch.full((2, 3), float("nan")))


def test_shapes_and_k_are_checked_by_name():
    p = log_probs(3, 6)
    for function in (kl_divergence, js_divergence):
        with pytest.raises(WidthError, match=r"log_p has shape \(3, 6\), log_q \(1, 6\)"):
            inspect.unwrap(function)(p, p[:1])
    with pytest.raises(ValueError, match="k is 7, expected 1 to d_vocab = 6"):
        top_changes(p, p, 7)
