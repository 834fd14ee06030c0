"""Sums under integer keys of which only a few ever occur, such as (prompt, latent) pairs.

Not for keys that mostly occur: a dense tensor is smaller and faster.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from emlens.numerics.validation import check_finite, check_same

_MIN_PENDING = 1 << 16
"""Entries gathered before they are sorted into the rest: 1 MiB."""
_CLOSE = 16
"""Numbers a key, from the smallest to the largest, up to which counting is faster than sorting."""


class SparseSums:
    """Streaming float64 sums under keys; 16 bytes a key that occurred, twice that for a moment."""

    def __init__(self) -> None:
        self._keys = np.zeros(0, dtype=np.int64)
        self._sums = np.zeros(0, dtype=np.float64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_pending = 0

    def update(self, keys: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Add values under their keys; a key may come several times.

        Raises:
            WidthError: not one value a key.
            NonFiniteError: a value is NaN or infinite. What was summed before stays as it was.
        """
        check_same("number of keys", len(keys), "number of values", len(values))
        check_finite("values", values)
        if len(keys):
            self._take(
                *_collapse(keys.cpu().long().numpy(), values.detach().double().cpu().numpy())
            )

    def merge(self, other: "SparseSums") -> None:
        """Take in what another has summed; it stays as it was."""
        other._settle()
        if len(other._keys):
            self._take(other._keys, other._sums)

    def result(self) -> tuple[Int64[Tensor, " n"], Float64[Tensor, " n"]]:
        """Every key that occurred, in order, and its sum."""
        self._settle()
        return torch.from_numpy(self._keys.copy()), torch.from_numpy(self._sums.copy())

    def _take(self, keys: np.ndarray, sums: np.ndarray) -> None:
        self._pending.append((keys, sums))
        self._n_pending += len(keys)
        # So that sorting costs a constant number of steps a key, however many batches there are.
        if self._n_pending > max(_MIN_PENDING, len(self._keys)):
            self._settle()

    def _settle(self) -> None:
        if self._pending:
            parts = [(self._keys, self._sums), *self._pending]
            keys, sums = (np.concatenate(column) for column in zip(*parts, strict=True))
            self._keys, self._sums = _collapse(keys, sums)
            self._pending, self._n_pending = [], 0


def _collapse(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, in order, and the sum of its values; at least one key is given."""
    first = keys.min()
    if keys.max() - first < _CLOSE * len(keys):
        near = keys - first
        found = np.flatnonzero(np.bincount(near) != 0)  # many times faster over bools
        return found + first, np.bincount(near, weights=values)[found]
    found, place = np.unique(keys, return_inverse=True)
    return found, np.bincount(place, weights=values, minlength=len(found))
