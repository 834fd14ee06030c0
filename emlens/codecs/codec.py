"""What every sparse codec offers, and the codes it gives; not how any of them computes.

A latent is a column of a codec, codes are its activations. A codec lives at one site and takes the
activations of that site as they are; whatever normalisation it wants is its own affair, and what it
took from each row to normalise it comes back with that row's codes, so that the batches of two
models may alternate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.sites import Site


class CodecError(ValueError):
    """A codec that cannot be read, or does not fit what it is used on; what and why is named."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Codes of some tokens, every latent."""

    values: Float[Tensor, "n d_sae"]
    """How strongly each latent is active; 0 where it is not."""
    scale: Float[Tensor, "n 1"] | None = None
    """What each row of the reconstruction is multiplied by; None where rows were taken as they
    are."""
    shift: Float[Tensor, "n 1"] | None = None
    """What is added to each row after that."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseCodes:
    """The largest codes of some tokens."""

    indices: Int[Tensor, "n k"]
    """Latents, the most active first."""
    values: Float[Tensor, "n k"]
    """Their codes; 0 where fewer than k are active."""
    d_sae: int
    """Latents of the codec."""
    scale: Float[Tensor, "n 1"] | None = None
    """As in `Codes`."""
    shift: Float[Tensor, "n 1"] | None = None
    """As in `Codes`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ActiveCodes:
    """The codes of some tokens that are not 0, token after token."""

    counts: Int[Tensor, " n"]
    """How many are active at each token."""
    latents: Int[Tensor, " active"]
    """Which latents are, those of the first token first."""
    values: Float[Tensor, " active"]
    """Their codes."""
    d_sae: int
    """Latents of the codec."""
    scale: Float[Tensor, "n 1"] | None = None
    """As in `Codes`."""
    shift: Float[Tensor, "n 1"] | None = None
    """As in `Codes`."""

    @property
    def rows(self) -> Int[Tensor, " active"]:
        """Token of each, rising."""
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(
            self.counts
        )


@runtime_checkable
class SparseCodec(Protocol):
    """A sparse codec of one site's activations."""

    @property
    def name(self) -> str:
        """Its source, as it was written."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of its weights and of how they are used."""
        ...

    @property
    def architecture(self) -> str:
        """Such as `topk` or `jumprelu`."""
        ...

    @property
    def site(self) -> Site:
        """Whose activations it takes."""
        ...

    @property
    def positions(self) -> str:
        """Which tokens it was trained on: `all`, or `all[8:]` without the first eight."""
        ...

    @property
    def base_fingerprint(self) -> str | None:
        """Of the model's weights whose activations it was trained on, where that is known."""
        ...

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """What each latent adds to the reconstruction, as a row, in units of the activations."""
        ...

    def encode(self, x: Float[Tensor, "n d_in"]) -> Codes:
        """Codes of activations."""
        ...

    def encode_latents(
        self, x: Float[Tensor, "n d_in"], latents: Sequence[int]
    ) -> Float[Tensor, "n k"]:
        """Codes of some latents, equal to those columns of `encode`."""
        ...

    def encode_sparse(self, x: Float[Tensor, "n d_in"], *, k: int) -> SparseCodes:
        """The k largest codes of each token, in memory that does not grow with n x d_sae."""
        ...

    def encode_active(self, x: Float[Tensor, "n d_in"]) -> ActiveCodes:
        """The codes that are not 0."""
        ...

    def decode(self, codes: Codes | SparseCodes | ActiveCodes) -> Float[Tensor, "n d_in"]:
        """Activations as the codes say they are."""
        ...

    def link(self, latent: int) -> str | None:
        """Where others describe a latent, if there is such a place."""
        ...
