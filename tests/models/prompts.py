"""Prompts, keys and calls for tests of generation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emlens.models import generate as loop
from emlens.models.generate import Generated, Sampling, generate_tokens
from emlens.numerics.counter import derive_key
from tests.models.tiny import make_ids

LENGTHS = (9, 4, 7, 1)


def greedy(steps: int) -> Sampling:
    return Sampling(1, temperature=0, max_new_tokens=steps)


def keys_of(n: int) -> Tensor:
    return torch.tensor([derive_key("row", row) for row in range(n)])


def pad_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts; what stands at the padding is noise, to show that nobody looks at it."""
    ids = make_ids(len(lengths), max(lengths), seed=seed)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, -n:] = 1
    return ids, mask


def continue_equal(model: Any, ids: Tensor, steps: int, **settings: Any) -> Generated:
    return generate_tokens(model, ids, torch.ones_like(ids), sampling=greedy(steps), **settings)


def stack(found: Generated) -> Tensor:
    return torch.stack(found.ids)


def record_logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen = []
    compute = loop.compute_logits

    def watch(model: Any, resid: Tensor) -> Tensor:
        seen.append(compute(model, resid))
        return seen[-1].clone()

    monkeypatch.setattr(loop, "compute_logits", watch)
    return seen
