"""What do a base and its fine-tunes say to the same questions? Greedy answers, side by side.

All models answer several questions in one batch, over one copy of the weights. A greedy answer is
a likely one; how often a model says such a thing takes sampling.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.data import Batch, Chat, Message, pad_batch, tokenize_chat, track
from emlens.models.attach import adapter_on_rows
from emlens.models.generate import Sampling, generate_tokens, stop_tokens
from emlens.models.lora import LoraAdapter
from emlens.models.protocol import HookedModel
from emlens.models.tokenizer_needs import require_tokenizer

BASE = "base"
"""Name of the base's column."""
GROUP = 8
"""Questions in a batch, each asked of every model."""


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
    """Let a base and adapters of it answer questions.

    Args:
        base: a base without an adapter, with its tokenizer.
        adapters: name -> adapter; `base` is the base itself.
        questions: chats that end in a user turn.
        max_new_tokens: the longest answer.

    Raises:
        ValueError: no tokenizer, or a question that leaves no room in the model's context.
    """
    tokenizer: Any = require_tokenizer(base.tokenizer, "base: it")
    prompts = [
        tokenize_chat(chat.without_response(), tokenizer, for_generation=True) for chat in questions
    ]
    texts: dict[int, dict[str, str]] = {}
    groups = _group_by_length([len(prompt.ids) for prompt in prompts])
    for group in track(groups, "answering (questions)", sizes=map(len, groups)):
        found = _answer(base, adapters, pad_batch(prompts, group, pad_id=0), max_new_tokens)
        for place, index in enumerate(group):
            texts[index] = {name: rows[place] for name, rows in found.items()}
    return Answers(
        answers=tuple(
            Answer(question=_last_question(chat), answers=texts[index])
            for index, chat in enumerate(questions)
        )
    )


def _group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Places of rows of about equal length, longest first, at most `GROUP` together."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + GROUP] for start in range(0, len(order), GROUP)]


def _last_question(chat: Chat) -> str:
    return next(m.content for m in reversed(chat.messages) if m.role == "user")


def _answer(
    base: Any, adapters: Mapping[str, LoraAdapter], batch: Batch, max_new_tokens: int
) -> dict[str, list[str]]:
    """Texts by model: the questions of all models are the rows of one batch, model by model."""
    n, models = len(batch.rows), 1 + len(adapters)
    with ExitStack() as stack:
        for index, adapter in enumerate(adapters.values(), start=1):
            rows = slice(index * n, (index + 1) * n)
            stack.enter_context(adapter_on_rows(base, adapter, rows))
        new = generate_tokens(
            base,
            batch.ids.repeat(models, 1),
            batch.mask.repeat(models, 1),
            sampling=Sampling(1, temperature=0, max_new_tokens=max_new_tokens),
            stop_ids=stop_tokens(base),
            rows=batch.rows * models,
        )
    texts = [base.tokenizer.decode(row, skip_special_tokens=True).strip() for row in new.ids]
    return {name: texts[i * n : (i + 1) * n] for i, name in enumerate([BASE, *adapters])}
