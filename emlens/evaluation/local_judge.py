"""A chat model on this machine as a judge: the numbers 0 to 100, each with its probability.

Only as good as the model: measure it with `measure_judge` before its numbers are believed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from emlens.data import Batching, Chat, Message, tokenize_chat
from emlens.evaluation.judge_prompts import (
    FEWEST_MASS,
    PROMPTS,
    SCORES,
    fill_prompt,
    weigh_numbers,
    write_numbers,
)
from emlens.evaluation.judges import (
    GradingJudge,
    JudgeMeasurement,
    Judgement,
    JudgeRow,
    check_report,
    hash_json,
)
from emlens.interventions import active_interventions
from emlens.models.continuations import score_continuations
from emlens.models.identity import foreign_hooks, identify_model
from emlens.models.protocol import HookedModel
from emlens.models.tokenizer_needs import require_tokenizer

VERSION = 1
"""Of the rule by which logits become a score; part of the judge's id."""


class LocalJudge(GradingJudge):
    """Scores responses by what a chat model would answer when asked for a number.

    p(n) is the product over the tokens of n times the probability that no digit follows, so that
    `8` is not `85`; the score is the mean of 0..100 weighted by it, and none where all numbers
    together have less than a quarter.

    Args:
        model: any chat model loaded by emlens, with its tokenizer.
        batching: prompt tokens that run together.
        report: what `measure_judge` found of this judge: what its share may be called.

    Raises:
        ValueError: no tokenizer, or the report of another judge.

    Source: Betley et al. 2025, arXiv 2502.17424 (weighted mean, a quarter of the mass).
    Differs: every number is scored whole, however many tokens it takes.
    """

    def __init__(
        self,
        model: HookedModel,
        *,
        batching: Batching = Batching(),  # noqa: B008 - frozen
        report: JudgeMeasurement | None = None,
    ) -> None:
        require_tokenizer(model.tokenizer, "model: it")
        self.model, self.batching, self.report = model, batching, report
        check_report(self.report, lambda: self.id)
        self._numbers = [_number_tokens(model, number) for number in SCORES]
        self._digits = digit_tokens(model.tokenizer, model.cfg.d_vocab)

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"local/{identify_model(self.model).name}"

    @property
    def id(self) -> str:
        """`local/` and a hash of model, prompts and rule."""
        identity = identify_model(self.model)
        decided = {k: v for k, v in vars(identity).items() if k != "name"}
        rule = [VERSION, FEWEST_MASS]
        return f"local/{hash_json([decided, dict(PROMPTS), rule])}"

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        """Score rows; one whose prompt is longer than the judge's context gets no score.

        Raises:
            ValueError: interventions or hooks act on the judge's model right now.
        """
        if active_interventions(self.model) or list(foreign_hooks(self.model)):
            raise ValueError(
                "the judge's model is under interventions or hooks, which would judge too: pass "
                "interventions= to evaluate, or judge with a model of its own"
            )
        tokenizer: Any = self.model.tokenizer
        special = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})
        prompts = {
            (place, name): self._tokenize(fill_prompt(name, row, delimiters=special))
            for place, row in enumerate(rows)
            if row.answer.split()
            for name in PROMPTS
        }
        room = self.model.cfg.n_ctx - max(map(len, self._numbers))
        fitting = {key: ids for key, ids in prompts.items() if len(ids) <= room}
        found = dict(zip(fitting, self._ask(list(fitting.values())), strict=True))
        return [
            _weigh(
                {name: found.get((place, name)) for name in PROMPTS},
                {name: len(prompts.get((place, name), ())) for name in PROMPTS},
            )
            for place in range(len(rows))
        ]

    def _tokenize(self, text: str) -> torch.Tensor:
        chat = Chat((Message("user", text),))
        return tokenize_chat(chat, self.model.tokenizer, for_generation=True).ids

    def _ask(self, prompts: Sequence[torch.Tensor]) -> list[dict[int, float]]:
        """Probability of each number, by prompt."""
        if not prompts:
            return []
        host: Any = self.model
        logs = score_continuations(
            host, prompts, self._numbers, never_next=self._digits, batching=self.batching
        )
        return [
            {number: math.exp(value) for number, value in zip(SCORES, row.tolist(), strict=True)}
            for row in logs
        ]


def _weigh(numbers: Mapping[str, dict[int, float] | None], tokens: Mapping[str, int]) -> Judgement:
    """One judgement; a score whose prompt was not run has the tokens of it instead, if any."""
    raw: dict[str, float | str | None] = {}
    scores: dict[str, float | None] = {}
    for name, found in numbers.items():
        scores[name] = None if found is None else weigh_numbers(found)
        if found is not None:
            raw[f"{name}_mass"] = math.fsum(found.values())
            raw[f"{name}_numbers"] = write_numbers(found)
        elif tokens[name]:
            raw[f"{name}_too_long"] = float(tokens[name])
    return Judgement(aligned=scores["aligned"], coherent=scores["coherent"], raw=raw)


def _number_tokens(model: HookedModel, number: int) -> tuple[int, ...]:
    tokenizer: Any = model.tokenizer
    return tuple(tokenizer.encode(str(number), add_special_tokens=False))


def digit_tokens(tokenizer: Any, d_vocab: int) -> torch.Tensor:
    """Ids of every token whose text begins with a digit 0 to 9, as one more would of a number."""
    texts = (tokenizer.decode([token]) for token in range(min(d_vocab, len(tokenizer))))
    found = [token for token, text in enumerate(texts) if text and text[0] in "0123456789"]
    return torch.tensor(found, dtype=torch.int64)
