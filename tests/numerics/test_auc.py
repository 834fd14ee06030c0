"""Areas under curves against scikit-learn, a published variance and simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from emlens.numerics.auc import area_under_curve

scores = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=20)


@settings(max_examples=50, deadline=None)
@given(scores, scores)
def test_the_area_is_scikit_learns(negative: list[float], positive: list[float]):
    ours = area_under_curve(negative, positive)
    theirs = roc_auc_score([0] * len(negative) + [1] * len(positive), negative + positive)
    assert ours.value == pytest.approx(float(theirs))
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


@settings(max_examples=50, deadline=None)
@given(scores, scores)
def test_the_area_turns_round_with_its_groups(negative: list[float], positive: list[float]):
    there, back = area_under_curve(negative, positive), area_under_curve(positive, negative)
    assert there.value == pytest.approx(1 - back.value)
    assert there.low == pytest.approx(1 - back.high, abs=1e-9)


def test_delongs_variance_is_that_of_the_placements():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, 15), rng.normal(1, 1, 11)
    ours = area_under_curve(list(x), list(y))
    placements_y = [np.mean(x < value) for value in y]
    placements_x = [np.mean(y > value) for value in x]
    variance = np.var(placements_y, ddof=1) / 11 + np.var(placements_x, ddof=1) / 15
    assert ours.value - ours.low == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)
    assert "26 clusters" in ours.method


def test_no_overlap_is_not_certainty():
    # The score limit solves (1 - t)^2 = z^2 V(t); for 20 and 20 it lies near .86.
    ours = area_under_curve(list(range(20)), list(range(20, 40)))
    assert ours.value == ours.high == 1
    assert 0.8 < ours.low < 0.93
    t, z = ours.low, 1.959964
    spread = t * (1 - t) * (1 + 19 * ((1 - t) / (2 - t) + t / (1 + t))) / 400
    assert (1 - t) ** 2 == pytest.approx(z * z * spread, rel=1e-4)
    more = area_under_curve(list(range(200)), list(range(200, 400)))
    assert more.low > ours.low


def covers(rng: np.random.Generator, paired: bool) -> bool:
    """Twenty clusters of three texts a group, whose scores share most of their noise."""
    shared = np.repeat(rng.normal(0, 1, (2, 20)), 3, axis=1)
    x, y = shared[0] + rng.normal(0, 0.3, 60), shared[1] + rng.normal(0, 0.3, 60) + 1.0
    names = [str(i // 3) for i in range(60)]
    pairs = ([f"x{n}" for n in names], [f"y{n}" for n in names]) if paired else None
    ours = area_under_curve(list(x), list(y), pairs=pairs)
    truth = 0.5 * (1 + math.erf(1.0 / math.sqrt(2 * 1.09) / math.sqrt(2)))
    return ours.low <= truth <= ours.high


def test_texts_of_one_cluster_need_to_be_named():
    rng = np.random.default_rng(3)
    named = np.mean([covers(rng, True) for _ in range(200)])
    alone = np.mean([covers(rng, False) for _ in range(200)])
    assert named > 0.88
    assert alone < 0.82


@pytest.mark.parametrize(
    ("negative", "positive", "message"),
    [([1.0], [1.0, 2.0], "negative: got 1"), ([1.0, 2.0], [1.0, math.nan], "positive: a score")],
)
def test_what_cannot_be_ordered_is_refused(
    negative: list[float], positive: list[float], message: str
):
    with pytest.raises(ValueError, match=message):
        area_under_curve(negative, positive)


def test_names_must_belong_to_scores():
    with pytest.raises(ValueError, match="pairs names"):
        area_under_curve([1.0, 2.0], [1.0, 2.0], pairs=(["a"], ["b", "c"]))
