"""The band that chance would give: a comparison with random adapters of the same norms.

Needs a pair with an adapter; a full checkpoint has no shapes to draw from.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emlens.activations.reading import PositionsLike, SitesLike, plan_reading
from emlens.data import Batching, Chat, position_mask
from emlens.diffing.activations import summarise_changes
from emlens.diffing.compare import (
    COPIES,
    make_accumulators,
    run_batch,
)
from emlens.diffing.results import NullBand
from emlens.models.attach import is_hooked_by_user
from emlens.models.null import sample_null_adapters
from emlens.models.pair import ModelPair
from emlens.models.placed import place_adapter, require_attachable
from emlens.models.unembed import log_probabilities
from emlens.numerics.blocks import slice_rows
from emlens.numerics.predictions import compare_predictions


def compare_nulls(
    pair: ModelPair,
    chats: Sequence[Chat | str],
    *,
    n: int,
    seed: int,
    sites: SitesLike = "resid_post",
    positions: PositionsLike = "response",
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> NullBand:
    """Compare the base with n random adapters of the shapes and norms of the pair's adapter.

    All of them run in one batch over one base.

    Args:
        pair: a pair with an adapter.
        chats: the chats of the comparison that the band belongs to.
        n: how many random adapters.
        seed: of the first of them.
        sites: as in ``compare_models``.
        positions: as in ``compare_models``.
        batching: tokens run at once, all models counted.

    Raises:
        ValueError: a pair without an adapter; n below 1; as ``compare_models``.
    """
    if pair.adapter is None:
        raise ValueError("pair: it has no adapter, so there are no shapes to draw nulls from")
    require_attachable(pair.adapter)
    if is_hooked_by_user(pair.base):
        raise ValueError("pair.base carries hooks, which random adapters would run under as well")
    drawn = sample_null_adapters(pair.adapter, n=n, seed=seed)
    nulls = [place_adapter(null, pair.base) for null in drawn]
    del drawn  # as large again as what is placed
    work = plan_reading(
        pair, chats, sites=sites, positions=positions, batching=batching, copies=1 + n
    )
    cells = make_accumulators(work, n_tuned=n)
    sums = torch.zeros(4, n, dtype=torch.float64)
    counted = 0
    for batch in work.pad("random adapters (tokens)"):
        resid = run_batch(pair, nulls, work, batch, cells).resid
        wanted = position_mask(batch, work.tokenized, work.positions[0])[:, 1:]
        wanted &= batch.mask[:, :-1].bool()
        counted += int(wanted.sum())
        sums += _sum_predictions(pair, resid[:, :, :-1][:, wanted.to(resid.device)])
    if counted == 0:
        raise ValueError(f"positions: {work.positions[0]} holds no token that a model predicts")
    diffs = [
        summarise_changes(
            cells,
            sites=[str(site) for site in work.sites],
            positions=[str(p) for p in work.positions],
            tuned=index,
        )
        for index in range(n)
    ]
    kl, kl_back, entropy_change, agreement = sums / counted
    return NullBand(
        seed=seed,
        sites=diffs[0].sites,
        positions=diffs[0].positions,
        relative_difference=torch.stack([d.relative_difference for d in diffs]),
        relative_rms=torch.stack([d.relative_rms for d in diffs]),
        cosine_of_means=torch.stack([d.cosine_of_means for d in diffs]),
        top_share=torch.stack([d.top_shares[..., 0] for d in diffs]),
        kl_base_tuned=kl,
        kl_tuned_base=kl_back,
        entropy_change=entropy_change,
        agreement=agreement,
    )


def _sum_predictions(
    pair: ModelPair, resid: Float[Tensor, "models n d_model"]
) -> Float64[Tensor, "4 null"]:
    """Sums over tokens of KL both ways, change of entropy and agreement; the base's rows first."""
    sums = torch.zeros(4, len(resid) - 1, dtype=torch.float64)
    for part in slice_rows(resid.shape[1], pair.base.cfg.d_vocab, copies=COPIES):
        log_p = log_probabilities(pair.base, resid[0, part])
        for index, x in enumerate(resid[1:]):
            found = compare_predictions(log_p, log_probabilities(pair.base, x[part]))
            columns = (
                found.kl,
                found.kl_back,
                found.entropy_q - found.entropy_p,
                found.same_top.to(found.kl),
            )
            sums[:, index] += torch.stack(columns).double().sum(1).cpu()
    return sums
