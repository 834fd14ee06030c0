"""Rows over a vocabulary, a block at a time: what is made of each then stays in a cache.

Not for what is to be held whole afterwards.
"""

from jaxtyping import Float
from torch import Tensor

BLOCK_VALUES = {"cpu": 1 << 19}
"""By kind of device: 2 MB of float32 for each temporary, which a processor's cache holds."""
LARGE_BLOCK_VALUES = 1 << 24
"""On any other kind: it has no such cache, and wants fewer launches."""


def split_blocks(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m d"], ...]:
    """Cut rows, views of them, into blocks of at least one; equal shapes are cut alike."""
    values = BLOCK_VALUES.get(rows.device.type, LARGE_BLOCK_VALUES)
    return rows.split(max(1, values // max(1, rows.shape[-1])))
