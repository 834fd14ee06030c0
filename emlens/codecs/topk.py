"""The k largest codes of each token, chunk of latents by chunk; not for numbers below zero.

Ties are settled: of equal codes the lower latent goes first. torch.topk leaves that open, so that a
result could depend on the device or on where chunks end.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.numerics.by_device import ByDevice

ROWS = 256
"""Tokens that a processor encodes at a time: enough that a product spends little on bringing
weights, and few enough for many latents in a chunk."""
CHUNK = ByDevice(cpu=1 << 22, elsewhere=1 << 26)
"""Codes held at a time: 16 MiB of float32, which the allocator hands out again without asking the
system for new pages, or 256 MiB, which keep a GPU busy and are little of its memory."""
BLOCK = 32
"""Latents of which the largest code is looked at first."""
LEAST_BLOCKS = 8
"""So many times k blocks there must be for that to pay; with fewer, most codes are seen twice."""


def select_largest(
    codes: Float[Tensor, "n width"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Largest codes of each row and their columns, largest first.

    Of equal codes the lower column goes first; which columns stand beside codes of zero is open.

    Args:
        codes: none negative.
        k: at most as many as there are columns.
    """
    with torch.no_grad():
        columns, next_largest = _find_columns(codes, k)
        columns = columns.sort(dim=1).values
        found, order = codes.gather(1, columns).sort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, order)
        last = found[:, -1]
        tied = ((last == next_largest) & (last > 0)).nonzero()[:, 0]
        if len(tied):
            columns[tied] = _settle_ties(codes[tied], k)
    return codes.gather(1, columns), columns


def merge_largest(
    encode: Callable[[slice, slice], Float[Tensor, "rows width"]],
    *,
    n: int,
    d_sae: int,
    k: int,
    device: torch.device,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row of a matrix that is made a chunk at a time and never whole.

    Args:
        encode: makes the codes of some rows and some latents.
        n: rows.
        d_sae: latents.
        k: how many of each row; at most `d_sae`.
        device: where codes are made.
    """
    room = CHUNK.of(device)
    step = max(1, min(n, ROWS if device.type == "cpu" else room // max(k, 1 << 14)))
    rows = [slice(row, min(row + step, n)) for row in range(0, n, step)] or [slice(0, 0)]
    width = max(k, room // step)
    chunks = [slice(start, min(start + width, d_sae)) for start in range(0, d_sae, width)]
    found = [_merge_chunks(lambda chunk, own=own: encode(own, chunk), chunks, k) for own in rows]
    return torch.cat([values for values, _ in found]), torch.cat([columns for _, columns in found])


def settle_inactive(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
) -> Int[Tensor, "n k"]:
    """Indices with the lowest inactive latents, ascending, in the places where codes are zero.

    Args:
        values: codes, largest first; none negative.
        indices: their latents, all of a row different.
    """
    n, k = values.shape
    inactive = values == 0
    if not bool(inactive.any()):
        return indices
    # Latents from k on need no look: at most k - 1 of the first k are active, if one place is left.
    active = torch.where(inactive, k, indices.clamp(max=k))
    taken = torch.zeros(n, k + 1, dtype=torch.uint8, device=values.device)
    free = taken.scatter_(1, active, 1)[:, :k].sort(dim=1, stable=True).indices
    place = (inactive.cumsum(1) - 1).clamp(min=0)
    return torch.where(inactive, free.gather(1, place), indices)


def pick_latents(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    latents: Int[Tensor, " m"],
    d_sae: int,
) -> Float[Tensor, "n m"]:
    """Codes of some latents out of sparse codes; 0 where a latent is not among a row's."""
    wanted, place = latents.unique(return_inverse=True)
    column = torch.full((d_sae,), len(wanted), device=latents.device)
    column[wanted] = torch.arange(len(wanted), device=latents.device)
    # The last column takes the codes that nobody asked for.
    found = values.new_zeros(len(values), len(wanted) + 1).scatter(1, column[indices], values)
    return found[:, place]


def _merge_chunks(
    encode: Callable[[slice], Tensor], chunks: list[slice], k: int
) -> tuple[Tensor, Tensor]:
    best: tuple[Tensor, Tensor] | None = None
    for chunk in chunks:
        codes = encode(chunk)
        values, columns = select_largest(codes, min(k, codes.shape[1]))
        columns = columns + chunk.start
        if best is not None:
            # Latents of earlier chunks are lower, so they stand first and win ties.
            values, columns = torch.cat([best[0], values], 1), torch.cat([best[1], columns], 1)
            values, order = values.sort(dim=1, descending=True, stable=True)
            values, columns = values[:, :k], columns.gather(1, order[:, :k])
        best = values, columns
    assert best is not None
    return best


def _find_columns(codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the k largest of each row, and the largest value that was left out."""
    n, count = len(codes), codes.shape[1] // BLOCK
    if count < LEAST_BLOCKS * k or codes.shape[1] % BLOCK:
        return _take(codes, k)
    # One maximum stands for each block: the k largest lie in the k blocks of largest maxima, and
    # what is sorted out is a fraction of the codes.
    blocks = codes.reshape(n * count, BLOCK)
    maxima = blocks.view(n, count, BLOCK).amax(2).topk(k + 1, dim=1)
    chosen = maxima.indices[:, :k]
    rows = torch.arange(0, n * count, count, device=codes.device)
    inside = blocks.index_select(0, (chosen + rows[:, None]).flatten()).view(n, k * BLOCK)
    places, left = _take(inside, k)
    columns = chosen.gather(1, places // BLOCK) * BLOCK + places % BLOCK
    return columns, torch.maximum(left, maxima.values[:, k])


def _take(codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if codes.shape[1] == k:
        columns = torch.arange(k, device=codes.device).expand(len(codes), -1)
        return columns, codes.new_full((len(codes),), -1)  # nothing was left out
    found = codes.topk(k + 1, dim=1)
    return found.indices[:, :k], found.values[:, k]


def _settle_ties(codes: Tensor, k: int) -> Tensor:
    """Columns of the k largest where the last of them is as large as others that have no place."""
    last = codes.topk(k, dim=1).values[:, -1:]
    above, equal = codes > last, codes == last
    room = k - above.sum(1, keepdim=True)
    columns = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    order = codes.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)
