"""Spectra, norms and overlaps of products B @ A without forming them; not for full-rank matrices.

Everything is computed in float64: the factors are thin, and norms of near-cancelling products need
the digits.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emlens.numerics.projection import principal_angles, with_canonical_signs
from emlens.numerics.validation import check_finite, check_matrix, check_same


@dataclass(frozen=True, kw_only=True)
class LowRankSvd:
    """Thin singular value decomposition U diag(S) Vh of a product B @ A.

    Attributes:
        U: Left singular vectors as columns, the largest entry of each positive.
        S: Singular values, largest first.
        Vh: Right singular vectors as rows.
    """

    U: Float64[Tensor, "d_out k"]
    S: Float64[Tensor, " k"]
    Vh: Float64[Tensor, "k d_in"]

    def numerical_rank(self) -> int:
        """Number of singular values above the rounding of the largest."""
        size = max(self.U.shape[0], self.Vh.shape[1])
        floor = float(self.S[0]) * size * torch.finfo(torch.float64).eps
        return int(self.S.gt(floor).sum())


def svd_product(B: Float[Tensor, "d_out rank"], A: Float[Tensor, "rank d_in"]) -> LowRankSvd:
    """Singular value decomposition of B @ A through QR of B and A^T and the SVD of a small core.

    Args:
        B: Matrix [d_out rank] that writes.
        A: Matrix [rank d_in] that reads.

    Returns:
        The min(d_out, rank, d_in) leading singular triples; the vectors of zero singular values are
        orthonormal but otherwise arbitrary.

    Raises:
        WidthError: The inner sizes of B and A differ.
        NonFiniteError: B or A holds NaN or infinity.
    """
    left, core, right = _factored(B, A)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    U = left @ u
    flipped = with_canonical_signs(U.T).T
    signs = torch.where((flipped * U).sum(0) < 0, -1.0, 1.0).to(U)
    return LowRankSvd(U=flipped, S=s, Vh=(vh @ right.T) * signs[:, None])


def frobenius_norm_product(B: Float[Tensor, "d_out rank"], A: Float[Tensor, "rank d_in"]) -> float:
    """Frobenius norm of B @ A; accurate also where columns of B nearly cancel."""
    _, core, _ = _factored(B, A)
    return float(torch.linalg.matrix_norm(core))


def inner_product(
    B1: Float[Tensor, "d_out rank1"],
    A1: Float[Tensor, "rank1 d_in"],
    B2: Float[Tensor, "d_out rank2"],
    A2: Float[Tensor, "rank2 d_in"],
) -> float:
    """Frobenius inner product of B1 @ A1 and B2 @ A2, the sum of (B1^T B2) * (A1 A2^T)."""
    _check_factors(B1, A1)
    _check_factors(B2, A2)
    check_same("rows of B2", B2.shape[0], "rows of B1", B1.shape[0])
    check_same("columns of A2", A2.shape[1], "columns of A1", A1.shape[1])
    return float(((B1.double().T @ B2.double()) * (A1.double() @ A2.double().T)).sum())


def write_overlap(
    B1: Float[Tensor, "d_out rank1"],
    A1: Float[Tensor, "rank1 d_in"],
    B2: Float[Tensor, "d_out rank2"],
    A2: Float[Tensor, "rank2 d_in"],
) -> Float64[Tensor, " k"]:
    """Cosines of the principal angles between what two products can write, largest first.

    A 1 is a direction that both write; for random spaces of ranks r1 and r2 the mean of the squared
    cosines is max(r1, r2) / d_out.

    Returns:
        As many cosines as the smaller write space has dimensions; none if a product is zero.
    """
    check_same("rows of B2", B2.shape[0], "rows of B1", B1.shape[0])
    first, second = _write_space(B1, A1), _write_space(B2, A2)
    if len(first) == 0 or len(second) == 0:
        return first.new_zeros(0)
    return principal_angles(first, second).cos()


def _write_space(B: Tensor, A: Tensor) -> Tensor:
    """Orthonormal rows [k d_out] that span the columns of B @ A."""
    svd = svd_product(B, A)
    return svd.U[:, : svd.numerical_rank()].T


def _check_factors(B: Tensor, A: Tensor) -> None:
    check_matrix("B", B)
    check_matrix("A", A)
    check_same("columns of B", B.shape[1], "rows of A", A.shape[0])
    if 0 in (*B.shape, *A.shape):
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} must not have an empty axis")
    check_finite("B", B)
    check_finite("A", A)


def _factored(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns, a small core and orthonormal columns with B @ A = left core right^T."""
    _check_factors(B, A)
    left, upper = torch.linalg.qr(B.detach().double())
    right, other = torch.linalg.qr(A.detach().double().T)
    return left, upper @ other.T, right
