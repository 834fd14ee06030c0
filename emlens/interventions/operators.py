"""What an intervention does to the values at a site; where and on which tokens is said elsewhere.

Add and Ablate are affine and can become weights; Cap, Shift and Replace depend on the value or on
another run and cannot.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.numerics.affine import LowRankAffine, ablation, compose, translation
from emlens.numerics.projection import unit_vectors
from emlens.numerics.validation import WidthError, ZeroVectorError, check_finite, check_same
from emlens.sites import Site, SiteError

Side = Literal["above", "below"]


@dataclass(frozen=True, eq=False)
class Add:
    """x + coefficient * vector."""

    vector: Float[Tensor, " d"]
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        _check_vector("vector", self.vector)
        if not math.isfinite(self.coefficient):
            raise ValueError(f"coefficient: got {self.coefficient}, expected a finite number")

    @property
    def width(self) -> int:
        """Entries of the vectors it acts on."""
        return len(self.vector)


@dataclass(frozen=True, eq=False)
class Ablate:
    """x - v^ (v^ . x), v^ the unit vector; with `toward`, x - v^ (v^ . (x - toward))."""

    vector: Float[Tensor, " d"]
    """Of any norm but zero."""
    toward: Float[Tensor, " d"] | None = None
    """A mean activation, whose component along the vector every x is given."""

    def __post_init__(self) -> None:
        _check_vector("vector", self.vector)
        if not bool(self.vector.any()):
            raise ZeroVectorError("vector: it is zero and has no direction to take out")
        if self.toward is not None:
            _check_vector("toward", self.toward)
            check_same("toward's width", len(self.toward), "the vector's", len(self.vector))

    @property
    def width(self) -> int:
        """Entries of the vectors it acts on."""
        return len(self.vector)


@dataclass(frozen=True, eq=False)
class Cap:
    """Keep v^ . x from passing a threshold: x - relu(v^ . x - threshold) v^, or its mirror image.

    `above` takes away what lies above the threshold, `below` adds what is missing below it.
    """

    vector: Float[Tensor, " d"]
    """Of any norm but zero."""
    threshold: float
    """In activation units, along the unit vector."""
    side: Side

    def __post_init__(self) -> None:
        _check_vector("vector", self.vector)
        if not bool(self.vector.any()):
            raise ZeroVectorError("vector: it is zero and has no direction to cap")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold: got {self.threshold}, expected a finite number")
        if self.side not in ("above", "below"):
            raise ValueError(f"side: got {self.side!r}, expected 'above' or 'below'")

    @property
    def width(self) -> int:
        """Entries of the vectors it acts on."""
        return len(self.vector)


@dataclass(frozen=True, eq=False)
class Replace:
    """x becomes a given value: the same everywhere, or each token's own from another run."""

    values: Float[Tensor, " d"] | Float[Tensor, "rows text d"]
    """One vector; or for each row of the run, and each token of its unpadded text, its own."""

    def __post_init__(self) -> None:
        if self.values.ndim not in (1, 3) or not self.values.numel():
            raise WidthError(
                f"values: got shape {tuple(self.values.shape)}, expected [d], or [rows, text, d] "
                "with heads counted together"
            )
        check_finite("values", self.values)

    @property
    def width(self) -> int:
        """Entries of the vectors it acts on."""
        return self.values.shape[-1]


@dataclass(frozen=True, eq=False)
class Shift:
    """x + a(x) * vector, with a(x) one number a token that is computed from the token's value.

    For what is read of x along another vector than is written, or not linearly: such as the code of
    a latent, which is held by moving x along what the latent writes.
    """

    vector: Float[Tensor, " d"]
    amount: Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]]
    """a, called with the values of the tokens that it is to act on, in float32 at least."""
    name: str
    """What `amount` computes, in full: of two operators with one vector it says whether they are
    the same."""

    def __post_init__(self) -> None:
        _check_vector("vector", self.vector)
        if not self.name:
            raise ValueError("name: got an empty text; expected what the amount is computed by")

    @property
    def width(self) -> int:
        """Entries of the vectors it acts on."""
        return len(self.vector)


Affine = Add | Ablate
Operator = Add | Ablate | Cap | Replace | Shift


@dataclass(frozen=True, eq=False)
class PerLayer:
    """One operator for the sites of each block; those of block 0 also act on the embeddings."""

    operators: Mapping[int, Operator]
    """Layer -> operator."""

    def __post_init__(self) -> None:
        if not self.operators:
            raise ValueError("operators: got none, expected one a layer")

    def at(self, site: Site) -> Operator:
        """Return the operator for a site.

        Raises:
            SiteError: no operator for the site's layer, or a site after the last block.
        """
        layer = 0 if site.stream in ("embed", "pos_embed") else site.layer
        if layer is None or layer not in self.operators:
            raise SiteError(
                f"{site}: no direction for it; there is one for the layers "
                f"{', '.join(map(str, sorted(self.operators)))}. Fit directions at every layer, "
                "name fewer sites, or give one direction for all"
            )
        return self.operators[layer]


def as_affine(operators: Sequence[Affine]) -> LowRankAffine:
    """Fuse operators, in the order given, into one map in float64.

    Neighbouring ablations act as one: what is left has no component along any of their vectors,
    and their order does not matter. An addition after an ablation stays; before, it is ablated too.

    Raises:
        ConflictingTargetsError: parallel vectors moved toward different values.
    """
    maps: list[LowRankAffine] = []
    for ablates, group in groupby(operators, lambda item: isinstance(item, Ablate)):
        members = list(group)
        if ablates:
            maps.append(_joint_ablation([item for item in members if isinstance(item, Ablate)]))
        else:
            maps += [
                translation(item.vector.double() * item.coefficient)
                for item in members
                if isinstance(item, Add)
            ]
    return compose(maps)


def _joint_ablation(members: Sequence[Ablate]) -> LowRankAffine:
    vectors = torch.stack([item.vector.double().cpu() for item in members])
    if all(item.toward is None for item in members):
        return ablation(vectors)
    targets = [
        0.0 if item.toward is None else float(unit(item.vector) @ item.toward.double().cpu())
        for item in members
    ]
    return ablation(vectors, torch.tensor(targets, dtype=torch.float64))


def unit(vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The direction of a vector, in float64 on the CPU."""
    return unit_vectors(vector.double().cpu())


def _check_vector(name: str, vector: Tensor) -> None:
    if vector.ndim != 1 or not len(vector):
        raise WidthError(f"{name}: got shape {tuple(vector.shape)}, expected [d]: one vector")
    check_finite(name, vector)
