"""Signatures of fine-tunes fitted under many labellings at once, and tried on models left out.

Tensors in; `classify` meets the comparisons. Each labelling is treated exactly like the true one,
its own latents chosen, so that a permutation test counts the choice.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from emlens.numerics.auc import area_under_curve
from emlens.numerics.intervals import Interval

RELABELLINGS = 1_000
"""Random relabellings where there are more of them: a p-value of .05 is then known to .007."""
RESAMPLES = 2_000
"""Bootstrap samples behind the interval of an area."""
_VALUES = 1 << 21
"""Values of a [labelling d_sae] block: 16 MiB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """Models that are told apart together, and those by which."""

    name: str
    """The domain left out."""
    test: Int64[Tensor, " test"]
    """Numbers of the models told apart."""
    train: Int64[Tensor, " train"]
    """Numbers of the models by which latents and weights are chosen."""


def fit_signatures(
    deltas: Float64[Tensor, "model d_sae"],
    labels: Bool[Tensor, "labelling model"],
    *,
    n_latents: int,
    latents: Int64[Tensor, " latent"] | None = None,
) -> tuple[Int64[Tensor, "labelling latent"], Float64[Tensor, "labelling latent"]]:
    """Choose latents and weights under each labelling: a diagonal linear discriminant.

    Latents are those with the largest |m_1 - m_0| / (s + s_0), m_1 and m_0 the mean deltas of the
    two kinds, s their pooled standard deviation and s_0 its median over latents that vary, so that
    a latent that hardly varies does not win by rounding. Weights are (m_1 - m_0) / (s + s_0)^2.

    Source: Tusher et al. 2001, Proc. Natl. Acad. Sci. 98, 5116 (s_0).

    Args:
        deltas: of the models to choose by.
        labels: which of them are misaligned, in each labelling.
        n_latents: how many to choose.
        latents: used instead.
    """
    found: list[tuple[Tensor, Tensor]] = []
    pool = deltas if latents is None else deltas[:, latents]
    squares = pool.square().sum(0)
    for part in labels.double().split(max(1, _VALUES // pool.shape[1])):
        n1 = part.sum(1, keepdim=True)
        n0 = part.shape[1] - n1
        m1, m0 = part @ pool / n1, (1 - part) @ pool / n0
        within = squares - n1 * m1.square() - n0 * m0.square()
        s = (within.clamp(min=0) / (part.shape[1] - 2)).sqrt()
        s = s + s.where(s > 0, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num(nan=1.0)
        distance = (m1 - m0) / s
        if latents is None:
            chosen = distance.abs().topk(n_latents, dim=1).indices
        else:
            chosen = torch.arange(len(latents)).expand(len(part), -1)
        weights = (distance / s).gather(1, chosen)
        found.append((chosen if latents is None else latents[chosen], weights))
    return torch.cat([one for one, _ in found]), torch.cat([weights for _, weights in found])


def score_held_out(
    deltas: Float64[Tensor, "model d_sae"],
    labels: Bool[Tensor, "labelling model"],
    folds: Sequence[Fold],
    *,
    n_latents: int,
    latents: Int64[Tensor, " latent"] | None = None,
) -> tuple[Float64[Tensor, "labelling model"], Int64[Tensor, "labelling fold latent"]]:
    """Score the models of each fold by what the others say; NaN for models in no fold."""
    scores = torch.full(labels.shape, torch.nan, dtype=torch.float64)
    used = []
    for fold in folds:
        chosen, weights = fit_signatures(
            deltas[fold.train], labels[:, fold.train], n_latents=n_latents, latents=latents
        )
        # [labelling test latent]: few latents, few models.
        values = deltas[fold.test][:, chosen].transpose(0, 1)
        scores[:, fold.test] = (values * weights[:, None]).sum(2)
        used.append(chosen)
    return scores, torch.stack(used, dim=1)


def area_in_folds(
    scores: Float64[Tensor, "labelling model"],
    labels: Bool[Tensor, "labelling model"],
    folds: Sequence[Fold],
) -> Float64[Tensor, " labelling"]:
    """Share of pairs of one fold, one model of each kind, of which the misaligned scores higher.

    Equal scores count half.
    """
    won = torch.zeros(len(scores), dtype=torch.float64)
    pairs = torch.zeros_like(won)
    for fold in folds:
        own, kind = scores[:, fold.test], labels[:, fold.test]
        both = kind[:, :, None] & ~kind[:, None, :]
        gap = own[:, :, None] - own[:, None, :]
        won += (both * (0.5 * gap.sign() + 0.5)).sum((1, 2))
        pairs += both.sum((1, 2))
    return won / pairs


def deal_labels(
    labels: Bool[Tensor, " model"], folds: Sequence[Fold], *, seed: int
) -> tuple[Bool[Tensor, "labelling model"], bool]:
    """The true labels, then others with as many misaligned models in each fold.

    Returns:
        The labellings, and whether they are all there are (then each comes once).
    """
    ways = [math.comb(len(fold.test), int(labels[fold.test].sum())) for fold in folds]
    if math.prod(ways) <= RELABELLINGS:
        found = [labels.clone()]
        options = [
            list(itertools.combinations(fold.test.tolist(), int(labels[fold.test].sum())))
            for fold in folds
        ]
        for picks in itertools.product(*options):
            other = _relabel(labels, folds, [n for pick in picks for n in pick])
            if not torch.equal(other, labels):
                found.append(other)
        return torch.stack(found), True
    generator = torch.Generator().manual_seed(seed)
    found = [labels.clone()]
    for _ in range(RELABELLINGS):
        other = labels.clone()
        for fold in folds:
            order = torch.randperm(len(fold.test), generator=generator)
            other[fold.test] = labels[fold.test][order]
        found.append(other)
    return torch.stack(found), False


def bootstrap_area(
    scores: Float64[Tensor, " model"],
    labels: Bool[Tensor, " model"],
    folds: Sequence[Fold],
    *,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """The area with a bootstrap interval: folds are drawn, then models of each kind within them.

    Latents and weights are kept. Where no resample differs, as when all pairs are won, that proves
    nothing: the limits are then Newcombe's score limits of as many models.
    """
    value = float(area_in_folds(scores[None], labels[None], folds)[0])
    generator = torch.Generator().manual_seed(seed)
    # [fold resample]: pairs won and pairs there are.
    won, pairs = zip(
        *(_resample_fold(scores[f.test], labels[f.test], generator) for f in folds), strict=True
    )
    drawn = torch.randint(len(folds), (len(folds), RESAMPLES), generator=generator)
    areas = torch.stack(won).gather(0, drawn).sum(0) / torch.tensor(pairs)[drawn].sum(0)
    low, high = (float(torch.quantile(areas, q)) for q in ((1 - level) / 2, (1 + level) / 2))
    if low == high:
        told = torch.cat([labels[fold.test] for fold in folds])
        n, m = int(told.sum()), int((~told).sum())
        limits = area_under_curve([0.0] * m, [1.0] * n, level=level)
        width = limits.value - limits.low
        low, high = max(0.0, value - width), min(1.0, value + width)
        method = f"Newcombe's score limits of {n} and {m} models: no resample differs"
        return Interval(value, low, high, level, method)
    method = f"bootstrap of {len(folds)} folds and their models, {RESAMPLES} resamples"
    return Interval(value, min(low, value), max(high, value), level, method)


def _resample_fold(
    scores: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Pairs won in resamples of a fold's models of each kind, and how many pairs there are."""
    kinds = []
    for kind in (labels, ~labels):
        own = scores[kind]
        kinds.append(own[torch.randint(len(own), (RESAMPLES, len(own)), generator=generator)])
    gap = kinds[0][:, :, None] - kinds[1][:, None, :]
    return (0.5 * gap.sign() + 0.5).sum((1, 2)), gap.shape[1] * gap.shape[2]


def _relabel(labels: Tensor, folds: Sequence[Fold], misaligned: Sequence[int]) -> Tensor:
    other = labels.clone()
    for fold in folds:
        other[fold.test] = False
    other[list(misaligned)] = True
    return other
