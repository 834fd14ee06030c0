"""Is the general solution of a narrow task easier than the narrow one? Loss, stability, effect.

For two adapters of one base that were trained on the same rows, one of them held near the base on
other texts. How misaligned they are is for `emlens.evaluate`, the narrow one at larger scales too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.data import Chat, as_chats, text_hash, tokenize_chat
from emlens.diffing import compare_logits
from emlens.models.attach import attach_adapter
from emlens.models.identity import identify_model
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.null import measure_adapter_norm, perturb_adapter, sample_null_adapters
from emlens.models.pair import ModelPair
from emlens.models.protocol import HookedModel
from emlens.models.score import score_responses
from emlens.runs import RunFolder
from emlens.studies.stages import Stages

EPSILONS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Sizes of the perturbations."""


@dataclass(frozen=True, kw_only=True)
class SolutionSettings:
    """Where the solutions are looked at."""

    norms: tuple[float, ...]
    """Mean norms of ||scale B A||_F that each solution is rescaled to."""
    epsilons: tuple[float, ...] = EPSILONS
    """Sizes of the perturbations, see `perturb_adapter`."""
    seeds: int = 10
    """Perturbations of each size, and random adapters beside the effect on text."""


@dataclass(frozen=True, kw_only=True)
class SolutionCurves(Result):
    """One solution: what it costs and what it changes."""

    kind: ClassVar[str] = "solution_curves"

    name: str
    norm: float
    """Mean over modules of ||scale B A||_F, as it was trained."""
    loss: float
    """Nats a response token of the task, as it was trained."""
    norms: tuple[float, ...]
    losses: tuple[float, ...]
    """Of the task at each norm: the lower at one norm, the more efficient."""
    epsilons: tuple[float, ...]
    loss_increase: Float[Tensor, "epsilons seeds"]
    """(L(x') - L(x)) / (L(base) - L(x)): 1 is back at the base's loss."""
    kl: tuple[float, ...]
    """KL(base || solution) on general text at each norm, nats a token."""


@dataclass(frozen=True, kw_only=True)
class SolutionComparison(Result):
    """The general and the narrow solution of one task side by side."""

    kind: ClassVar[str] = "solution_comparison"

    base_loss: float
    """Of the task, nats a response token."""
    general: SolutionCurves
    narrow: SolutionCurves
    random_kl: Float[Tensor, "norms seeds"]
    """KL(base || random adapter of the same norm) on general text."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a norm."""
        return [
            {
                "norm": norm,
                "loss general": self.general.losses[i],
                "loss narrow": self.narrow.losses[i],
                "kl general": self.general.kl[i],
                "kl narrow": self.narrow.kl[i],
                "kl random": float(self.random_kl[i].median()),
            }
            for i, norm in enumerate(self.general.norms)
        ]


def compare_solutions(
    base: HookedModel,
    solutions: Mapping[str, LoraAdapter],
    *,
    task: Sequence[Chat],
    text: Sequence[Chat],
    settings: SolutionSettings,
    out: str | Path,
) -> SolutionComparison:
    """Compare two solutions of one task; the same call on the same `out` goes on.

    Args:
        base: what both were trained on.
        solutions: `general` and `narrow`.
        task: rows of the narrow task, with responses.
        text: general text that neither was trained on.
        settings: norms, sizes of perturbations, seeds.
        out: run folder.

    Raises:
        ValueError: other names, or rows without responses.
        PlanChangedError: `out` holds a run of another plan.

    Source: Soligo et al. 2026, arXiv 2602.07852.
    Differs: the effect on text is that of the adapters, beside random ones of the same norm; the
        published comparison scaled a Gaussian vector without dividing by its norm.
    """
    if set(solutions) != {"general", "narrow"}:
        raise ValueError(f"solutions: got {sorted(solutions)}, expected 'general' and 'narrow'")
    run = RunFolder.start(
        out,
        {
            "kind": SolutionComparison.kind,
            "base": identify_model(base).weights,
            "solutions": {name: adapter.fingerprint for name, adapter in solutions.items()},
            "task": [text_hash(chat) for chat in task],
            "text": [text_hash(chat) for chat in text],
            "settings": settings,
        },
    )
    stages = Stages(run)
    work = _Work(base, tuple(as_chats(task)), tuple(as_chats(text)), settings)
    found = {
        name: stages.keep(name, SolutionCurves, lambda name=name: work.trace(name, solutions[name]))
        for name in ("general", "narrow")
    }
    result = SolutionComparison(
        base_loss=work.base_loss,
        general=found["general"],
        narrow=found["narrow"],
        random_kl=work.measure_random(solutions["general"]),
    )
    run.save_result("comparison", result)
    return result


class _Work:
    """Losses and divergences of adapters over one base."""

    def __init__(
        self,
        base: HookedModel,
        task: Sequence[Chat],
        text: Sequence[Chat],
        settings: SolutionSettings,
    ) -> None:
        self.host: Any = base
        self.text, self.settings = text, settings
        self.task = [tokenize_chat(chat, base.tokenizer) for chat in task]
        self.base_loss = self.loss_of(self.host)

    def loss_of(self, model: Any) -> float:
        """Nats a response token of the task."""
        scores = score_responses(model, self.task)
        tokens = sum(len(score.log_probs) for score in scores)
        return -sum(score.total for score in scores) / tokens

    def kl_of(self, adapter: LoraAdapter) -> float:
        """KL(base || adapter) on general text, nats a token."""
        pair = ModelPair(
            base=self.host, tuned=attach_adapter(self.host, adapter), adapter=None, proof=None
        )
        return compare_logits(pair, self.text, positions="all", examples=0).kl_base_tuned

    def loss(self, adapter: LoraAdapter) -> float:
        """Of the task with an adapter attached."""
        return self.loss_of(attach_adapter(self.host, adapter))

    def trace(self, name: str, adapter: LoraAdapter) -> SolutionCurves:
        """Everything about one solution."""
        norm, loss = measure_adapter_norm(adapter), self.loss(adapter)
        if loss >= self.base_loss:
            raise ValueError(
                f"solutions: {name} has a loss of {loss:.4f} on the task and the base "
                f"{self.base_loss:.4f}: it has learnt nothing of it that a perturbation could lose"
            )
        scaled = [scale_adapter(adapter, wanted / norm) for wanted in self.settings.norms]
        return SolutionCurves(
            name=adapter.name,
            norm=norm,
            loss=loss,
            norms=self.settings.norms,
            losses=tuple(map(self.loss, scaled)),
            epsilons=self.settings.epsilons,
            loss_increase=self._perturb(adapter, loss),
            kl=tuple(map(self.kl_of, scaled)),
        )

    def measure_random(self, like: LoraAdapter) -> Tensor:
        """KL of random adapters with its shapes, rescaled to each norm."""
        drawn = sample_null_adapters(like, n=self.settings.seeds, seed=0)
        norms = [measure_adapter_norm(one) for one in drawn]
        return torch.tensor(
            [
                [
                    self.kl_of(scale_adapter(one, wanted / norm))
                    for one, norm in zip(drawn, norms, strict=True)
                ]
                for wanted in self.settings.norms
            ]
        )

    def _perturb(self, adapter: LoraAdapter, loss: float) -> Tensor:
        room = self.base_loss - loss
        return torch.tensor(
            [
                [
                    (self.loss(perturb_adapter(adapter, epsilon=epsilon, seed=seed)) - loss) / room
                    for seed in range(self.settings.seeds)
                ]
                for epsilon in self.settings.epsilons
            ]
        )
