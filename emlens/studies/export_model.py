"""Is the exported folder the model that was studied? Fold, write, read back, compare logits.

For weights alone, without the reading back, use `emlens.models.export.save_checkpoint`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from emlens.artifacts import Result
from emlens.data import Chat, as_chats, load_chats, tokenize_chat
from emlens.interventions import Intervention, fold_into_weights, intervene
from emlens.models.export import save_checkpoint
from emlens.models.loading import load_model
from emlens.models.protocol import HookedModel

PROBES = "emlens:open-questions"
"""Chats whose logits are compared."""
N_PROBES = 4
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of a logit, of the largest one; half precision rounds the fold."""
HALF_TOLERANCE = 0.05
"""In half precision the two round differently: the folder's weights after the fold, the model's
activations in its hooks. Passing says that the folder was read back as it was meant, not which of
the two is nearer to the exact model."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel(Result):
    """A Hugging Face folder, and how near its logits are to those of the model it was made from."""

    kind: ClassVar[str] = "exported_model"

    folder: str
    largest_difference: float
    """Of a logit, over all tokens of the probes."""
    largest_logit: float
    tolerance: float
    """Largest difference, of the largest logit, that counts as the same."""
    same: bool


def export_model(
    model: HookedModel,
    folder: str | Path,
    *,
    interventions: Sequence[Intervention] = (),
    probes: Sequence[Chat | str] | None = None,
) -> ExportedModel:
    """Write a model with its adapter and interventions in the weights, and read it back.

    Args:
        model: loaded by emlens; an attached adapter is merged.
        folder: a new one.
        interventions: folded where that is exact.
        probes: prompts (str) or chats whose logits are compared; by default four open questions.

    Raises:
        FoldError: an intervention that no weights can stand for.
        ValueError: no probe at all, a folder in use, or a bias that the Hugging Face class cannot
            hold.
    """
    given: Any = model
    probed = _probe_ids(given, probes)
    written = fold_into_weights(given, interventions) if interventions else given
    path = save_checkpoint(written, folder)
    again = load_model(path, dtype=str(given.cfg.dtype).removeprefix("torch."))
    difference, largest = 0.0, 0.0
    for ids in probed:
        with torch.no_grad(), intervene(given, tuple(interventions)):
            expected = given(ids).double()
        with torch.no_grad():
            got = again(ids).double()
        difference = max(difference, float((got - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    tolerance = TOLERANCES.get(given.cfg.dtype, HALF_TOLERANCE)
    return ExportedModel(
        folder=str(path),
        largest_difference=difference,
        largest_logit=largest,
        tolerance=tolerance,
        same=difference <= tolerance * largest,
    )


def _probe_ids(model: Any, probes: Sequence[Chat | str] | None) -> list[torch.Tensor]:
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(model.cfg.d_vocab, (1, 16), generator=generator)]
    chats = load_chats(PROBES, limit=N_PROBES) if probes is None else as_chats(probes)
    found = [
        tokenize_chat(chat.without_response(), model.tokenizer, for_generation=True).ids
        for chat in chats
    ]
    return [ids[None, : model.cfg.n_ctx] for ids in found]
