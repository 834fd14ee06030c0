"""Rows of activations as the few latents that are active in each, and what those reconstruct.

Not for the codes of all latents: a row of 16,384 codes has some dozens that are not 0, and whatever
is counted here is counted over those alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from emlens.codecs import SparseCodec
from emlens.numerics.by_device import ByDevice
from emlens.numerics.validation import check_finite

CHUNK_VALUES = ByDevice(cpu=6 << 20, elsewhere=1 << 28)
"""Codes held at a time, n x d_sae. 24 MiB of float32 on a processor: blocks of 32 MiB and more
glibc asks the system for each time, page by page; with fewer rows a product takes longer a row.
1 GiB elsewhere, a fraction of a GPU's memory; a search for what is not 0 wants fewer than 2^31
values."""
FEWEST_ROWS = 128
"""Encoded at once: with fewer the encoder's weights are read too often."""
MOST_ROWS = ByDevice(cpu=1024, elsewhere=4096)
"""Encoded at once: enough to fill the device, and in float64, where they are summed, still little
beside the codes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRows:
    """The active latents of some rows, and the rows' reconstruction."""

    n_rows: int
    """Rows encoded."""
    d_sae: int
    """Latents of the codec."""
    rows: Int64[Tensor, " active"]
    """Row of each active code, rising."""
    latents: Int64[Tensor, " active"]
    """Its latent."""
    values: Float[Tensor, " active"]
    """The code, which is not 0."""
    reconstruction: Float[Tensor, "n d_in"]
    """What the codec makes of its codes, in units of the activations."""


def split_rows(n: int, d_sae: int, *, device: str) -> Iterator[slice]:
    """Cut n rows into chunks whose codes are of bounded size.

    Args:
        n: rows.
        d_sae: latents of the codec.
        device: kind of the device that it lies on, such as `cuda`.
    """
    fitting = CHUNK_VALUES.of(device) // d_sae
    step = min(MOST_ROWS.of(device), max(FEWEST_ROWS, fitting))
    yield from (slice(start, min(n, start + step)) for start in range(0, n, step))


@torch.no_grad()
def encode_rows(codec: SparseCodec, x: Float[Tensor, "n d_in"]) -> EncodedRows:
    """Encode and reconstruct some rows; call it on a chunk at a time (`split_rows`).

    Raises:
        CodecError: rows of another width than the codec's, or that hold NaN or infinity.
        NonFiniteError: a code is NaN or infinite although the activations are not.
    """
    codes = codec.encode_active(x)
    check_finite(f"codes of {codec.name}", codes.values)
    return EncodedRows(
        n_rows=len(x),
        d_sae=codec.d_sae,
        rows=codes.rows,
        latents=codes.latents,
        values=codes.values,
        reconstruction=codec.decode(codes),
    )


def encode_models(codec: SparseCodec, x: Float[Tensor, "models n d_in"]) -> list[EncodedRows]:
    """Encode the rows of all models; rows that are the first's to the last bit are encoded once.

    Raises:
        CodecError: as `encode_rows` raises.
        NonFiniteError: as `encode_rows` raises.
    """
    found = [encode_rows(codec, x[0])]
    for other in x[1:]:
        found.append(found[0] if torch.equal(other, x[0]) else encode_rows(codec, other))
    return found


def pick_latents(encoded: EncodedRows, latents: Sequence[int]) -> Float64[Tensor, "n latent"]:
    """Codes of some latents at every row, 0 where they are not active; on the CPU.

    Args:
        encoded: what `encode_rows` made.
        latents: different ones, in the order of the columns.
    """
    column = torch.full((encoded.d_sae,), -1)
    column[list(latents)] = torch.arange(len(latents))
    places = column[encoded.latents.cpu()]
    wanted = places >= 0
    found = torch.zeros(encoded.n_rows, len(latents), dtype=torch.float64)
    found[encoded.rows.cpu()[wanted], places[wanted]] = encoded.values.cpu()[wanted].double()
    return found
