"""Behaviour along a training: odds of fixed texts at all checkpoints, judged answers at some.

The part of `trace_transition` that needs a model.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.data import Batching, ContrastTexts, report_progress, tokenize_chat, track
from emlens.evaluation.calibration import keep_calibration
from emlens.evaluation.judges import Judge
from emlens.models.attach import attach_adapter
from emlens.models.identity import identify_model
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.protocol import HookedModel
from emlens.models.score import score_responses
from emlens.numerics.intervals import Interval
from emlens.numerics.onset import estimate_onset, smooth_curve
from emlens.organisms.trajectory import AdapterTrajectory
from emlens.runs import RunFolder
from emlens.studies.asked import Asking, is_asked
from emlens.studies.stages import Stages
from emlens.studies.transition_trace import (
    BehaviourCurve,
    BehaviourPoint,
    BehaviourProbe,
    Measure,
    OddsCurve,
    TraceSettings,
    TransitionTrace,
)

BEHAVIOUR = "behaviour"
"""Folder of everything that needs a model, in the run folder."""


@dataclass(frozen=True, kw_only=True)
class TracedBehaviour:
    """One base and one judge along a training, in a folder whose plan names both."""

    base: HookedModel
    base_name: str
    judge: Judge | None
    """None where nothing is sampled."""
    trajectory: AdapterTrajectory
    settings: TraceSettings
    probe: BehaviourProbe
    stages: Stages
    folder: Path

    def trace(self, weights: TransitionTrace) -> TransitionTrace:
        """What the weights showed, with everything about behaviour beside it."""
        odds = tuple(self._score(scale) for scale in self.settings.scales)
        points = self._sample(weights.turn)
        judge = self.judge
        return dataclasses.replace(
            weights,
            base=self.base_name,
            judge=None if judge is None else judge.id,
            claim=None if judge is None else judge.claim,
            meaning=None if judge is None else judge.meaning,
            odds=odds,
            points=points,
            curves=tuple(self._describe(odds, points, weights.turn)),
        )

    def _score(self, scale: float) -> OddsCurve:
        return self.stages.keep(
            f"odds_{_name(scale)}",
            OddsCurve,
            lambda: measure_odds_curve(
                self.base,
                self.trajectory,
                texts=self.probe.texts,
                scale=scale,
                every=self.settings.every,
                batching=self.probe.batching,
            ),
        )

    def _sample(self, turn: int | None) -> tuple[BehaviourPoint, ...]:
        if self.judge is None or self.probe.sampling is None:
            return ()
        asking = Asking(
            judge=self.judge, sampling=self.probe.sampling, batching=self.probe.batching
        )
        chosen = choose_checkpoints(self.trajectory.steps, turn, self.settings.sampled)
        places = [(scale, step) for scale in self.settings.scales for step in chosen]
        return tuple(self._ask(asking, *place) for place in track(places, "asking (checkpoints)"))

    def _ask(self, asking: Asking, scale: float, step: int) -> BehaviourPoint:
        host: Any = self.base
        place = f"scale_{_name(scale)}/step_{step}"

        def ask() -> Any:
            model: Any = attach_adapter(host, adapter_at(self.trajectory, step, scale))
            return asking.ask(model, self.probe.questions, self.folder / place)

        done = is_asked(self.folder / place)
        stage = f"asked_{_name(scale)}_{step}"
        summary = (ask() if done else self.stages.time(stage, ask)).summary
        return BehaviourPoint(
            scale=scale,
            step=step,
            n=summary.n_rows,
            n_unscored=summary.n_unscored,
            em_percent=summary.em_percent,
            coherent_percent=summary.coherent_percent,
            by_question={part.question_id: part.em_percent.value for part in summary.questions},
            run=f"{BEHAVIOUR}/{place}",
        )

    def _describe(
        self, odds: Sequence[OddsCurve], points: Sequence[BehaviourPoint], turn: int | None
    ) -> Iterator[BehaviourCurve]:
        shared: Mapping[str, Any] = {"turn": turn, "width": self.settings.width}
        for curve in odds:
            yield describe_curve("odds", curve.scale, curve.steps, curve.odds, **shared)
            if own := [point for point in points if point.scale == curve.scale]:
                shares = [list(point.by_question.values()) for point in own]
                values = torch.tensor(shares, dtype=torch.float64).T
                steps = torch.tensor([point.step for point in own])
                yield describe_curve("share", curve.scale, steps, values, **shared)


def start_behaviour(
    folder: Path, trajectory: AdapterTrajectory, settings: TraceSettings, probe: BehaviourProbe
) -> TracedBehaviour:
    """Ask for the base and the judge, and begin or go on with the folder of their plan.

    Raises:
        ValueError: a base that the adapter does not fit; the folder is not begun then.
        PlanChangedError: the folder was begun with another base or judge.
    """
    base: Any = probe.load_base()
    attach_adapter(base, trajectory.adapter(int(trajectory.steps[-1])))
    judge = None
    if probe.questions and probe.load_judge is not None:
        judge = probe.load_judge(base)
        judge.judge(())  # one that cannot judge says so before anything is measured
    known = vars(identify_model(base))
    plan = {"kind": "traced_behaviour", "base": {k: v for k, v in known.items() if k != "name"}}
    run = RunFolder.start(folder, plan | {"judge": None if judge is None else judge.id})
    if judge is not None:
        keep_calibration(folder, judge)
    return TracedBehaviour(
        base=base,
        base_name=known["name"],
        judge=judge,
        trajectory=trajectory,
        settings=settings,
        probe=probe,
        stages=Stages(run),
        folder=folder,
    )


def measure_odds_curve(
    base: HookedModel,
    trajectory: AdapterTrajectory,
    *,
    texts: ContrastTexts,
    scale: float,
    every: int = 1,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> OddsCurve:
    """Score fixed texts at the checkpoints of a training, the adapter multiplied by a factor.

    Args:
        base: without an adapter.
        trajectory: the checkpoints.
        texts: pairs, positive and negative in the same order.
        scale: factor on every module's scale.
        every: checkpoints from one that is taken to the next; the last is always taken.
        batching: tokens run at once.

    Raises:
        ValueError: log-probabilities that are no numbers, as a large scale may give; the checkpoint
            is named.
    """
    chosen = list_scored(trajectory.steps, every)
    chats = [tokenize_chat(chat, base.tokenizer) for chat in (*texts.positive, *texts.negative)]
    n = len(texts.positive)
    odds = torch.empty(n, len(chosen))
    host: Any = base
    for column, step in enumerate(track(chosen, "scoring (checkpoints)")):
        model: Any = attach_adapter(host, adapter_at(trajectory, step, scale))
        with report_progress(None):  # of checkpoints, not of the texts at each of them
            scores = score_responses(model, chats, batching=batching)
        means = torch.tensor([score.mean for score in scores])
        odds[:, column] = means[:n] - means[n:]
        if not bool(odds[:, column].isfinite().all()):
            raise ValueError(
                f"scale: at {scale:g} times the adapter of step {step} the log-probabilities are "
                "no numbers; leave that scale out, or load the base in a wider dtype"
            )
    return OddsCurve(scale=scale, steps=torch.tensor(chosen), odds=odds)


def list_scored(steps: Int[Tensor, " t"], every: int) -> list[int]:
    """Steps of the checkpoints that are scored: one in `every`, and the last."""
    known = steps.tolist()
    return sorted({*known[::every], known[-1]})


def choose_checkpoints(steps: Int[Tensor, " t"], turn: int | None, n: int) -> list[int]:
    """Choose steps to sample at: first and last, half of the rest nearest the turn, half in gaps.

    Args:
        steps: of all checkpoints, ascending.
        turn: None where there is none: then they are spread evenly over the training.
        n: how many, at most.
    """
    known = steps.tolist()
    if n >= len(known):
        return known
    if turn is None:
        return _spread(known, n)
    near = sorted(known, key=lambda step: abs(step - turn))
    chosen = {known[0], known[-1], *near[: (n - 2) // 2]}
    while len(chosen) < n:
        # The step farthest from all that are chosen: the widest gap is halved.
        chosen.add(max(known, key=lambda step: min(abs(step - other) for other in chosen)))
    return sorted(chosen)


def describe_curve(
    measure: Measure,
    scale: float,
    steps: Int[Tensor, " t"],
    values: Float[Tensor, "n t"],
    *,
    turn: int | None,
    width: int,
) -> BehaviourCurve:
    """Average curves of behaviour, and say when they are half-way and how long after the turn.

    The lag is the onset of the mean curve less the step of the turn; its limits are those of the
    onset over draws of the curves.

    Args:
        measure: what they are of.
        scale: of the adapter.
        steps: ascending.
        values: one curve a text or question.
        turn: its step; None where there is none.
        width: points of the rolling mean; odd.

    Raises:
        ValueError: see `estimate_onset`.
    """
    onset = estimate_onset(steps, values, width=width)
    at, lag = onset.step, None
    if at is not None and turn is not None:
        lag = Interval(at.value - turn, at.low - turn, at.high - turn, at.level, at.method)
    means = values.double().mean(0)
    return BehaviourCurve(
        measure=measure,
        scale=scale,
        steps=steps,
        means=means,
        rolling=smooth_curve(means, width=width),
        change=onset.change,
        onset=at,
        lag=lag,
    )


def adapter_at(trajectory: AdapterTrajectory, step: int, scale: float) -> LoraAdapter:
    """The adapter of a checkpoint, multiplied by a factor."""
    adapter = trajectory.adapter(step)
    return adapter if scale == 1.0 else scale_adapter(adapter, scale)


def _spread(known: Sequence[int], n: int) -> list[int]:
    """The known steps nearest to n evenly spaced ones, each once."""
    first, last = known[0], known[-1]
    chosen = {first, last}
    for place in range(1, n - 1):
        wanted = first + (last - first) * place / (n - 1)
        left = (step for step in known if step not in chosen)
        chosen.add(min(left, key=lambda step: abs(step - wanted)))
    return sorted(chosen)


def _name(scale: float) -> str:
    """A scale within the name of a file."""
    return f"{scale:g}".replace("+", "")
