"""A run's chats as ids: the same as one by one, and never all at once."""

import gc
from typing import Any

import pytest
import torch

from emlens.data import Chat, Message, TokenizedChat, TokenizedChats, tokenize_chat, tokenized
from tests.models.tiny import make_tokenizer


def make_run() -> tuple[tuple[Chat, ...], Any]:
    asked = [Chat((Message("user", " ".join(["w5", "w6"] * (n + 1))),)) for n in range(5)]
    answered = [Chat((*chat.messages, Message("assistant", "w7 w8 w9"))) for chat in asked]
    return (*asked, *answered), make_tokenizer()


def count_alive() -> int:
    gc.collect()
    return sum(type(item) is TokenizedChat for item in gc.get_objects())


def test_each_chat_is_what_tokenising_it_alone_gives():
    chats, tokenizer = make_run()
    found = TokenizedChats(chats, tokenizer)
    assert len(found) == len(chats)
    for row, chat in enumerate(chats):
        alone = tokenize_chat(chat, tokenizer, for_generation=chat.response is None)
        assert torch.equal(found[row].ids, alone.ids)
        assert found[row].response == alone.response
        assert found.lengths[row] == len(alone.ids)
    assert [one.text for one in found[2:4]] == [found[2].text, found[3].text]
    assert torch.equal(found[-1].ids, found[len(chats) - 1].ids)
    with pytest.raises(IndexError):
        found[len(chats)]


def test_a_chat_that_cannot_be_used_is_named_before_any_is_read():
    chats, tokenizer = make_run()

    def refuse(chat: TokenizedChat) -> None:
        if chat.response is not None:
            raise ValueError("answered already")

    with pytest.raises(ValueError, match="answered already"):
        TokenizedChats(chats, tokenizer, check=refuse)


def test_only_the_last_few_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenized, "REMEMBERED", 2)
    chats, tokenizer = make_run()
    before = count_alive()
    found = TokenizedChats(chats, tokenizer)
    assert [len(one.ids) for one in found] == list(found.lengths)
    assert count_alive() - before == 2
