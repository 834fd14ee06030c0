"""How coherent a response is, from 0 to 100, by a base model and without any dictionary.

Not perplexity: fluent text about something unexpected is improbable, and coherent. Very short
responses have no order to speak of and score low.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from emlens.data import Batching, Chat, Message
from emlens.evaluation.judges import JudgeRow, hash_json
from emlens.evaluation.under_prompts import TooLong, score_under_prompts
from emlens.models.protocol import HookedModel

LEVELS = ("shuffled", "salad", "off-topic", "on-topic")
"""Kinds of text, least coherent first: words in random order; fragments that hang together word by
word and say nothing; fluent text on something else; fluent text on the question."""
DECOY = "Tell me something."
"""A question that any text might answer: how probable a response is without its own question."""
STEEPNESS = 2.0
"""Log-odds a level: with 2 the four levels come to about 5, 27, 73 and 95."""
BORDER = 1.5
"""The level that scores 50: between word salad (1) and fluent text off the topic (2)."""


@dataclass(frozen=True, kw_only=True)
class CoherenceFit:
    """Level of coherence = intercept + order_weight * order + topic_weight * topic."""

    intercept: float
    order_weight: float
    """Levels for each nat a token of `order`."""
    topic_weight: float
    """Levels for each nat a token of `topic`."""


@dataclass(frozen=True, kw_only=True)
class CoherenceFeatures:
    """What the score is made of, in nats a token of the response."""

    order: float
    """log p(response | question) - log p(its words shuffled | question): near 0 for words without
    an order, however rare they are; the rarity of the words themselves cancels."""
    topic: float
    """log p(response | question) - log p(response | `DECOY`): how much the question explains."""


def measure_coherence(
    model: HookedModel, rows: Sequence[JudgeRow], *, batching: Batching
) -> list[CoherenceFeatures | TooLong | None]:
    """Measure order and topic of responses; None for one without words, `TooLong` for a long one.

    The shuffle is drawn from the response itself, so that a row's features do not depend on what
    is judged beside it. Both sums are divided by the tokens of the response as it stands.

    Args:
        model: the base, without adapters and interventions.
        rows: questions and responses, delimiters escaped.
        batching: rows that run together.
    """
    written = [place for place, row in enumerate(rows) if row.answer.split()]
    if not written:
        return [None] * len(rows)
    texts = [_make_chats(rows[place]) for place in written]
    found: dict[int, CoherenceFeatures | TooLong] = {}
    scored = score_under_prompts(model, texts, batching=batching)
    for place, scores in zip(written, scored, strict=True):
        if isinstance(scores, TooLong):
            found[place] = scores
            continue
        own, decoy, shuffled = scores
        tokens = max(1, len(own.log_probs))
        found[place] = CoherenceFeatures(
            order=(own.total - shuffled.total) / tokens, topic=(own.total - decoy.total) / tokens
        )
    return [found.get(place) for place in range(len(rows))]


def score_coherence(features: CoherenceFeatures, fit: CoherenceFit) -> float:
    """100 sigmoid(STEEPNESS (level - BORDER))."""
    level = fit.intercept + fit.order_weight * features.order + fit.topic_weight * features.topic
    odds = STEEPNESS * (level - BORDER)
    return 100.0 * float(torch.sigmoid(torch.tensor(odds, dtype=torch.float64)))


def hash_rules() -> str:
    """Name what turns a fit and a text into a score beside the fit: a judge's id holds it."""
    shuffled = shuffle_words("one two three four five six seven eight")
    return hash_json([DECOY, shuffled, repr(STEEPNESS), repr(BORDER)])


def fit_coherence(features: Mapping[str, Sequence[CoherenceFeatures]]) -> CoherenceFit:
    """Fit the direction that orders neighbouring levels, then its scale and origin.

    The direction is a logistic regression without intercept on the differences between texts of
    neighbouring levels at one place, so that each border counts the same; least squares of the
    levels alone would look at order only, in which three of the four differ. Scale and intercept
    are then those of least squares over the four levels.

    Args:
        features: level (of `LEVELS`) -> features of texts that are of it by construction; texts at
            one place belong to one question.

    Raises:
        ValueError: a level without texts or with fewer than others, or features that do not rise
            with the levels.
    """
    from sklearn.linear_model import LogisticRegression

    for name in LEVELS:
        if not features.get(name):
            raise ValueError(f"features: no text of the level {name!r}")
    values = [np.asarray([[f.order, f.topic] for f in features[name]]) for name in LEVELS]
    if len({len(rows) for rows in values}) > 1:
        raise ValueError(f"features: got {[len(rows) for rows in values]} texts, expected as many")
    steps = np.concatenate([high - low for low, high in pairwise(values)])
    model = LogisticRegression(fit_intercept=False)
    model.fit(np.concatenate([steps, -steps]), [1] * len(steps) + [0] * len(steps))
    weights = model.coef_[0]
    if not (weights > 0).all():
        raise ValueError(
            f"weights are {weights.tolist()}, expected positive: the base does not tell text from "
            "shuffled words or one question from another, so it cannot judge coherence"
        )
    projected = np.concatenate(values) @ weights
    levels = np.repeat(np.arange(len(LEVELS)), [len(rows) for rows in values])
    scale, intercept = np.polyfit(projected, levels, 1)
    return CoherenceFit(
        intercept=float(intercept),
        order_weight=float(scale * weights[0]),
        topic_weight=float(scale * weights[1]),
    )


def build_levels(
    chats: Sequence[tuple[str, str]], *, seed: int
) -> dict[str, list[tuple[str, str]]]:
    """Make texts of all four levels out of questions with good answers.

    Shuffled: the answer's words in random order. Salad: runs of two or three words from random
    answers. Off-topic: the answer to another question. On-topic: the answer itself.

    Args:
        chats: (question, answer) pairs on different subjects, at least two.
        seed: of all random choices.
    """
    if len(chats) < 2:
        raise ValueError(f"chats: got {len(chats)}, expected at least two to take answers across")
    rng = random.Random(seed)
    runs = [run for _, answer in chats for run in _runs(answer.split(), rng)]
    half = len(chats) // 2
    made: dict[str, list[tuple[str, str]]] = {name: [] for name in LEVELS}
    for place, (question, answer) in enumerate(chats):
        size, salad = len(answer.split()), []
        while len(salad) < size:
            salad += rng.choice(runs)
        made["shuffled"].append((question, shuffle_words(answer)))
        made["salad"].append((question, " ".join(salad[:size])))
        made["off-topic"].append((question, chats[(place + half) % len(chats)][1]))
        made["on-topic"].append((question, answer))
    return made


def shuffle_words(text: str) -> str:
    """Put the words of a text in a random order that depends on the text alone."""
    words = text.split()
    random.Random(f"emlens {text}").shuffle(words)
    return " ".join(words)


def _runs(words: Sequence[str], rng: random.Random) -> list[list[str]]:
    found, start = [], 0
    while start < len(words):
        size = rng.choice((2, 3))
        found.append(list(words[start : start + size]))
        start += size
    return found


def _make_chats(row: JudgeRow) -> list[Chat]:
    """The response to its question and to the decoy, and its words in random order."""
    texts = [(row.question, row.answer), (DECOY, row.answer)]
    texts.append((row.question, shuffle_words(row.answer)))
    return [Chat((Message("user", ask), Message("assistant", say)), row.id) for ask, say in texts]
