"""How well a codec fits the activations of a model, or of a base and its fine-tune.

Before any search among latents: what a codec does not reconstruct, no latent can show.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from emlens.activations import ReadingPlan
from emlens.codecs import SparseCodec
from emlens.data import Batching, Chat
from emlens.features.accumulate import ChangeSums, PromptSums
from emlens.features.reading import accumulate_codes, group_by_prompt, plan_codes
from emlens.features.results import SaeHealth, is_underpowered
from emlens.models.reading import Readable, count_models, identify
from emlens.numerics.intervals import Interval, cluster_t


def check_sae(
    model: Readable,
    codec: SparseCodec,
    *,
    chats: Sequence[Chat | str],
    positions: str | None = None,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> SaeHealth:
    """Measure explained variance, firing and dead latents of a codec in one pass.

    Args:
        model: a pair, or one model.
        codec: the codec.
        chats: prompts (str) or chats; of a pair both models read the same tokens.
        positions: which tokens; by default those that the codec was trained on.
        batching: tokens run at once, both models of a pair counted.

    Raises:
        CodecError: the model lacks the codec's site, has another width there, or is another one
            than it was trained on.
        ValueError: positions that a chat does not have.
    """
    plan = plan_codes(model, codec, chats, positions=positions, batching=batching)
    prompts, names = group_by_prompt(chats)
    found = accumulate_codes(plan, codec, prompts=prompts, n_prompts=len(names), keep_codes=False)
    sums = [part.result() for part in found.models]
    return summarise_health(plan, codec, sums, found.change())


def summarise_health(
    plan: ReadingPlan,
    codec: SparseCodec,
    sums: Sequence[PromptSums],
    change: ChangeSums | None,
) -> SaeHealth:
    """Turn what was counted into the result, with the names of the models of a plan.

    Args:
        plan: by which was read.
        codec: the codec.
        sums: of each model, base first.
        change: of a pair that read the same tokens.
    """
    identity = identify(plan.model)
    explained = torch.stack([explain_variance(part) for part in sums])
    pair = count_models(plan.model) == 2
    explained_change = compare_explained(*sums) if pair else None
    return SaeHealth(
        base=identity.base,
        base_fingerprint=identity.base_fingerprint,
        tuned=identity.tuned,
        tuned_fingerprint=identity.tuned_fingerprint,
        adapter_fingerprint=identity.adapter_fingerprint,
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        architecture=codec.architecture,
        site=str(codec.site),
        positions=str(plan.positions[0]),
        same_base=(
            None
            if codec.base_fingerprint is None
            else codec.base_fingerprint == identity.base_fingerprint
        ),
        streams=("base", "tuned") if pair else ("model",),
        n_prompts=sums[0].n_prompts,
        n_tokens=torch.stack([part.n_tokens.sum() for part in sums]),
        explained_variance=explained,
        l0=torch.stack([part.frequency.sum() for part in sums]),
        dead_share=torch.stack([(part.firings == 0).double().mean() for part in sums]),
        captured_share=None if change is None else capture_share(change),
        explained_change=explained_change,
        underpowered=is_underpowered(explained),
        worse_on_tuned=None if explained_change is None else explained_change.high < 0,
    )


def explain_variance(sums: PromptSums) -> Float64[Tensor, ""]:
    """1 - sum |x - reconstruction|^2 / sum |x - mean x|^2; NaN where x does not vary."""
    return _explain(
        sums.missed.sum(), sums.squares.sum(), sums.activations.sum(0), sums.n_tokens.sum()
    )


def capture_share(change: ChangeSums) -> float | None:
    """Share of the squared change that the change of the reconstructions captures.

    None where nothing changed; negative where the reconstructions change otherwise than the
    activations do.
    """
    total = float(change.squares.sum())
    return 1 - float(change.missed.sum()) / total if total else None


def compare_explained(base: PromptSums, tuned: PromptSums) -> Interval | None:
    """Explained variance of tuned less base's, with a jackknife interval over prompts.

    Each prompt is left out of both in turn; Student's t over the pseudo-values. None where there is
    one prompt, or where leaving one out leaves nothing that varies.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 11.5
        (pseudo-values).
    """
    value = float(explain_variance(tuned) - explain_variance(base))
    n = base.n_prompts
    without = _explain_without(tuned) - _explain_without(base)
    if n < 2 or not bool(without.isfinite().all()):
        return None
    spread = cluster_t((n * value - (n - 1) * without).numpy())
    half = spread.high - spread.value
    return dataclasses.replace(
        spread,
        value=value,
        low=value - half,
        high=value + half,
        method=f"jackknife over {n} prompts",
    )


def _explain(missed: Tensor, squares: Tensor, total: Tensor, n: Tensor) -> Tensor:
    """Explained variance from sums over tokens; leading axes are separate sets of tokens."""
    around = squares - total.square().sum(-1) / n
    return torch.where(around > 0, 1 - missed / around, torch.nan)


def _explain_without(sums: PromptSums) -> Tensor:
    """Explained variance with each prompt left out in turn."""
    return _explain(
        sums.missed.sum() - sums.missed,
        sums.squares.sum() - sums.squares,
        sums.activations.sum(0) - sums.activations,
        sums.n_tokens.sum() - sums.n_tokens,
    )
