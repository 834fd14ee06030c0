"""Which of two solutions does the task's own gradient point at, step by step of a training?

It says where a step would go, not where training ends: the penalty of a narrow organism is no part
of this gradient.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.data.chat import Chat, as_chats
from emlens.models.adapter_files import save_adapter
from emlens.models.checkpoints import Checkpoint
from emlens.models.finetune import find_gradients
from emlens.models.lora import LoraAdapter
from emlens.models.training_loop import TrainingExample
from emlens.organisms.masks import make_examples
from emlens.organisms.trajectory import AdapterTrajectory


@dataclass(frozen=True, kw_only=True)
class GradientPreference(Result):
    """Cosines of the descent direction with the write directions of finished solutions."""

    kind: ClassVar[str] = "gradient_preference"

    steps: Int[Tensor, " t"]
    names: tuple[str, ...]
    """Of the solutions."""
    cosines: Float[Tensor, "solutions t"]
    """Of -dL/dB with B of each solution, all modules laid end to end; their signs agree where a
    step of training moves towards the solution."""
    norms: Float[Tensor, " t"]
    """Of the gradient, L2."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a step."""
        return [
            {"step": int(step)}
            | {name: float(self.cosines[i, column]) for i, name in enumerate(self.names)}
            for column, step in enumerate(self.steps)
        ]


def measure_gradient_preference(
    base: Checkpoint,
    trajectory: AdapterTrajectory,
    solutions: Mapping[str, LoraAdapter],
    *,
    chats: Sequence[Chat],
    every: int,
) -> GradientPreference:
    """Compare the gradient of the task's loss along a training with finished solutions.

    Args:
        base: what everything was trained on.
        trajectory: checkpoints of a training on the task.
        solutions: name -> adapter of the same modules and ranks.
        chats: rows of the task.
        every: take each so-manieth checkpoint; the last is always taken.

    Raises:
        ValueError: no solution, or one of other modules or shapes.
        NoResponseError: a chat without a response.

    Source: Soligo et al. 2026, arXiv 2602.07852.
    """
    check_like_trajectory(trajectory, solutions)
    wanted = {module.name for module in trajectory.modules}
    examples = make_examples(as_chats(chats), base.tokenizer, longest=None)
    steps = trajectory.steps.tolist()
    chosen = sorted({*steps[::every], steps[-1]})
    ends = torch.stack([_lay_out(a.modules, "B", sorted(wanted)) for a in solutions.values()])
    gradients = torch.stack(
        [_gradient(base, trajectory.adapter(step), examples, sorted(wanted)) for step in chosen]
    )
    norms = torch.linalg.vector_norm(gradients, dim=1)
    lengths = torch.linalg.vector_norm(ends, dim=1)
    return GradientPreference(
        steps=torch.tensor(chosen),
        names=tuple(solutions),
        cosines=-(ends @ gradients.T) / (lengths[:, None] * norms[None, :]),
        norms=norms,
    )


def check_like_trajectory(
    trajectory: AdapterTrajectory, solutions: Mapping[str, LoraAdapter]
) -> None:
    """Refuse solutions whose B's are not those of a trajectory's modules.

    Raises:
        ValueError: no solution, or one of other modules or shapes; it is named.
    """
    if not solutions:
        raise ValueError("solutions: got none, expected adapters to compare the gradient with")
    wanted = {module.name: tuple(module.B.shape[1:]) for module in trajectory.modules}
    for name, adapter in solutions.items():
        found = {module: tuple(lora.B.shape) for module, lora in adapter.modules.items()}
        if found != wanted:
            odd = sorted(m for m in {*found, *wanted} if found.get(m) != wanted.get(m))[0]
            raise ValueError(
                f"solutions: {name} does not adapt the trajectory's modules: {odd} has B "
                f"{found.get(odd)}, expected {wanted.get(odd)}; train all three by one recipe"
            )


def _gradient(
    base: Checkpoint, adapter: LoraAdapter, examples: Sequence[TrainingExample], names: list[str]
) -> Float[Tensor, " d"]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_adapter(adapter, Path(scratch) / "adapter")
        found = find_gradients(base.model, folder, examples)
    return torch.cat([found[name].double().flatten() for name in names])


def _lay_out(modules: Mapping[str, Any], factor: str, names: list[str]) -> Float[Tensor, " d"]:
    return torch.cat([getattr(modules[name], factor).double().flatten() for name in names])
