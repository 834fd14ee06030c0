"""Choosing tokens: the nucleus is that of transformers, draws have the softmax's distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import TopPLogitsWarper

from emlens.models.sampling import Sampling, choose_tokens, keep_top_p
from emlens.numerics import blocks


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.01, 0.999), st.floats(0.1, 8))
def test_the_nucleus_is_that_of_transformers(seed: int, top_p: float, spread: float):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(3, 60, generator=generator)
    expected = TopPLogitsWarper(top_p)(torch.zeros(3, 1), logits)  # pyright: ignore[reportArgumentType]
    assert torch.equal(keep_top_p(logits, top_p), expected)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_the_nucleus_in_a_large_vocabulary_is_that_of_transformers(spread: float):
    logits = spread * torch.randn(3, 9000, generator=torch.Generator().manual_seed(0)).double()
    for top_p in (0.1, 0.5, 0.95):
        expected = TopPLogitsWarper(top_p)(torch.zeros(3, 1), logits)  # pyright: ignore[reportArgumentType]
        found = keep_top_p(logits, top_p)
        assert torch.equal(found, expected)
    sizes = found.isfinite().sum(-1)
    assert bool((sizes > 1024).all()) == (spread < 2)


def test_the_nucleus_of_a_sure_prediction_is_one_token():
    logits = torch.tensor([[0.0, 50.0, 1.0]])
    assert keep_top_p(logits, 0.01).isfinite().tolist() == [[False, True, False]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_distribution_of_the_softmax_at_the_temperature(temperature: float):
    n = 30_000
    logits = torch.tensor([1.5, 0.0, -1.0, 2.0, 0.3])
    chosen, sound = choose_tokens(
        logits.repeat(n, 1),
        keys=torch.arange(n),
        step=4,
        sampling=Sampling(1, temperature=temperature),
    )
    assert bool(sound.all())
    counts = torch.bincount(chosen, minlength=5).numpy()
    expected = (logits.double() / temperature).softmax(-1).numpy() * n
    assert stats.chisquare(counts, expected).pvalue > 0.001


def test_steps_and_keys_draw_anew():
    logits = torch.zeros(4, 1000)
    keys = torch.arange(4)
    how = Sampling(1)
    first, again, later = (
        choose_tokens(logits, keys=keys, step=step, sampling=how)[0] for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert len(set(first.tolist())) > 1


def test_nearly_equal_logits_give_equal_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 500, generator=generator)
    rounded = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
    how = Sampling(1)
    chosen, other = (
        choose_tokens(x, keys=torch.arange(2000), step=0, sampling=how)[0]
        for x in (logits, rounded)
    )
    assert (chosen != other).float().mean() < 2e-3


def test_slices_change_no_choice(monkeypatch: pytest.MonkeyPatch):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    for how in (Sampling(1), Sampling(1, top_p=0.6), Sampling(1, temperature=0)):
        whole = choose_tokens(logits, keys=torch.arange(50), step=2, sampling=how)[0]
        monkeypatch.setattr(blocks, "MAX_LOGITS", 700)
        cut = choose_tokens(logits, keys=torch.arange(50), step=2, sampling=how)[0]
        monkeypatch.undo()
        assert torch.equal(whole, cut)


def test_greedy_takes_the_likeliest_and_needs_no_keys():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    chosen, _ = choose_tokens(logits, keys=None, step=0, sampling=Sampling(1, temperature=0))
    assert torch.equal(chosen, logits.argmax(-1))


def test_rows_with_nan_are_told():
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    for temperature in (0, 1):
        how = Sampling(1, temperature=temperature)
        _, sound = choose_tokens(logits, keys=torch.arange(3), step=0, sampling=how)
        assert sound.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": 0}, "n: got 0"),
        ({"n": 1, "max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"n": 1, "temperature": -0.1}, "temperature"),
        ({"n": 1, "temperature": float("inf")}, "temperature"),
        ({"n": 1, "top_p": 0.0}, "top_p"),
        ({"n": 1, "top_p": 1.1}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict, says: str):
    with pytest.raises(ValueError, match=says):
        Sampling(**wrong)
