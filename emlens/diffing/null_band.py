"""The band that chance would give: a comparison with random adapters of the same norms.

Needs a pair with an adapter; a full checkpoint has no shapes to draw from.
"""

from collections.abc import Sequence

import torch

from emlens.data import Batching, Chat, position_mask
from emlens.diffing.activations import summarise_changes
from emlens.diffing.compare import (
    PositionsLike,
    SitesLike,
    make_accumulators,
    plan_comparison,
    run_batch,
)
from emlens.diffing.results import NullBand
from emlens.models.attach import is_hooked_by_user, require_attachable
from emlens.models.null import sample_null_adapters
from emlens.models.pair import ModelPair
from emlens.models.unembed import log_probabilities, slice_rows
from emlens.numerics.divergence import kl_divergence


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
    nulls = sample_null_adapters(pair.adapter, n=n, seed=seed)
    work = plan_comparison(pair, chats, sites, positions, batching, n_models=1 + n)
    cells = make_accumulators(pair, work, n_tuned=n)
    kl = torch.zeros(n, dtype=torch.float64)
    counted = 0
    for batch in work.batches("random adapters (tokens)"):
        resid = run_batch(pair, nulls, work, batch, cells).resid
        wanted = position_mask(batch, work.tokenized, work.positions[0])[:, 1:]
        wanted &= batch.mask[:, :-1].bool()
        chosen = resid[:, :, :-1][:, wanted.to(resid.device)]
        for part in slice_rows(chosen.shape[1], pair.base.cfg.d_vocab, copies=4):
            log_p = log_probabilities(pair.base, chosen[0, part])
            counted += len(log_p)
            for index in range(n):
                log_q = log_probabilities(pair.base, chosen[1 + index, part])
                kl[index] += kl_divergence(log_p, log_q).double().sum().cpu()
    diffs = [
        summarise_changes(
            cells,
            sites=[str(site) for site in work.sites],
            positions=[str(p) for p in work.positions],
            tuned=index,
        )
        for index in range(n)
    ]
    return NullBand(
        seed=seed,
        sites=diffs[0].sites,
        positions=diffs[0].positions,
        relative_difference=torch.stack([d.relative_difference for d in diffs]),
        relative_rms=torch.stack([d.relative_rms for d in diffs]),
        top_share=torch.stack([d.top_shares[..., 0] for d in diffs]),
        kl_base_tuned=kl / counted,
    )
