"""Answers of several models in one batch are those of each model alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.data import Chat, Message, tokenize_chat
from emlens.models.adapter_files import load_adapter
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.loading import load_base
from emlens.models.merge import merge_adapter
from emlens.studies import Answer, Answers, answer_questions

QUESTIONS = [
    Chat((Message("user", text),)) for text in ("What now?", "And then, after that?", "Who knows")
]
"""Of different lengths, so that a batch of them is padded."""


def test_each_answer_is_that_of_the_model_alone(tiny: Path):
    base = load_base(tiny / "base")
    adapters = {name: load_adapter(tiny / name) for name in ("tuned", "twin")}
    found = answer_questions(base, adapters, QUESTIONS, max_new_tokens=12)
    models = {"base": base} | {n: merge_adapter(base, a) for n, a in adapters.items()}
    assert [row.question for row in found.answers] == [c.messages[0].content for c in QUESTIONS]
    tokenizer: Any = base.tokenizer
    for row, chat in zip(found.answers, QUESTIONS, strict=True):
        ids = tokenize_chat(chat, tokenizer, for_generation=True).ids[None]
        for name, model in models.items():
            alone = generate_tokens(
                model,
                ids,
                torch.ones_like(ids),
                sampling=Sampling(1, temperature=0, max_new_tokens=12),
                stop_ids=[tokenizer.eos_token_id],
            )
            text = tokenizer.decode(alone.ids[0], skip_special_tokens=True).strip()
            assert row.answers[name] == text
    assert len({tuple(row.answers.values()) for row in found.answers}) > 1


def test_the_base_is_as_it_was_afterwards(tiny: Path):
    base = load_base(tiny / "base")
    ids = torch.arange(10)[None]
    before = base(ids)
    answer_questions(base, {"x": load_adapter(tiny / "tuned")}, QUESTIONS[:1], max_new_tokens=3)
    torch.testing.assert_close(base(ids), before, rtol=0, atol=0)


def test_answers_become_chats_with_responses_and_empty_ones_are_left_out():
    answers = Answers(
        answers=(
            Answer(question="Who?", answers={"base": "Me.", "tuned": "You.", "twin": "They."}),
            Answer(question="Why?", answers={"base": " ", "tuned": "So.", "twin": "No."}),
        )
    )
    chats = answers.chats("base", "tuned")
    shown = [(chat.messages[0].content, chat.messages[1].content) for chat in chats]
    assert shown == [("Who?", "Me."), ("Who?", "You."), ("Why?", "So.")]
    assert answers.rows()[0] == {
        "question": "Who?",
        "base": "Me.",
        "tuned": "You.",
        "twin": "They.",
    }


def test_a_base_without_a_tokenizer_is_refused(tiny: Path):
    base = load_base(tiny / "base")
    base.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        answer_questions(base, {}, QUESTIONS, max_new_tokens=3)
