"""One response under several prompts, scored by a judge's base; not a judgement.

A response that the base cannot read whole is told apart instead of stopping those beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emlens.data import Batching, Chat, ChatError, TokenizedChat, tokenize_chat
from emlens.models.protocol import HookedModel
from emlens.models.score import ResponseScore, count_read, score_responses


@dataclass(frozen=True)
class TooLong:
    """A response that is longer than what is read."""

    tokens: int
    """Of the longest of its texts, prompt included."""


def score_under_prompts(
    base: HookedModel, rows: Sequence[Sequence[Chat]], *, batching: Batching
) -> list[tuple[ResponseScore, ...] | TooLong]:
    """Score every row's response under each of its prompts.

    Args:
        base: scores the responses.
        rows: of each the chats that end in its response, as many in every row; a chat's id names
            the response in errors.
        batching: what runs together, and the longest text that is read; the base's own context
            bounds it too.

    Returns:
        A score for each chat of a row; `TooLong` where one of them is.

    Raises:
        ChatError: a chat that the base's template refuses or rewrites.
    """
    host: Any = base
    texts = [[_tokenize(chat, host.tokenizer) for chat in row] for row in rows]
    longest = [max(map(count_read, row)) for row in texts]
    limit = min(batching.max_length, host.cfg.n_ctx)
    kept = [place for place, tokens in enumerate(longest) if tokens <= limit]
    if not kept:
        return [TooLong(tokens) for tokens in longest]
    # Prompt by prompt: those who share one stand together.
    columns = zip(*(texts[place] for place in kept), strict=True)
    ordered = [chat for column in columns for chat in column]
    scores = score_responses(host, ordered, batching=batching)
    found = {place: tuple(scores[i :: len(kept)]) for i, place in enumerate(kept)}
    return [found.get(place, TooLong(tokens)) for place, tokens in enumerate(longest)]


def _tokenize(chat: Chat, tokenizer: Any) -> TokenizedChat:
    try:
        return tokenize_chat(chat, tokenizer)
    except ChatError as error:
        raise type(error)(f"response {chat.id!r}: {error}") from error
