"""Intervals against scipy, published examples and simulated coverage."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from emlens.numerics.intervals import (
    Interval,
    cluster_t,
    difference_of_clusters,
    newcombe,
    share_of_clusters,
    sign_flip,
    wilson,
)

counts_of = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(max_examples=50, deadline=None)
@given(counts_of, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(pair: tuple[int, int], level: float):
    count, n = pair
    ours = wilson(count, n, level=level)
    theirs = stats.binomtest(count, n).proportion_ci(level, method="wilson")
    assert ours.value == count / n
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        # Newcombe 1998, table II, method 10.
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ],
)
def test_newcombe_gives_the_published_examples(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
):
    ours = newcombe(*first, minus_count=second[0], minus_n=second[1])
    assert (ours.low, ours.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@settings(max_examples=50, deadline=None)
@given(counts_of, counts_of)
def test_newcombe_changes_sign_when_the_sides_change_place(a: tuple[int, int], b: tuple[int, int]):
    there = newcombe(*a, minus_count=b[0], minus_n=b[1])
    back = newcombe(*b, minus_count=a[0], minus_n=a[1])
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


means_of = st.lists(st.floats(-1, 1), min_size=2, max_size=30)


@settings(max_examples=50, deadline=None)
@given(means_of.filter(lambda m: np.std(m) > 1e-6))
def test_t_over_questions_is_scipys(means: list[float]):
    ours = cluster_t(means)
    theirs = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)


@pytest.mark.parametrize("q", [6, 8])
def test_sign_flip_limits_are_where_the_permutation_test_stops_rejecting(q: int):
    differences = np.random.default_rng(q).normal(0.1, 0.2, q)
    ours = sign_flip(list(differences))

    def p_value(centre: float) -> float:
        test = stats.permutation_test(
            (differences - centre,),
            lambda x: x.mean(),
            permutation_type="samples",
            n_resamples=10**6,  # more than there are: exact
        )
        return float(test.pvalue)

    for limit, outside in ((ours.low, -1e-6), (ours.high, 1e-6)):
        assert p_value(limit + outside) <= 0.05
        assert p_value(limit - outside) > 0.05


def test_sign_flip_of_too_few_questions_rejects_nothing():
    assert math.isinf(sign_flip([0.1, 0.2, 0.3, 0.4, 0.5]).high)
    assert math.isfinite(sign_flip([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).high)


def test_sign_flip_refuses_what_it_would_take_forever_on():
    with pytest.raises(ValueError, match="fewer than 20"):
        sign_flip([0.1] * 20)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1, 1), st.integers(2, 8))
def test_sign_flip_of_equal_differences_holds_their_mean(x: float, q: int):
    assert sign_flip([x] * q).value == pytest.approx(x)


clusters = st.lists(
    st.integers(1, 30).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    min_size=1,
    max_size=12,
)


@settings(max_examples=50, deadline=None)
@given(clusters)
def test_a_share_is_that_of_all_rows_and_never_narrower_than_either_interval(
    pairs: list[tuple[int, int]],
):
    counts, sizes = [list(x) for x in zip(*pairs, strict=True)]
    ours = share_of_clusters(counts, sizes)
    rows = wilson(sum(counts), sum(sizes))
    assert ours.value == pytest.approx(sum(counts) / sum(sizes))
    assert 0 <= ours.low <= rows.low <= rows.high <= ours.high <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=2, max_size=12))
def test_with_equal_sizes_the_questions_enter_as_their_plain_means(counts: list[int]):
    ours = share_of_clusters(counts, [10] * len(counts))
    if len(set(counts)) == 1:
        assert ours.method.startswith("Wilson")
        assert "alone" in ours.method
        return
    plain = cluster_t([c / 10 for c in counts])
    assert ours.low == pytest.approx(
        max(0, min(plain.low, wilson(sum(counts), 10 * len(counts)).low))
    )
    assert "t over" in ours.method
    assert "Wilson over" in ours.method


def test_none_of_four_hundred_proves_less_than_nothing():
    ours = share_of_clusters([0] * 8, [50] * 8)
    assert ours.low == 0
    assert ours.high == pytest.approx(stats.binomtest(0, 400).proportion_ci(method="wilson").high)
    assert ours.high > 0.009
    both = difference_of_clusters(([0] * 8, [50] * 8), ([0] * 8, [50] * 8))
    assert both.low < -0.009
    assert both.high > 0.009
    assert both.method.startswith("Newcombe")
    assert "alone" in both.method


def test_a_question_without_rows_is_no_cluster():
    assert share_of_clusters([1, 5, 0], [10, 10, 0]) == share_of_clusters([1, 5], [10, 10])
    with pytest.raises(ValueError, match="no rows on one side"):
        difference_of_clusters(([1, 0], [10, 0]), ([1, 1], [10, 10]))


def test_differences_of_few_questions_use_the_sign_flip_and_of_many_t():
    few = difference_of_clusters(([5, 1] * 4, [50] * 8), ([0, 1] * 4, [50] * 8))
    many = difference_of_clusters(([5, 1] * 10, [50] * 20), ([0, 1] * 10, [50] * 20))
    assert "exact sign-flip over 8 questions" in few.method
    assert "t over 20 questions" in many.method


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9))
def test_a_difference_changes_sign_with_its_sides_and_equals_that_of_the_shares(
    pairs: list[tuple[int, int]],
):
    a, b = [list(x) for x in zip(*pairs, strict=True)]
    sizes = [9 + i for i in range(len(a))]
    there = difference_of_clusters((a, sizes), (b, sizes))
    back = difference_of_clusters((b, sizes), (a, sizes))
    assert there.value == pytest.approx((sum(a) - sum(b)) / sum(sizes))
    assert there.low == pytest.approx(-back.high)


def simulate(rng: np.random.Generator, q: int, n: int) -> tuple[list[int], float]:
    """Counts of q questions of n rows, whose rates differ, and the mean rate of such questions."""
    rates = rng.beta(0.4, 3.6, q)
    return [int(c) for c in rng.binomial(n, rates)], 0.1


def test_coverage_over_new_questions_needs_the_cluster():
    rng = np.random.default_rng(0)
    held, held_by_rows, runs = 0, 0, 400
    for _ in range(runs):
        counts, truth = simulate(rng, q=12, n=50)
        ours, rows = share_of_clusters(counts, [50] * 12), wilson(sum(counts), 600)
        held += ours.low <= truth <= ours.high
        held_by_rows += rows.low <= truth <= rows.high
    assert held_by_rows / runs < 0.6
    assert held / runs > 0.86


def test_coverage_of_paired_differences_over_few_questions():
    rng = np.random.default_rng(1)
    held, runs = 0, 300
    for _ in range(runs):
        differences = rng.normal(0.05, 0.1, 8)
        ours = sign_flip(list(differences))
        held += ours.low <= 0.05 <= ours.high
    # Exact: 1 - 12 / 256 = .953; three standard errors of 300 runs are .037.
    assert 0.916 < held / runs < 0.99


def test_coverage_of_newcombe():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(500):
        a, b = rng.binomial(60, 0.1), rng.binomial(80, 0.03)
        ours = newcombe(int(a), 60, minus_count=int(b), minus_n=80)
        held += ours.low <= 0.07 <= ours.high
    assert 0.92 < held / 500 < 0.985


def test_a_wider_level_gives_a_wider_interval():
    levels = [0.5, 0.8, 0.9, 0.95]
    for narrow, wide in pairwise(levels):
        for make in (
            lambda level: share_of_clusters([1, 4, 7], [10] * 3, level=level),
            lambda level: sign_flip([0.1, -0.2, 0.3, 0.5, 0.1, 0.2, 0.7], level=level),
        ):
            assert make(narrow).low >= make(wide).low
            assert make(narrow).high <= make(wide).high


def test_an_interval_must_hold_its_value_and_scales_with_its_units():
    with pytest.raises(ValueError, match="outside its limits"):
        Interval(0.5, 0.6, 0.7, 0.95, "wrong")
    assert Interval(0.25, 0.125, 0.5, 0.95, "m").scaled(100.0) == Interval(
        25.0, 12.5, 50.0, 0.95, "m"
    )
    with pytest.raises(ValueError, match="factor"):
        Interval(0.5, 0.4, 0.7, 0.95, "m").scaled(-1.0)


@pytest.mark.parametrize(
    ("count", "n", "level", "message"),
    [(1, 0, 0.95, "n at least 1"), (5, 4, 0.95, "count is 5"), (1, 4, 95.0, "between 0 and 1")],
)
def test_what_is_no_share_is_refused(count: int, n: int, level: float, message: str):
    with pytest.raises(ValueError, match=message):
        wilson(count, n, level=level)


def test_scores_that_are_missing_are_not_averaged_away():
    with pytest.raises(ValueError, match="not finite"):
        cluster_t([0.1, math.nan])
