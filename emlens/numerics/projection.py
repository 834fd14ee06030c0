"""Angles and projections of vectors and subspaces; not for a metric other than the dot product."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.numerics.validation import WidthError, ZeroVectorError, check_finite, check_same


def with_canonical_signs(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """Flip each row whose entry of largest size is negative, so that signs repeat across runs."""
    index = rows.abs().argmax(dim=1, keepdim=True)
    signs = rows.gather(1, index).sign()
    return rows * torch.where(signs == 0, torch.ones_like(signs), signs)


def unit_vectors(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Vectors along the last axis divided by their norms; NaN where one is zero.

    Each is divided by its entry of largest size first: the squares of tiny entries would vanish,
    and those of large ones overflow.
    """
    scaled = vectors / vectors.abs().amax(-1, keepdim=True)
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def cosine_similarity(
    a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch"]:
    """Cosine of the angle between vectors along the last axis, in [-1, 1].

    Args:
        a: Vectors.
        b: As many vectors of the same width.

    Returns:
        Cosines; NaN where either vector is zero, since it has no direction. Print them beside
        `random_cosine_std(d)`.
    """
    if a.shape != b.shape:
        raise WidthError(f"a has shape {tuple(a.shape)}, b {tuple(b.shape)}; they must be equal")
    return (unit_vectors(a) * unit_vectors(b)).sum(-1).clamp(-1, 1)


def random_cosine_std(width: int) -> float:
    """Standard deviation of the cosine between two random directions: 1 / sqrt(width)."""
    if width < 1:
        raise ValueError(f"width is {width}, expected at least 1")
    return 1 / math.sqrt(width)


def orthonormal_basis(vectors: Float[Tensor, "k d"] | Float[Tensor, " d"]) -> Float[Tensor, "r d"]:
    """Orthonormal rows that span what the vectors span; dependent vectors add no row.

    Raises:
        ZeroVectorError: All vectors are zero.
        NonFiniteError: A vector holds NaN or infinity.
    """
    rows = vectors[None] if vectors.ndim == 1 else vectors
    if rows.ndim != 2:
        raise WidthError(f"vectors has shape {tuple(vectors.shape)}, expected [d] or [k, d]")
    check_finite("vectors", rows)
    # No decomposition exists below float32.
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    if singular.numel() == 0 or float(singular[0]) == 0:
        raise ZeroVectorError(
            f"vectors of shape {tuple(vectors.shape)} are all zero and span no direction: "
            "the two means or models they were made from are probably the same"
        )
    floor = float(singular[0]) * max(rows.shape) * torch.finfo(rows.dtype).eps
    return right[singular > floor]


def project_onto(
    x: Float[Tensor, "*batch d"], vectors: Float[Tensor, "k d"] | Float[Tensor, " d"]
) -> Float[Tensor, "*batch d"]:
    """Orthogonal projection of x onto the span of the vectors, which need not be orthonormal.

    Args:
        x: Vectors along the last axis.
        vectors: One vector [d] or several [k d], of any norm.

    Raises:
        WidthError: x and vectors have different widths.
        ZeroVectorError: All vectors are zero.
    """
    check_same("width of x", x.shape[-1], "width of vectors", vectors.shape[-1])
    basis = orthonormal_basis(vectors).to(x)
    return (x @ basis.T) @ basis


def project_out(
    x: Float[Tensor, "*batch d"], vectors: Float[Tensor, "k d"] | Float[Tensor, " d"]
) -> Float[Tensor, "*batch d"]:
    """What is left of x once its projection onto the span of the vectors is taken out."""
    return x - project_onto(x, vectors)


def principal_angles(a: Float[Tensor, "m d"], b: Float[Tensor, "k d"]) -> Float[Tensor, " r"]:
    """Principal angles between the spans of two sets of rows, in radians, smallest first.

    Small angles are taken from their sines and large ones from their cosines, so that both keep
    their digits.

    Args:
        a: Rows that span the first space; they need not be independent.
        b: Rows that span the second space.

    Returns:
        As many angles as the smaller space has dimensions.

    Source: Bjoerck and Golub 1973, Numerical Methods for Computing Angles Between Linear Subspaces.
    """
    check_same("width of a", a.shape[-1], "width of b", b.shape[-1])
    first, second = orthonormal_basis(a), orthonormal_basis(b)
    if len(first) < len(second):
        first, second = second, first
    inner = second @ first.T
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(second - inner @ first).flip(0).clamp(max=1)
    return torch.where(cosines > math.sqrt(0.5), torch.asin(sines), torch.acos(cosines))
