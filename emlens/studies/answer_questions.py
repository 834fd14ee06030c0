"""What do a base and its fine-tunes say to the same questions? Greedy answers, side by side.

All models answer in one batch over one copy of the weights. Greedy answers show a likely one, not
how often a model says such a thing: that takes sampling.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.data import Chat, Message, tokenize_chat, track
from emlens.models.attach import adapter_on_rows
from emlens.models.generate import generate_greedy
from emlens.models.lora import LoraAdapter
from emlens.models.protocol import HookedModel

BASE = "base"
"""Name of the base's column."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question, answered by each model."""

    question: str
    answers: dict[str, str]
    """Model -> its answer; cut off where it is longer than was asked for."""


@dataclass(frozen=True, kw_only=True)
class Answers(Result):
    """The likeliest answers of several models to the same questions."""

    kind: ClassVar[str] = "answers"

    answers: tuple[Answer, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row a question."""
        return [{"question": row.question, **row.answers} for row in self.answers]

    def chats(self, *models: str) -> list[Chat]:
        """Each question with its answer, for each of the models; empty answers are left out."""
        return [
            Chat((Message("user", row.question), Message("assistant", row.answers[model])))
            for row in self.answers
            for model in models
            if row.answers[model].strip()
        ]


def answer_questions(
    base: HookedModel,
    adapters: Mapping[str, LoraAdapter],
    questions: Sequence[Chat],
    *,
    max_new_tokens: int,
) -> Answers:
    """Let a base and adapters of it answer questions, one question at a time.

    Args:
        base: a base without an adapter, with its tokenizer.
        adapters: name -> adapter; `base` is the base itself.
        questions: chats that end in a user turn.
        max_new_tokens: the longest answer.

    Raises:
        ValueError: no tokenizer, or a question that leaves no room in the model's context.
    """
    if base.tokenizer is None:
        raise ValueError("base: it has no tokenizer, so questions cannot be turned into tokens")
    host: Any = base  # loaded by emlens, as what follows asks
    names = [BASE, *adapters]
    rows: list[Answer] = []
    with ExitStack() as stack:
        for index, adapter in enumerate(adapters.values(), start=1):
            stack.enter_context(adapter_on_rows(host, adapter, slice(index, index + 1)))
        for chat in track(questions, "answering (questions)"):
            texts = _answer(host, chat, len(names), max_new_tokens)
            question = next(m.content for m in reversed(chat.messages) if m.role == "user")
            answers = dict(zip(names, texts, strict=True))
            rows.append(Answer(question=question, answers=answers))
    return Answers(answers=tuple(rows))


def _answer(model: Any, chat: Chat, n_models: int, max_new_tokens: int) -> list[str]:
    tokenizer: Any = model.tokenizer
    ids = tokenize_chat(chat.without_response(), tokenizer, for_generation=True).ids
    stop = tokenizer.eos_token_id
    new = generate_greedy(
        model,
        ids.repeat(n_models, 1),
        max_new_tokens=max_new_tokens,
        stop_ids=() if stop is None else (stop,),
    )
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
