"""The threshold above which latents count as active, set so that as many are as was wanted.

During training BatchTopK takes the k largest codes a row on average over a batch; in use each row
stands alone, and one threshold decides. What a short training leaves for it is far off.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.codec import CodecError
from emlens.codecs.runtime import Sae

_CHUNK_VALUES = 2**22
"""Codes made at a time: 16 MiB in float32, for which a processor need not fetch memory anew."""
_LOW_BITS = 16
"""Bits of a float32 that the first count leaves out: positive floats are ordered as their bits are,
so that the other 15 sort them into 2^15 bins."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold, and what it does to the rows that it was set on."""

    value: float
    """Codes above it count."""
    l0: float
    """Latents above it at a row, on average: what was wanted, but for rounding to whole codes and
    for codes that are equal."""
    n_rows: int
    """Rows it was set on."""


@torch.no_grad()
def find_threshold(
    encode: Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_sae"]],
    rows: Float[Tensor, "rows d_in"],
    *,
    l0: float,
    d_sae: int,
) -> Threshold:
    """Find the threshold that keeps `l0` codes a row, exactly, in two passes over the rows.

    The first sorts codes into bins by their leading bits, the second looks into one bin.

    Args:
        encode: gives codes of rows that nothing was left out of.
        rows: activations that were not trained on.
        l0: latents wanted at a row, on average.
        d_sae: latents, which decide how many rows go at a time.

    Raises:
        CodecError: no row, or fewer codes above 0 than are wanted.
    """
    wanted = round(l0 * len(rows))
    if wanted < 1:
        raise CodecError(
            f"l0: {l0} of {len(rows)} rows is no code at all, expected rows, and an l0 above 0"
        )

    def codes() -> Iterator[Tensor]:
        for chunk in rows.split(max(1, _CHUNK_VALUES // d_sae)):
            values = encode(chunk).flatten()
            yield values[values > 0]

    counts = torch.zeros(2**15, dtype=torch.int64)
    for values in codes():
        counts += torch.bincount(_bins(values), minlength=len(counts)).cpu()
    at_least = counts.flip(0).cumsum(0).flip(0)
    if int(at_least[0]) < wanted:
        raise CodecError(
            f"l0: got {l0}, but only {int(at_least[0]) / len(rows):.4g} codes a row are above 0"
        )
    bin_of_last = int((at_least >= wanted).nonzero()[-1])
    above = int(at_least[bin_of_last]) - int(counts[bin_of_last])
    inside = torch.cat([values[_bins(values) == bin_of_last].cpu() for values in codes()])
    last = inside.sort(descending=True).values[wanted - above - 1]
    # Where several codes are equal to the last one wanted, all or none of them count.
    with_equals, without = (above + int((inside >= last).sum()), above + int((inside > last).sum()))
    if with_equals - wanted <= wanted - without:
        # The next number below it in the dtype of the codes: any other would be rounded to it.
        value, kept = torch.nextafter(last, torch.zeros_like(last)), with_equals
    else:
        value, kept = last, without
    return Threshold(value=float(value), l0=kept / len(rows), n_rows=len(rows))


def calibrate_threshold(sae: Sae, rows: Float[Tensor, "rows d_in"], *, l0: float) -> Sae:
    """The same autoencoder, with one threshold that keeps `l0` codes a row of held-out rows.

    Args:
        sae: with a threshold, such as one trained as BatchTopK; its own does not matter.
        rows: activations at its site that were not trained on.
        l0: latents wanted at a row, on average.

    Raises:
        CodecError: an autoencoder that chooses its latents otherwise, or rows as for
            `find_threshold`.
    """
    if sae.threshold is None:
        raise CodecError(
            f"{sae.name} has no threshold: architecture {sae.architecture!r} chooses its latents "
            "otherwise"
        )
    plain = dataclasses.replace(sae, threshold=torch.zeros_like(sae.threshold))
    found = find_threshold(lambda x: plain.encode(x).values, rows, l0=l0, d_sae=sae.d_sae)
    return dataclasses.replace(sae, threshold=torch.full_like(sae.threshold, found.value))


def _bins(values: Tensor) -> Tensor:
    return values.float().view(torch.int32) >> _LOW_BITS
