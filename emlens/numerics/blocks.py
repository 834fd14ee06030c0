"""Rows over a vocabulary: slices that fit in memory, and blocks of them that a cache holds.

Not for what is to be held whole afterwards.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

MAX_LOGITS = 1 << 26
"""Values in one slice of logits: 256 MiB in float32."""
BLOCK_VALUES = {"cpu": 1 << 19}
"""By kind of device: 2 MB of float32 for each temporary, which a processor's cache holds."""
LARGE_BLOCK_VALUES = 1 << 24
"""On any other kind: it has no such cache, and wants fewer launches."""


def slice_rows(n: int, d_vocab: int, *, copies: int = 1) -> Iterator[slice]:
    """Cut n rows so that ``copies`` tensors [rows d_vocab] together stay under ``MAX_LOGITS``."""
    step = max(1, MAX_LOGITS // (d_vocab * copies))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def split_blocks(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m d"], ...]:
    """Cut rows, views of them, into blocks of at least one; equal shapes are cut alike."""
    values = BLOCK_VALUES.get(rows.device.type, LARGE_BLOCK_VALUES)
    return rows.split(max(1, values // max(1, rows.shape[-1])))
