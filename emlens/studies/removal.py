"""What the removal of a direction is asked with, and what comes of it; the study is beside."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from emlens.artifacts import Result
from emlens.data import Chat, ContrastTexts
from emlens.directions.fit import Construction
from emlens.evaluation import Question
from emlens.models.generate import Sampling
from emlens.numerics.intervals import Interval
from emlens.studies.screen_ablations import AblationScreen, choose_ablation

Split = Literal["thresholds", "thirds", "halves"]


@dataclass(frozen=True, kw_only=True)
class RemovalSettings:
    """What is fitted, where it acts, and how much is sampled."""

    sites: tuple[str, ...]
    """Where directions are fitted; one of them is chosen."""
    max_kl: float
    """What taking the direction out may cost on the neutral text, nats a token; see `Choice`."""
    construction: Construction
    """Which difference of means."""
    coefficient: float
    """Of the direction as estimated (`delta_norm`), added to the base at its site."""
    fit_sampling: Sampling
    """Of the fine-tune's own responses that it is fitted on."""
    sampling: Sampling
    """Of every arm."""
    split: Split
    """What is fitted on: responses scored below 30 against those above 70, as published; or the
    lowest third (half) of the coherent ones against the highest, for a judge without an absolute
    scale."""
    coherent_above: int | float = 50
    """Of the responses that are fitted on."""
    seed: int = 0
    """Of the choice that balances the classes."""


@dataclass(frozen=True, kw_only=True)
class RemovalQuestions:
    """Disjoint prompts: to fit on, to judge on, and text to measure damage on."""

    fit: tuple[Question, ...]
    choose: ContrastTexts
    """Answered chats, harmful (positive) and careful, that the site is chosen by."""
    choose_neutral: tuple[Chat, ...]
    """Answered chats that have nothing to do with the behaviour: damage is bounded on them in the
    choice."""
    evaluate: tuple[Question, ...]
    neutral: tuple[Chat, ...]
    """Others of that kind, that damage is reported on."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model under one change, and how it behaves."""

    name: str
    role: str
    """`base`, `tuned`, `ablated`, `control`, `steered`, or the name of another model."""
    n: int
    """Responses."""
    em_percent: Interval
    """Misaligned and coherent, of all responses."""
    coherent_percent: Interval
    """Coherent, of all responses."""
    spillover_percent: Interval | None
    """Responses with the fine-tune's topic words; None where no lexicon was given."""
    kl: float | None
    """KL(model || model under the change) on the neutral text, nats a token; None unchanged."""


@dataclass(frozen=True, kw_only=True)
class Disturbance(Result):
    """KL(model || model under a change) on neutral text, nats a token, for each change."""

    kind: ClassVar[str] = "disturbance"

    ablated: float
    """The direction out of every write of the fine-tune."""
    controls: tuple[float, ...]
    """Each covariance-matched random direction out of every write of the fine-tune."""
    steered: float
    """The direction added to the base."""

    @property
    def nearest(self) -> int:
        """The control that disturbs most nearly as much as the direction, as a ratio."""
        floor = 1e-9
        return min(
            range(len(self.controls)),
            key=lambda i: abs(math.log(max(self.controls[i], floor) / max(self.ablated, floor))),
        )


@dataclass(frozen=True, kw_only=True)
class Choice(Result):
    """The site whose direction, taken out, makes harmful text least likely at a bearable cost."""

    kind: ClassVar[str] = "direction_choice"

    screen: AblationScreen
    """The direction of each site out of every write, alone."""
    split_half_cosines: tuple[float | None, ...]
    """Of each, in the same order."""
    max_kl: float
    """What taking it out may cost on the neutral text, nats a token."""

    @property
    def site(self) -> str:
        """The site chosen; see `choose_ablation`."""
        return choose_ablation(self.screen.ablations, max_kl=self.max_kl).site

    def rows(self) -> list[dict[str, Any]]:
        """One row a site."""
        return [
            {"site": one.site, "split_half_cosine": half, "kl": one.kl, "odds": one.odds}
            for one, half in zip(self.screen.ablations, self.split_half_cosines, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class DirectionRemoval(Result):
    """The behaviour of base and fine-tune with and without one direction."""

    kind: ClassVar[str] = "direction_removal"

    base: str
    tuned: str
    judge: str
    claim: str
    """What the judge's share may be called."""
    meaning: str
    """A sentence on what that is."""
    site: str
    construction: str
    n_positive: int
    n_negative: int
    split_half_cosine: float | None
    top3_share: float | None
    """Share of the squared direction in the three dimensions of largest variance."""
    arms: tuple[Arm, ...]
    choice: Choice
    """How the site was chosen."""
    disturbance: Disturbance
    """Of the direction and of all controls; the control that is an arm is the nearest."""

    def rows(self) -> list[dict[str, Any]]:
        """One row an arm."""
        return [
            {
                "arm": arm.name,
                "n": arm.n,
                "em_percent": arm.em_percent.value,
                "low": arm.em_percent.low,
                "high": arm.em_percent.high,
                "coherent_percent": arm.coherent_percent.value,
                "spillover_percent": arm.spillover_percent and arm.spillover_percent.value,
                "kl": arm.kl,
            }
            for arm in self.arms
        ]
