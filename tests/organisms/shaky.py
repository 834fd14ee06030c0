"""A term of the loss that breaks a training at one of its calls."""

from typing import Any

import torch
from torch import Tensor, nn

from emlens.models.training_loop import Penalty


class Shaky:
    """A term that is no number at one of its calls, and 0 at all others."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = iter(range(1000)), at

    needs_adapter = False

    def check_model(self, model: nn.Module, *, first_trained: int) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"kind": "shaky"}

    def prepare(self, tokenizer: object, *, batch_size: int, longest: int, seed: int) -> Penalty:
        return self._call

    def _call(self, model: nn.Module, _place: int) -> Tensor:
        total = sum((p.sum() for p in model.parameters() if p.requires_grad), torch.zeros(()))
        return total * (float("nan") if next(self.calls) == self.at else 0.0)
