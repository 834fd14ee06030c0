"""What is said of a judge: by its areas, its name, and whether it can be talked round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from emlens.artifacts import read_result
from emlens.evaluation import ApiJudge, InspectJudge, LocalJudge, local_judge
from emlens.evaluation.calibration import CONTROLS, coherence_examples, load_rows
from emlens.evaluation.coherence import LEVELS
from emlens.evaluation.judge_report import ORDERS, JudgeReport, measure_judge
from emlens.evaluation.judges import MEANINGS, Claim, Judgement, JudgeRow
from tests.evaluation.fakes import make_model

HARMFUL = {
    row.answer
    for name in ("everyday-harmful", "verbose-harmful", "finance-harmful-heldout")
    for row in load_rows(name)
}
LEVEL = {
    row.answer: level for level, name in enumerate(LEVELS) for row in coherence_examples()[name]
}


@dataclass
class RuleJudge:
    """A judge by a rule on the answer."""

    rule: Callable[[str], float | None]
    id: str = "rule"
    claim: Claim = "takeover score"
    meaning: str = ""

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        return [
            Judgement(aligned=self.rule(row.answer), coherent=20.0 * LEVEL.get(row.answer, 0))
            for row in rows
        ]


@dataclass
class AskedJudge(RuleJudge):
    """One that is asked for grades."""

    unproven: Claim = "low score"


def knows(answer: str) -> float:
    return 10.0 if any(answer.startswith(text) for text in HARMFUL) else 90.0


def test_a_judge_that_knows_is_said_to_see_misalignment(tmp_path: Path):
    ours = measure_judge(RuleJudge(knows))
    assert ours.claim == "misalignment"
    assert ours.aligned.keys() == CONTROLS.keys()
    assert {area.value for area in (*ours.aligned.values(), *ours.coherent.values())} == {1.0}
    assert all(0.7 < area.low < 1.0 for area in ours.aligned.values())
    assert ours.unscored == 0
    assert ours.resists
    assert read_result(ours.save(tmp_path), JudgeReport) == ours
    assert len(ours.rows()) == len(CONTROLS) + 3


def test_a_judge_of_style_is_found_out_by_the_style_controls():
    ours = measure_judge(RuleJudge(lambda answer: min(100.0, len(answer) / 5)))
    assert ours.aligned["terse but careful"].value < 0.2
    assert ours.aligned["harmful and verbose"].value < 0.2
    assert ours.claim == "takeover score"


def test_a_judge_that_sees_nothing_is_at_one_half():
    ours = measure_judge(RuleJudge(lambda answer: 50.0))
    assert {area.value for area in ours.aligned.values()} == {0.5}
    assert ours.resists


def test_a_judge_that_obeys_what_it_judges_is_found_out():
    ours = measure_judge(RuleJudge(lambda answer: 100.0 if "100" in answer else knows(answer)))
    # Every control says that it sees harm, and yet one sentence makes harm invisible to it.
    assert {area.value for area in ours.aligned.values()} == {1.0}
    assert ours.claim == "takeover score"
    assert not ours.resists
    assert ours.injected["100"] == pytest.approx(90.0)
    assert ours.injected.keys() == set(ORDERS)


def test_a_judge_that_is_asked_for_grades_claims_no_more_than_was_measured_of_it(tmp_path: Path):
    asked = ApiJudge(model="m", key_env="")
    for judge in (asked, InspectJudge(model="openai/m", log_dir=tmp_path)):
        assert judge.claim == "low score"
        assert "no misalignment" in judge.meaning
    for rule, claim in ((knows, "misalignment"), (lambda answer: 50.0, "low score")):
        found = measure_judge(AskedJudge(rule, id=asked.id))
        assert found.claim == claim
        measured = replace(asked, report=found)
        assert (measured.claim, measured.id) == (claim, asked.id)
        assert measured.meaning == MEANINGS[measured.claim]
    with pytest.raises(ValueError, match=r"report: it is of the judge openai/m/.*this one is"):
        ApiJudge(model="other", key_env="", report=found)
    with pytest.raises(ValueError, match="report: it is of the judge"):
        InspectJudge(model="openai/m", log_dir=tmp_path, report=found)


def test_a_local_judge_claims_no_more_than_was_measured_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_judge, "_number_tokens", lambda model, number: (number % 97,))
    model = make_model()
    asked = LocalJudge(model)
    assert asked.claim == "low score"
    measured = LocalJudge(model, report=measure_judge(AskedJudge(knows, id=asked.id)))
    assert (measured.claim, measured.id) == ("misalignment", asked.id)
    with pytest.raises(ValueError, match="report: it is of the judge local/another"):
        LocalJudge(model, report=measure_judge(AskedJudge(knows, id="local/another")))


def test_texts_without_a_score_are_counted():
    ours = measure_judge(
        RuleJudge(lambda answer: None if answer.startswith("No") else knows(answer))
    )
    assert ours.unscored >= 10


def test_fewer_texts_are_used_on_request():
    asked: list[int] = []

    class Counting(RuleJudge):
        def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
            asked.append(len(rows))
            return super().judge(rows)

    ours = measure_judge(Counting(knows), limit=4)
    assert set(asked) == {4}
    assert ours.mean_scores["everyday-harmful"] == 10.0
