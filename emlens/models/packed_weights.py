"""Weights as oneDNN multiplies them, rearranged once for many products instead of at each.

Of few rows a product spends about half of its time on that: see the benchmarks' page.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor

ROOM = 1 << 30
"""Bytes of weights that are kept rearranged beside themselves while a model generates."""


class PackedWeights:
    """Rearranged weights, each made when it is first asked for.

    While they are in use weights must not be changed: a product would be that of before.

    Args:
        room: bytes that may be taken; weights that come when it is used up stay as they are.
    """

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._held: dict[tuple[tuple, ...], tuple[Tensor, tuple[Tensor, ...]]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it `multiply` takes them; those of the outermost of several."""
        token = _USED.set(_USED.get() or self)
        try:
            yield
        finally:
            _USED.reset(token)

    def pack(
        self, weight: Float[Tensor, "d_out d_in"], *, rows: int
    ) -> Float[Tensor, "d_out d_in"]:
        """Return the weight rearranged for so many rows, or as it is for want of room."""
        packed = self.pack_together([weight], rows=rows)
        return weight if packed is None else packed

    def pack_together(
        self, weights: Sequence[Float[Tensor, "_ d_in"]], *, rows: int
    ) -> Float[Tensor, "d_outs d_in"] | None:
        """Return weights of one input under one another, rearranged; None for want of room."""
        key = tuple((one.data_ptr(), one.shape, one.stride()) for one in weights)
        if key in self._held:
            return self._held[key][0]
        size = sum(one.nbytes for one in weights)
        if size > self._room:
            return None
        self._room -= size
        whole = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        packed = _rearrange(whole, rows)
        self._held[key] = packed, tuple(weights)  # so that nothing else can have their addresses
        return packed


def _rearrange(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


_USED: ContextVar[PackedWeights | None] = ContextVar("packed weights in use", default=None)


def packed_weights_in_use() -> PackedWeights | None:
    """Those of the context that runs, if there is one."""
    return _USED.get()
