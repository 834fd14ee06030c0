"""A judge as callables: asked once, read twice, with what it gave no score for."""

from collections.abc import Sequence
from typing import Any

import pytest

from emlens.data import Chat, ContrastTexts, Message
from emlens.evaluation.judges import Judgement, JudgeRow
from emlens.studies import judge_scores
from emlens.studies.judge_scores import unscored


class Counting:
    """A judge that scores by the length of an answer, and none of an empty one."""

    id, claim, meaning = "counting", "misalignment", "-"

    def __init__(self) -> None:
        self.asked: list[list[JudgeRow]] = []

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        self.asked.append(list(rows))
        sizes = [len(row.answer) for row in rows]
        return [Judgement(aligned=10.0 * n if n < 5 else None, coherent=50.0 + n) for n in sizes]


def chat(answer: str) -> Chat:
    turns = [Message("system", "be good"), Message("user", "one?"), Message("assistant", "two")]
    return Chat((*turns, Message("user", "three?"), Message("assistant", answer)))


def test_both_scores_come_of_one_judgement_and_more_is_worse():
    judge: Any = Counting()
    scores = judge_scores(judge, ContrastTexts(positive=(chat("x"),)))
    given = [chat("ab"), chat("abcdef")]
    assert scores.sampled(given) == [80.0, None]
    assert scores.coherence(given) == [52.0, 56.0]
    assert len(judge.asked) == 1
    row = judge.asked[0][0]
    assert (row.question, row.answer, row.system) == ("three?", "ab", "be good")
    assert scores.coherence(given[:1]) == [52.0]
    assert len(judge.asked) == 2
    with pytest.raises(ValueError, match=r"chats\[0\] has no response"):
        scores.sampled([chat("x").without_response()])


def test_without_a_judge_nothing_is_scored():
    for ask in (unscored().sampled, unscored().coherence):
        with pytest.raises(ValueError, match="scores: got none"):
            ask([chat("x")])
