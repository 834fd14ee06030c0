"""Statistics of activations that add up over batches and shards; tensors in, no model.

The shell that meets a model is `stream`.
"""

import difflib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.numerics.covariance import CovarianceAccumulator
from emlens.numerics.histogram import SizeHistogramAccumulator
from emlens.numerics.moments import MomentsAccumulator
from emlens.numerics.validation import WidthError

STATISTICS = ("mean", "variance", "covariance", "norm")
NORM_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of the norm that are kept."""


def check_statistics(statistics: Sequence[str]) -> tuple[str, ...]:
    """Return the statistics asked for, each once.

    Raises:
        ValueError: none, or an unknown one; the nearest three are listed.
    """
    if isinstance(statistics, str) or not statistics:
        raise ValueError(f"statistics: got {statistics!r}, expected some of {list(STATISTICS)}")
    for name in statistics:
        if name not in STATISTICS:
            near = difflib.get_close_matches(name, STATISTICS, n=3, cutoff=0.0)
            raise ValueError(f"statistics: {name!r} is not known; nearest: {', '.join(near)}")
    return tuple(dict.fromkeys(statistics))


class ActivationAccumulator:
    """Statistics of one stream at one site and one set of positions.

    Args:
        width: values of one token.
        statistics: some of `STATISTICS`.
    """

    def __init__(self, width: int, statistics: Sequence[str]) -> None:
        names = check_statistics(statistics)
        self.width, self.statistics = width, names
        # The covariance holds mean and variance already.
        plain = "covariance" not in names and bool({"mean", "variance"} & set(names))
        self.covariance = CovarianceAccumulator(width) if "covariance" in names else None
        self.moments = MomentsAccumulator(width) if plain else None
        self.sizes = SizeHistogramAccumulator() if "norm" in names else None

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Take in the activations of some tokens.

        Raises:
            WidthError: x is not a matrix of this width.
            NonFiniteError: x holds NaN or infinity, or norms too large to count. What was counted
                before stays as it was.
        """
        self.merge(self._count_apart(x))

    def _count_apart(self, x: Float[Tensor, "n d"]) -> "ActivationAccumulator":
        """Count some tokens in a new accumulator of the same kind; this one stays as it was.

        So that whatever one statistic refuses, no other has taken in. Raises as `update` does.
        """
        found = ActivationAccumulator(self.width, self.statistics)
        for part in (found.covariance, found.moments):
            if part is not None:
                part.update(x)
        if found.sizes is not None:
            if x.ndim != 2 or x.shape[1] != self.width:
                raise WidthError(f"x has shape {tuple(x.shape)}, expected [n, {self.width}]")
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            found.sizes.update(torch.linalg.vector_norm(wide, dim=1))
        return found

    def merge(self, other: "ActivationAccumulator") -> None:
        """Take in what another accumulator of the same kind has seen; it stays as it was."""
        for name in ("covariance", "moments", "sizes"):
            own, theirs = getattr(self, name), getattr(other, name)
            if (own is None) != (theirs is None):
                raise ValueError(f"other counts {name} and this one does not, or the reverse")
            if own is not None:
                own.merge(theirs)

    @property
    def count(self) -> int:
        """Tokens seen."""
        counted = next(part for part in (self.covariance, self.moments, self.sizes) if part)
        return counted.count

    def values(self) -> dict[str, Tensor]:
        """Every statistic that was counted, by name; `norm` is its quantiles at `NORM_LEVELS`."""
        found: dict[str, Tensor] = {}
        if self.covariance is not None:
            both = self.covariance.result()
            variance = both.covariance.diagonal().clone()
            found |= {"mean": both.mean, "variance": variance, "covariance": both.covariance}
        if self.moments is not None:
            moments = self.moments.result()
            found |= {"mean": moments.mean, "variance": moments.variance}
        if self.sizes is not None:
            sizes = self.sizes.result()
            levels = [sizes.quantile(level) for level in NORM_LEVELS]
            found["norm"] = torch.tensor(levels, dtype=torch.float64)
        return found


class StatisticsAccumulator:
    """One `ActivationAccumulator` for each stream, site and positions.

    Args:
        streams: names of the models read, and of their difference where it is counted.
        sites: names of the sites, all of one width.
        positions: names of the positions.
        width: values of one token at every site.
        statistics: some of `STATISTICS`.
    """

    def __init__(
        self,
        *,
        streams: Sequence[str],
        sites: Sequence[str],
        positions: Sequence[str],
        width: int,
        statistics: Sequence[str],
    ) -> None:
        self.labels = (tuple(streams), tuple(sites), tuple(positions))
        self.statistics = check_statistics(statistics)
        self.cells = [
            [[ActivationAccumulator(width, statistics) for _ in positions] for _ in sites]
            for _ in streams
        ]

    def update(self, site: int, position: int, streams: Sequence[Float[Tensor, "n d"]]) -> None:
        """Take in the activations of some tokens at one site, one tensor a stream.

        Raises:
            WidthError: a stream that is not a matrix of this width.
            NonFiniteError: a stream that holds NaN or infinity. What was counted before stays as it
                was, in every stream.
        """
        cells = [stream_cells[site][position] for stream_cells in self.cells]
        found = [cell._count_apart(x) for cell, x in zip(cells, streams, strict=True)]
        for cell, counted in zip(cells, found, strict=True):
            cell.merge(counted)

    def merge(self, other: "StatisticsAccumulator") -> None:
        """Take in what was counted over other chats; it stays as it was.

        Raises:
            ValueError: it counts other streams, sites, positions or statistics.
        """
        if (other.labels, other.statistics) != (self.labels, self.statistics):
            raise ValueError(
                f"other counts {other.statistics} of {other.labels}, this one {self.statistics} "
                f"of {self.labels}; shards must be made with the same arguments"
            )
        for own, theirs in zip(self._flat(), other._flat(), strict=True):
            own.merge(theirs)

    def stacked(self, name: str) -> Tensor | None:
        """One statistic [stream site position ...] on the CPU, or None where it was not asked."""
        if name not in self.statistics:
            return None
        return self._stack(lambda cell: cell.values()[name].cpu())

    def count_tokens(self) -> Tensor:
        """Tokens seen at each of the positions."""
        return torch.tensor([cell.count for cell in self.cells[0][0]])

    def _flat(self) -> list[ActivationAccumulator]:
        return [cell for stream in self.cells for site in stream for cell in site]

    def _stack(self, value: Callable[[ActivationAccumulator], Tensor]) -> Tensor:
        return torch.stack(
            [
                torch.stack([torch.stack([value(cell) for cell in site]) for site in stream])
                for stream in self.cells
            ]
        )
