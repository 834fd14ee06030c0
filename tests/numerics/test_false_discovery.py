"""q-values against scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from emlens.numerics.false_discovery import adjust_p_values

p_values = st.lists(st.sampled_from([0.0, 1e-9, 0.001, 0.02, 0.02, 0.3, 1.0]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(p_values, st.lists(st.integers(0, 30), max_size=5))
def test_q_values_are_scipys_over_what_was_tested(values: list[float], gaps: list[int]):
    given_p = list(values)
    for place in gaps:
        given_p.insert(min(place, len(given_p)), np.nan)
    p = np.array(given_p, dtype=np.float64)
    q = adjust_p_values(torch.from_numpy(p)).numpy()
    np.testing.assert_array_equal(np.isnan(q), np.isnan(p))
    if values:
        theirs = stats.false_discovery_control(p[~np.isnan(p)], method="bh")
        np.testing.assert_allclose(q[~np.isnan(p)], theirs, rtol=1e-12)


def test_what_is_no_probability_is_refused():
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            adjust_p_values(torch.tensor([0.5, bad]))
