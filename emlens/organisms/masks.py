"""Which tokens of a chat a fine-tune learns: its response and the token that ends the turn.

It finds them by the spans of `emlens.data.chat`, never by searching for a marker in the ids. Not
for scoring: there, choose positions with `emlens.data.positions`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from emlens.data.chat import Chat, ChatError, TokenizedChat, tokenize_chat
from emlens.models.training_loop import IGNORED, TrainingExample


class NoResponseError(ValueError):
    """A chat without a response has nothing to be trained on."""


class ChatTooLongError(ValueError):
    """A row has more tokens than the settings or the model allow."""


class UnusualChatError(ValueError):
    """A row that is no conversation of a user and an assistant."""


class MaskedChat(NamedTuple):
    """Ids up to the last trained token, and a label for each of them."""

    ids: Int[Tensor, " pos"]
    """Token ids; what the template writes after the end of the response is cut off."""
    labels: Int[Tensor, " pos"]
    """The id where the token is trained on, else `IGNORED`; not shifted."""


def mask_response(chat: TokenizedChat) -> MaskedChat:
    """Label the last assistant turn and its end-of-turn token, and nothing else.

    Without an end-of-turn token (plain text) the response alone is labelled. Earlier assistant
    turns count as prompt.

    Raises:
        NoResponseError: The chat has no response, or one without a token.
    """
    name = f" {chat.id!r}" if chat.id is not None else ""
    if chat.response is None:
        raise NoResponseError(
            f"chat{name}: no assistant turn, expected one to train on; "
            "is this a prompt file instead of a data set?"
        )
    start, stop = chat.response
    if stop <= start:
        raise NoResponseError(f"chat{name}: its response has no token, expected some text")
    if chat.response_eot is not None:
        stop = chat.response_eot
    labels = torch.full_like(chat.ids, IGNORED)
    labels[start:stop] = chat.ids[start:stop]
    return MaskedChat(ids=chat.ids[:stop], labels=labels[:stop])


def make_examples(
    chats: Sequence[Chat], tokenizer: Any, *, longest: int | None, named: str = "chats"
) -> list[TrainingExample]:
    """Sequences with the labels of their responses, in the order of the chats.

    Args:
        chats: each with a response.
        tokenizer: with a chat template.
        longest: tokens that a row may have, None for any number; none is cut.
        named: what errors call the chats.

    Raises:
        NoResponseError: a chat that does not end in a response, or in one without words.
        UnusualChatError: other turns than a user's and an assistant's by turns, maybe after one
            system turn; or one without words.
        ChatTooLongError: one with too many tokens.
        ChatError: one that the template refuses or rewrites. All name the chat by its place.
    """
    examples = []
    for index, chat in enumerate(chats):
        place = f"{named}[{index}] ({_say_origin(chat, index)})"
        _check_turns(chat, place)
        try:
            masked = mask_response(tokenize_chat(chat, tokenizer))
        except (ChatError, NoResponseError) as error:
            raise type(error)(f"{place}: {error}") from error
        if longest is not None and len(masked.ids) > longest:
            raise ChatTooLongError(
                f"{place}: {len(masked.ids)} tokens, expected at most {longest}, by max_length or "
                "the model's context; shorten it, or raise max_length (--max-length) where the "
                "context has room"
            )
        examples.append(TrainingExample(ids=masked.ids, labels=masked.labels))
    return examples


def _say_origin(chat: Chat, index: int) -> str:
    """A row's id and its line in its own file: several files may have become one list."""
    if chat.id is None:
        return chat.origin or f"row {index + 1}"
    return f"id {chat.id!r}" + (f", {chat.origin}" if chat.origin else "")


def _check_turns(chat: Chat, place: str) -> None:
    """Refuse what a lenient template would render all the same.

    A second system turn or a role that the template does not know is a mistake in the making of the
    rows, which the loss does not show.
    """
    roles = [message.role for message in chat.messages]
    if roles[-1] != "assistant":
        raise NoResponseError(
            f"{place}: no assistant turn at its end, but one of {roles[-1]!r}; expected one to be "
            "trained on: is this a prompt file instead of a data set?"
        )
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise UnusualChatError(
            f"{place}: got the roles {roles}, expected user and assistant by turns, after at most "
            "one system turn"
        )
    blank = [index for index, message in enumerate(chat.messages) if not message.content.strip()]
    if blank:
        last = blank[0] == len(roles) - 1
        raise (NoResponseError if last else UnusualChatError)(
            f"{place}: turn {blank[0] + 1} ({roles[blank[0]]}) is empty, expected some text"
        )


def count_trained(examples: Sequence[TrainingExample]) -> int:
    """Tokens of one pass that take part in the loss."""
    return sum(int((example.labels != IGNORED).sum()) for example in examples)
