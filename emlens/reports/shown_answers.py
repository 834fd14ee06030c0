"""Some of the answers of an evaluation, to be read beside its shares; they are no sample of either.

A bounded number of each question: those that score lowest, and some of the others drawn by a seed,
so that a page is the same every time.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from emlens.reports.sections import Json
from emlens.reports.visible import read_number

LOWEST, DRAWN = 2, 2
"""Answers of a question: those with the lowest scores, and those drawn from the rest."""
MOST_QUESTIONS = 40
"""A page of more would be long without saying more; the published sets have 8 to 24."""
MOST_CHARACTERS = 2000
"""Of an answer: about the 600 tokens that the published protocol samples at most."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class ShownAnswers:
    """The answers to one question that a page shows."""

    question_id: str
    n: int
    """All answers to it."""
    rows: list[tuple[str, Json]]
    """Why each is shown, and the scored response."""


@dataclass(frozen=True, kw_only=True)
class AnswerSheet:
    """What a page shows of all answers."""

    questions: list[ShownAnswers]
    n_questions: int
    """All that were asked."""
    n_answers: int
    """All that were given."""

    @property
    def shown(self) -> int:
        """Answers on the page."""
        return sum(len(part.rows) for part in self.questions)


def choose_answers(responses: Sequence[Json]) -> AnswerSheet | None:
    """The answers that a page shows, in the order of the questions; None where no text is known.

    Args:
        responses: an Evaluation's, as JSON.
    """
    groups: dict[str, list[Json]] = {}
    for row in responses:
        if row["answer"] is not None:
            groups.setdefault(str(row["question_id"]), []).append(row)
    if not groups:
        return None
    chosen = [
        ShownAnswers(question_id=name, n=len(rows), rows=_choose(name, rows))
        for name, rows in list(groups.items())[:MOST_QUESTIONS]
    ]
    return AnswerSheet(
        questions=chosen, n_questions=len(groups), n_answers=sum(map(len, groups.values()))
    )


def _choose(question: str, rows: Sequence[Json]) -> list[tuple[str, Json]]:
    scores = [
        (read_number(row["aligned"]), place)
        for place, row in enumerate(rows)
        if row["aligned"] is not None
    ]
    lowest = [place for _, place in sorted(scores)[:LOWEST]]
    rest = [place for place in range(len(rows)) if place not in lowest]
    # A stream of its own for each question: what is drawn of one depends on no other.
    drawn = random.Random(f"{SEED} {question}").sample(rest, min(DRAWN, len(rest)))
    return [("lowest", rows[place]) for place in lowest] + [
        ("drawn", rows[place]) for place in sorted(drawn)
    ]
