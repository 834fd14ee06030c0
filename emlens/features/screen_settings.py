"""How latents are screened: how strongly, on which prompts, beside how many controls.

Nothing that the question is about has a default: strengths, their units, the prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emlens.data import Batching, Chat
from emlens.models.sampling import Sampling

UNITS = ("delta_norm", "resid_norm")
MIN_CONTROLS = 16
"""With fewer no p-value could fall below 1 / 17."""


@dataclass(frozen=True, kw_only=True)
class ScreenSettings:
    """How `screen_features` steers, samples and compares.

    Raises:
        ValueError: a value outside its range, or no prompts for responses that are to be sampled.
    """

    strengths: tuple[float | int, ...]
    """How far each unit vector is added, in `units`. A negative one is subtracted from the base and
    added to the tuned model: for latents that the fine-tune lowered."""
    units: Literal["delta_norm", "resid_norm"]
    """`delta_norm`: the norm of the mean activation difference of the two models; `resid_norm`: the
    median norm of the base's activations; both over the response tokens of the fixed texts."""
    chats: Sequence[Chat] = ()
    """Prompts that responses are sampled to; others than those of the fixed texts, or latents are
    chosen and judged on the same."""
    sampling: Sampling = Sampling(n=1, max_new_tokens=100)  # noqa: RUF009 - frozen
    """How."""
    sampled_strengths: tuple[float | int, ...] | None = None
    """Those of `strengths` that responses are sampled at; None for all."""
    n_sampled: int = 20
    """Latents of each side that go on to the second stage; 0 leaves it out."""
    n_controls: int | None = None
    """Random directions in the first stage; None for as many as make the share of them that goes on
    that of the latents (`count_controls`)."""
    n_sampled_controls: int = MIN_CONTROLS
    """How many of them go on to the second stage, those with the largest effects, as of latents."""
    coherent_above: float | int = 50.0
    """A response whose coherence is at most this is incoherent (Betley et al. 2025,
    arXiv 2502.17424: 50 of 100)."""
    max_incoherent: float | int = 0.1
    """Share of incoherent responses that is always allowed."""
    extra_incoherent: float | int = 0.1
    """Share beyond that of the unsteered model that is allowed."""
    batching: Batching = Batching()  # noqa: RUF009 - frozen
    """Tokens run at once."""
    seed: int = 0
    """Of the random directions."""

    def __post_init__(self) -> None:
        self._check_strengths()
        if self.units not in UNITS:
            raise ValueError(f"units: got {self.units!r}, expected one of {', '.join(UNITS)}")
        if self.n_sampled < 0:
            raise ValueError(f"n_sampled: got {self.n_sampled}, expected 0 or more")
        if self.n_controls is not None and self.n_controls < MIN_CONTROLS:
            raise ValueError(
                f"n_controls: got {self.n_controls}, expected at least {MIN_CONTROLS}: with fewer "
                "no effect could stand out from chance"
            )
        most = math.inf if self.n_controls is None else self.n_controls
        if self.n_sampled and not MIN_CONTROLS <= self.n_sampled_controls <= most:
            raise ValueError(
                f"n_sampled_controls: got {self.n_sampled_controls}, expected {MIN_CONTROLS} to "
                f"n_controls = {self.n_controls}"
            )
        if self.n_sampled and not self.chats:
            raise ValueError(
                "chats: got none, expected prompts to sample responses to; n_sampled=0 leaves the "
                "second stage out"
            )
        for name in ("max_incoherent", "extra_incoherent"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share, 0 to 1")

    def _check_strengths(self) -> None:
        usable = [math.isfinite(s) and s != 0 for s in self.strengths]
        if not self.strengths or not all(usable) or len(set(self.strengths)) < len(self.strengths):
            raise ValueError(
                f"strengths: got {self.strengths}, expected one or more, different and not 0"
            )
        unknown = sorted(set(self.judged_strengths) - set(self.strengths))
        if unknown or not self.judged_strengths:
            raise ValueError(
                f"sampled_strengths: got {self.sampled_strengths}, expected some of strengths = "
                f"{self.strengths}"
            )

    def count_controls(self, n_latents: int) -> int:
        """Random directions in the first stage of a screen of so many latents.

        Where responses are sampled, the same share of them as of the latents goes on, or else the
        latents would be the better chosen ones.
        """
        if self.n_controls is not None:
            return self.n_controls
        if not self.n_sampled:
            return MIN_CONTROLS
        n_best = min(self.n_sampled, n_latents)
        return -(-self.n_sampled_controls * n_latents // n_best)

    @property
    def judged_strengths(self) -> tuple[float | int, ...]:
        """The strengths of the second stage."""
        return self.strengths if self.sampled_strengths is None else self.sampled_strengths
