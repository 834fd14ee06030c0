"""What streaming over activations leaves; not the activations themselves."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import Result


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics(Result):
    """Statistics of activations by stream, site and positions; those not asked for are None."""

    kind: ClassVar[str] = "activation_statistics"

    base: str
    """The base's source, or the only model's."""
    base_fingerprint: str
    tuned: str | None
    """The fine-tune's source, of a pair."""
    tuned_fingerprint: str | None
    """Of a full checkpoint."""
    adapter_fingerprint: str | None
    tokenizer_fingerprint: str
    dtype: str
    """In which the models ran."""
    interventions: tuple[str, ...]
    """What acted on the models, one JSON object each; vectors by their hashes, `model` is `base` or
    `tuned` of a pair."""
    streams: tuple[str, ...]
    """`model`; of a pair `base`, `tuned` and `difference` (tuned minus base, token by token)."""
    sites: tuple[str, ...]
    positions: tuple[str, ...]
    n_tokens: Int[Tensor, " position"]
    mean: Float[Tensor, "stream site position d"] | None
    """Mean activation."""
    variance: Float[Tensor, "stream site position d"] | None
    """Population variance per coordinate."""
    covariance: Float[Tensor, "stream site position d d"] | None
    """Population covariance."""
    norm_levels: tuple[float, ...]
    """Which quantiles of the norm; empty where none was asked for."""
    norm_quantiles: Float[Tensor, "stream site position level"] | None
    """Quantiles of the norm of one token's activation, good to half a percent."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each stream, site and positions, vectors as their norms."""
        return [
            {"stream": stream, "site": site, "positions": positions}
            | {"n_tokens": int(self.n_tokens[k])}
            | self._numbers(i, j, k)
            for i, stream in enumerate(self.streams)
            for j, site in enumerate(self.sites)
            for k, positions in enumerate(self.positions)
        ]

    def _numbers(self, i: int, j: int, k: int) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.mean is not None:
            found["mean_norm"] = float(self.mean[i, j, k].norm())
        if self.variance is not None:
            found["total_variance"] = float(self.variance[i, j, k].sum())
        if self.covariance is not None:
            found["total_variance"] = float(self.covariance[i, j, k].trace())
        if self.norm_quantiles is not None:
            levels = zip(self.norm_levels, self.norm_quantiles[i, j, k].tolist(), strict=True)
            found |= {f"norm_{level:g}": value for level, value in levels}
        return found
