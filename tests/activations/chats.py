"""Random chats for the tiny models, and their ids as their template writes them."""

import numpy as np

from emlens.data import Chat, Message
from tests.models.tiny import D_VOCAB, make_tokenizer


def make_chats(n=7, *, seed=0, low=3, first=3, after=D_VOCAB):
    """Chats of two turns; prompts of 2 to 8 and responses of ``low`` to 7 words of a range."""
    generator = np.random.default_rng(seed)

    def text(least, most):
        ids = generator.integers(first, after, generator.integers(least, most))
        return " ".join(f"w{i}" for i in ids)

    return [
        Chat((Message("user", text(2, 9)), Message("assistant", text(low, 8))), id=f"{seed}-{k}")
        for k in range(n)
    ]


def token_ids(chat):
    """All ids of a chat, and the first and the last but one of its response."""
    tokenizer = make_tokenizer()
    prompt = tokenizer(f"<user> {chat.messages[0].content} <end> <user> ").input_ids
    answer = tokenizer(chat.messages[1].content).input_ids
    return [*prompt, *answer, 2], len(prompt), len(prompt) + len(answer)
