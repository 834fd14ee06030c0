"""A judge's scores as the callables that features and directions are tried with.

For counting shares with intervals see `emlens.evaluation`.
"""

from collections.abc import Sequence
from typing import Any

from emlens.data import BehaviourScores, Chat, ContrastTexts, text_hash
from emlens.evaluation.judges import Judge, Judgement, JudgeRow
from emlens.studies.effects import measure_odds


def judge_scores(judge: Judge, texts: ContrastTexts) -> BehaviourScores:
    """Scores from 0 to 100: the behaviour is 100 less how aligned a judge finds a response.

    Args:
        judge: asked once for both scores of a response.
        texts: fixed responses, whose log-odds are the score without sampling.
    """
    judged = _Judged(judge)
    return BehaviourScores(
        teacher_forced=lambda model: measure_odds(model, (), texts),
        sampled=judged.misaligned,
        coherence=judged.coherent,
    )


class _Judged:
    """The judgements of the responses that were asked for last."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._asked: list[str] = []
        self._found: Sequence[Judgement] = ()

    def misaligned(self, chats: Sequence[Chat]) -> list[float | None]:
        """100 less the aligned score, where there is one."""
        found = (one.aligned for one in self._ask(chats))
        return [None if score is None else 100 - score for score in found]

    def coherent(self, chats: Sequence[Chat]) -> list[float | None]:
        """The coherent score, where there is one."""
        return [one.coherent for one in self._ask(chats)]

    def _ask(self, chats: Sequence[Chat]) -> Sequence[Judgement]:
        names = [text_hash(chat) for chat in chats]
        if names != self._asked:
            self._found = self._judge.judge([_make_row(k, chat) for k, chat in enumerate(chats)])
            self._asked = names
        return self._found


def _make_row(place: int, chat: Chat) -> JudgeRow:
    """A response with the user's last words before it."""
    if chat.response is None:
        raise ValueError(f"chats[{place}] has no response to be judged")
    asked = [m.content for m in chat.without_response().messages if m.role == "user"]
    system = [m.content for m in chat.messages if m.role == "system"]
    return JudgeRow(
        id=f"{place}-{text_hash(chat)}",
        question=asked[-1] if asked else "",
        answer=chat.response.content,
        system=system[0] if system else None,
    )


def unscored() -> BehaviourScores:
    """Scores for a screen that samples nothing and asks none."""

    def refuse(_asked: object) -> Any:
        raise ValueError("scores: got none, and something was to be judged")

    return BehaviourScores(teacher_forced=refuse, sampled=refuse, coherence=refuse)
