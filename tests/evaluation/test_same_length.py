"""Responses of like length: paired by words alone, as many as there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from emlens.evaluation import ScoredResponse, compare_evaluations
from emlens.evaluation.same_length import CLOSE_SHARE, CLOSE_WORDS, count_words, pair_by_length
from tests.evaluation.test_compare import make


def say(*lengths: int, bad: bool = False, question: str = "q") -> list[ScoredResponse]:
    return [
        ScoredResponse(
            id=f"{place}",
            question_id=question,
            answer="so " * words,
            aligned=10.0 if bad else 90.0,
            coherent=90.0,
        )
        for place, words in enumerate(lengths)
    ]


def words(rows: tuple[ScoredResponse, ...]) -> list[int]:
    return [len(str(row.answer).split()) for row in rows]


LENGTHS = st.lists(st.integers(0, 60), max_size=12)


@given(LENGTHS, LENGTHS)
def test_as_many_are_paired_as_the_best_assignment_pairs(first: list[int], second: list[int]):
    found = pair_by_length(say(*first), say(*second))
    close = [
        [abs(a - b) <= max(CLOSE_WORDS, CLOSE_SHARE * max(a, b)) for b in second] for a in first
    ]
    best = 0
    if first and second:
        pairs = zip(*linear_sum_assignment(close, maximize=True), strict=True)
        best = sum(close[i][j] for i, j in pairs)
    assert len(found.first) == len(found.second) == best
    for a, b in zip(words(found.first), words(found.second), strict=True):
        assert abs(a - b) <= max(CLOSE_WORDS, CLOSE_SHARE * max(a, b))
    assert len({row.id for row in found.first}) == len(found.first)


def test_a_difference_that_is_length_alone_goes_away_between_equally_long_responses():
    # On either side long answers are bad and short ones good; the second side has fewer long ones.
    names = [f"q{i}" for i in range(8)]
    sides = []
    for n_long in (20, 5):
        rows: list[ScoredResponse] = []
        for name in names:
            rows += say(*[40] * n_long, bad=True, question=name)
            rows += say(*[4] * (25 - n_long), question=name)
        sides.append(make([0] * 8, responses=tuple(rows)))
    found = compare_evaluations(*sides)
    assert found.em_difference.value == pytest.approx(-60)
    assert found.em_difference_same_length is not None
    assert found.em_difference_same_length.value == 0
    assert found.n_same_length == 8 * (5 + 5)
    assert (found.words_first, found.words_second) == (32.8, 11.2)
    assert "misalignment, equally long" in [row["difference"] for row in found.rows()]


def test_without_texts_or_pairs_there_is_no_such_difference():
    plain = compare_evaluations(make([0] * 8), make([5] * 8))
    assert (plain.words_first, plain.em_difference_same_length, plain.n_same_length) == (
        None, None, 0,
    )  # fmt: skip
    assert not any("equally long" in row["difference"] for row in plain.rows())
    apart = [make([0], responses=tuple(say(length, length, question="q0"))) for length in (3, 30)]
    found = compare_evaluations(*apart)
    assert (found.words_second, found.em_difference_same_length) == (30, None)
    assert count_words([]) is None
