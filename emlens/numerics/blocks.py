"""Rows over a vocabulary: slices that fit in memory, and blocks of them that a cache holds.

Not for what is to be held whole afterwards.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from emlens.numerics.by_device import ByDevice

MAX_LOGITS = 1 << 26
"""Values in one slice of logits: 256 MiB in float32."""
BLOCK_VALUES = ByDevice(cpu=1 << 19, elsewhere=1 << 24)
"""2 MB of float32 for each temporary, which a processor's cache holds; elsewhere 64 MB."""


def slice_rows(n: int, d_vocab: int, *, copies: int = 1) -> Iterator[slice]:
    """Cut n rows so that ``copies`` tensors [rows d_vocab] together stay under ``MAX_LOGITS``."""
    step = max(1, MAX_LOGITS // (d_vocab * copies))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def split_blocks(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m d"], ...]:
    """Cut rows, views of them, into blocks of at least one; equal shapes are cut alike."""
    return rows.split(max(1, BLOCK_VALUES.of(rows.device) // max(1, rows.shape[-1])))
