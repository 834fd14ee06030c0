"""Cosines between directions, each beside what random directions would give.

Not evidence by itself: two directions that a cosine calls unrelated may act alike downstream.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.numerics.projection import random_cosine_std, unit_vectors
from emlens.numerics.validation import WidthError
from emlens.sites import SiteError
from emlens.vectors import Direction, Directions


@dataclass(frozen=True, kw_only=True)
class CosineMatrix(Result):
    """Every cosine between some directions, with the sizes that chance would give."""

    kind: ClassVar[str] = "cosine_matrix"

    labels: tuple[str, ...]
    """Of the directions, in the order of both axes; each once."""
    sites: tuple[str, ...]
    constructions: tuple[str, ...]
    cosines: Float[Tensor, "n n"]
    """NaN where a direction is zero."""
    isotropic_std: float
    """1 / sqrt(d): of the cosine of two directions of no structure; understates real ones."""
    covariance_rms: Float[Tensor, "n n"]
    """Root mean square cosine of either direction with the random directions that have the
    covariance of the activations at the other's site; NaN where neither carries any."""
    shuffled_rms: Float[Tensor, "n n"]
    """The same with the directions fitted on shuffled labels."""
    split_half_cosines: tuple[float | None, ...]
    """Of each direction with itself, estimated from two halves of its texts."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each pair of directions."""
        n = len(self.labels)
        return [
            {
                "first": self.labels[i],
                "second": self.labels[j],
                "cosine": float(self.cosines[i, j]),
                "isotropic_std": self.isotropic_std,
                "covariance_rms": float(self.covariance_rms[i, j]),
                "shuffled_rms": float(self.shuffled_rms[i, j]),
                "split_half_first": self.split_half_cosines[i],
                "split_half_second": self.split_half_cosines[j],
            }
            for i in range(n)
            for j in range(i + 1, n)
        ]


@dataclass(frozen=True)
class _Entry:
    """One direction with its controls."""

    label: str
    direction: Direction
    covariance: Tensor | None  # [k d]
    shuffled: Tensor | None  # [m d]


def compare_directions(
    directions: Directions | Sequence[Direction] | Mapping[str, Directions],
) -> CosineMatrix:
    """Compute all cosines between directions, beside their random baselines.

    Args:
        directions: of several sites, or several at one; or name -> directions, such as by
            construction or organism, labelled `name resid_post.14`.

    Raises:
        ValueError: fewer than two directions.
        WidthError: directions of several widths.
        SiteError: directions of sites with different axes, such as heads and the residual stream.
    """
    entries = _list_entries(directions)
    if len(entries) < 2:
        raise ValueError(f"directions: got {len(entries)}, expected at least two to compare")
    widths = {entry.direction.width for entry in entries}
    if len(widths) > 1:
        raise WidthError(f"directions: widths {sorted(widths)}; cosines need one width")
    axes = {entry.direction.site.axes: entry.label for entry in entries}
    if len(axes) > 1:
        named = " and ".join(f"{label} of {one}" for one, label in axes.items())
        raise SiteError(
            f"directions: {named} have axes whose entries mean different things, although their "
            "widths agree; compare directions of one kind of site"
        )
    vectors = torch.stack([entry.direction.vector.double().cpu() for entry in entries])
    return CosineMatrix(
        labels=tuple(entry.label for entry in entries),
        sites=tuple(str(entry.direction.site) for entry in entries),
        constructions=tuple(entry.direction.provenance.construction for entry in entries),
        cosines=_cosines(vectors, vectors),
        isotropic_std=random_cosine_std(widths.pop()),
        covariance_rms=_chance([entry.covariance for entry in entries], vectors),
        shuffled_rms=_chance([entry.shuffled for entry in entries], vectors),
        split_half_cosines=tuple(entry.direction.split_half_cosine for entry in entries),
    )


def _list_entries(
    directions: Directions | Sequence[Direction] | Mapping[str, Directions],
) -> list[_Entry]:
    if isinstance(directions, Directions):
        return _entries_of(directions, "")
    if isinstance(directions, Mapping):
        return [
            entry for name, some in directions.items() for entry in _entries_of(some, f"{name} ")
        ]
    seen: Counter[str] = Counter()
    entries = []
    for direction in directions:
        label = f"{direction.provenance.construction} {direction.site}"
        seen[label] += 1
        numbered = label if seen[label] == 1 else f"{label} ({seen[label]})"
        entries.append(_Entry(numbered, direction, None, None))
    return entries


def _entries_of(directions: Directions, prefix: str) -> list[_Entry]:
    matched, shuffled = directions.covariance_matched, directions.shuffled
    return [
        _Entry(
            f"{prefix}{direction.site}",
            direction,
            None if matched is None else matched[index],
            None if shuffled is None else shuffled[index],
        )
        for index, direction in enumerate(directions)
    ]


def _cosines(rows: Float[Tensor, "m d"], others: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """Cosines without an [m n d] tensor; NaN where a row is zero."""
    return (unit_vectors(rows) @ unit_vectors(others).T).clamp(-1, 1)


def _chance(
    controls: Sequence[Tensor | None], vectors: Float[Tensor, "n d"]
) -> Float[Tensor, "n n"]:
    """Root mean square cosine of one's controls with the other, both ways pooled."""
    n = len(vectors)
    squares = torch.zeros(n, n, dtype=torch.float64)
    counts = torch.zeros(n, n, dtype=torch.float64)
    for index, rows in enumerate(controls):
        if rows is None:
            continue
        found = _cosines(rows.double().cpu(), vectors).square().sum(0)
        squares[index] += found
        squares[:, index] += found
        counts[index] += len(rows)
        counts[:, index] += len(rows)
    return (squares / counts).sqrt()
