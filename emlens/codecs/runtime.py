"""The runtime of sparse autoencoders; not for training one, nor for reading one from a file.

With x the activations, normalised where the autoencoder wants it, p = (x - b_dec) W_enc + b_enc, or
without b_dec where it was trained so. Codes are

- `standard`: relu(p);
- `jumprelu`, `batchtopk`, `matryoshka_batchtopk`: relu(p) where p is above a threshold, else 0. A
  BatchTopK looks at a whole batch while it trains, and at one threshold from then on;
- `topk`: relu(p) of the k largest p of a token, 0 elsewhere;
- `gated`: relu(exp(r_mag) (p - b_enc) + b_mag) where p is above 0, else 0.

The reconstruction is codes W_dec + b_dec, with the normalisation undone. Codes that were scaled by
decoder norms in training are brought to this form when they are read.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar
from urllib.parse import quote

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.codecs.active import decode_active
from emlens.codecs.codec import ActiveCodes, CodecError, Codes, SparseCodes
from emlens.codecs.encoder import Encoder, decode_codes
from emlens.codecs.frozen import check_k, fingerprint_codec, freeze_weights, move_codec
from emlens.codecs.inputs import (
    cast_rows,
    check_activations,
    check_codes,
    check_latents,
    check_range,
)
from emlens.codecs.normalization import NORMALIZATIONS, Normalization, normalize, restore
from emlens.codecs.rectifier import Rectifier, read_floor
from emlens.sites import Site

WITH_THRESHOLD = ("jumprelu", "batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "gated", "topk", *WITH_THRESHOLD)
NEURONPEDIA = "https://www.neuronpedia.org"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sae(Result):
    """A sparse autoencoder of one site's activations, its weights frozen.

    It computes in the dtype of its weights, and nothing it does changes it.

    Raises:
        CodecError: an unknown architecture, or weights that are missing, superfluous, not finite,
            or of sizes, dtypes or devices that differ.
    """

    kind: ClassVar[str] = "sae"

    name: str
    """Its source, as it was written."""
    architecture: str
    """One of `ARCHITECTURES`."""
    site: Site
    """Whose activations it takes; those with heads with the heads side by side."""
    positions: str = "all"
    """Which tokens it was trained on."""
    W_enc: Float[Tensor, "d_in d_sae"]
    """Encoder."""
    b_enc: Float[Tensor, " d_sae"]
    """Its bias; of a gated autoencoder the bias of the gate."""
    W_dec: Float[Tensor, "d_sae d_in"]
    """What each latent adds to the (normalised) reconstruction, as a row."""
    b_dec: Float[Tensor, " d_in"]
    """What every reconstruction begins with."""
    threshold: Float[Tensor, " d_sae"] | None = None
    """What p must be above; one below zero is as one of zero."""
    k: int | None = None
    """How many latents of a token may be active; only of `topk`."""
    r_mag: Float[Tensor, " d_sae"] | None = None
    """Logarithm of how much longer the encoder of magnitudes is; only of `gated`."""
    b_mag: Float[Tensor, " d_sae"] | None = None
    """Bias of the magnitudes; only of `gated`."""
    apply_b_dec_to_input: bool = True
    """Whether b_dec is subtracted before encoding."""
    normalization: Normalization = "none"
    """What is done to each row before that."""
    base_name: str | None = None
    """Model that it was trained on, as its source calls it."""
    base_fingerprint: str | None = None
    """Of that model's weights, where that is known."""
    neuronpedia_id: str | None = None
    """Where Neuronpedia describes its latents."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise CodecError(
                f"architecture: {self.architecture!r} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        if self.normalization not in NORMALIZATIONS:
            raise CodecError(
                f"normalization: {self.normalization!r} is not supported; supported are "
                f"{', '.join(NORMALIZATIONS)}"
            )
        d_in, d_sae = self.W_enc.shape
        gated, bounded = self.architecture == "gated", self.architecture in WITH_THRESHOLD
        freeze_weights(
            self,
            {
                "W_enc": (d_in, d_sae),
                "b_enc": (d_sae,),
                "W_dec": (d_sae, d_in),
                "b_dec": (d_in,),
                "threshold": (d_sae,) if bounded else None,
                "r_mag": (d_sae,) if gated else None,
                "b_mag": (d_sae,) if gated else None,
            },
        )
        check_k(self.architecture, self.k, d_sae)

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def fingerprint(self) -> str:
        """Of its weights and of how they are used; the same weights in another dtype differ."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_codec(self)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Codes:
        """Codes of activations.

        A processor is fastest with up to 2^22 codes (16 MiB of float32) a call: memory of larger
        tensors is fetched anew by every call.

        Raises:
            CodecError: activations of another width or device, or that are not finite; in half
                precision also rows or codes that it cannot hold.
        """
        rows, scale, shift = self._prepare(x)
        values = check_range("codes", self._encoder.encode(rows), self)
        return Codes(values=values, scale=scale, shift=shift)

    def encode_latents(
        self, x: Float[Tensor, "n d_in"], latents: Sequence[int]
    ) -> Float[Tensor, "n k"]:
        """Codes of some latents: those columns of `encode`, to rounding.

        Of a `topk` autoencoder all latents are encoded, as a latent is active only if few others
        are more so.

        Raises:
            CodecError: as `encode`; or latents that there are not.
        """
        chosen = check_latents(latents, self.d_sae)
        made = self._encoder.encode_latents(self._prepare(x)[0], chosen)
        return check_range("codes", made, self)

    def encode_sparse(self, x: Float[Tensor, "n d_in"], *, k: int) -> SparseCodes:
        """The k largest codes of each token, in memory that does not grow with n x d_sae.

        Of equal codes the lower latent goes first. Where fewer than k latents are active, the
        lowest inactive ones stand beside codes of 0, so that the latents of a row all differ.

        Raises:
            CodecError: as `encode`; or a k below 1 or above d_sae.
        """
        rows, scale, shift = self._prepare(x)
        found = self._encoder.find_largest(rows, k)
        check_range("codes", found.values, self)
        return dataclasses.replace(found, scale=scale, shift=shift)

    @torch.no_grad()
    def encode_active(self, x: Float[Tensor, "n d_in"]) -> ActiveCodes:
        """The codes that are not 0, to rounding, without the time it takes to write all others.

        Raises:
            CodecError: as `encode`.
        """
        rows, scale, shift = self._prepare(x)
        found = self._encoder.find_active(rows)
        check_range("codes", found.values, self)
        return dataclasses.replace(found, scale=scale, shift=shift)

    def decode(self, codes: Codes | SparseCodes | ActiveCodes) -> Float[Tensor, "n d_in"]:
        """Activations as the codes say they are.

        Raises:
            CodecError: codes of another number of latents, or without the scale that this codec's
                normalisation needs; or a reconstruction that half precision cannot hold.
        """
        self._check_codes(codes)
        if isinstance(codes, ActiveCodes):
            rows = decode_active(codes, W_dec=self.W_dec, b_dec=self.b_dec)
        else:
            indices = codes.indices if isinstance(codes, SparseCodes) else None
            rows = decode_codes(codes.values, indices, W_dec=self.W_dec, b_dec=self.b_dec)
        made = restore(rows, codes.scale, codes.shift).to(self.W_dec.dtype)
        return check_range("reconstructions", made, self)

    def link(self, latent: int) -> str | None:
        """Where others describe a latent, if there is such a place."""
        check_latents([latent], self.d_sae)
        if self.neuronpedia_id is None:
            return None
        return f"{NEURONPEDIA}/{quote(self.neuronpedia_id)}/{latent}"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Sae":
        """The same codec elsewhere or in another precision."""
        return move_codec(self, device, dtype)

    @cached_property
    def _encoder(self) -> Encoder:
        rectifier = Rectifier(floor=read_floor(self.threshold))
        if self.r_mag is not None and self.b_mag is not None:
            gain = check_range("magnitudes (exp(r_mag))", self.r_mag.exp(), self)
            rectifier = Rectifier(gain=gain, offset=self.b_mag - gain * self.b_enc)
        return Encoder(weight=self.W_enc, bias=self.b_enc, rectifier=rectifier, k=self.k)

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        check_activations("x", x, self)
        # In float32 at least: the norm of a row that half precision holds may be beyond it.
        wide = torch.promote_types(self.W_enc.dtype, torch.float32)
        rows, scale, shift = normalize(x.to(wide), self.normalization)
        # Subtracted here, not folded into the bias: at sites where b_dec is long the difference of
        # two large products would lose digits, and this costs 1 / d_sae of a product.
        rows = rows - self.b_dec if self.apply_b_dec_to_input else rows
        return cast_rows("x", rows, self, given=x.dtype), scale, shift

    def _check_codes(self, codes: Codes | SparseCodes | ActiveCodes) -> None:
        check_codes(codes, self.d_sae)
        wanted = (self.normalization != "none", self.normalization == "layer_norm")
        if (codes.scale is not None, codes.shift is not None) != wanted:
            raise CodecError(
                f"codes: scale and shift do not fit the normalization {self.normalization!r} of "
                f"{self.name}: decode what its own encode gave"
            )
