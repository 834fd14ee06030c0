"""The runtime of sparse autoencoders; not for training one, nor for reading one from a file.

Codes are f((x - b_dec) W_enc + b_enc), or without b_dec where an autoencoder was trained so, and a
reconstruction is codes W_dec + b_dec. f is a ReLU, a ReLU above a threshold, or a ReLU of the k
largest. What an autoencoder saved otherwise (codes scaled by decoder norms) is brought to this form
when it is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.codecs.codec import CodecError, Codes, SparseCodes
from emlens.codecs.topk import merge_largest
from emlens.sites import Site

Normalization = Literal["none", "constant_norm_rescale", "layer_norm"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sae(Result):
    """A sparse autoencoder of one site's activations, its weights frozen."""

    kind: ClassVar[str] = "sae"

    name: str
    """Its source, as it was written."""
    architecture: str
    """Such as `topk` or `standard`."""
    site: Site
    """Whose activations it takes."""
    positions: str = "all"
    """Which tokens it was trained on."""
    W_enc: Float[Tensor, "d_in d_sae"]
    """Encoder."""
    b_enc: Float[Tensor, " d_sae"]
    """Its bias."""
    W_dec: Float[Tensor, "d_sae d_in"]
    """What each latent adds to the reconstruction, as a row."""
    b_dec: Float[Tensor, " d_in"]
    """What every reconstruction begins with."""
    k: int | None = None
    """How many latents may be active at a token; None for as many as are."""
    apply_b_dec_to_input: bool = True
    """Whether b_dec is subtracted before encoding."""
    base_fingerprint: str | None = None
    """Of the weights it was trained on, where that is known."""

    def __post_init__(self) -> None:
        for weight in (self.W_enc, self.b_enc, self.W_dec, self.b_dec):
            weight.requires_grad_(False)

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """Of its weights and of how they are used."""
        return ""

    def encode(self, x: Float[Tensor, "n d_in"]) -> Codes:
        """Codes of activations.

        Raises:
            CodecError: another width than the codec's.
        """
        if self.k is not None:
            sparse = self.encode_sparse(x, k=self.k)
            values = sparse.values.new_zeros(len(x), self.d_sae)
            return Codes(values=values.scatter_(1, sparse.indices, sparse.values))
        return Codes(values=self._block(self._prepare(x), 0, self.d_sae))

    def encode_latents(
        self, x: Float[Tensor, "n d_in"], latents: Sequence[int]
    ) -> Float[Tensor, "n k"]:
        """Codes of some latents, equal to those columns of `encode`."""
        chosen = torch.tensor(list(latents), device=self.W_enc.device)
        if self.k is not None:
            return self.encode(x).values[:, chosen]
        rows = self._prepare(x)
        return torch.addmm(self.b_enc[chosen], rows, self.W_enc[:, chosen]).relu_()

    def encode_sparse(self, x: Float[Tensor, "n d_in"], *, k: int) -> SparseCodes:
        """The k largest codes of each token, in memory that does not grow with n x d_sae."""
        if not 0 < k <= self.d_sae:
            raise CodecError(f"k: got {k}, expected 1 to {self.d_sae}, the latents of {self.name}")
        rows = self._prepare(x)
        values, indices = merge_largest(
            lambda row, stop, start, end: self._block(rows[row:stop], start, end),
            n=len(x),
            d_sae=self.d_sae,
            k=k,
            device=rows.device,
        )
        if self.k is not None and k > self.k:
            values[:, self.k :] = 0
        return SparseCodes(indices=indices, values=values, d_sae=self.d_sae)

    def decode(self, codes: Codes | SparseCodes) -> Float[Tensor, "n d_in"]:
        """Activations as the codes say they are."""
        if isinstance(codes, Codes):
            return torch.addmm(self.b_dec, codes.values, self.W_dec)
        parts = [
            torch.einsum("nk,nkd->nd", values, self.W_dec[indices])
            for values, indices in zip(codes.values.split(64), codes.indices.split(64), strict=True)
        ]
        return torch.cat(parts) + self.b_dec

    def link(self, latent: int) -> str | None:
        """Where others describe a latent, if there is such a place."""
        return None

    def _prepare(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise CodecError(
                f"x has shape {tuple(x.shape)}, expected [n, {self.d_in}], the width of "
                f"{self.name} at {self.site}"
            )
        x = x.to(self.W_enc.dtype)
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def _block(self, rows: Tensor, start: int, stop: int) -> Tensor:
        return torch.addmm(self.b_enc[start:stop], rows, self.W_enc[:, start:stop]).relu_()
