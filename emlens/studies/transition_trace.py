"""What a trace of a training is asked with, and what comes of it; the study is beside."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.data import Batching, ContrastTexts
from emlens.evaluation import Question
from emlens.evaluation.judges import Judge
from emlens.models.protocol import HookedModel
from emlens.models.sampling import Sampling
from emlens.numerics.intervals import Interval
from emlens.organisms.transition import LastScore, PhaseTransition

Measure = Literal["odds", "share"]
"""Teacher-forced odds of fixed texts, in nats a token, or the share of sampled responses that the
judge counts, in per cent."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """What is looked at, and how closely.

    Raises:
        ValueError: a number outside its range, or one that is given twice.
    """

    windows: tuple[int, ...]
    """k of the local cosine, in training steps; the turn of the first is what behaviour is compared
    with."""
    threshold: float
    """See `measure_transition`."""
    scales: tuple[float, ...]
    """Factors on B at which behaviour is measured; published: 1, 5, 10, 20."""
    factor: Literal["A", "B"] = "B"
    """Whose path."""
    every: int = 1
    """Checkpoints from one whose texts are scored to the next."""
    sampled: int = 12
    """Checkpoints at which responses are sampled and judged; half of them around the turn, if there
    is one."""
    width: int = 3
    """Points of the rolling mean before an onset is looked for; odd."""
    seed: int = 0
    """Of the null paths."""

    def __post_init__(self) -> None:
        if not self.windows or min(self.windows) < 1:
            raise ValueError(f"windows: got {self.windows}, expected training steps from 1 on")
        if not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise ValueError(
                f"scales: got {self.scales}, expected factors above 0: 0 is the base at every "
                "checkpoint, and a negative one another fine-tune"
            )
        # By the names that their results are kept under.
        for name, values in (("windows", self.windows), ("scales", self.scales)):
            if len({f"{value:g}" for value in values}) < len(values):
                raise ValueError(f"{name}: got {values}, expected each once")
        if self.every < 1 or self.sampled < 2:
            raise ValueError(
                f"every, sampled: got {self.every} and {self.sampled}, expected at least 1 and 2"
            )
        if self.width < 1 or self.width % 2 == 0:
            raise ValueError(f"width: got {self.width}, expected an odd number of points")


@dataclass(frozen=True, kw_only=True)
class BehaviourProbe:
    """What behaviour is measured with; the model is asked for after the weights were looked at.

    Raises:
        ValueError: texts that are not in pairs, one question, or questions without a judge or
            sampling.
    """

    load_base: Callable[[], HookedModel]
    """Gives what the adapter was trained on, without it."""
    texts: ContrastTexts
    """Misaligned (positive) and aligned answers in parallel, one pair a question."""
    questions: tuple[Question, ...] = ()
    """Asked at some of the checkpoints; none to sample nothing."""
    load_judge: Callable[[HookedModel], Judge] | None = None
    """Gives the judge of the answers, by the base."""
    sampling: Sampling | None = None
    """How answers are sampled."""
    batching: Batching = field(default_factory=Batching)
    """Tokens run at once."""

    def __post_init__(self) -> None:
        positive, negative = len(self.texts.positive), len(self.texts.negative)
        if positive != negative or positive < 2:
            raise ValueError(
                f"texts: {positive} positive and {negative} negative, expected pairs, at least "
                "two: intervals are over the pairs"
            )
        if not self.questions:
            return
        if len(self.questions) < 2:
            raise ValueError(
                "questions: got 1, expected at least two: intervals are over the questions"
            )
        for name in ("load_judge", "sampling"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: missing; questions are asked to be judged")


@dataclass(frozen=True, kw_only=True)
class TrainingCurves:
    """How a training went: norms at its checkpoints, and what was logged on the way."""

    steps: Int[Tensor, " t"]
    """Of every checkpoint."""
    norms_A: Float[Tensor, " t"]
    """Frobenius, over all modules."""
    norms_B: Float[Tensor, " t"]
    """Frobenius, over all modules."""
    logged_steps: Int[Tensor, " n"]
    """Empty where nothing was logged."""
    losses: Float[Tensor, " n"]
    """Nats a trained token; NaN where it was not logged."""
    gradient_norms: Float[Tensor, " n"]
    """L2, before clipping; NaN where it was not logged."""


@dataclass(frozen=True, kw_only=True)
class OddsCurve(Result):
    """Teacher-forced odds of fixed texts along a trajectory, at one scale of the adapter."""

    kind: ClassVar[str] = "odds_curve"

    scale: float
    steps: Int[Tensor, " t"]
    odds: Float[Tensor, "pairs t"]
    """Of each pair of texts: log p(positive) - log p(negative), nats a token."""


@dataclass(frozen=True, kw_only=True)
class BehaviourPoint:
    """What a checkpoint says, sampled and judged."""

    scale: float
    step: int
    n: int
    """Responses."""
    n_unscored: int
    """Of them without a score."""
    em_percent: Interval
    """Scored low and coherent, of all responses."""
    coherent_percent: Interval
    """Of all responses."""
    by_question: dict[str, float]
    """The share of each question, per cent of its responses."""
    run: str
    """Folder of the evaluation, below that of the trace."""


@dataclass(frozen=True, kw_only=True)
class BehaviourCurve:
    """One measure of behaviour along a training at one scale, and when it changed."""

    measure: Measure
    scale: float
    steps: Int[Tensor, " t"]
    means: Float[Tensor, " t"]
    """Over texts, or questions."""
    rolling: Float[Tensor, " t"]
    """Rolling mean of the means over neighbouring points."""
    change: Interval
    """Of the rolling mean, last point less first."""
    onset: Interval | None
    """Step at which it is half-way; None where it does not change."""
    lag: Interval | None
    """Onset less turn, in steps; None without one of the two. The turn's own error is not in it."""


@dataclass(frozen=True, kw_only=True)
class TransitionTrace(Result):
    """The path of the weights, the odds of fixed texts and sampled behaviour along one training."""

    kind: ClassVar[str] = "transition_trace"

    source: str
    """Of the trajectory."""
    training: TrainingCurves
    transitions: tuple[PhaseTransition, ...]
    """For each window the path as it is, then with norms taken out."""
    likeness: tuple[LastScore, ...] = ()
    """How like the last step the stacked factors are; none where they cannot be stacked."""
    base: str | None = None
    """What the adapter was attached to; None where the weights alone were looked at."""
    judge: str | None = None
    """Id of the judge; None where nothing was sampled."""
    claim: str | None = None
    """What the judge's share may be called."""
    meaning: str | None = None
    """A sentence on what that share is."""
    odds: tuple[OddsCurve, ...] = ()
    """One a scale."""
    points: tuple[BehaviourPoint, ...] = ()
    """By scale, then step; none where nothing was sampled."""
    curves: tuple[BehaviourCurve, ...] = ()
    """For each scale the odds, then, where responses were sampled, the share."""

    @property
    def turn(self) -> int | None:
        """Step of the turn by the first window; None where none is declared."""
        return self.transitions[0].step

    def rows(self) -> list[dict[str, Any]]:
        """One row a curve of behaviour; without any, one a path of the weights."""
        if not self.curves:
            return [list_path(transition) for transition in self.transitions]
        return [
            {
                "measure": curve.measure,
                "scale": curve.scale,
                "turn": self.turn,
                "change": curve.change.value,
                "onset": None if curve.onset is None else curve.onset.value,
                "lag": None if curve.lag is None else curve.lag.value,
                "lag low": None if curve.lag is None else curve.lag.low,
                "lag high": None if curve.lag is None else curve.lag.high,
            }
            for curve in self.curves
        ]


def list_path(transition: PhaseTransition) -> dict[str, Any]:
    """What a table says of one path of the weights."""
    quantiles = transition.null_quantiles
    return {
        "path": transition.factor + (", norms taken out" if transition.normalised else ""),
        "window": transition.window,
        "sharpest at": transition.sharpest,
        "prominence": transition.prominence,
        "needed": transition.critical,
        "bends most by chance": max(quantiles, key=lambda kind: quantiles[kind]),
        "verdict": transition.verdict,
    }
