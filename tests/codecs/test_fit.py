"""How well codecs fit: scikit-learn's explained variance, any batching, both forms of codes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score

from emlens.codecs.codec import Codes
from emlens.codecs.fit import FitAccumulator, measure_fit
from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError, WidthError
from tests.codecs.test_calibrate import draw_sae

X = torch.randn(300, 6, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 7) + 20


def test_explained_variance_is_that_of_scikit_learn():
    sae = draw_sae()
    fit = measure_fit(sae, X.split(70))
    codes = sae.encode(X)
    expected = r2_score(X.numpy(), sae.decode(codes).numpy(), multioutput="variance_weighted")
    assert fit.explained_variance == pytest.approx(float(expected), rel=1e-5)
    active = codes.values.numpy() > 0
    assert fit.l0 == pytest.approx(active.sum(1).mean())
    assert fit.dead_share == pytest.approx((~active.any(0)).mean())
    assert fit.n_rows == 300


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=4), first=st.integers(0, 4))
def test_any_batching_and_merging_gives_the_same(cuts, first):
    sae = draw_sae()
    whole = measure_fit(sae, [X])
    edges = [0, *sorted(cuts), 300]
    parts = [FitAccumulator(6, 9), FitAccumulator(6, 9)]
    for number, (a, b) in enumerate(pairwise(edges)):
        codes = sae.encode(X[a:b])
        parts[number < first].update(X[a:b], codes, sae.decode(codes))
    parts[0].merge(parts[1])
    found = parts[0].result()
    assert found.explained_variance == pytest.approx(whole.explained_variance, rel=1e-6)
    assert (found.l0, found.dead_share, found.n_rows) == (whole.l0, whole.dead_share, 300)


def test_the_largest_codes_count_as_all_codes_do_where_no_more_are_active():
    sae = draw_sae()
    dense, sparse = FitAccumulator(6, 9), FitAccumulator(6, 9)
    all_codes, largest = sae.encode(X), sae.encode_sparse(X, k=9)
    dense.update(X, all_codes, sae.decode(all_codes))
    sparse.update(X, largest, sae.decode(largest))
    assert dense.result().l0 == sparse.result().l0
    assert dense.result().dead_share == sparse.result().dead_share


def test_latents_that_are_never_active_are_dead():
    found = FitAccumulator(2, 4)
    codes = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.0, 2.0, 0.0]])
    found.update(torch.eye(2), Codes(values=codes), torch.eye(2))
    assert found.result().dead_share == 0.5
    assert found.result().l0 == 1.5
    assert found.result().explained_variance == 1.0


def test_what_does_not_fit_changes_nothing():
    found = FitAccumulator(6, 9)
    with pytest.raises(EmptyAccumulatorError, match="no row"):
        found.result()
    sae = draw_sae()
    codes = sae.encode(X)
    found.update(X, codes, X)
    before = found.result()
    with pytest.raises(NonFiniteError):
        found.update(X, codes, X * torch.nan)
    with pytest.raises(WidthError, match=r"codes \(300, 9\), expected as many rows"):
        found.update(X[:10], codes, X[:10])
    with pytest.raises(WidthError, match=r"of 8 latents, expected 9"):
        found.update(X, Codes(values=codes.values[:, :8]), X)
    with pytest.raises(WidthError, match=r"counts 9 latents of width 5"):
        found.merge(FitAccumulator(5, 9))
    assert found.result() == before
