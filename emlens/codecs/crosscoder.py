"""The runtime of crosscoders: codes that a base and its fine-tune share; not for training one.

With x_m the activations of model m at the same token, p = sum_m x_m W_enc_m + b_enc, codes are made
of p as an `Sae` of the same architecture makes them, and model m's reconstruction is
codes W_dec_m + b_dec_m. What was scaled in training (rows, codes) is folded into the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.codecs.codec import CodecError, Codes, SparseCodes
from emlens.codecs.encoder import Encoder, decode_codes
from emlens.codecs.frozen import check_k, fingerprint_codec, freeze_weights, move_codec
from emlens.codecs.inputs import (
    cast_rows,
    check_activations,
    check_codes,
    check_latents,
    check_range,
)
from emlens.codecs.rectifier import Rectifier, read_floor
from emlens.sites import Site

MODELS = ("base", "tuned")
"""What the first axis of a crosscoder's weights stands for, in order."""
ARCHITECTURES = ("standard", "topk", "batchtopk")


@dataclass(frozen=True, kw_only=True, eq=False)
class Crosscoder(Result):
    """A sparse codec of the activations of two models at one site, its weights frozen.

    Raises:
        CodecError: an unknown architecture, or weights that are missing, superfluous, not finite,
            or of sizes, dtypes or devices that differ.
    """

    kind: ClassVar[str] = "crosscoder"

    name: str
    """Its source, as it was written."""
    architecture: str
    """`standard`, `topk` or `batchtopk`."""
    site: Site
    """Whose activations it takes."""
    positions: str = "all"
    """Which tokens it was trained on."""
    W_enc: Float[Tensor, "model d_in d_sae"]
    """Encoders of base and tuned."""
    b_enc: Float[Tensor, " d_sae"]
    """The bias of their sum."""
    W_dec: Float[Tensor, "model d_sae d_in"]
    """What each latent adds to a model's reconstruction, as a row."""
    b_dec: Float[Tensor, "model d_in"]
    """What every reconstruction of a model begins with."""
    threshold: Float[Tensor, " d_sae"] | None = None
    """What p must be above; only of `batchtopk`. One below zero is as one of zero."""
    k: int | None = None
    """How many latents of a token may be active; only of `topk`."""
    base_fingerprint: str | None = None
    """Of the base's weights."""
    tuned_fingerprint: str | None = None
    """Of what makes the tuned model: its adapter, or its weights."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise CodecError(
                f"architecture: {self.architecture!r} is not supported for crosscoders; supported "
                f"are {', '.join(ARCHITECTURES)}"
            )
        models, d_in, d_sae = self.W_enc.shape
        if models != len(MODELS):
            raise CodecError(f"W_enc is of {models} models, expected {len(MODELS)}: {MODELS}")
        freeze_weights(
            self,
            {
                "W_enc": (models, d_in, d_sae),
                "b_enc": (d_sae,),
                "W_dec": (models, d_sae, d_in),
                "b_dec": (models, d_in),
                "threshold": (d_sae,) if self.architecture == "batchtopk" else None,
            },
        )
        check_k(self.architecture, self.k, d_sae)

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[2]

    @cached_property
    def fingerprint(self) -> str:
        """Of its weights and of how they are used; the same weights in another dtype differ."""
        return fingerprint_codec(self)

    def encode(self, base: Float[Tensor, "n d_in"], tuned: Float[Tensor, "n d_in"]) -> Codes:
        """Codes of the two models' activations at the same tokens.

        Raises:
            CodecError: activations of different numbers of tokens, another width or device, or that
                are not finite; in half precision also rows or codes that it cannot hold.
        """
        values = self._encoder.encode(self._prepare(base, tuned))
        return Codes(values=check_range("codes", values, self))

    def encode_latents(
        self,
        base: Float[Tensor, "n d_in"],
        tuned: Float[Tensor, "n d_in"],
        *,
        latents: Sequence[int],
    ) -> Float[Tensor, "n k"]:
        """Codes of some latents: those columns of `encode`, to rounding.

        Raises:
            CodecError: as `encode`; or latents that there are not.
        """
        chosen = check_latents(latents, self.d_sae)
        made = self._encoder.encode_latents(self._prepare(base, tuned), chosen)
        return check_range("codes", made, self)

    def encode_sparse(
        self, base: Float[Tensor, "n d_in"], tuned: Float[Tensor, "n d_in"], *, k: int
    ) -> SparseCodes:
        """The k largest codes of each token, as `Sae.encode_sparse` gives them.

        Raises:
            CodecError: as `encode`; or a k below 1 or above d_sae.
        """
        found = self._encoder.find_largest(self._prepare(base, tuned), k)
        check_range("codes", found.values, self)
        return found

    def decode(self, codes: Codes | SparseCodes) -> Float[Tensor, "model n d_in"]:
        """Both models' activations as the codes say they are.

        Raises:
            CodecError: codes of another number of latents, or a reconstruction that half precision
                cannot hold.
        """
        check_codes(codes, self.d_sae)
        indices = codes.indices if isinstance(codes, SparseCodes) else None
        made = [
            decode_codes(codes.values, indices, W_dec=W_dec, b_dec=b_dec)
            for W_dec, b_dec in zip(self.W_dec, self.b_dec, strict=True)
        ]
        return check_range("reconstructions", torch.stack(made), self)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Crosscoder":
        """The same codec elsewhere or in another precision."""
        return move_codec(self, device, dtype)

    @cached_property
    def _encoder(self) -> Encoder:
        rectifier = Rectifier(floor=read_floor(self.threshold))
        weight = self.W_enc.reshape(-1, self.d_sae)
        return Encoder(weight=weight, bias=self.b_enc, rectifier=rectifier, k=self.k)

    def _prepare(self, base: Tensor, tuned: Tensor) -> Tensor:
        for name, x in zip(MODELS, (base, tuned), strict=True):
            check_activations(name, x, self)
        if len(base) != len(tuned):
            raise CodecError(
                f"tuned: {len(tuned)} rows beside {len(base)} of base; expected the same tokens"
            )
        return torch.cat(
            [
                cast_rows(name, x, self, given=x.dtype)
                for name, x in zip(MODELS, (base, tuned), strict=True)
            ],
            dim=1,
        )
