"""Low-rank affine maps of the values at one place; not for changes that depend on thresholds.

y -> y + (y V) U^T + c. Adding a vector (rank 0), projecting directions out and moving them to a
given value are such maps, and so is any sequence of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emlens.numerics.projection import orthonormal_basis, unit_vectors
from emlens.numerics.validation import WidthError, ZeroVectorError, check_finite, check_same

NEARLY_DEPENDENT = 1e-6
"""Singular value, of the largest, from which unit vectors are independent: one vector, rounded to
float32, is not two. Two values for both would be reached by an enormous shift only."""
MISSED = 1e-5
"""How far from a value a component may end, of the largest value: that of rounded vectors."""


class ConflictingTargetsError(ValueError):
    """Dependent directions are to be moved to values that no vector has at once."""


@dataclass(frozen=True, eq=False)
class LowRankAffine:
    """y -> y + (y V) U^T + c for row vectors y.

    Raises:
        WidthError: factors of different shapes.
        NonFiniteError: NaN or infinity.
    """

    U: Float[Tensor, "d k"]
    """What is written, a column for each of the k numbers read."""
    V: Float[Tensor, "d k"]
    """What is read."""
    c: Float[Tensor, " d"]
    """What is added whatever is read."""

    def __post_init__(self) -> None:
        if self.U.ndim != 2 or self.U.shape != self.V.shape or self.c.shape != self.U.shape[:1]:
            raise WidthError(
                f"U has shape {tuple(self.U.shape)}, V {tuple(self.V.shape)}, c "
                f"{tuple(self.c.shape)}; expected [d, k], [d, k] and [d]"
            )
        check_finite("U, V or c", self.U, self.V, self.c)

    @property
    def width(self) -> int:
        """Entries of the vectors it maps."""
        return len(self.c)

    @property
    def rank(self) -> int:
        """Numbers read: columns of U and V, dependent ones included."""
        return self.U.shape[1]

    @cached_property
    def _shifts(self) -> bool:
        return bool(self.c.any())

    @cached_property
    def _writes(self) -> Tensor:
        """U^T, and c as a last row where it is not zero: read with a constant 1."""
        # A tensor made in inference mode could not be used under gradients later.
        with torch.inference_mode(False):
            columns = torch.cat([self.U, self.c[:, None]], dim=1) if self._shifts else self.U
            return columns.mT.contiguous()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "LowRankAffine":
        """The same map elsewhere or in another precision."""
        return LowRankAffine(*(t.to(device, dtype) for t in (self.U, self.V, self.c)))

    def apply(
        self, y: Float[Tensor, "*batch d"], where: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """Map vectors along the last axis; y itself stays as it was.

        Half precision is computed in float32 and rounded once: a direction taken out of a vector
        that mostly lies along it would otherwise leave a remainder of the size of what is left.

        Args:
            y: values.
            where: which of them to map; all by default.
        """
        check_same("y's last axis", y.shape[-1], "the width of the map", self.width)
        wide = torch.promote_types(y.dtype, torch.float32)
        # Read at every hook of every pass: what is in place already is not moved again.
        placed = self.c.dtype == wide and self.c.device == y.device
        map_ = self if placed else self.to(y.device, wide)
        if wide == y.dtype:
            return map_._map(y, where)
        widened = y.to(wide)
        # A copy of our own is written to, unless autograd follows anything that goes into it.
        read = (widened, map_.U, map_.V, map_.c)
        followed = torch.is_grad_enabled() and any(t.requires_grad for t in read)
        out = None if followed else widened
        return map_._map(widened, where, out=out).to(y.dtype)

    def _map(self, y: Tensor, where: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        """One pass that reads and one that writes, into a tensor of its own unless one is given."""
        if self.rank == 0:
            if where is None:
                return torch.add(y, self.c, out=out)
            return torch.addcmul(y, where[..., None].to(y.dtype), self.c, out=out)
        read = y @ self.V
        if self._shifts:
            read = torch.nn.functional.pad(read, (0, 1), value=1.0)
        if where is not None:
            read = read * where[..., None]
        writes = self._writes
        if len(writes) == 1:
            return torch.addcmul(y, read, writes[0], out=out)
        flat = torch.addmm(y.reshape(-1, self.width), read.reshape(-1, len(writes)), writes)
        return flat.view(y.shape)

    def then(self, after: "LowRankAffine") -> "LowRankAffine":
        """The one map that does this and afterwards the other.

        y1 = y + (y V1) U1^T + c1 put into y1 + (y1 V2) U2^T + c2 reads V2 + V1 (U1^T V2) of y and
        c1 V2 of nothing.
        """
        check_same("the other map's width", after.width, "this map's", self.width)
        V = torch.cat([self.V, after.V + self.V @ (self.U.mT @ after.V)], dim=1)
        c = self.c + after.U @ (self.c @ after.V) + after.c
        return LowRankAffine(torch.cat([self.U, after.U], dim=1), V, c)

    def compress(self) -> "LowRankAffine":
        """The same map with as few columns as it needs, those of V orthonormal.

        U V^T is decomposed through two thin QR factorisations; the [d, d] product is never formed.
        """
        Q_u, R_u = torch.linalg.qr(self.U)
        Q_v, R_v = torch.linalg.qr(self.V)
        left, singular, right = torch.linalg.svd(R_u @ R_v.mT)
        # Relative to the factors, not to the product: two maps that undo each other leave rank 0.
        size = torch.linalg.matrix_norm(R_u) * torch.linalg.matrix_norm(R_v)
        kept = singular > size * self.width * torch.finfo(singular.dtype).eps
        return LowRankAffine(
            Q_u @ (left[:, kept] * singular[kept]), Q_v @ right.mT[:, kept], self.c
        )

    def fold_into(
        self, W: Float[Tensor, "d_in d"], b: Float[Tensor, " d"]
    ) -> tuple[Float[Tensor, "d_in d"], Float[Tensor, " d"]]:
        """Weights W', b' with x W' + b' equal to this map of x W + b, rounded once.

        A table of vectors (an embedding) is folded as `fold_into(table, zeros)`; b' then belongs
        to every row.
        """
        check_same("W's last axis", W.shape[-1], "the width of the map", self.width)
        check_same("b's width", len(b), "the width of the map", self.width)
        wide = torch.promote_types(W.dtype, torch.float32)
        U, V, c = (t.to(W.device, wide) for t in (self.U, self.V, self.c))
        W_wide, b_wide = W.to(wide), b.to(wide)
        folded = torch.addmm(W_wide, W_wide @ V, U.mT)
        return folded.to(W.dtype), (b_wide + U @ (b_wide @ V) + c).to(b.dtype)


def compose(maps: Sequence[LowRankAffine]) -> LowRankAffine:
    """The one map that does all of them in order, compressed.

    Raises:
        ValueError: no map.
        WidthError: maps of different widths.
    """
    if not maps:
        raise ValueError("maps: got none, expected at least one")
    whole = maps[0]
    for after in maps[1:]:
        whole = whole.then(after)
    return whole.compress()


def translation(vector: Float[Tensor, " d"]) -> LowRankAffine:
    """Add a vector: y -> y + vector, in float64."""
    none = vector.new_zeros((len(vector), 0), dtype=torch.float64)
    return LowRankAffine(none, none, vector.double())


def ablation(
    vectors: Float[Tensor, "k d"], values: Float[Tensor, " k"] | None = None
) -> LowRankAffine:
    """Move the components along vectors to given values, and nothing orthogonal to them.

    y -> y - (y Q) Q^T + m with Q an orthonormal basis of the vectors' span and m the vector of
    that span whose component along each vector has its value; m = 0 without values. In float64.

    Args:
        vectors: of any norm, one or several, which need not be orthogonal or independent.
        values: v^ . y afterwards, for each vector; zeros by default.

    Raises:
        ZeroVectorError: a vector is zero.
        NonFiniteError: NaN or infinity.
        ConflictingTargetsError: dependent vectors with values that contradict each other.
    """
    check_finite("vectors", vectors)
    zero = ~vectors.any(dim=1)
    if bool(zero.any()):
        raise ZeroVectorError(
            f"vectors: {int(zero.sum())} of {len(vectors)} are zero and have no direction: "
            "the two means they were made from are the same there"
        )
    units = unit_vectors(vectors.double())
    Q = orthonormal_basis(units).mT
    if values is None:
        return LowRankAffine(-Q, Q, units.new_zeros(units.shape[1]))
    check_same("values' length", len(values), "the number of vectors", len(vectors))
    wanted = values.to(units)
    c = torch.linalg.pinv(units, rtol=NEARLY_DEPENDENT) @ wanted
    if float((units @ c - wanted).abs().max()) > MISSED * float(wanted.abs().max()):
        raise ConflictingTargetsError(
            f"values: no vector has the components {wanted.tolist()} along these directions at "
            "once; some of them are parallel or dependent, with different values"
        )
    return LowRankAffine(-Q, Q, c)
