"""The rows of a run, listed before any is made: names, wordings and samples."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emlens.data import Chat
from emlens.evaluation.judges import hash_json
from emlens.evaluation.questions import Question
from emlens.models.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """One response that is to be there in the end."""

    id: str
    """Hash of everything that decides the response."""
    question: Question
    chat: Chat
    """One wording of the question, with its system prompt."""
    paraphrase: int
    """Which wording."""
    sample: int
    """Which of the samples of that wording."""
    repeat: int = 0
    """How many wordings before this one ask the same, under another question or with other blanks
    around: the response is another one then, not the same one counted twice."""


def plan_rows(
    questions: Sequence[Question], sampling: Sampling, decided: Mapping[str, Any]
) -> tuple[PlannedRow, ...]:
    """List every response of a run, in the order of the final table.

    Args:
        questions: what is asked.
        sampling: `n` is used where a question does not say how often it is asked.
        decided: JSON of what else decides a response: model, interventions, stop tokens.
    """
    settings = {k: v for k, v in dataclasses.asdict(sampling).items() if k != "n"}
    rows: list[PlannedRow] = []
    seen = Counter[tuple[tuple[str, str], ...]]()
    for question in questions:
        for paraphrase, chat in enumerate(question.chats()):
            turns = [[message.role, message.content] for message in chat.messages]
            # Without the blanks around: many a template takes them off.
            asked = tuple((message.role, message.content.strip()) for message in chat.messages)
            again = {"repeat": seen[asked]} if seen[asked] else {}
            for sample in range(question.samples_per_paraphrase or sampling.n):
                own = {"question": question.id, "turns": turns, "sample": sample, **again}
                row = PlannedRow(
                    id=hash_json({**decided, "sampling": settings, **own}),
                    question=question,
                    chat=chat,
                    paraphrase=paraphrase,
                    sample=sample,
                    repeat=seen[asked],
                )
                rows.append(row)
            seen[asked] += 1
    return tuple(rows)
