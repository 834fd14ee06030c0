"""Latents from both ends of several orderings, in turn."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from emlens.studies.choose_latents import choose_latents


def test_each_end_of_each_ordering_has_its_turn():
    scores = {
        "contrast": torch.tensor([5.0, -4.0, 0.0, 3.0, -1.0, 0.5]),
        "abs_delta": torch.tensor([1.0, 9.0, 8.0, 0.0, 0.0, 0.0]),
    }
    found = choose_latents(scores, n=5)
    assert [(one.latent, one.chosen_by) for one in found] == [
        (0, "contrast, highest"),
        (1, "contrast, lowest"),
        (2, "abs_delta, highest"),
        (3, "contrast, highest"),
        (4, "contrast, lowest"),
    ]
    assert found[0].ranks == {"contrast": 1, "abs_delta": 3}
    assert found[1].ranks == {"contrast": 6, "abs_delta": 1}


def test_what_no_ordering_says_anything_of_is_not_chosen():
    still = torch.zeros(4)
    assert choose_latents({"delta": still, "abs_delta": still}, n=3) == ()
    one = torch.tensor([0.0, 0.0, -1.0, 0.0])
    assert [c.latent for c in choose_latents({"delta": one, "abs_delta": one.abs()}, n=3)] == [2]


@given(
    st.lists(st.lists(st.floats(-9, 9), min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(1, 8),
)
def test_latents_come_once_and_as_many_as_there_are(rows, n):
    scores = {f"order {k}": torch.tensor(row) for k, row in enumerate(rows)}
    found = [one.latent for one in choose_latents(scores, n=n)]
    moving = {i for row in scores.values() for i in row.nonzero()[:, 0].tolist()}
    assert len(found) == len(set(found)) == min(n, len(moving))
    assert set(found) <= moving
    assert found[: n - 1] == [one.latent for one in choose_latents(scores, n=n)][: n - 1]
