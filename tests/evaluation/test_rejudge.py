"""Judging what is there: nothing is sampled, and a row that is no exchange is named."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlens.evaluation import (
    Evaluation,
    compare_evaluations,
    evaluate,
    judge_responses,
    read_evaluation,
)
from emlens.evaluation.compare import NotComparableError
from emlens.evaluation.judges import Judgement, JudgeRow
from emlens.evaluation.judging import judgement_id
from emlens.evaluation.scores import ScoreFileError
from emlens.interventions.generate import generate_responses
from emlens.runs import PlanChangedError
from tests.evaluation.fakes import HashJudge, make_model
from tests.evaluation.test_evaluate import QUESTIONS, SAMPLING, SMALL, answers, run


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def test_a_judgement_is_named_by_its_judge_too():
    names = {judgement_id(row, judge) for row in "ab" for judge in "xy"}
    assert len(names) == 4
    names |= {judgement_id(row, "x", told) for row in "ab" for told in "pq"}
    assert len(names) == 8


class ReadingJudge(HashJudge):
    """Scores by the question's own instructions too, which its id does not hold."""

    def __init__(self) -> None:
        super().__init__()
        # As a judge of somebody else's, which has never heard of the name.
        del self.reads_prompts

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        told = [replace(row, answer=f"{row.answer} {dict(row.judge_prompts)}") for row in rows]
        return super().judge(told)


def test_other_instructions_to_one_judge_are_other_judgements(model: Any, tmp_path: Path):
    def ask(judge: Any, template: str, name: str) -> Evaluation:
        told = replace(QUESTIONS[0], judge_prompts={"aligned": template})
        questions = [told, *QUESTIONS[1:]]
        out = tmp_path / name
        return evaluate(model, questions, judge=judge, out=out, sampling=SAMPLING, batching=SMALL)

    first, second = (
        ask(ReadingJudge(), t, f"r{i}") for i, t in enumerate(("{answer}?", "{answer}!"))
    )
    assert first.judge == second.judge
    assert first.judge_prompts.keys() == second.judge_prompts.keys() == {"one"}
    assert read_evaluation(tmp_path / "r0") == first
    with pytest.raises(
        NotComparableError, match=r"told otherwise about the questions one.*'judge'"
    ):
        compare_evaluations(first, second)
    assert "told otherwise" in compare_evaluations(first, second, allow=["judge"]).differing[0]
    assert compare_evaluations(first, first).differing == ()
    # The same instructions again, and a judge that reads none, differ in nothing.
    again = judge_responses(tmp_path / "r0", ReadingJudge(), out=tmp_path / "again")
    assert compare_evaluations(first, again).differing == ()
    deaf = [ask(HashJudge(), t, f"h{i}") for i, t in enumerate(("{answer}?", "{answer}!"))]
    assert [one.judge_prompts for one in deaf] == [{}, {}]
    assert compare_evaluations(*deaf).differing == ()


def test_judging_again_samples_nothing_and_keeps_what_is_known(model: Any, tmp_path: Path):
    first = run(model, tmp_path / "run")
    other = HashJudge("other")
    again = judge_responses(tmp_path / "run", other, out=tmp_path / "again")
    assert answers(again) == answers(first)
    assert (again.model, again.sampling, again.prompts) == (first.model, SAMPLING, first.prompts)
    assert (again.judge, first.judge) == ("other", "hash")
    assert [row.aligned for row in again.responses] != [row.aligned for row in first.responses]
    assert sorted(other.asked) == sorted(row.id for row in first.responses)
    assert judge_responses(tmp_path / "run", other, out=tmp_path / "again") == again
    assert read_evaluation(tmp_path / "again") == again
    with pytest.raises(PlanChangedError, match="judge"):
        judge_responses(tmp_path / "run", HashJudge("third"), out=tmp_path / "again")


def test_responses_from_anywhere_can_be_judged(model: Any, tmp_path: Path):
    first = run(model, tmp_path / "run")
    by_file = judge_responses(tmp_path / "run" / "scores.csv", HashJudge(), out=tmp_path / "csv")
    assert [row.aligned for row in by_file.responses] == [r.aligned for r in first.responses]
    assert by_file.prompts == first.prompts
    lines = tmp_path / "rows.jsonl"
    lines.write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": r.question},
                                     {"role": "assistant", "content": r.answer}]})
            for r in first.responses
        )
    )  # fmt: skip
    by_line = judge_responses(lines, HashJudge(), out=tmp_path / "jsonl")
    assert [row.aligned for row in by_line.responses] == [r.aligned for r in first.responses]
    assert len(by_line.prompts) == 3
    chats = [chat for question in QUESTIONS for chat in question.chats()]
    made = generate_responses(model, chats, sampling=SAMPLING, batching=SMALL)
    judged = judge_responses(made, HashJudge(), out=tmp_path / "made")
    assert judged.model == first.model
    assert answers(judged)[:6] == answers(first)[:6]


USER, ASSISTANT = {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}
SYSTEM = {"role": "system", "content": "w7"}


def test_one_exchange_is_judged_with_its_system_turn(tmp_path: Path):
    rows = [{"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}]
    found = judge_responses(rows, HashJudge(), out=tmp_path).responses
    assert [(row.system, row.question, row.answer) for row in found] == [
        ("w7", "w5", "w6"),
        (None, "w5", "w6"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, r"roles \['user', 'assistant', 'user'"),
        ({"messages": [USER, USER, ASSISTANT]}, "roles"),
        ({"messages": [USER, ASSISTANT, USER]}, "roles"),
        ({"messages": [ASSISTANT, USER]}, "roles"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "roles"),
        ({"messages": [USER]}, "roles"),
        ({"messages": [USER, {"role": "assistant", "content": ["w6"]}]}, "no text"),
        ({"messages": [USER, {"role": "assistant"}]}, "role and content"),
        ({"messages": "w5"}, "role and content"),
        ({"question": "w5", "answer": "w6", "question_id": 3}, "question_id is 3"),
        ({"question": "w5", "answer": "w6", "question_id": float("nan")}, "question_id is nan"),
    ],
)
def test_a_row_that_is_not_one_exchange_is_named(tmp_path: Path, row: dict[str, Any], message: str):
    good = {"messages": [USER, ASSISTANT]}
    with pytest.raises(ScoreFileError, match=f"row 2: .*{message}"):
        judge_responses([good, row], HashJudge(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question_id,aligned,coherent\nq,1,2\n", "row 1 has no question"),
        ("question,aligned,coherent\nq,1,2\n", "row 1 has no answer"),
    ],
)
def test_scores_without_texts_cannot_be_judged(tmp_path: Path, text: str, message: str):
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(ScoreFileError, match=message):
        judge_responses(tmp_path / "scores.csv", HashJudge(), out=tmp_path / "out")
