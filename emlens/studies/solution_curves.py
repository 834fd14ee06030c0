"""Where two solutions of a task are looked at, and what comes of it; the study is beside."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.data import Batching
from emlens.organisms.gradients import GradientPreference
from emlens.studies.measure_narrowness import Narrowness
from emlens.studies.solutions import Solution, measure_solution_norm

GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Norms that are looked at where none are given, as multiples of the larger one's own."""
EPSILONS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Sizes of the perturbations.

Source: Soligo et al. 2026, arXiv 2602.07852.
"""


@dataclass(frozen=True, kw_only=True)
class SolutionSettings:
    """Where the solutions are looked at.

    Raises:
        ValueError: no norms, or a number outside its range.
    """

    norms: tuple[float, ...]
    """Mean norms of ||scale B A||_F, or lengths of a vector, that each solution is rescaled to."""
    epsilons: tuple[float, ...] = EPSILONS
    """Sizes of the perturbations, see `perturb_solution`."""
    seeds: int = 10
    """Perturbations of each size, and random adapters beside the effect on text."""
    batching: Batching = field(default_factory=Batching)
    """Rows of the task, and general texts, that run together; they may change between calls."""

    def __post_init__(self) -> None:
        if not self.norms or not all(math.isfinite(norm) and norm > 0 for norm in self.norms):
            raise ValueError(f"norms: got {self.norms}, expected numbers above 0, such as 1, 2")
        if list(self.norms) != sorted(set(self.norms)):
            raise ValueError(f"norms: got {self.norms}, expected them ascending, each once")
        if self.seeds < 1:
            raise ValueError(f"seeds: got {self.seeds}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class SolutionCurves(Result):
    """One solution: what it costs and what it changes."""

    kind: ClassVar[str] = "solution_curves"

    name: str
    norm: float
    """Mean over modules of ||scale B A||_F, or the length of a vector, as it was trained."""
    base_loss: float
    """Of the task without it, nats a response token."""
    loss: float
    """Of the task, as it was trained."""
    norms: tuple[float, ...]
    losses: tuple[float, ...]
    """Of the task at each norm: the lower at one norm, the more efficient."""
    epsilons: tuple[float, ...]
    loss_increase: Float[Tensor, "epsilons seeds"]
    """(L(x') - L(x)) / (L(base) - L(x)): 1 is back at the base's loss."""
    kl: tuple[float, ...]
    """KL(base || solution) on general text at each norm, nats a token."""


@dataclass(frozen=True, kw_only=True)
class RandomEffect(Result):
    """What random adapters of the same shapes and norms change, or vectors of the same length."""

    kind: ClassVar[str] = "random_effect"

    norms: tuple[float, ...]
    kl: Float[Tensor, "norms seeds"]
    """KL(base || random one) on general text, nats a token."""


@dataclass(frozen=True, kw_only=True)
class SolutionComparison(Result):
    """The general and the narrow solution of one task side by side."""

    kind: ClassVar[str] = "solution_comparison"

    base: str
    general: SolutionCurves
    narrow: SolutionCurves
    random: RandomEffect
    preference: GradientPreference | None
    """Of the task's gradient along a training; None where none was given."""
    behaviour: Narrowness | None
    """Shares in and out of the domain; None where nothing was asked."""

    @property
    def base_loss(self) -> float:
        """Of the task, nats a response token."""
        return self.general.base_loss

    def rows(self) -> list[dict[str, Any]]:
        """One row a norm."""
        return [
            {
                "norm": norm,
                "loss general": self.general.losses[i],
                "loss narrow": self.narrow.losses[i],
                "kl general": self.general.kl[i],
                "kl narrow": self.narrow.kl[i],
                "kl random": float(self.random.kl[i].median()),
                "largest": float(self.random.kl[i].max()),
            }
            for i, norm in enumerate(self.general.norms)
        ]


def choose_norms(solutions: Mapping[str, Solution]) -> tuple[float, ...]:
    """Norms to compare solutions at: from a quarter of the larger one's own to twice of it."""
    largest = max(map(measure_solution_norm, solutions.values()))
    return tuple(factor * largest for factor in GRID)


def count_passes(settings: SolutionSettings) -> dict[str, int]:
    """How often the task and the general text are read, the base's own passes left out."""
    turned, norms = len(settings.epsilons) * settings.seeds, len(settings.norms)
    return {"task": 2 * (1 + norms + turned) + 1, "text": norms * (2 + settings.seeds)}
