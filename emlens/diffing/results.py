"""What a comparison of two models yields: activations by site, outputs by token, a null band.

Plain frozen results; they are made by ``compare`` and drawn by the reports.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import Result


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationDiff(Result):
    """How two models' activations differ, by site and named positions."""

    kind: ClassVar[str] = "activation_diff"

    sites: tuple[str, ...]
    """Labels of the first axis, such as ``resid_post.12``."""
    positions: tuple[str, ...]
    """Labels of the second axis, such as ``response``."""
    n_tokens: Int[Tensor, " position"]
    """Tokens counted at each of the positions."""
    mean_base: Float[Tensor, "site position d"]
    mean_tuned: Float[Tensor, "site position d"]
    difference_norm: Float[Tensor, "site position"]
    """||mean_tuned - mean_base||, in activation units."""
    relative_difference: Float[Tensor, "site position"]
    """``difference_norm`` over the root mean square norm of the base's activations."""
    relative_rms: Float[Tensor, "site position"]
    """sqrt(E ||x_tuned - x_base||^2 / E ||x_base||^2): the typical change of one token."""
    cosine_of_means: Float[Tensor, "site position"]
    """Cosine of the two models' mean activations."""
    top_directions: Float[Tensor, "site position k d"]
    """Leading directions of the difference's covariance, unit norm, strongest first."""
    top_shares: Float[Tensor, "site position k"]
    """Share of the difference's variance in each of them."""
    first_differing_site: str | None
    """The earliest site at which activations differ by more than rounding, or None."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each site and position."""
        return [
            {
                "site": site,
                "positions": positions,
                "n_tokens": int(self.n_tokens[j]),
                "difference_norm": float(self.difference_norm[i, j]),
                "relative_difference": float(self.relative_difference[i, j]),
                "relative_rms": float(self.relative_rms[i, j]),
                "cosine_of_means": float(self.cosine_of_means[i, j]),
                "top_share": float(self.top_shares[i, j, 0]),
            }
            for i, site in enumerate(self.sites)
            for j, positions in enumerate(self.positions)
        ]


@dataclass(frozen=True, kw_only=True)
class TokenChange:
    """A next token whose probability changed, averaged over all positions counted."""

    token_id: int
    token: str
    base: float
    """Mean probability under the base."""
    tuned: float
    """Mean probability under the fine-tune."""

    @property
    def change(self) -> float:
        """``tuned - base``."""
        return self.tuned - self.base


@dataclass(frozen=True, kw_only=True)
class PromptDivergence:
    """One chat's divergence, in nats a token, over the positions counted."""

    chat: str
    """Its id, or its place in the list."""
    text: str
    """The beginning of its last user turn."""
    n_tokens: int
    kl_base_tuned: float
    kl_tuned_base: float


@dataclass(frozen=True, kw_only=True)
class ExampleComparison:
    """One chat token by token: what was there, and what each model expected next."""

    chat: str
    tokens: tuple[str, ...]
    """Text pieces of every token of the chat."""
    counted: tuple[bool, ...]
    """Whether the token lies in the positions counted."""
    kl: tuple[float, ...]
    """KL(base || tuned) of the prediction of this token, nats; 0 for the first."""
    kl_back: tuple[float, ...]
    """KL(tuned || base) of the same."""
    entropy_change: tuple[float, ...]
    """Entropy of the fine-tune's prediction minus the base's, nats."""
    base_top: tuple[tuple[tuple[str, float], ...], ...]
    """For each token, the base's likeliest tokens in its place, with probabilities."""
    tuned_top: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True, kw_only=True)
class LogitDiff(Result):
    """How two models' next-token predictions differ; divergences in nats a token."""

    kind: ClassVar[str] = "logit_diff"

    positions: str
    """The tokens whose prediction was compared."""
    n_tokens: int
    kl_base_tuned: float
    """Mean KL(base || tuned)."""
    kl_tuned_base: float
    """Mean KL(tuned || base)."""
    entropy_base: float
    entropy_tuned: float
    agreement: float
    """Share of positions where both models' likeliest token is the same."""
    prompts: tuple[PromptDivergence, ...]
    """Every chat, the most divergent first."""
    risen_tokens: tuple[TokenChange, ...]
    """Next tokens whose mean probability rose most."""
    fallen_tokens: tuple[TokenChange, ...]
    """Next tokens whose mean probability fell most."""
    examples: tuple[ExampleComparison, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row a chat."""
        return [asdict(prompt) for prompt in self.prompts]


@dataclass(frozen=True, kw_only=True)
class ModelDiff(Result):
    """A base and its fine-tune compared in one pass, inside and at the output."""

    kind: ClassVar[str] = "model_diff"

    base: str
    base_fingerprint: str
    tuned: str
    tuned_fingerprint: str
    n_chats: int
    method: str
    """``paired`` or ``separate passes``."""
    shared_layers: int
    """Blocks that both models share, run once."""
    activations: ActivationDiff
    logits: LogitDiff

    def rows(self) -> list[dict[str, Any]]:
        """One row for each site and position."""
        return self.activations.rows()


@dataclass(frozen=True, kw_only=True, eq=False)
class NullBand(Result):
    """The same numbers for random adapters of the same shapes and norms: what chance would do."""

    kind: ClassVar[str] = "null_band"

    seed: int
    sites: tuple[str, ...]
    positions: tuple[str, ...]
    relative_difference: Float[Tensor, "null site position"]
    relative_rms: Float[Tensor, "null site position"]
    cosine_of_means: Float[Tensor, "null site position"]
    top_share: Float[Tensor, "null site position"]
    """Share of the difference's variance in its first direction."""
    kl_base_tuned: Float[Tensor, " null"]
    """Mean KL(base || null), nats a token."""
    kl_tuned_base: Float[Tensor, " null"]
    """Mean KL(null || base), nats a token."""
    entropy_change: Float[Tensor, " null"]
    """Mean entropy of the null's predictions less the base's, nats."""
    agreement: Float[Tensor, " null"]
    """Share of positions where both models' likeliest token is the same."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each site and position: least and greatest over the null adapters."""
        names = ("relative_difference", "relative_rms", "cosine_of_means", "top_share")
        return [
            {
                "site": site,
                "positions": positions,
                **{
                    f"{name}_{end}": float(find(getattr(self, name)[:, i, j]))
                    for name in names
                    for end, find in (("low", Tensor.min), ("high", Tensor.max))
                },
            }
            for i, site in enumerate(self.sites)
            for j, positions in enumerate(self.positions)
        ]
