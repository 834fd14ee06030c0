"""Tokens kept from a stream, beside sorting all of it at once, however it is cut and merged."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from emlens.features.windows import NONE, SampledTokens, TopTokens, split_by_decile
from emlens.numerics.validation import NonFiniteError, WidthError


@st.composite
def streams(draw):
    """Codes with many ties of some tokens of some chats, in any order, and where they are cut."""
    n, n_latents = draw(st.integers(0, 30)), draw(st.integers(1, 3))
    value = st.integers(-1, 3).map(float)
    codes = [[draw(value) for _ in range(n_latents)] for _ in range(n)]
    places = draw(st.permutations([(i % 5, i // 5) for i in range(n)]))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    sides = draw(st.lists(st.booleans(), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    return torch.tensor(codes).reshape(n, n_latents), list(places), cuts, sides


def feed(make, stream):
    """Two accumulators take the parts in turn and are merged."""
    codes, places, cuts, sides = stream
    both = make(), make()
    where = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    for start, stop, side in zip([0, *cuts], [*cuts, len(codes)], sides, strict=True):
        both[side].update(codes[start:stop], where[start:stop, 0], where[start:stop, 1])
    both[0].merge(both[1])
    return both[0]


def as_lists(kept, latent):
    rows = zip(kept.chats[latent], kept.tokens[latent], kept.codes[latent], strict=True)
    return [(int(c), int(t), float(v)) for c, t, v in rows if int(c) != NONE]


@settings(max_examples=50, deadline=None)
@given(streams(), st.integers(1, 6))
def test_the_largest_are_those_of_sorting_everything(stream, n):
    codes, places, _, _ = stream
    found = feed(lambda: TopTokens(codes.shape[1], kept=n), stream).result()
    for latent in range(codes.shape[1]):
        best: dict[int, tuple[float, int]] = {}
        for (chat, token), value in zip(places, codes[:, latent].tolist(), strict=True):
            if value > 0:
                best[chat] = min(best.get(chat, (0.0, 0)), (-value, token))
        ordered = sorted((value, chat, token) for chat, (value, token) in best.items())
        assert as_lists(found, latent) == [(c, t, -v) for v, c, t in ordered[:n]]


@settings(max_examples=50, deadline=None)
@given(streams(), st.integers(1, 6))
def test_a_sample_does_not_depend_on_how_the_text_was_cut(stream, n):
    codes, places, _, _ = stream
    found = feed(lambda: SampledTokens(codes.shape[1], kept=n, seed=3), stream)
    whole = SampledTokens(codes.shape[1], kept=n, seed=3)
    where = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    whole.update(codes[order], where[order, 0], where[order, 1])
    assert torch.equal(found.active, (codes > 0).sum(0))
    assert found.n_tokens == len(codes)
    value = dict(zip(places, codes.tolist(), strict=True))
    for latent in range(codes.shape[1]):
        kept = as_lists(found.result(), latent)
        assert kept == as_lists(whole.result(), latent)
        assert len(kept) == min(n, int((codes[:, latent] > 0).sum()))
        assert all(value[chat, token][latent] == v > 0 for chat, token, v in kept)


def test_every_active_token_is_as_likely_to_be_sampled():
    codes = torch.ones(400, 1)
    codes[::4] = 0
    places = torch.arange(400)
    counts = np.zeros(400)
    for seed in range(150):
        sample = SampledTokens(1, kept=20, seed=seed)
        sample.update(codes, places // 8, places % 8)
        for chat, token, _ in as_lists(sample.result(), 0):
            counts[8 * chat + token] += 1
    assert not counts[::4].any()
    active = np.delete(counts, np.arange(0, 400, 4))
    assert stats.chisquare(active).pvalue > 1e-3
    by_token = [counts[k::8].sum() for k in range(8) if k % 4]
    assert stats.chisquare(by_token).pvalue > 1e-3


def test_deciles_are_cut_by_rank():
    codes = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 3.0])
    assert [part.tolist() for part in split_by_decile(codes, parts=3)] == [[1, 3], [4, 5], [2, 0]]


def test_what_does_not_fit_is_refused():
    top = TopTokens(2, kept=3)
    ids = torch.arange(4)
    with pytest.raises(WidthError, match=r"\(4, 3\) for 4 chats and 4 tokens, expected \[n, 2\]"):
        top.update(torch.ones(4, 3), ids, ids)
    with pytest.raises(NonFiniteError, match="codes"):
        SampledTokens(1, kept=1, seed=0).update(torch.tensor([[math.nan]]), ids[:1], ids[:1])
    with pytest.raises(ValueError, match="0 places"):
        TopTokens(1, kept=0)
