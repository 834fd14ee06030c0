"""P-values by rank among controls, beside scipy's ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from emlens.numerics.rank_test import rank_p_value
from emlens.numerics.validation import EmptyAccumulatorError

NUMBERS = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(NUMBERS, NUMBERS)
def test_p_is_the_rank_of_the_value_among_all(values, controls):
    found = rank_p_value(torch.tensor(values), torch.tensor(controls))
    for value, p in zip(values, found, strict=True):
        together = [-value, *(-control for control in controls)]
        rank = rankdata(together, method="max")[0]
        assert float(p) == pytest.approx(rank / len(together))


def test_what_is_no_number_is_no_value_and_a_weak_control():
    found = rank_p_value(torch.tensor([math.nan, -9.0]), torch.tensor([math.nan, -math.inf]))
    assert math.isnan(found[0])
    assert float(found[1]) == pytest.approx(1 / 3)


def test_chance_must_have_been_tried():
    with pytest.raises(EmptyAccumulatorError, match="controls: got none"):
        rank_p_value(torch.tensor([1.0]), torch.tensor([]))
