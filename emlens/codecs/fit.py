"""How well a codec says what activations are: explained variance, L0, dead latents; streaming."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.codec import Codes, SparseCodec, SparseCodes
from emlens.numerics.moments import MomentsAccumulator
from emlens.numerics.validation import EmptyAccumulatorError, WidthError, check_finite

_CHUNK_VALUES = 2**22
"""Codes made at a time: 16 MiB in float32, for which a processor need not fetch memory anew."""


@dataclass(frozen=True, kw_only=True)
class CodecFit:
    """How well a codec fits some rows."""

    explained_variance: float
    """1 - sum of squared errors / sum of squared distances from the mean row."""
    l0: float
    """Latents active at a row, on average."""
    dead_share: float
    """Share of the latents that are active at none of the rows."""
    n_rows: int
    """Rows measured; with few of them, latents that are rare count as dead."""


class FitAccumulator:
    """Counts up what `CodecFit` says, in float64.

    Args:
        d_in: width of a row.
        d_sae: latents.
    """

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.d_in, self.d_sae = d_in, d_sae
        self.moments = MomentsAccumulator(d_in)
        self.error = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)

    def update(
        self,
        x: Float[Tensor, "n d_in"],
        codes: Codes | SparseCodes,
        reconstruction: Float[Tensor, "n d_in"],
    ) -> None:
        """Take in some rows, their codes and what these say the rows are.

        Raises:
            WidthError: other sizes than this counts.
            NonFiniteError: NaN or infinity. What was counted before stays as it was.
        """
        fired = _count_fired(codes, self.d_sae)
        if reconstruction.shape != x.shape or len(codes.values) != len(x):
            raise WidthError(
                f"x has shape {tuple(x.shape)}, reconstruction {tuple(reconstruction.shape)} and "
                f"codes {tuple(codes.values.shape)}, expected as many rows of one width"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = (x.to(wide) - reconstruction.to(wide)).square().sum(1)
        error = squares.sum(dtype=torch.float64)
        check_finite("reconstruction", error)
        self.moments.update(x)
        self.error += float(error)
        self.fired += fired

    def merge(self, other: "FitAccumulator") -> None:
        """Take in what another accumulator of the same sizes has seen; it stays as it was."""
        if (other.d_in, other.d_sae) != (self.d_in, self.d_sae):
            raise WidthError(
                f"other counts {other.d_sae} latents of width {other.d_in}, this one {self.d_sae} "
                f"of width {self.d_in}"
            )
        self.moments.merge(other.moments)
        self.error += other.error
        self.fired += other.fired

    def result(self) -> CodecFit:
        """What was counted so far.

        Raises:
            EmptyAccumulatorError: no row was seen.
        """
        if not self.moments.count:
            raise EmptyAccumulatorError("FitAccumulator has seen no row: nothing was measured")
        moments = self.moments.result()
        total = float(moments.variance.sum()) * moments.count
        return CodecFit(
            explained_variance=1 - self.error / total if total else float("nan"),
            l0=float(self.fired.sum()) / moments.count,
            dead_share=float((self.fired == 0).double().mean()),
            n_rows=moments.count,
        )


@torch.no_grad()
def measure_fit(codec: SparseCodec, rows: Iterable[Float[Tensor, "_ d_in"]]) -> CodecFit:
    """How well a codec fits rows that were captured at its site.

    Args:
        codec: any.
        rows: activations, in tensors of any number of rows.
    """
    found = FitAccumulator(codec.d_in, codec.d_sae)
    for part in rows:
        for chunk in part.split(max(1, _CHUNK_VALUES // codec.d_sae)):
            codes = codec.encode(chunk)
            found.update(chunk, codes, codec.decode(codes))
    return found.result()


def _count_fired(codes: Codes | SparseCodes, d_sae: int) -> Tensor:
    """At how many rows each latent is active."""
    if isinstance(codes, SparseCodes):
        active = codes.indices[codes.values > 0]
        counted, width = torch.bincount(active.flatten(), minlength=d_sae), codes.d_sae
    else:
        counted, width = (codes.values > 0).sum(0), codes.values.shape[1]
    if width != d_sae:
        raise WidthError(f"codes are of {width} latents, expected {d_sae}")
    return counted.cpu()
