"""Comparisons: paired, refused where numbers say nothing, slow to claim that nothing is left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlens.artifacts import read_result
from emlens.evaluation import (
    BehaviourDifference,
    Evaluation,
    ScoredResponse,
    claim_equivalence,
    compare_evaluations,
    summarise_scores,
)
from emlens.evaluation.compare import NotComparableError
from emlens.models.sampling import Sampling
from emlens.numerics.intervals import newcombe, sign_flip

GOOD, BAD, LOST = (90.0, 90.0), (10.0, 90.0), (None, 90.0)


def make(bad: list[int], n: int = 50, lost: int = 0, **changes: Any) -> Evaluation:
    """Question i has bad[i] misaligned rows of n; the first one has lost unscored rows too."""
    rows = [
        ScoredResponse(id=f"{q}-{i}", question_id=f"q{q}", aligned=scores[0], coherent=scores[1])
        for q, count in enumerate(bad)
        for i, scores in enumerate(
            ([BAD] * count + ([LOST] * lost if q == 0 else []) + [GOOD] * n)[:n]
        )
    ]
    fields: dict[str, Any] = {
        "model": None,
        "interventions": (),
        "sampling": Sampling(n=n),
        "judge": "j",
        "claim": "misalignment",
        "meaning": "",
        "prompts": {f"q{q}": f"h{q}" for q in range(len(bad))},
        "responses": tuple(rows),
        "summary": summarise_scores(rows),
    }
    return Evaluation(**fields | changes)


def test_differences_are_second_minus_first_paired_by_question():
    first, second = make([0, 1, 2, 3, 0, 1, 2, 3]), make([5, 6, 7, 9, 5, 6, 7, 8])
    ours = compare_evaluations(first, second)
    paired = sign_flip([x / 50 for x in (5, 5, 5, 6, 5, 5, 5, 5)])
    rows = newcombe(53, 400, minus_count=12, minus_n=400)
    assert ours.em_difference.value == pytest.approx(
        second.summary.em_percent.value - first.summary.em_percent.value
    )
    assert ours.em_difference.low == pytest.approx(100 * min(paired.low, rows.low))
    assert ours.em_difference_these_questions == rows.scaled(100.0)
    assert compare_evaluations(second, first).em_difference.value == -ours.em_difference.value
    assert ours.equivalence.verdict == "more"


def test_pairing_takes_out_what_questions_have_in_common():
    first, second = make([0, 40] * 4), make([2, 42, 1, 41, 3, 42, 2, 43])
    ours = compare_evaluations(first, second).em_difference
    paired = sign_flip([x / 50 for x in (2, 2, 1, 1, 3, 2, 2, 3)])
    assert paired.low > 0.02
    assert ours.low < 100 * paired.low  # the rows alone do not pair: the wider limit holds


def test_a_difference_that_one_question_makes_is_as_wide_as_the_questions_say():
    ours = compare_evaluations(make([0] * 8), make([40] + [0] * 7))
    em, rows = ours.em_difference, ours.em_difference_these_questions
    assert em.value == pytest.approx(10.0)
    # Over rows it is sure; over questions it may be none, or that of two questions in five.
    assert rows.low > 7
    assert rows.high < 14
    paired = sign_flip([0.8] + [0.0] * 7)
    assert (em.low, em.high) == (pytest.approx(100 * paired.low), pytest.approx(100 * paired.high))
    assert (em.low, em.high) == (pytest.approx(0.0), pytest.approx(40.0))
    assert ours.equivalence.verdict == "undecided"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"judge": "other"}, "judge"),
        ({"judge_prompts": {"q3": "other instructions"}}, "judge"),
        ({"prompts": {f"q{q}": f"h{q}" for q in range(9)}}, "questions"),
        ({"prompts": {f"q{q}": "h0" for q in range(8)}}, "prompts"),
    ],
)
def test_what_differs_is_refused_unless_allowed_and_then_said(changes: dict[str, Any], name: str):
    first, second = make([0] * 8), make([0] * 8, **changes)
    with pytest.raises(NotComparableError, match=rf"allow=\['{name}'\]"):
        compare_evaluations(first, second)
    others = {"judge", "questions", "prompts"} - {name}
    with pytest.raises(NotComparableError):
        compare_evaluations(first, second, allow=others)
    ours = compare_evaluations(first, second, allow=[name])
    assert len(ours.differing) == 1
    assert ours.equivalence.verdict == "undecided"
    assert compare_evaluations(first, first).differing == ()


def test_only_shared_questions_are_compared():
    ours = compare_evaluations(make([0, 5, 9]), make([1, 6]), allow=["questions"])
    assert ours.questions == ("q0", "q1")
    assert (ours.n_first, ours.n_second) == (100, 100)
    assert ours.em_difference.value == pytest.approx(2.0)
    with pytest.raises(NotComparableError, match="share no question"):
        compare_evaluations(make([0]), make([0], prompts={"x": "y"}), allow=["questions"])


def test_a_name_that_may_not_be_allowed_is_refused():
    with pytest.raises(ValueError, match="nearest: judge"):
        compare_evaluations(make([0]), make([0]), allow=["judges"])


def test_other_sampling_is_said_and_not_refused():
    ours = compare_evaluations(make([0]), make([0], sampling=Sampling(n=5, temperature=0.5)))
    assert ours.differing == ("temperature was 1.0 and 0.5",)
    assert compare_evaluations(make([0]), make([0], sampling=Sampling(n=5, seed=8))).differing == ()


def test_no_spill_over_left_is_claimed_only_with_enough_rows_below_the_margin():
    base = make([0] * 8)
    assert compare_evaluations(base, make([0] * 8)).equivalence.verdict == "equivalent"
    few = compare_evaluations(make([0] * 8, n=49), make([0] * 8, n=49)).equivalence
    assert (few.verdict, few.reason) == ("undecided", "392 responses on a side, 400 needed")
    some = compare_evaluations(base, make([2, 1, 2, 1, 2, 1, 2, 1]))
    assert some.em_difference.value == 3.0
    assert some.equivalence.verdict != "equivalent"
    assert some.equivalence.margin == 3.0
    wide = claim_equivalence(some, general_percent=40)
    assert wide.margin == 8.0
    assert wide.verdict == "equivalent"
    assert claim_equivalence(some, general_percent=10).margin == 3.0
    with pytest.raises(ValueError, match="general_percent"):
        claim_equivalence(some, general_percent=400)


@pytest.mark.parametrize("q", [1, 2, 5, 6])
def test_below_six_questions_nothing_is_claimed(q: int):
    none, half = make([0] * q, n=400), make([200] * q, n=400)
    same, more = (compare_evaluations(none, other).equivalence for other in (none, half))
    if q == 6:
        assert (same.verdict, more.verdict) == ("equivalent", "more")
        return
    assert (same.verdict, more.verdict) == ("undecided", "undecided")
    assert same.reason == f"{q} of at least 6 questions"


def test_unscored_rows_of_the_second_count_against_the_claim():
    base, narrow = make([0] * 8), make([0] * 8, lost=20)
    ours = compare_evaluations(base, narrow)
    assert ours.em_difference.value == 0
    assert ours.em_difference_upper.value == pytest.approx(5.0)
    assert (ours.unscored_first, ours.unscored_second) == (0, 20)
    assert ours.equivalence.verdict == "undecided"
    assert compare_evaluations(narrow, base).em_difference_upper.value == 0


def test_shares_of_two_judges_keep_the_name_that_each_bears():
    other = make([0], judge="other", claim="takeover score")
    ours = compare_evaluations(make([0]), other, allow=["judge"])
    assert ours.claim == "takeover score of the second less misalignment of the first"
    assert ours.rows()[0]["difference"] == ours.claim
    assert compare_evaluations(other, other).claim == "takeover score"


def test_judges_that_differ_are_told_apart_by_name():
    long: dict[str, Any] = {
        "judge": f"contrast/{'5fd1bae4' * 4}",
        "judge_name": "contrast on smollm2",
    }
    with pytest.raises(
        NotComparableError, match=r"differ \(j and contrast on smollm2 \(5fd1bae4\)"
    ):
        compare_evaluations(make([0]), make([0], **long))


def test_a_comparison_survives_the_disk(tmp_path: Path):
    ours = compare_evaluations(make([0, 1]), make([5, 1]))
    assert read_result(ours.save(tmp_path), BehaviourDifference) == ours
    assert ours.rows()[0]["difference"] == "misalignment"
    weaker = replace(ours, claim="takeover score").rows()
    assert [row["difference"] for row in weaker if "misalignment" in row["difference"]] == []
    assert weaker[0]["difference"] == "takeover score"
    assert replace(ours, claim="x") != ours
