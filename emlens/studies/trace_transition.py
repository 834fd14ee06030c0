"""When did a fine-tune turn, in its weights and in what it says? Both curves, and the lag between.

It takes neither for the cause of the other. For the weights alone see
`emlens.organisms.measure_transition`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.data import ContrastTexts, text_hash, tokenize_chat, track
from emlens.evaluation import Question, evaluate
from emlens.evaluation.judges import Judge
from emlens.models.attach import attach_adapter
from emlens.models.identity import identify_model
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.protocol import HookedModel
from emlens.models.sampling import Sampling
from emlens.models.score import score_responses
from emlens.numerics.intervals import Interval
from emlens.numerics.onset import estimate_onset
from emlens.organisms.trajectory import AdapterTrajectory
from emlens.organisms.transition import PhaseTransition, measure_transition
from emlens.runs import RunFolder
from emlens.studies.stages import Stages


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """What is looked at, and how closely."""

    windows: tuple[int, ...]
    """k of the local cosine, in training steps."""
    threshold: float
    """See `measure_transition`."""
    scales: tuple[float, ...]
    """Factors on the adapter at which behaviour is measured; published: 1, 5, 10, 20."""
    every: int = 1
    """Checkpoints from one whose texts are scored to the next."""
    sampled: int = 12
    """Checkpoints at which responses are sampled and judged, denser around the sharpest bend."""
    width: int = 3
    """Points of the rolling mean before an onset is looked for; odd."""


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
    em_percent: Interval
    coherent_percent: Interval
    run: str
    """Folder of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class Lag:
    """From the turn of the weights to the onset of behaviour at one scale."""

    scale: float
    onset: Interval | None
    """Half-way step of the odds; None where they do not change."""
    change: Interval
    """Of the odds, last checkpoint less first, nats a token."""
    steps: Interval | None
    """Onset less turn; None without one of the two. The turn's own error is not in it."""


@dataclass(frozen=True, kw_only=True)
class TransitionTrace(Result):
    """The path of the weights, the odds of fixed texts and sampled behaviour along one training."""

    kind: ClassVar[str] = "transition_trace"

    source: str
    transitions: tuple[PhaseTransition, ...]
    """For each window the path of B as it is, then with norms taken out."""
    curves: tuple[OddsCurve, ...]
    """One a scale."""
    behaviour: tuple[BehaviourPoint, ...]
    """By scale, then step; none where nothing was sampled."""
    lags: tuple[Lag, ...]
    """One a scale, from the turn of the first window."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a scale."""
        turn = self.transitions[0]
        return [
            {
                "scale": lag.scale,
                "turn": turn.step,
                "onset": None if lag.onset is None else lag.onset.value,
                "lag": None if lag.steps is None else lag.steps.value,
                "low": None if lag.steps is None else lag.steps.low,
                "high": None if lag.steps is None else lag.steps.high,
            }
            for lag in self.lags
        ]


def trace_transition(
    base: HookedModel,
    trajectory: AdapterTrajectory,
    *,
    texts: ContrastTexts,
    settings: TraceSettings,
    out: str | Path,
    questions: Sequence[Question] = (),
    judge_with: "tuple[Judge, Sampling] | None" = None,
) -> TransitionTrace:
    """Measure weights and behaviour along a training; the same call on the same `out` goes on.

    Args:
        base: what the adapter was trained on, without it.
        trajectory: its checkpoints.
        texts: misaligned (positive) and aligned answers in parallel, one pair a question.
        settings: windows, scales, how many checkpoints.
        out: run folder.
        questions: asked at some of the checkpoints; none to sample nothing.
        judge_with: who judges the answers, and how they are sampled; needed with questions.

    Raises:
        ValueError: texts that are not in pairs, or questions without a judge.
        PlanChangedError: `out` holds a run of another plan.

    Source: Turner et al. 2025, arXiv 2506.11613, sections 4.1 and 4.2.
    Differs: odds of fixed texts at all checkpoints beside sampled answers at some; onset and lag
        with intervals over the texts.
    """
    _check(texts, questions, judge_with)
    plan = {
        "kind": TransitionTrace.kind,
        "base": identify_model(base).weights,
        "trajectory": trajectory.adapter(int(trajectory.steps[-1])).fingerprint,
        "steps": trajectory.steps.tolist(),
        "texts": [list(map(text_hash, part)) for part in (texts.positive, texts.negative)],
        "settings": settings,
        "questions": {question.id: question.prompt_hash() for question in questions},
        "judge": None if judge_with is None else judge_with[0].id,
        "sampling": None if judge_with is None else judge_with[1],
    }
    run = RunFolder.start(out, plan)
    stages = Stages(run)
    transitions = tuple(
        stages.keep(
            f"transition_{window}{'_normalised' if normalised else ''}",
            PhaseTransition,
            lambda window=window, normalised=normalised: measure_transition(
                trajectory, window=window, threshold=settings.threshold, normalised=normalised
            ),
        )
        for window in settings.windows
        for normalised in (False, True)
    )
    curves = tuple(
        stages.keep(
            f"odds_{scale:g}".replace(".", "_"),
            OddsCurve,
            lambda scale=scale: measure_odds_curve(
                base, trajectory, texts=texts, scale=scale, every=settings.every
            ),
        )
        for scale in settings.scales
    )
    points: list[BehaviourPoint] = []
    if judge_with is not None and questions:
        chosen = choose_checkpoints(trajectory.steps, transitions[0].sharpest, settings.sampled)
        for scale in settings.scales:
            for step in chosen:
                folder = run.path / "behaviour" / f"scale_{scale:g}" / f"step_{step}"
                points.append(_sample(base, trajectory, scale, step, questions, judge_with, folder))
    found = TransitionTrace(
        source=trajectory.source,
        transitions=transitions,
        curves=curves,
        behaviour=tuple(points),
        lags=tuple(_find_lag(curve, transitions[0], settings.width) for curve in curves),
    )
    run.save_result("trace", found)
    return found


def measure_odds_curve(
    base: HookedModel,
    trajectory: AdapterTrajectory,
    *,
    texts: ContrastTexts,
    scale: float,
    every: int = 1,
) -> OddsCurve:
    """Score fixed texts at the checkpoints of a training, the adapter multiplied by a factor.

    Args:
        base: without an adapter.
        trajectory: the checkpoints.
        texts: pairs, positive and negative in the same order.
        scale: factor on every module's scale.
        every: take each so-manieth checkpoint; the last is always taken.
    """
    steps = trajectory.steps.tolist()
    chosen = sorted({*steps[::every], steps[-1]})
    chats = [tokenize_chat(chat, base.tokenizer) for chat in (*texts.positive, *texts.negative)]
    n = len(texts.positive)
    odds = torch.empty(n, len(chosen))
    host: Any = base
    for column, step in enumerate(track(chosen, "scoring (checkpoints)")):
        model: Any = attach_adapter(host, _at(trajectory, step, scale))
        means = torch.tensor([score.mean for score in score_responses(model, chats)])
        odds[:, column] = means[:n] - means[n:]
    return OddsCurve(scale=scale, steps=torch.tensor(chosen), odds=odds)


def choose_checkpoints(steps: Int[Tensor, " t"], sharpest: int | None, n: int) -> list[int]:
    """Some of the steps: first and last, half of the rest nearest the sharpest bend, half in gaps.

    Args:
        steps: of all checkpoints, ascending.
        sharpest: step of the bend; None for even spacing alone.
        n: how many, at most.
    """
    known = steps.tolist()
    if n >= len(known):
        return known
    near = [] if sharpest is None else sorted(known, key=lambda step: abs(step - sharpest))
    chosen = {known[0], known[-1], *near[: (n - 2) // 2]}
    while len(chosen) < n:
        # The step farthest from all that are chosen: the widest gap is halved.
        chosen.add(max(known, key=lambda step: min(abs(step - other) for other in chosen)))
    return sorted(chosen)


def _sample(
    base: HookedModel,
    trajectory: AdapterTrajectory,
    scale: float,
    step: int,
    questions: Sequence[Question],
    judge_with: tuple[Judge, Sampling],
    folder: Path,
) -> BehaviourPoint:
    host: Any = base
    judge, sampling = judge_with
    model: Any = attach_adapter(host, _at(trajectory, step, scale))
    found = evaluate(model, questions, judge=judge, out=folder, sampling=sampling)
    summary = found.summary
    return BehaviourPoint(
        scale=scale,
        step=step,
        em_percent=summary.em_percent,
        coherent_percent=summary.coherent_percent,
        run=str(folder),
    )


def _at(trajectory: AdapterTrajectory, step: int, scale: float) -> LoraAdapter:
    adapter = trajectory.adapter(step)
    return adapter if scale == 1.0 else scale_adapter(adapter, scale)


def _find_lag(curve: OddsCurve, transition: PhaseTransition, width: int) -> Lag:
    onset = estimate_onset(curve.steps, curve.odds, width=width)
    turn, steps = transition.step, None
    if onset.step is not None and turn is not None:
        at = onset.step
        steps = Interval(at.value - turn, at.low - turn, at.high - turn, at.level, at.method)
    return Lag(scale=curve.scale, onset=onset.step, change=onset.change, steps=steps)


def _check(
    texts: ContrastTexts,
    questions: Sequence[Question],
    judge_with: "tuple[Judge, Sampling] | None",
) -> None:
    if len(texts.positive) != len(texts.negative) or len(texts.positive) < 2:
        raise ValueError(
            f"texts: {len(texts.positive)} positive and {len(texts.negative)} negative, expected "
            "pairs, at least two: intervals are over the pairs"
        )
    if questions and judge_with is None:
        raise ValueError("judge_with: missing; questions are asked to be judged")
