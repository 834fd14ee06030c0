"""Sums under keys against a dict, for any batches and any order of merging."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from emlens.numerics import sparse_sums
from emlens.numerics.sparse_sums import SparseSums
from emlens.numerics.validation import NonFiniteError, WidthError

entries = st.lists(st.tuples(st.integers(0, 12), st.integers(-5, 5)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(entries, max_size=4), min_size=1, max_size=4), st.integers(0, 3))
def test_sums_are_those_of_a_dict(shards: list[list[list[tuple[int, int]]]], least: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_sums, "_MIN_PENDING", least)  # so that it settles on the way, too
        whole, expected = SparseSums(), defaultdict(float)
        for shard in shards:
            part = SparseSums()
            for batch in shard:
                keys, values = zip(*batch, strict=True) if batch else ((), ())
                part.update(torch.tensor(keys, dtype=torch.long), torch.tensor(values).float())
                for key, value in batch:
                    expected[key] += value
            before = [x.clone() for x in part.result()]
            whole.merge(part)
            assert all(torch.equal(a, b) for a, b in zip(before, part.result(), strict=True))
    keys, sums = whole.result()
    assert keys.tolist() == sorted(expected)
    np.testing.assert_array_equal(sums, [expected[key] for key in sorted(expected)])
    assert sums.dtype == torch.float64


def test_memory_grows_with_keys_and_not_with_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparse_sums, "_MIN_PENDING", 64)
    sums, keys = SparseSums(), torch.arange(50)
    for _ in range(100):
        sums.update(keys, torch.ones(50))
        assert sums._n_pending <= 2 * 64
    assert sums.result()[1].tolist() == [100.0] * 50


def test_what_cannot_be_summed_is_refused_and_changes_nothing():
    sums = SparseSums()
    sums.update(torch.tensor([1]), torch.tensor([2.0]))
    with pytest.raises(NonFiniteError):
        sums.update(torch.tensor([1, 2]), torch.tensor([1.0, float("nan")]))
    with pytest.raises((WidthError, TypeCheckError), match=r"number of keys is 1|'values'"):
        sums.update(torch.tensor([1]), torch.tensor([1.0, 2.0]))
    assert [x.tolist() for x in sums.result()] == [[1], [2.0]]
