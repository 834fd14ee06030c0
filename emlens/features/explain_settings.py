"""How much is kept of a corpus for each latent, and who puts it into words."""

from collections.abc import Callable
from dataclasses import dataclass

from emlens.data import Batching
from emlens.features.cards import FeatureCard

Explainer = Callable[[FeatureCard], str]
"""Says in words what a latent stands for, by its card: a person, a model, a rule."""


@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """How `explain_features` looks at a corpus.

    Raises:
        ValueError: a number below its least.
    """

    n_top: int = 10
    """Texts in which the latent is most active."""
    per_decile: int = 1
    """Windows from each tenth of the active tokens, by strength; 0 for none."""
    sample: int = 200
    """Active tokens drawn for each latent, that the tenths are made of."""
    before: int = 12
    """Tokens of a window before the one in question."""
    after: int = 6
    """And after it."""
    n_tokens: int = 8
    """Tokens of either end of the logit lens."""
    positions: str | None = None
    """Which tokens are looked at; by default those that the codec was trained on."""
    explainer: Explainer | None = None
    """Called with each finished card."""
    batching: Batching = Batching()  # noqa: RUF009 - frozen
    """Tokens run at once, both models of a pair counted."""
    seed: int = 0
    """Of the sample."""

    def __post_init__(self) -> None:
        least = {"n_top": 1, "per_decile": 0, "sample": 10, "before": 0, "after": 0, "n_tokens": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {bound}")
