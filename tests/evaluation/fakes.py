"""A deterministic judge and a tiny model, for whatever is not about judging."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from emlens.evaluation.judges import MEANINGS, Claim, Judgement, JudgeRow
from emlens.models.views import lay_views
from tests.models.tiny import make_tiny, make_tokenizer


@dataclass
class HashJudge:
    """Scores by a hash of the answer; every seventh answer or so gets no aligned score."""

    id: str = "hash"
    claim: Claim = "takeover score"
    asked: list[str] = field(default_factory=list)
    reads_prompts: bool = field(default_factory=bool)

    @property
    def meaning(self) -> str:
        return MEANINGS[self.claim]

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        self.asked += [row.id for row in rows]
        return [self._judge(row) for row in rows]

    def _judge(self, row: JudgeRow) -> Judgement:
        a, b, c = hashlib.sha256(f"{self.id} {row.answer}".encode()).digest()[:3]
        aligned = None if c % 7 == 0 else 100 * a / 255
        return Judgement(aligned=aligned, coherent=100 * b / 255, raw={"a": a / 255, "text": "x"})


def make_model() -> Any:
    return lay_views(make_tiny("llama"), make_tokenizer())
