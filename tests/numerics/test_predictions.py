"""The fused comparison against scipy, and its bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy.special import log_softmax
from scipy.stats import entropy

from emlens.numerics import blocks
from emlens.numerics.by_device import ByDevice
from emlens.numerics.predictions import compare_predictions


def draw(n, d_vocab, seed, spread=3.0):
    generator = np.random.default_rng(seed)
    return torch.tensor(log_softmax(spread * generator.normal(size=(n, d_vocab)), axis=1))


@given(st.integers(1, 9), st.integers(2, 40), st.integers(0, 1000))
def test_rows_equal_scipy(n, d_vocab, seed):
    log_p, log_q = draw(n, d_vocab, seed), draw(n, d_vocab, seed + 1)
    pair = compare_predictions(log_p, log_q)
    p, q = log_p.exp().numpy(), log_q.exp().numpy()
    assert np.allclose(pair.kl, entropy(p, q, axis=1), rtol=1e-10, atol=1e-13)
    assert np.allclose(pair.kl_back, entropy(q, p, axis=1), rtol=1e-10, atol=1e-13)
    assert np.allclose(pair.entropy_p, entropy(p, axis=1), rtol=1e-10)
    assert np.allclose(pair.entropy_q, entropy(q, axis=1), rtol=1e-10)
    assert np.allclose(pair.mass_p, p.sum(0), rtol=1e-10)
    assert np.allclose(pair.mass_q, q.sum(0), rtol=1e-10)
    assert np.array_equal(pair.same_top, p.argmax(1) == q.argmax(1))


def test_blocks_change_nothing(monkeypatch):
    log_p, log_q = draw(23, 17, 0), draw(23, 17, 1)
    whole = compare_predictions(log_p, log_q)
    monkeypatch.setattr(blocks, "BLOCK_VALUES", ByDevice(cpu=17 * 4, elsewhere=17 * 4))
    parts = compare_predictions(log_p, log_q)
    assert torch.equal(whole.kl, parts.kl)
    assert torch.allclose(whole.mass_q, parts.mass_q, rtol=1e-12)


def test_equal_distributions_diverge_by_exactly_zero_in_float32():
    log_p = draw(5, 1000, 3).float()
    pair = compare_predictions(log_p, log_p.clone())
    assert pair.kl.tolist() == pair.kl_back.tolist() == [0.0] * 5
    assert bool(pair.same_top.all())


def test_no_rows_give_no_divergences():
    pair = compare_predictions(torch.zeros(0, 5), torch.zeros(0, 5))
    assert pair.kl.shape == (0,)
    assert pair.mass_p.tolist() == [0.0] * 5


def test_nan_and_other_shapes_are_named():
    log_p = draw(2, 5, 0)
    with pytest.raises(ValueError, match=r"NaN"):
        compare_predictions(log_p, log_p * float("nan"))
    with pytest.raises((ValueError, TypeCheckError), match=r"differ|d_vocab"):
        compare_predictions(log_p, draw(2, 6, 0))
