"""Latent scaling: whether a crosscoder's latent is of both models or of one alone.

A decoder norm near zero does not say so by itself: a crosscoder can leave a latent out of a model
that has it. One trained with an L1 penalty does that often: it had 3,176 tuned-only latents by
their norms where BatchTopK had 134 (Minder et al. 2025). So each model is asked how much of the
latent it holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.codecs.crosscoder import Crosscoder
from emlens.numerics.validation import EmptyAccumulatorError, WidthError, check_finite

MODELS = ("base", "tuned")
NU_ERROR = 0.2
"""Below it, what a model's reconstruction leaves unsaid lacks the latent (Minder et al. 2025)."""
NU_RECONSTRUCTION = 0.5
"""Below it, what a model's reconstruction says lacks the latent (Minder et al. 2025)."""
Kind = Literal["shared", "base_only", "tuned_only", "undetermined"]
_CHUNK_VALUES = 2**22
"""Codes made at a time: 16 MiB in float32, for which a processor need not fetch memory anew."""


@dataclass(frozen=True, kw_only=True)
class LatentScaling(Result):
    """How strongly each latent, along one model's decoder vector, is in either model."""

    kind: ClassVar[str] = "latent_scaling"

    codec: str
    """The crosscoder's name."""
    codec_fingerprint: str
    """Of its weights."""
    site: str
    """Whose activations."""
    n_rows: int
    """Tokens measured."""
    n_active: Int[Tensor, " d_sae"]
    """At how many of them each latent is active."""
    decoder_norm: Float[Tensor, "model d_sae"]
    """Of each model's decoder vectors, in units of the activations."""
    beta_reconstruction: Float[Tensor, "vector model d_sae"]
    """By what codes times a decoder vector (base's or tuned's, the first axis) must be multiplied
    to be nearest to a model's reconstruction (the second axis); NaN where the latent is never
    active or the vector is 0."""
    beta_error: Float[Tensor, "vector model d_sae"]
    """The same for what is left of the model without this latent's contribution."""
    nu_reconstruction: Float[Tensor, "vector d_sae"]
    """Of the other model's beta the share of the vector's own; NaN where that is not above 0."""
    nu_error: Float[Tensor, "vector d_sae"]
    """As `nu_reconstruction`."""

    def latents(self, kind: Kind) -> Int[Tensor, " n"]:
        """The latents of one kind.

        `tuned_only`: along the tuned model's vector nu_error < 0.2 and nu_reconstruction < 0.5, and
        that vector is the longer one; `base_only` likewise; `undetermined`: a nu of the longer
        vector is not a number; `shared`: all others.
        """
        longer = (self.decoder_norm[1] > self.decoder_norm[0]).long()[None]
        error = self.nu_error.gather(0, longer)[0]
        reconstruction = self.nu_reconstruction.gather(0, longer)[0]
        unknown = error.isnan() | reconstruction.isnan()
        alone = (error < NU_ERROR) & (reconstruction < NU_RECONSTRUCTION) & ~unknown
        chosen = {
            "tuned_only": alone & (longer[0] == 1),
            "base_only": alone & (longer[0] == 0),
            "undetermined": unknown,
            "shared": ~alone & ~unknown,
        }
        return chosen[kind].nonzero()[:, 0]

    def rows(self) -> list[dict[str, int | str]]:
        """How many latents are of each kind."""
        kinds: tuple[Kind, ...] = ("shared", "base_only", "tuned_only", "undetermined")
        return [{"kind": kind, "latents": len(self.latents(kind))} for kind in kinds]


class LatentScalingAccumulator:
    """Counts up what `LatentScaling` says, in float64.

    For a vector d, codes f and rows Y: beta = d . (Y^T f) / (||f||^2 ||d||^2), which is least
    squares of Y on the outer product of f and d. Y is a model's reconstruction, or its error plus
    the latent's own contribution f_j d_j of that model: without that term a perfect crosscoder
    would leave 0 / 0.

    Args:
        decoders: of base and tuned, in this order.

    Source: Minder et al. 2025, arXiv 2504.02922, latent scaling (section 3 and its appendix).
    """

    def __init__(self, decoders: Float[Tensor, "models d_sae d_in"]) -> None:
        if decoders.ndim != 3 or len(decoders) != len(MODELS):
            raise WidthError(
                f"decoders has shape {tuple(decoders.shape)}, expected [2, d_sae, d_in]: of base "
                "and tuned"
            )
        self.decoders = decoders
        d_sae = decoders.shape[1]
        self.along_reconstruction = torch.zeros(2, 2, d_sae, dtype=torch.float64)
        self.along_error = torch.zeros(2, 2, d_sae, dtype=torch.float64)
        self.squares = torch.zeros(d_sae, dtype=torch.float64)
        self.active = torch.zeros(d_sae, dtype=torch.int64)
        self.n_rows = 0

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "2 n d_in"],
        codes: Float[Tensor, "n d_sae"],
        reconstruction: Float[Tensor, "2 n d_in"],
    ) -> None:
        """Take in some tokens: both models' activations, codes, and both reconstructions.

        Raises:
            WidthError: sizes that do not fit one another.
            NonFiniteError: NaN or infinity. What was counted before stays as it was.
        """
        _, d_sae, d_in = self.decoders.shape
        n = codes.shape[0]
        if codes.shape[1] != d_sae or x.shape != (2, n, d_in) or reconstruction.shape != x.shape:
            raise WidthError(
                f"x has shape {tuple(x.shape)}, codes {tuple(codes.shape)} and reconstruction "
                f"{tuple(reconstruction.shape)}, expected [2, n, {d_in}], [n, {d_sae}] and the "
                "first again"
            )
        # In float32 at least: half precision is no place for differences, nor for sums.
        codes = codes.to(torch.promote_types(codes.dtype, torch.float32))
        decoders, rebuilt = self.decoders.to(codes), reconstruction.to(codes)
        said = self._sum_along(rebuilt, codes, decoders)
        left = self._sum_along(x.to(codes) - rebuilt, codes, decoders)
        squares = codes.double().square().sum(0)
        check_finite("x", said, left, squares)
        self.along_reconstruction += said.cpu()
        self.along_error += left.cpu()
        self.squares += squares.cpu()
        self.active += (codes > 0).sum(0).cpu()
        self.n_rows += n

    def merge(self, other: "LatentScalingAccumulator") -> None:
        """Take in what another accumulator of the same decoders has seen; it stays as it was."""
        if not torch.equal(other.decoders, self.decoders):
            raise ValueError("other has other decoders: it counts another crosscoder")
        self.along_reconstruction += other.along_reconstruction
        self.along_error += other.along_error
        self.squares += other.squares
        self.active += other.active
        self.n_rows += other.n_rows

    def result(self, *, codec: str, codec_fingerprint: str, site: str) -> LatentScaling:
        """What was counted so far.

        Raises:
            EmptyAccumulatorError: no token was seen.
        """
        if not self.n_rows:
            raise EmptyAccumulatorError("LatentScalingAccumulator has seen no token")
        decoders = self.decoders.double().cpu()
        # d of the first axis times the decoder vector of the second.
        products = torch.einsum("vsd,msd->vms", decoders, decoders)
        lengths = torch.diagonal(products).T[:, None]
        whole = self.squares * lengths
        beta_error = (self.along_error + self.squares * products) / whole
        beta_reconstruction = self.along_reconstruction / whole
        return LatentScaling(
            codec=codec,
            codec_fingerprint=codec_fingerprint,
            site=site,
            n_rows=self.n_rows,
            n_active=self.active.clone(),
            decoder_norm=lengths[:, 0].sqrt(),
            beta_reconstruction=_undefined(beta_reconstruction, whole),
            beta_error=_undefined(beta_error, whole),
            nu_reconstruction=_ratio(beta_reconstruction),
            nu_error=_ratio(beta_error),
        )

    @staticmethod
    def _sum_along(y: Tensor, codes: Tensor, decoders: Tensor) -> Tensor:
        """Sum over rows of f_j (y . d_j), for either vector d and either model's y."""
        return torch.stack(
            [
                torch.stack(
                    [(codes * (rows @ vectors.T)).sum(0, dtype=torch.float64) for rows in y]
                )
                for vectors in decoders
            ]
        )


@torch.no_grad()
def measure_latent_scaling(
    crosscoder: Crosscoder, pairs: Iterable[Float[Tensor, "2 _ d_in"]]
) -> LatentScaling:
    """Measure latent scaling on activations of base and tuned at the same tokens.

    Args:
        crosscoder: of base and tuned, in this order.
        pairs: activations at its site, such as `shuffle_activations(..., paired=True)`.

    Raises:
        EmptyAccumulatorError: no tokens.
    """
    found = LatentScalingAccumulator(crosscoder.W_dec)
    for part in pairs:
        for chunk in part.split(max(1, _CHUNK_VALUES // crosscoder.d_sae), dim=1):
            codes = crosscoder.encode(chunk[0], chunk[1])
            found.update(chunk, codes.values, crosscoder.decode(codes))
    return found.result(
        codec=crosscoder.name,
        codec_fingerprint=crosscoder.fingerprint,
        site=str(crosscoder.site),
    )


def _ratio(beta: Float[Tensor, "vector model d_sae"]) -> Float[Tensor, "vector d_sae"]:
    """The other model's beta over that of the model whose vector it is."""
    own = torch.diagonal(beta).T
    other = torch.stack([beta[0, 1], beta[1, 0]])
    return torch.where(own > 0, other / own, torch.nan)


def _undefined(beta: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, beta, torch.nan)
