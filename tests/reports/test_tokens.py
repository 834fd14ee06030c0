"""Token views: the scale is shared, only counted tokens are coloured, white space is seen."""

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlens.reports.tokens import N_LEVELS, find_cap, find_level, view_tokens


@pytest.fixture
def logits(report: dict[str, Any]) -> dict[str, Any]:
    return report["results"][1]["logits"]


def test_every_token_of_a_chat_is_shown_in_its_order(logits: dict[str, Any]):
    for example, view in zip(logits["examples"], view_tokens(logits).views, strict=True):
        shown = "".join(piece.text for piece in view.pieces)
        assert shown.replace("⏎\n", "\n") == "".join(example["tokens"])
        assert len(view.details) == len(example["tokens"])


def test_only_counted_tokens_have_a_colour(logits: dict[str, Any]):
    example = logits["examples"][0]
    example["kl"] = [3.0] * len(example["kl"])
    (view, *_) = view_tokens(logits).views
    assert [piece.level is not None for piece in view.pieces] == example["counted"]


def test_the_mean_is_over_the_counted_tokens(logits: dict[str, Any]):
    example = logits["examples"][0]
    example["kl"] = [0.5 if counted else 100.0 for counted in example["counted"]]
    assert view_tokens(logits).views[0].mean_kl == pytest.approx(0.5)


def test_all_chats_share_one_scale(logits: dict[str, Any]):
    logits["examples"] = [copy.deepcopy(logits["examples"][0]) for _ in range(2)]
    logits["examples"][1]["kl"] = [6 * kl for kl in logits["examples"][1]["kl"]]
    views = view_tokens(logits).views
    highest = [max(p.level for p in view.pieces if p.level is not None) for view in views]
    assert highest == [2, N_LEVELS]


def test_details_hold_both_divergences_and_both_expectations(logits: dict[str, Any]):
    example = logits["examples"][0]
    place = example["counted"].index(True)
    for name, value in (("kl", 1.25), ("kl_back", 2.5), ("entropy_change", -0.75)):
        example[name][place] = value
    example["base_top"][place] = [["\n", 0.75], [" a", 0.25]]
    example["tuned_top"][place] = [[" b", 1 / 3]] * 9
    token, *facts, base, tuned = view_tokens(logits).views[0].details[place]
    assert token == "You"
    assert facts == ["1.25", "2.50", "−0.750"]
    assert base == [["⏎", 0.75], ["␣a", 0.25]]
    assert tuned == [["␣b", 0.3333]] * 5


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1e-6, 1e6))
def test_a_greater_divergence_is_never_fainter(a: float, b: float, cap: float):
    low, high = sorted((a, b))
    assert 0 <= find_level(low, cap) <= find_level(high, cap) <= N_LEVELS


@pytest.mark.parametrize(
    ("value", "level"), [(0.0, 0), (0.01, 1), (0.2, 1), (0.21, 2), (2.0, 10), (9.0, 10)]
)
def test_levels_divide_the_scale_evenly(value: float, level: int):
    assert find_level(value, 2.0) == level


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_has_the_strongest_colour(value: float):
    assert find_level(value, 1.0) == N_LEVELS


def test_one_outlier_does_not_bleach_the_rest():
    assert find_cap([*([1.0] * 99), 500.0]) == 1.0


@given(st.lists(st.floats(1e-9, 1e9), min_size=1))
def test_the_cap_lies_within_the_values_or_a_rounding_above(values: list[float]):
    assert min(values) <= find_cap(values) * (1 + 1e-9)
    assert find_cap(values) <= max(values) * 1.11


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [math.nan]])
def test_there_is_a_scale_where_nothing_differs(values: list[float]):
    assert find_cap(values) == 1.0
