"""Rows in, codes out: what every codec does once rows are prepared; not for raw activations."""

import dataclasses
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from emlens.codecs.active import drop_inactive, list_above, list_active
from emlens.codecs.codec import ActiveCodes, CodecError, SparseCodes
from emlens.codecs.rectifier import Rectifier
from emlens.codecs.topk import merge_largest, pick_latents, settle_inactive
from emlens.models.products import multiply


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """Codes of rows: rectified rows W + b, and of them the k largest where k is a number."""

    weight: Float[Tensor, "d_in d_sae"]
    """W."""
    bias: Float[Tensor, " d_sae"]
    """b."""
    rectifier: Rectifier
    """What makes codes of pre-activations."""
    k: int | None
    """How many latents of a row may be active; None for as many as are."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.weight.shape[1]

    def encode(self, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Codes of all latents."""
        if self.k is None:
            return self._rectify(rows, slice(None))
        found = self.find_largest(rows, self.k)
        codes = found.values.new_zeros(len(rows), self.d_sae)
        return codes.scatter_(1, found.indices, found.values)

    def find_active(self, rows: Float[Tensor, "n d_in"]) -> ActiveCodes:
        """The codes that are not 0, row after row; in memory of n x d_sae unless there is a k."""
        if self.k is not None:
            return drop_inactive(self.find_largest(rows, self.k))
        if self.rectifier.gain is not None:
            return list_active(self._rectify(rows, slice(None)))
        # The bias is added to what is found alone: over all it is one more pass over memory.
        found = list_above(
            multiply(rows, self.weight.mT, loose=True), self.rectifier.floor - self.bias
        )
        return dataclasses.replace(found, values=found.values + self.bias[found.latents])

    def encode_latents(
        self, rows: Float[Tensor, "n d_in"], latents: Int[Tensor, " m"]
    ) -> Float[Tensor, "n m"]:
        """Codes of some latents; with k, all are encoded, as others may leave them no place."""
        latents = latents.to(self.weight.device)
        if self.k is None:
            return self._rectify(rows, latents)
        found = self.find_largest(rows, self.k)
        return pick_latents(found.values, found.indices, latents, self.d_sae)

    def find_largest(self, rows: Float[Tensor, "n d_in"], k: int) -> SparseCodes:
        """The k largest codes of each row; places that nothing active fills have a code of 0.

        Raises:
            CodecError: a k below 1 or above d_sae.
        """
        if not 0 < k <= self.d_sae:
            raise CodecError(f"k: got {k}, expected 1 to {self.d_sae}, the number of latents")
        values, indices = merge_largest(
            lambda part, latents: self._rectify(rows[part], latents),
            n=len(rows),
            d_sae=self.d_sae,
            k=k,
            device=rows.device,
        )
        if self.k is not None and k > self.k:
            values = F.pad(values[:, : self.k], (0, k - self.k))
        indices = settle_inactive(values, indices)
        return SparseCodes(indices=indices, values=values, d_sae=self.d_sae)

    def _rectify(self, rows: Tensor, latents: slice | Tensor) -> Tensor:
        """Codes of some latents as if no other were there."""
        pre = multiply(rows, self.weight[:, latents].mT, self.bias[latents], loose=True)
        return self.rectifier[latents](pre)


def decode_codes(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"] | None,
    *,
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "n d_in"]:
    """Return b_dec + codes W_dec.

    Args:
        values: codes: of all latents, or of some.
        indices: of which; None for all.
        W_dec: decoder.
        b_dec: its bias.
    """
    if indices is None:
        return multiply(values, W_dec.mT, b_dec, loose=True)
    if not len(values):
        return values.new_zeros(0, len(b_dec))
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
