"""The right answer: Hugging Face's logits and tokens on the same weights, up to rounding.

Checked before anything is timed.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

EXACT = 1e-5
"""Rounding of float32 logits, as a part of the largest."""
NEAR_TIE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Gap of two logits, as a part of the largest, below which either may come out on top."""


class Reference:
    """Hugging Face's logits of some ids, as they come and one precision up.

    In float32 an answer is right within `EXACT` of the largest; where that fails, as in bfloat16,
    if its error is at most twice that which Hugging Face itself makes.

    Args:
        hf: the model; hooks on it act.
        ids: tokens [batch pos].
    """

    def __init__(self, hf: PreTrainedModel, ids: Tensor) -> None:
        self.hf, self.ids = hf, ids
        self.logits = self._run()

    @torch.inference_mode()
    def _run(self) -> Tensor:
        return self.hf(self.ids, use_cache=False).logits

    @cached_property
    def exact(self) -> Tensor:
        """The logits one precision up: in float64, or in float32 for half precision."""
        finer = torch.float64 if self.logits.dtype == torch.float32 else torch.float32
        with computed_in(self.hf, finer):
            return self._run()

    def check(self, logits: Tensor, *, what: str) -> None:
        """Require these logits.

        Raises:
            AssertionError: they differ by more; timing something else is no use.
        """
        with torch.inference_mode():
            if logits.dtype == torch.float32:
                gap = float((logits - self.logits).abs().max() / self.logits.abs().max())
                if gap <= EXACT:
                    return
            size = self.exact.norm()
            gap = float((logits.to(self.exact.dtype) - self.exact).norm() / size)
            own = float((self.logits.to(self.exact.dtype) - self.exact).norm() / size)
        if not gap <= 2 * own:
            raise AssertionError(
                f"{what}: logits differ by {gap:.2g}, at most {2 * own:.2g} allowed"
            )


def check_logits(logits: Tensor, hf: PreTrainedModel, ids: Tensor, *, what: str) -> None:
    """Require Hugging Face's logits; see `Reference`, for more than one answer."""
    Reference(hf, ids).check(logits, what=what)


@contextmanager
def computed_in(hf: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Run a model in a finer precision, each part widened while it runs.

    So that beside the model one block lies in memory, and not a second model of twice its size.
    """
    inner: Any = hf.base_model
    parts = [inner.get_input_embeddings(), *inner.layers, inner.norm, hf.get_output_embeddings()]
    with ExitStack() as stack:
        for part in parts:
            part.forward = _widened(part, dtype)
            stack.callback(part.__dict__.pop, "forward")
        yield


def _widened(part: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    def forward(*args: Any, **given: Any) -> Any:
        wide = copy.deepcopy(part)
        del wide.forward
        return wide.to(dtype).forward(*args, **given)  # hooks of the part itself run around this

    return forward


@torch.inference_mode()
def check_tokens(ours: Tensor, theirs: Tensor, hf: PreTrainedModel, ids: Tensor) -> None:
    """Require equal greedy tokens, or a first difference at which Hugging Face sees a near-tie.

    Raises:
        AssertionError: a row that leaves Hugging Face's where it had a clear favourite.
    """
    if ours.shape != theirs.shape:
        raise AssertionError(f"tokens {tuple(ours.shape)}, Hugging Face {tuple(theirs.shape)}")
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        differs = (mine != other).nonzero()
        if not len(differs):
            continue
        at = int(differs[0])
        before = torch.cat([ids[row], other[:at]])[None]
        logits = hf(before, use_cache=False).logits[0, -1].float()
        gap = float(logits[other[at]] - logits[mine[at]]) / float(logits.abs().max())
        if gap > NEAR_TIE[hf.dtype]:
            raise AssertionError(f"row {row} leaves Hugging Face's tokens at {at}, gap {gap:.2g}")
