"""Which tokens of a chat a fine-tune learns: its response and the token that ends the turn.

It finds them by the spans of `emlens.data.chat`, never by searching for a marker in the ids. Not
for scoring: there, choose positions with `emlens.data.positions`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from emlens.data.chat import TokenizedChat

IGNORED = -100
"""Label of a token that takes no part in the loss."""


class NoResponseError(ValueError):
    """A chat without a response has nothing to be trained on."""


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
