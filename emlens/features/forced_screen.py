"""First stage of a screen: fixed responses under every direction, without sampling.

For many directions: what they make a model say itself is a question for the second stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.data import Batching, ContrastTexts, TokenizedChat, tokenize_chat
from emlens.features.screen_journal import ScreenJournal
from emlens.features.steering import spread_strengths
from emlens.models.suffix import score_steered
from emlens.numerics.validation import NonFiniteError
from emlens.sites import Site

KEPT_TOGETHER = 32
"""Directions whose scores are kept at once: what a kill can lose, while the layers below the site
are run again for each such group only."""


@dataclass(frozen=True, kw_only=True)
class FixedTexts:
    """Fixed responses, tokenised: the misaligned before the aligned."""

    chats: tuple[TokenizedChat, ...]
    n_positive: int

    def class_means(self, totals: Float[Tensor, "n chats"]) -> Float[Tensor, "class n"]:
        """Mean log-probability a token of each class; every response counts the same.

        Args:
            totals: sums over the tokens of each response.
        """
        sizes = torch.tensor([_size(chat) for chat in self.chats], dtype=torch.float64)
        means = totals / sizes
        cut = self.n_positive
        return torch.stack([means[:, :cut].mean(1), means[:, cut:].mean(1)])


def tokenize_texts(texts: ContrastTexts, tokenizer: Any) -> FixedTexts:
    """Tokenise both classes.

    Raises:
        ValueError: a class without texts, or a response without a token.
    """
    if not texts.positive or not texts.negative:
        raise ValueError(
            f"texts: {len(texts.positive)} positive and {len(texts.negative)} negative, expected "
            "at least one of each: the odds are between the two"
        )
    chats = tuple(tokenize_chat(c, tokenizer) for c in (*texts.positive, *texts.negative))
    empty = [place for place, chat in enumerate(chats) if not _size(chat)]
    if empty:
        raise ValueError(f"texts: the response of chat {empty[0]} (positive first) has no token")
    return FixedTexts(chats=chats, n_positive=len(texts.positive))


def _size(chat: TokenizedChat) -> int:
    return 0 if chat.response is None else chat.response[1] - chat.response[0]


@dataclass(frozen=True, kw_only=True)
class ForcedStage:
    """Everything that the scores of one side depend on."""

    model: Any
    side: str
    """Of the parts' names."""
    site: Site
    texts: FixedTexts
    strengths: Sequence[float]
    """In activation units, the side's sign included."""
    batching: Batching
    journal: ScreenJournal

    def score_plain(self) -> Float[Tensor, " class"]:
        """Class means without steering."""
        nothing = torch.zeros(1, self.site.width(self.model.cfg), dtype=torch.float64)
        totals = self.journal.ask(f"forced/{self.side}", lambda: self._score(nothing))
        return self.texts.class_means(torch.tensor(totals, dtype=torch.float64))[:, 0]

    def score(
        self, directions: Float[Tensor, "n d"], *, named: Sequence[str]
    ) -> Float[Tensor, "class n strength"]:
        """Class means under each unit vector at each strength, kept as they come.

        Args:
            directions: unit vectors.
            named: a name for each, the same in every call that goes on with a screen.
        """
        found = []
        for start in range(0, len(directions), KEPT_TOGETHER):
            part = slice(start, start + KEPT_TOGETHER)
            names = f"{named[start]}-{named[part][-1]}"
            vectors = spread_strengths(directions[part], self.strengths, 1.0)
            totals = self.journal.ask(
                f"forced/{self.side}/{names}", lambda vectors=vectors: self._score(vectors)
            )
            means = self.texts.class_means(torch.tensor(totals, dtype=torch.float64))
            found.append(means.unflatten(1, (-1, len(self.strengths))))
        return torch.cat(found, dim=1)

    def _score(self, vectors: Tensor) -> list[list[float]]:
        totals = score_steered(
            self.model, self.texts.chats, site=self.site, vectors=vectors, batching=self.batching
        )
        if not bool(totals.isfinite().all()):
            longest = float(vectors.norm(dim=1).max())
            raise NonFiniteError(
                f"strengths: under vectors of up to {longest:.3g} activation units the {self.side} "
                "model's log-probabilities are no numbers; steer less, or load it in float32"
            )
        return totals.tolist()
