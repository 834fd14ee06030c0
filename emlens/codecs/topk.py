"""The k largest codes of each token, chunk of latents by chunk; not for whole matrices of codes.

Ties are settled: of equal codes the lower latent goes first. torch.topk leaves that open, so that a
result could depend on the device or the chunks.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Codes held at a time: 4 MiB of float32, which a processor's cache holds, or 256 MiB, which keeps
a GPU busy and is little of its memory."""


def select_largest(
    values: Float[Tensor, "n width"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Largest values of each row and their columns, largest first; of equal ones the lower column."""
    width = values.shape[1]
    with torch.no_grad():
        found = values.topk(min(k + 1, width), dim=1)
        columns = found.indices[:, :k]
        if width > k:
            tied = (found.values[:, k - 1] == found.values[:, k]).nonzero()[:, 0]
            if len(tied):
                order = values[tied].sort(dim=1, descending=True, stable=True).indices
                columns = columns.index_copy(0, tied, order[:, :k])
        columns = columns.sort(dim=1).values
        order = values.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
        columns = columns.gather(1, order)
    return values.gather(1, columns), columns


def merge_largest(
    codes: Callable[[int, int, int, int], Float[Tensor, "rows width"]],
    *,
    n: int,
    d_sae: int,
    k: int,
    device: torch.device,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row of a matrix that is made a block at a time and never whole.

    Args:
        codes: makes the block from row, to row, from latent, to latent.
        n: rows.
        d_sae: latents.
        k: how many of each row.
        device: where the blocks are.
    """
    room = CHUNK.get(device.type, CHUNK["cpu"])
    rows = max(1, min(n, room // max(k, 2048)))
    width = max(k, room // rows)
    found = []
    for row in range(0, n, rows):
        stop = min(row + rows, n)
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, d_sae, width):
            block = codes(row, stop, start, min(start + width, d_sae))
            values, columns = select_largest(block, min(k, block.shape[1]))
            columns = columns + start
            if best is not None:
                # Latents of earlier chunks are lower, so they stand first and win ties.
                values, columns = torch.cat([best[0], values], 1), torch.cat([best[1], columns], 1)
                values, order = values.sort(dim=1, descending=True, stable=True)
                values, columns = values[:, :k], columns.gather(1, order[:, :k])
            best = values, columns
        assert best is not None
        found.append(best)
    return torch.cat([value for value, _ in found]), torch.cat([column for _, column in found])
