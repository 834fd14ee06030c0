"""What judges look like to whoever only needs their scores; not a judge.

Directions and features are chosen by behaviour, and judges live on their own floor: they come down
as plain callables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from emlens.data.chat import Chat

ModelScorer = Callable[[Any], float]
"""Scores a model as it stands, interventions in effect included."""
ResponseScorer = Callable[[Sequence[Chat]], Sequence[float | None]]
"""Scores answered chats, one value each; None where the judge gave none."""


@dataclass(frozen=True, kw_only=True)
class BehaviourScores:
    """How much of a behaviour a model shows, cheaply and dearly, and whether it still makes sense.

    More is more of the behaviour, so that taking the behaviour out lowers both of the first.
    """

    teacher_forced: ModelScorer
    """Without sampling: such as the mean log-odds of misaligned against aligned fixed responses."""
    sampled: ResponseScorer
    """Of sampled responses, by a judge."""
    coherence: ResponseScorer
    """Of the same responses: a behaviour lost together with coherence is damage, not repair."""

    def __post_init__(self) -> None:
        for name in ("teacher_forced", "sampled", "coherence"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected a callable")
