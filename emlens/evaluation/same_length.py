"""Pair the responses of two evaluations that are about equally long, question by question.

A model that answers in fewer words shows less of everything, harm too. What is left of a difference
between pairs is not length; what goes away may be either.
"""

from collections.abc import Sequence
from typing import NamedTuple

from emlens.evaluation.scores import ScoredResponse

CLOSE_SHARE = 0.1
"""Two responses are about equally long if their words differ by at most this share of the longer;
this project's choice."""
CLOSE_WORDS = 2
"""And, however short they are, if they differ by at most this many."""

Pair = tuple[ScoredResponse, ScoredResponse]


class SameLength(NamedTuple):
    """Pairs of one question."""

    first: tuple[ScoredResponse, ...]
    second: tuple[ScoredResponse, ...]
    """As many as of the first, each about as long as the one in its place."""


def count_words(rows: Sequence[ScoredResponse]) -> float | None:
    """Mean words of some responses; None where one of them has no text."""
    if not rows or any(row.answer is None for row in rows):
        return None
    return sum(map(_words, rows)) / len(rows)


def pair_by_length(first: Sequence[ScoredResponse], second: Sequence[ScoredResponse]) -> SameLength:
    """As many pairs of about equally long responses as there are, each response in one at most.

    Whether two are close depends on their words alone, so that scores choose nothing.

    Args:
        first: responses of one model to one question, with their texts.
        second: those of the other model.
    """
    ours, theirs = sorted(first, key=_words), sorted(second, key=_words)
    pairs: list[Pair] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        a, b = _words(ours[i]), _words(theirs[j])
        if abs(a - b) <= max(CLOSE_WORDS, CLOSE_SHARE * max(a, b)):
            pairs.append((ours[i], theirs[j]))
            i, j = i + 1, j + 1
        elif a < b:
            i += 1
        else:
            j += 1
    return SameLength(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def _words(row: ScoredResponse) -> int:
    return len((row.answer or "").split())
