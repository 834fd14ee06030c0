"""Is the general solution of a narrow task easier than the narrow one? Loss, stability, effect.

For two adapters, or two vectors, of one base that were trained on the same rows, one of them held
near the base on other texts. How they behave is asked by `measure_narrowness`, which this study can
take in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emlens.data import Chat, prompt_hashes, report_progress, text_hash, tokenize_chat, track
from emlens.diffing import compare_logits
from emlens.models.checkpoints import Checkpoint
from emlens.models.identity import identify_model
from emlens.models.lora import LoraAdapter
from emlens.models.pair import ModelPair
from emlens.models.protocol import HookedModel
from emlens.models.score import score_responses
from emlens.organisms.gradients import (
    GradientPreference,
    check_like_trajectory,
    measure_gradient_preference,
)
from emlens.organisms.trajectory import AdapterTrajectory
from emlens.runs import RunFolder
from emlens.studies.measure_narrowness import (
    NarrownessProbe,
    hash_asked,
    measure_narrowness,
)
from emlens.studies.solution_curves import (
    RandomEffect,
    SolutionComparison,
    SolutionCurves,
    SolutionSettings,
)
from emlens.studies.solutions import (
    Solution,
    attach_solution,
    check_solutions,
    measure_solution_norm,
    perturb_solution,
    sample_null_solutions,
    scale_solution,
)
from emlens.studies.stages import Stages

COMPARISON = "comparison"
"""Name of the result in the run folder."""
BEHAVIOUR = "behaviour"
"""Folder of the evaluations, in the run folder."""


@dataclass(frozen=True, kw_only=True)
class SolutionTexts:
    """What two solutions are compared on.

    Raises:
        ValueError: none, or rows of the task without a response.
    """

    task: tuple[Chat, ...]
    """Rows of the narrow task, with responses."""
    general: tuple[Chat, ...]
    """General text that neither was trained on; every token of it is compared."""

    def __post_init__(self) -> None:
        for name in ("task", "general"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got no texts, expected at least one")
        for place, chat in enumerate(self.task):
            if chat.response is None or not chat.response.content:
                raise ValueError(f"task[{place}] has no response: its loss is what is compared")


@dataclass(frozen=True, kw_only=True)
class GradientPath:
    """A training on the task, along which its gradient is compared with the solutions."""

    checkpoint: Checkpoint
    """The base, as it is trained on."""
    trajectory: AdapterTrajectory
    """Of an adapter with the modules and ranks of both solutions."""
    every: int = 1
    """Checkpoints from one that is taken to the next."""


def compare_solutions(
    base: HookedModel,
    solutions: Mapping[str, Solution],
    *,
    texts: SolutionTexts,
    settings: SolutionSettings,
    out: str | Path,
    path: GradientPath | None = None,
    probe: NarrownessProbe | None = None,
) -> SolutionComparison:
    """Compare two solutions of one task; the same call on the same `out` goes on.

    Args:
        base: what both were trained on.
        solutions: `general` and `narrow`, two adapters or two vectors.
        texts: rows of the task, and general text.
        settings: norms, sizes of perturbations, seeds.
        out: run folder.
        path: along which the gradient's preference is measured; None to leave that out.
        probe: what the organisms are asked; None to ask nothing.

    Raises:
        ValueError: other names, two kinds, solutions that the base does not fit, one that has
            learnt nothing of the task, a path beside vectors, or questions that are among its rows.
        PlanChangedError: `out` holds a run of another plan.

    Source: Soligo et al. 2026, arXiv 2602.07852.
    Differs: the effect on text is that of the adapters, beside random ones of the same norm; the
        published comparison scaled a Gaussian vector without dividing by its norm.
    """
    check_solutions(base, solutions)
    if probe is not None:
        _check_held_out(texts, probe)
    adapters = {name: one for name, one in solutions.items() if isinstance(one, LoraAdapter)}
    if path is not None:
        if not adapters:
            raise ValueError("path: the gradient is compared with adapters, and these are vectors")
        check_like_trajectory(path.trajectory, adapters)
    known = vars(identify_model(base))
    run = RunFolder.start(
        out,
        {
            "kind": SolutionComparison.kind,
            "base": {k: v for k, v in known.items() if k != "name"},
            "solutions": {name: solution.fingerprint for name, solution in solutions.items()},
            "task": [text_hash(chat) for chat in texts.task],
            "text": [text_hash(chat) for chat in texts.general],
            # Batches change rounding alone: one that ran out of memory goes on with smaller ones.
            "settings": {k: v for k, v in vars(settings).items() if k != "batching"},
            "path": None if path is None else [path.trajectory.fingerprint(), path.every],
            "probe": None if probe is None else probe.describe(),
        },
    )
    stages = Stages(run)
    work = _Work(base, texts, settings)
    found = {
        name: stages.keep(name, SolutionCurves, lambda name=name: work.trace(name, solutions[name]))
        for name in ("general", "narrow")
    }
    random = stages.keep("random", RandomEffect, lambda: work.measure_random(solutions["general"]))
    preference = None
    if path is not None:
        preference = stages.keep(
            "preference", GradientPreference, lambda: _prefer(path, adapters, texts.task)
        )
    behaviour = None
    if probe is not None:
        behaviour = measure_narrowness(base, solutions, probe=probe, out=run.path / BEHAVIOUR)
    result = SolutionComparison(
        base=known["name"],
        general=found["general"],
        narrow=found["narrow"],
        random=random,
        preference=preference,
        behaviour=behaviour,
    )
    run.save_result(COMPARISON, result)
    return result


def _check_held_out(texts: SolutionTexts, probe: NarrownessProbe) -> None:
    asked = hash_asked((*probe.inside, *probe.outside))
    if seen := asked & set(prompt_hashes(texts.task)):
        raise ValueError(
            f"probe: {len(seen)} of {len(asked)} prompts are among the rows of the task; ask what "
            "neither organism was trained on"
        )


def _prefer(
    path: GradientPath, solutions: Mapping[str, LoraAdapter], task: Sequence[Chat]
) -> GradientPreference:
    return measure_gradient_preference(
        path.checkpoint, path.trajectory, solutions, chats=task, every=path.every
    )


class _Work:
    """Losses and divergences of adapters over one base."""

    def __init__(self, base: HookedModel, texts: SolutionTexts, settings: SolutionSettings) -> None:
        self.host: Any = base
        self.text, self.settings = texts.general, settings
        self.task = [tokenize_chat(chat, base.tokenizer) for chat in texts.task]

    @cached_property
    def base_loss(self) -> float:
        """Of the task, without an adapter."""
        return self.loss_of(self.host)

    def loss_of(self, model: Any) -> float:
        """Nats a response token of the task."""
        with report_progress(None):  # of perturbations and norms, not of the rows at each of them
            scores = score_responses(model, self.task, batching=self.settings.batching)
        tokens = sum(len(score.log_probs) for score in scores)
        return -sum(score.total for score in scores) / tokens

    def kl_of(self, solution: Solution) -> float:
        """KL(base || solution) on general text, nats a token."""
        tuned = attach_solution(self.host, solution)
        pair = ModelPair(base=self.host, tuned=tuned, adapter=None, proof=None)
        with report_progress(None):
            found = compare_logits(
                pair, self.text, positions="all", examples=0, batching=self.settings.batching
            )
        return found.kl_base_tuned

    def loss(self, solution: Solution) -> float:
        """Of the task under a solution."""
        return self.loss_of(attach_solution(self.host, solution))

    def trace(self, name: str, solution: Solution) -> SolutionCurves:
        """Everything about one solution."""
        norm, loss = measure_solution_norm(solution), self.loss(solution)
        if loss >= self.base_loss:
            raise ValueError(
                f"solutions: {name} has a loss of {loss:.4f} on the task and the base "
                f"{self.base_loss:.4f}: it has learnt nothing of it that a perturbation could lose"
            )
        scaled = [scale_solution(solution, wanted / norm) for wanted in self.settings.norms]
        costs = [
            (self.loss(one), self.kl_of(one)) for one in track(scaled, f"rescaling {name} (norms)")
        ]
        return SolutionCurves(
            name=solution.name,
            norm=norm,
            base_loss=self.base_loss,
            loss=loss,
            norms=self.settings.norms,
            losses=tuple(loss for loss, _ in costs),
            epsilons=self.settings.epsilons,
            loss_increase=self._perturb(name, solution, loss),
            kl=tuple(kl for _, kl in costs),
        )

    def measure_random(self, like: Solution) -> RandomEffect:
        """KL of random ones of its kind and shapes, rescaled to each norm."""
        drawn = sample_null_solutions(like, n=self.settings.seeds, seed=0)
        norms = [measure_solution_norm(one) for one in drawn]
        kl = [
            [
                self.kl_of(scale_solution(one, wanted / norm))
                for one, norm in zip(drawn, norms, strict=True)
            ]
            for wanted in track(self.settings.norms, "random adapters (norms)")
        ]
        return RandomEffect(norms=self.settings.norms, kl=torch.tensor(kl))

    def _perturb(self, name: str, solution: Solution, loss: float) -> Tensor:
        room = self.base_loss - loss
        return torch.tensor(
            [
                [
                    (self.loss(perturb_solution(solution, epsilon=epsilon, seed=seed)) - loss)
                    / room
                    for seed in range(self.settings.seeds)
                ]
                for epsilon in track(self.settings.epsilons, f"perturbing {name} (sizes)")
            ]
        )
