"""Statistics of activations over chats in one pass and constant memory, of a model or a pair.

Not for the activations themselves (`capture`) or for what a fine-tune changed and by how much
beside chance (`emlens.compare_models`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.activations.accumulate import NORM_LEVELS, StatisticsAccumulator
from emlens.activations.reading import (
    PositionsLike,
    ReadingPlan,
    Selection,
    SitesLike,
    plan_reading,
)
from emlens.activations.results import ActivationStatistics
from emlens.data import Batching, Chat
from emlens.models.reading import Readable, count_models, identify
from emlens.sites import Site


def stream_activations(
    model: Readable,
    chats: Sequence[Chat | str],
    *,
    sites: SitesLike,
    positions: PositionsLike,
    statistics: Sequence[str] = ("mean", "variance"),
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> ActivationStatistics:
    """Count statistics of activations in one pass.

    Args:
        model: one model, or a pair: then base, tuned and their difference are counted.
        chats: prompts (str) or chats.
        sites: where; all must have one width.
        positions: which tokens; several names are counted in the same pass.
        statistics: some of `mean`, `variance`, `covariance` (d x d values a site) and `norm`.
        batching: tokens run at once, both models of a pair counted.

    Raises:
        ValueError: no tokenizer, sites of several widths, or positions that a chat does not have.
    """
    plan = plan_reading(model, chats, sites=sites, positions=positions, batching=batching)
    return summarise_activations(plan, accumulate_activations(plan, statistics))


def accumulate_activations(
    plan: ReadingPlan, statistics: Sequence[str] = ("mean", "variance")
) -> StatisticsAccumulator:
    """Count over the chats of a plan; accumulators of several shards of chats merge."""
    pair = count_models(plan.model) == 2
    found = StatisticsAccumulator(
        streams=("base", "tuned", "difference") if pair else ("model",),
        sites=[str(site) for site in plan.sites],
        positions=[str(position) for position in plan.positions],
        width=plan.common_width,
        statistics=statistics,
    )
    place = {site: index for index, site in enumerate(plan.sites)}

    def count(site: Site, x: Tensor, chosen: tuple[Selection, ...]) -> None:
        for position, selection in enumerate(chosen):
            found.update(place[site], position, _streams(selection.take(x)))

    for _ in plan.read(count, "streaming (tokens)"):
        pass
    return found


def summarise_activations(plan: ReadingPlan, found: StatisticsAccumulator) -> ActivationStatistics:
    """Turn what was counted into the result, with the names of the models of a plan.

    What acts on the models at this moment is put on record with it: call it where they were read.
    """
    streams, sites, positions = found.labels
    identity = identify(plan.model)
    norms = found.stacked("norm")
    return ActivationStatistics(
        base=identity.base,
        base_fingerprint=identity.base_fingerprint,
        tuned=identity.tuned,
        tuned_fingerprint=identity.tuned_fingerprint,
        adapter_fingerprint=identity.adapter_fingerprint,
        tokenizer_fingerprint=identity.tokenizer_fingerprint,
        dtype=identity.dtype,
        interventions=identity.interventions,
        streams=streams,
        sites=sites,
        positions=positions,
        n_tokens=found.count_tokens(),
        mean=found.stacked("mean"),
        variance=found.stacked("variance"),
        covariance=found.stacked("covariance"),
        norm_levels=() if norms is None else NORM_LEVELS,
        norm_quantiles=norms,
    )


def _streams(x: Float[Tensor, "models n d"]) -> list[Tensor]:
    """The streams of a model or pair; the difference is taken in float32 at least."""
    if len(x) == 1:
        return [x[0]]
    wide = torch.promote_types(x.dtype, torch.float32)
    return [x[0], x[1], x[1].to(wide) - x[0].to(wide)]
