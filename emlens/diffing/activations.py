"""Streaming differences of activations: base moments and a sketch of the change, by site.

Tensors in, ``ActivationDiff`` out; the shell that meets the models is ``compare``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.diffing.results import ActivationDiff
from emlens.numerics.moments import MomentsAccumulator
from emlens.numerics.sketch import CovarianceSketch, TopDirections

SKETCH_RANK = 32
"""Test vectors of a sketch: an exact covariance at every site would be 10 GB at 14B."""
NO_CHANGE = 32
"""Relative change up to which a site does not differ, in eps of the precision compared in; in
shared layers the change is exactly 0."""
TOP = 4
"""Leading directions kept."""


class SiteDifferences:
    """Accumulates, for one site and one set of positions, base moments and n models' changes.

    Args:
        width: values at one position.
        n_tuned: models compared with the base.
    """

    def __init__(self, width: int, n_tuned: int):
        self.base = MomentsAccumulator(width)
        self.changes = [CovarianceSketch(width, rank=SKETCH_RANK) for _ in range(n_tuned)]
        self.eps = 0.0
        """Of the precision compared in: float32, or float64 where the activations have it."""

    def update(
        self, x: Float[Tensor, "models batch pos ..."], index: Int[Tensor, " n"] | None
    ) -> None:
        """Take in one site's activations, base first.

        Args:
            x: of all models.
            index: places of the tokens that count, rows laid end to end; None for all of them.
        """
        flat = x.flatten(1, 2)
        chosen = (flat if index is None else flat.index_select(1, index)).flatten(2)
        base = chosen[0].float() if chosen.dtype.itemsize < 4 else chosen[0]
        self.base.update(base)
        self.eps = max(self.eps, torch.finfo(base.dtype).eps)
        for sketch, tuned in zip(self.changes, chosen[1:], strict=True):
            sketch.update(tuned.to(base.dtype) - base)


def summarise_changes(
    accumulators: Sequence[Sequence[SiteDifferences]],
    *,
    sites: Sequence[str],
    positions: Sequence[str],
    tuned: int = 0,
) -> ActivationDiff:
    """Turn accumulators [site position] into the result for one of the models compared.

    Args:
        accumulators: one for each site and positions.
        sites: labels of the first axis, in the model's order.
        positions: labels of the second axis.
        tuned: which of the models.
    """
    bases = [[cell.base.result() for cell in row] for row in accumulators]
    changes = [[cell.changes[tuned].moments() for cell in row] for row in accumulators]
    tops = [[cell.changes[tuned].result() for cell in row] for row in accumulators]
    mean_base = _stack(bases, lambda m: m.mean)
    change = _stack(changes, lambda m: m.mean)
    mean_tuned = mean_base + change
    root = _stack(bases, lambda m: _scalar(m.mean_square_norm)).sqrt()
    moved = _stack(changes, lambda m: _scalar(m.mean_square_norm)).sqrt()
    norm = change.norm(dim=-1)
    relative_rms = _ratio(moved, root)
    eps = _stack(accumulators, lambda cell: _scalar(cell.eps))
    differs = (relative_rms > NO_CHANGE * eps).any(dim=1)
    return ActivationDiff(
        sites=tuple(sites),
        positions=tuple(positions),
        n_tokens=torch.tensor([m.count for m in bases[0]]),
        mean_base=mean_base,
        mean_tuned=mean_tuned,
        difference_norm=norm,
        relative_difference=_ratio(norm, root),
        relative_rms=relative_rms,
        cosine_of_means=torch.cosine_similarity(mean_base, mean_tuned, dim=-1),
        top_directions=_stack(tops, _directions),
        top_shares=_stack(tops, _shares),
        first_differing_site=next((s for s, d in zip(sites, differs, strict=True) if d), None),
    )


def _stack(cells: Sequence[Sequence[Any]], value: Callable[[Any], Tensor]) -> Tensor:
    return torch.stack([torch.stack([value(cell).cpu() for cell in row]) for row in cells])


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Top / bottom, 0 where both are."""
    return torch.where(top == 0, torch.zeros_like(top), top / bottom)


def _directions(top: TopDirections) -> Tensor:
    kept = top.directions[:TOP]
    missing = TOP - len(kept)
    return torch.cat([kept, kept.new_zeros(missing, kept.shape[1])]) if missing else kept


def _shares(top: TopDirections) -> Tensor:
    kept = top.shares[:TOP]
    return torch.cat([kept, kept.new_zeros(TOP - len(kept))])
