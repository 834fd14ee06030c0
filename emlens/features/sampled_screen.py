"""Second stage of a screen: responses sampled under a direction, judged by the caller's scores.

For the few directions that the first stage has chosen, and for controls.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from emlens.data import BehaviourScores, Chat, Message, as_chats
from emlens.features.screen_journal import ScreenJournal
from emlens.features.screen_results import SampledPoint, Side
from emlens.features.screen_settings import ScreenSettings
from emlens.interventions import Add, Intervention, generate_responses
from emlens.numerics.intervals import SIGN_FLIP_BELOW, Interval, cluster_t, sign_flip
from emlens.sites import Site


@dataclass(frozen=True, kw_only=True)
class JudgedResponse:
    """One sampled response and what the judges gave it."""

    prompt: int
    """Index of the prompt."""
    text: str
    behaviour: float | None
    coherence: float | None

    @property
    def scored(self) -> bool:
        """Whether both scores are there."""
        return self.behaviour is not None and self.coherence is not None


@dataclass(frozen=True, kw_only=True)
class SampledStage:
    """Everything that the responses of one side depend on."""

    model: Any
    side: Side
    """Of the parts' names."""
    site: Site
    scores: BehaviourScores
    settings: ScreenSettings
    journal: ScreenJournal

    def sample(self, named: str, vector: Float[Tensor, " d"] | None) -> list[JudgedResponse]:
        """Answer every prompt under an added vector and judge the responses, once.

        Args:
            named: the direction and its strength; the same in every call that goes on.
            vector: in activation units, the side's sign included; None for no steering.
        """
        part = self.journal.ask(f"sampled/{self.side}/{named}", lambda: self._judge(vector))
        return [JudgedResponse(**row) for row in part]

    def _judge(self, vector: Tensor | None) -> list[dict[str, Any]]:
        chats = as_chats(self.settings.chats)
        act = () if vector is None else (Intervention(self.site, Add(vector)),)
        made = generate_responses(
            self.model,
            chats,
            sampling=self.settings.sampling,
            interventions=act,
            batching=self.settings.batching,
        ).responses
        answered = [_answer(chats[one.prompt_index], one.text) for one in made]
        judges = {"behaviour": self.scores.sampled, "coherence": self.scores.coherence}
        found = {name: _ask(name, judge, answered) for name, judge in judges.items()}
        return [
            {"prompt": one.prompt_index, "text": one.text}
            | {name: values[place] for name, values in found.items()}
            for place, one in enumerate(made)
        ]


def _answer(chat: Chat, text: str) -> Chat:
    messages = (*chat.without_response().messages, Message("assistant", text))
    return Chat(messages, chat.id)


def _ask(name: str, judge: Any, answered: Sequence[Chat]) -> list[float | None]:
    values = [None if value is None else float(value) for value in judge(answered)]
    if len(values) != len(answered):
        raise ValueError(
            f"scores: {name} gave {len(values)} values for {len(answered)} responses, expected one "
            "each, None where there is no score"
        )
    # What is no number is no score, and JSON has no word for it.
    return [None if value is None or math.isnan(value) else value for value in values]


def summarise_responses(
    responses: Sequence[JudgedResponse],
    plain: Sequence[JudgedResponse],
    *,
    strength: float,
    sign: float,
    coherent_above: float,
) -> SampledPoint:
    """Count incoherence and compare behaviour with the unsteered model's, prompt by prompt.

    Args:
        responses: steered.
        plain: unsteered, to the same prompts.
        strength: of the steering; 0 for the unsteered responses themselves.
        sign: 1 where more of the behaviour is hoped for, -1 where less is.
        coherent_above: scores above this are coherent.
    """
    scored = [one for one in responses if one.scored]
    means = _prompt_means(responses, coherent_above)
    before = _prompt_means(plain, coherent_above)
    both = [sign * (means[k] - before[k]) for k in sorted(means.keys() & before.keys())]
    coherent = sum(one.coherence > coherent_above for one in scored if one.coherence is not None)
    return SampledPoint(
        strength=strength,
        n_responses=len(responses),
        n_scored=len(scored),
        incoherent=1 - coherent / len(scored) if scored else math.nan,
        behaviour=statistics.fmean(means.values()) if means else math.nan,
        effect=_interval(both) if strength else None,
    )


def _prompt_means(responses: Sequence[JudgedResponse], coherent_above: float) -> dict[int, float]:
    """Mean behaviour of each prompt's coherent responses; prompts without one are left out."""
    found: dict[int, list[float]] = {}
    for one in responses:
        if one.behaviour is None or one.coherence is None or one.coherence <= coherent_above:
            continue
        found.setdefault(one.prompt, []).append(one.behaviour)
    return {prompt: statistics.fmean(values) for prompt, values in found.items()}


def _interval(differences: Sequence[float]) -> Interval | None:
    """By sign flips of prompts where they are few, by t where they are many."""
    if len(differences) < 2:
        return None
    return (sign_flip if len(differences) < SIGN_FLIP_BELOW else cluster_t)(differences)
