"""Is the exported folder the model that was studied? Fold, write, read back, compare with both.

For weights alone, without the reading back, use `emlens.models.export.save_checkpoint`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from emlens.artifacts import Result
from emlens.data import Chat, as_chats, load_chats, tokenize_chat
from emlens.interventions import Intervention, fold_into_weights, intervene
from emlens.models.exact import exact_logits, share_exact
from emlens.models.export import save_checkpoint
from emlens.models.loading import load_model
from emlens.models.protocol import HookedModel
from emlens.numerics.divergence import kl_divergence

PROBES = "emlens:open-questions"
"""Chats whose logits are compared."""
N_PROBES = 4
WEIGHTS_TOLERANCE = 2.0**-21
"""Largest difference of a weight read back, of the largest in its tensor. Weights come back bit by
bit; only Gemma's norms, kept as 1 + w in float32 and written as w, are rounded on the way."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest difference of a logit, of the largest one, that is rounding without further question."""
KL_FACTOR = 4.0
"""How much farther than the model under hooks the folder may be from the same model in float64.
Half precision rounds both, each in its own way: the one its weights after the fold, the other its
activations in the hooks: 0.7 to 1.8 was measured on SmolLM2. A fold that is wrong is far
outside."""
KL_FLOOR = 1e-9
"""Nats a token that are nothing."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel(Result):
    """A Hugging Face folder, read back, beside the weights written and the model they are of."""

    kind: ClassVar[str] = "exported_model"

    folder: str
    weights_difference: float
    """Of a weight read back from the one written, of the largest of its tensor."""
    largest_difference: float
    """Of a logit between what was read back and the model under its interventions, over all tokens
    of the probes."""
    largest_logit: float
    tolerance: float | None
    """Largest difference, of the largest logit, that counts as the same; None in half precision,
    where logits tell nothing."""
    kl_folder: float | None
    """KL(float64 || what was read back), nats a token, float64 being the model under its
    interventions in that precision; None where the logits agree, or other weights came back."""
    kl_hooked: float | None
    """KL(float64 || the model under its interventions): what rounding alone makes."""
    same: bool
    """Whether the weights came back, and the logits or the divergences agree."""


def export_model(
    model: HookedModel,
    folder: str | Path,
    *,
    interventions: Sequence[Intervention] = (),
    probes: Sequence[Chat | str] | None = None,
) -> ExportedModel:
    """Write a model with its adapter and interventions in the weights, and read it back.

    What was read back must have the weights that were written, and compute what the model does
    under its interventions: to `TOLERANCES` of the largest logit, or, where that is not met and in
    half precision, as near to the same in float64 as the model itself, within `KL_FACTOR`.

    Args:
        model: loaded by emlens; an attached adapter is merged.
        folder: a new one.
        interventions: folded where that is exact.
        probes: prompts (str) or chats whose logits are compared; by default four open questions.

    Raises:
        FoldError: an intervention that no weights can stand for, or interventions or hooks that
            act on the model already.
        ValueError: no probe at all, a folder in use, or a bias that the Hugging Face class cannot
            hold.
    """
    given: Any = model
    probed = _probe_ids(given, probes)
    written: Any = fold_into_weights(given, interventions)
    path = save_checkpoint(written, folder)
    dtype, device = given.cfg.dtype, given.embed.W_E.device
    again = load_model(path, dtype=dtype, device=device)
    weights = _compare_weights(written, again)
    difference, largest = _compare_logits(given, again, interventions, probed)
    tolerance = TOLERANCES.get(dtype)
    same = tolerance is not None and difference <= tolerance * largest
    kl_folder = kl_hooked = None
    read_back = weights <= WEIGHTS_TOLERANCE and math.isfinite(difference)
    if read_back and not same and dtype != torch.float64:
        kl_folder, kl_hooked = _compare_exact(given, again, interventions, probed)
        same = kl_folder <= KL_FACTOR * kl_hooked + KL_FLOOR
    return ExportedModel(
        folder=str(path),
        weights_difference=weights,
        largest_difference=difference,
        largest_logit=largest,
        tolerance=tolerance,
        kl_folder=kl_folder,
        kl_hooked=kl_hooked,
        same=same and read_back,
    )


def _compare_weights(written: Any, again: Any) -> float:
    """Largest difference of a weight, of the largest of its tensor; infinite beside zeros."""
    theirs = dict(again.named_parameters(remove_duplicate=False))
    gaps = [0.0]
    for name, own in written.named_parameters(remove_duplicate=False):
        if torch.equal(own, theirs[name]):
            continue
        wide = torch.promote_types(own.dtype, torch.float32)
        own, other = own.to(wide), theirs[name].to(wide)
        gap = float((own - other).abs().max() / own.abs().max())
        gaps.append(gap if gap < float("inf") else float("inf"))
    return max(gaps)


@torch.no_grad()
def _compare_logits(
    given: Any, again: Any, interventions: Sequence[Intervention], probed: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """Largest difference of a logit, and the largest logit; NaN where one of them is none."""
    gaps, sizes = [], []
    for ids in probed:
        with intervene(given, tuple(interventions)):
            expected = given(ids).double()
        gaps.append((again(ids).double() - expected).abs().max())
        sizes.append(expected.abs().max())
    return float(torch.stack(gaps).max()), float(torch.stack(sizes).max())


@torch.no_grad()
def _compare_exact(
    given: Any, again: Any, interventions: Sequence[Intervention], probed: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """KL(float64 || what was read back) and KL(float64 || given), nats a token."""
    shell, kept = share_exact(given), tuple(interventions)
    folder, hooked = [], []
    for ids in probed:
        with intervene(shell, kept):
            exact = exact_logits(shell, ids).log_softmax(-1)
        with intervene(given, kept):
            rounded = given(ids).double().log_softmax(-1)
        hooked.append(kl_divergence(exact, rounded).flatten())
        folder.append(kl_divergence(exact, again(ids).double().log_softmax(-1)).flatten())
    return float(torch.cat(folder).mean()), float(torch.cat(hooked).mean())


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
