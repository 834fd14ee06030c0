"""What vectors have in common with directions and with what a LoRA writes, beside random ones.

In 5,000 dimensions a cosine of .04 is three standard deviations of chance, in 24 one of .6 is:
no cosine is told here without what a random vector would have.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.numerics.projection import orthonormal_basis, random_cosine_std, unit_vectors
from emlens.sites import Site
from emlens.vectors import Direction


@dataclass(frozen=True, kw_only=True)
class VectorCosine:
    """How far a vector lies along something else."""

    name: str
    """Site, construction and note of a direction, or the module of an adapter."""
    cosine: float
    """With one vector, signed; with the span of several, the norm of the unit vector's projection
    onto it."""
    dimensions: int
    """Of the span; 1 for one vector."""
    random: float
    """Root mean square of the same for random vectors: sqrt(dimensions / width)."""


def compare_with_directions(
    vectors: Float[Tensor, "n d"], directions: Sequence[Direction], *, site: Site
) -> list[tuple[VectorCosine, ...]]:
    """Cosines of each vector with each direction.

    Args:
        vectors: none of them zero.
        directions: at sites whose entries mean the same: of the same axes and width.
        site: of the vectors.

    Raises:
        ValueError: a direction at a site of other axes, or of another width.
    """
    width, units = vectors.shape[1], unit_vectors(vectors.double())
    found: list[list[VectorCosine]] = [[] for _ in vectors]
    for own in directions:
        if own.site.axes != site.axes or own.width != width:
            raise ValueError(
                f"directions: one at {own.site} has axes {own.site.axes} and {own.width} entries, "
                f"and the codec's vectors at {site} have {site.axes} and {width}: their entries "
                "mean different things"
            )
        note = f" ({own.provenance.note})" if own.provenance.note else ""
        name = f"{own.site} {own.provenance.construction}{note}"
        cosines = (units @ own.direction.to(units)).clamp(-1, 1)
        for row, cosine in zip(found, cosines.tolist(), strict=True):
            row.append(_make(name, cosine, 1, width))
    return [tuple(row) for row in found]


def compare_with_writes(
    vectors: Float[Tensor, "n d"], writes: Iterable[tuple[str, Float[Tensor, "rank d"]]]
) -> list[tuple[VectorCosine, ...]]:
    """How far each vector lies in what each module of an adapter writes.

    Args:
        vectors: none of them zero.
        writes: name and write vectors of each module; one vector has a sign, a span has none.
    """
    width, units = vectors.shape[1], unit_vectors(vectors.double())
    found: list[list[VectorCosine]] = [[] for _ in vectors]
    for name, rows in writes:
        if len(rows) == 1:
            along, dimensions = units @ unit_vectors(rows.double())[0], 1
        else:
            basis = orthonormal_basis(rows.double())
            along, dimensions = torch.linalg.vector_norm(units @ basis.mT, dim=1), len(basis)
        for row, cosine in zip(found, along.clamp(-1, 1).tolist(), strict=True):
            row.append(_make(name, cosine, dimensions, width))
    return [tuple(row) for row in found]


def _make(name: str, cosine: float, dimensions: int, width: int) -> VectorCosine:
    random = math.sqrt(dimensions) * random_cosine_std(width)
    return VectorCosine(name=name, cosine=cosine, dimensions=dimensions, random=random)
