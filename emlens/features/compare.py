"""Which latents are more or less active in a fine-tune than in its base.

The core takes sums by prompt; the shell fills them in one paired pass. What the difference means,
and whether it causes anything, is not learnt here (`screen_features`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int8, Int64
from scipy import sparse
from torch import Tensor

from emlens.activations import ReadingPlan, plan_reading
from emlens.codecs import SparseCodec
from emlens.data import Batching, Chat
from emlens.features.accumulate import ChangeSums, PromptSums
from emlens.features.health import summarise_health
from emlens.features.reading import accumulate_codes, group_by_prompt, plan_codes
from emlens.features.results import FEWEST_PROMPTS, FeatureDiff
from emlens.models.pair import ModelPair
from emlens.models.reading import identify
from emlens.numerics.false_discovery import adjust_p_values
from emlens.numerics.sign_flips import FLIPS, draw_signs, flip_signs
from emlens.numerics.validation import check_same

_BLOCK_VALUES = 1 << 22
"""Values of a dense [prompt latent] block: 32 MiB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentChanges:
    """What changes from base to tuned, latent by latent; fields as those of `FeatureDiff`."""

    mean_base: Float64[Tensor, " d_sae"]
    """Mean code in the base, over prompts."""
    mean_tuned: Float64[Tensor, " d_sae"]
    """The same in the fine-tune."""
    delta: Float64[Tensor, " d_sae"]
    """The second less the first."""
    prompts_fired: Int64[Tensor, " d_sae"]
    """Prompts on which a latent is active in either."""
    t: Float64[Tensor, " d_sae"]
    """delta over its standard error."""
    p_value: Float64[Tensor, " d_sae"]
    """By flipping signs within prompts; NaN where untested."""
    q_value: Float64[Tensor, " d_sae"]
    """Benjamini-Hochberg over those tested."""
    p_method: Int8[Tensor, " d_sae"]
    """Index into `sign_flips.METHODS`."""


def compare_features(
    pair: ModelPair,
    codec: SparseCodec,
    *,
    chats: Sequence[Chat | str],
    tuned_chats: Sequence[Chat | str] | None = None,
    positions: str | None = None,
    batching: Batching = Batching(),  # noqa: B008 - frozen
    seed: int = 0,
) -> FeatureDiff:
    """Compare the codes of a base and its fine-tune on prompts that elicit the behaviour.

    Args:
        pair: the two models.
        codec: of activations of the base's architecture.
        chats: prompts (str) or chats; both models read them. Responses to one prompt are one unit.
        tuned_chats: with the fine-tune's own responses to the same prompts, `chats` then holding
            the base's: recorded as `responses="own"`, since texts differ then, too.
        positions: which tokens; by default those that the codec was trained on.
        batching: tokens run at once, both models counted.
        seed: of the flipped signs.

    Raises:
        CodecError: the models lack the codec's site, have another width there, or the base is
            another one than it was trained on.
        ValueError: positions that a chat does not have, or prompts in `tuned_chats` that are not
            those of `chats`.

    Source: Wang et al. 2025, Persona features control emergent misalignment, arXiv 2506.19823,
        section 3 (the difference of mean codes).
    Differs: means are over prompts; the tests are ours.
    """
    prompts, names = group_by_prompt(chats)
    plan = plan_codes(pair, codec, chats, positions=positions, batching=batching)
    change: ChangeSums | None = None
    if tuned_chats is None:
        found = accumulate_codes(plan, codec, prompts=prompts, n_prompts=len(names))
        base, tuned = (part.result() for part in found.models)
        change = found.change()
    else:
        others = _match_prompts(names, tuned_chats)
        sides = ((pair.base, chats, prompts), (pair.tuned, tuned_chats, others))
        base, tuned = _read_own(plan, codec, sides, n_prompts=len(names))
    changes = measure_changes(base, tuned, seed=seed)
    mean_difference = average_activations(tuned) - average_activations(base)
    identity = identify(pair)
    return FeatureDiff(
        base=identity.base,
        base_fingerprint=identity.base_fingerprint,
        tuned=pair.tuned_name,
        tuned_fingerprint=identity.tuned_fingerprint,
        adapter_fingerprint=identity.adapter_fingerprint,
        tokenizer_fingerprint=identity.tokenizer_fingerprint,
        dtype=identity.dtype,
        interventions=identity.interventions,
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        site=str(codec.site),
        positions=str(plan.positions[0]),
        responses="same" if tuned_chats is None else "own",
        prompts=names,
        n_prompts=len(names),
        n_tokens=torch.stack([base.n_tokens.sum(), tuned.n_tokens.sum()]),
        **vars(changes),
        n_tested=int((~changes.p_value.isnan()).sum()),
        why_untested=_explain_untested(changes, len(names)),
        frequency_base=base.frequency,
        frequency_tuned=tuned.frequency,
        decoder_cosine=decoder_cosines(codec.W_dec, mean_difference),
        mean_difference=mean_difference,
        flips=FLIPS,
        seed=seed,
        health=summarise_health(plan, codec, (base, tuned), change),
    )


def measure_changes(base: PromptSums, tuned: PromptSums, *, seed: int) -> LatentChanges:
    """Compare mean codes over prompts that both models were read on, with tests and q-values.

    A latent that is active on fewer than `FEWEST_PROMPTS` prompts is not tested.

    Args:
        base: sums of the base; prompt by prompt those of the same prompts as
        tuned: sums of the fine-tune, of the same or other tokens.
        seed: of the flipped signs.

    Raises:
        WidthError: other numbers of prompts or of latents.
    """
    check_same("prompts of tuned", tuned.n_prompts, "prompts of base", base.n_prompts)
    check_same("d_sae of tuned", tuned.d_sae, "d_sae of base", base.d_sae)
    n = base.n_prompts
    sides = [_as_matrix(part) for part in (base, tuned)]
    gap = (sides[1] - sides[0]).tocsc()
    fired = ((sides[0] != 0) + (sides[1] != 0)).tocsc()
    mean_base, mean_tuned, delta = (_sum_columns(x) / n for x in (*sides, gap))
    prompts_fired = torch.from_numpy(np.diff(fired.indptr).astype(np.int64))
    squares = _sum_columns(gap.multiply(gap))
    signs = draw_signs(n, seed=seed)
    p = torch.full((base.d_sae,), torch.nan, dtype=torch.float64)
    method = torch.zeros(base.d_sae, dtype=torch.int8)
    for chosen in _blocks(prompts_fired >= FEWEST_PROMPTS, n):
        flipped = flip_signs(torch.from_numpy(gap[:, chosen.numpy()].toarray()), signs)
        p[chosen], method[chosen] = flipped.p_value, flipped.method
    return LatentChanges(
        mean_base=mean_base,
        mean_tuned=mean_tuned,
        delta=delta,
        prompts_fired=prompts_fired,
        t=_studentise(delta, squares, n),
        p_value=p,
        q_value=adjust_p_values(p),
        p_method=method,
    )


def average_activations(sums: PromptSums) -> Float64[Tensor, " d_in"]:
    """Mean over prompts of the mean activation of each."""
    return (sums.activations / sums.n_tokens[:, None]).mean(0)


def decoder_cosines(
    W_dec: Float[Tensor, "d_sae d_in"], direction: Float[Tensor, " d_in"]
) -> Float64[Tensor, " d_sae"]:
    """Cosine of every decoder vector with a direction; 0 where either has no length.

    Returns:
        On the CPU. They are computed where W_dec lies, which is too large to bring over.
    """
    check_same("width of W_dec", W_dec.shape[1], "width of direction", len(direction))
    wanted = direction.double().to(W_dec.device)
    length = wanted.norm()
    found = []
    for rows in W_dec.detach().split(max(1, _BLOCK_VALUES // W_dec.shape[1])):
        wide = rows.double()
        sizes = wide.norm(dim=1) * length
        found.append(torch.where(sizes > 0, wide @ wanted / sizes, 0.0))
    return torch.cat(found).cpu()


def _read_own(
    plan: ReadingPlan,
    codec: SparseCodec,
    sides: Sequence[tuple[Any, Any, Tensor]],
    *,
    n_prompts: int,
) -> tuple[PromptSums, PromptSums]:
    """Sums of base and tuned, each on its own texts: model, chats and the number of each's prompt.

    A plan of the pair has held the codec against the base; a full fine-tune has other weights.
    """
    where = str(plan.positions[0])
    base, tuned = (
        accumulate_codes(
            plan_reading(model, chats, sites=codec.site, positions=where, batching=plan.batching),
            codec,
            prompts=prompts,
            n_prompts=n_prompts,
        )
        .models[0]
        .result()
        for model, chats, prompts in sides
    )
    return base, tuned


def _as_matrix(sums: PromptSums) -> Any:
    """Mean codes [prompt d_sae], a sparse array; scipy says nothing of their types."""
    places = (sums.prompts.numpy(), sums.latents.numpy())
    shape = (sums.n_prompts, sums.d_sae)
    return sparse.coo_array((sums.mean_codes.numpy(), places), shape=shape).tocsr()


def _sum_columns(x: Any) -> Tensor:
    return torch.from_numpy(np.asarray(x.sum(axis=0), dtype=np.float64).ravel())


def _blocks(wanted: Tensor, n_prompts: int) -> Iterator[Tensor]:
    found = wanted.nonzero()[:, 0]
    if len(found):  # what is empty splits into one part
        yield from found.split(max(1, _BLOCK_VALUES // n_prompts))


def _studentise(mean: Tensor, squares: Tensor, n: int) -> Tensor:
    """Means over their standard errors; 0 where nothing differs, NaN for a prompt alone."""
    if n < 2:
        return torch.full_like(mean, torch.nan)
    variance = (squares - n * mean.square()).clamp(min=0) / (n - 1)
    return torch.where(squares > 0, mean / (variance / n).sqrt(), 0.0)


def _explain_untested(changes: LatentChanges, n_prompts: int) -> str:
    """Why no latent has a p-value; empty where some have."""
    if not bool(changes.p_value.isnan().all()):
        return ""
    if n_prompts < FEWEST_PROMPTS:
        return (
            f"{n_prompts} prompts, {FEWEST_PROMPTS} needed: no p-value of so few would survive "
            "among many latents"
        )
    return f"no latent fires on {FEWEST_PROMPTS} prompts"


def _match_prompts(names: tuple[str, ...], chats: Sequence[Chat | str]) -> Int64[Tensor, " chat"]:
    """Number of each chat's prompt among the base's."""
    own, theirs = group_by_prompt(chats)
    if set(theirs) != set(names):
        raise ValueError(
            f"tuned_chats: {len(set(theirs) - set(names))} of their prompts are not in chats, and "
            f"{len(set(names) - set(theirs))} of those in chats have no response of the fine-tune: "
            "give both models' responses to the same prompts"
        )
    place = {name: number for number, name in enumerate(names)}
    return torch.tensor([place[name] for name in theirs])[own]
