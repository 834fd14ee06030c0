"""The checkpoints of one LoRA through its training, read without its base.

Own runs, the `checkpoint-*` folders of any Trainer, or such a Hub folder. Not for full fine-tunes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import JSON_NAME, Result, read_kind, read_result
from emlens.models.adapter_files import fingerprint_modules, load_adapter
from emlens.models.checkpoint_folders import find_checkpoints
from emlens.models.lora import LoraAdapter, LoraModule
from emlens.runs import RunFolder
from emlens.sources import Source, locate_source, parse_source

TRAJECTORY_NAME = "trajectory"
"""Of the result in a run folder."""
_FILES = [f"checkpoint-*/{name}" for name in ("adapter_*", "trainer_state.json")]
_OWN = [JSON_NAME, "tensors*.safetensors", f"results/{TRAJECTORY_NAME}/*"]
_PLAN = "manifest.json"
"""Of a run, which names the base that it trained on."""


class TrajectoryError(ValueError):
    """Checkpoints that are missing, damaged, or not of one adapter."""


@dataclass(frozen=True, kw_only=True)
class ModuleTrajectory:
    """One adapted module at every checkpoint: its output gains scale * B (A x)."""

    name: str
    scale: float
    A: Float[Tensor, "t rank d_in"]
    B: Float[Tensor, "t d_out rank"]


@dataclass(frozen=True, kw_only=True)
class AdapterTrajectory(Result):
    """A LoRA at every checkpoint, and how its training went."""

    kind: ClassVar[str] = "adapter_trajectory"

    source: str
    """As it was asked for."""
    steps: Int[Tensor, " t"]
    """Training step of each checkpoint, ascending."""
    modules: tuple[ModuleTrajectory, ...]
    """By name."""
    logged_steps: Int[Tensor, " n"]
    """Training steps that loss and gradient norm were logged at; empty where they were not."""
    losses: Float[Tensor, " n"]
    """Nats a trained token, at the logged steps; NaN where it was not logged."""
    penalties: Float[Tensor, " n"]
    """Extra terms of the loss together, weights included, at the logged steps; NaN where there were
    none."""
    gradient_norms: Float[Tensor, " n"]
    """L2, before clipping, at the logged steps; NaN where it was not logged."""

    def __len__(self) -> int:
        """Number of checkpoints."""
        return len(self.steps)

    def adapter(self, step: int) -> LoraAdapter:
        """The LoRA at one of the checkpoints.

        Raises:
            TrajectoryError: there is none at that step; the nearest three are listed.
        """
        places = {known: place for place, known in enumerate(self.steps.tolist())}
        if step not in places:
            near = sorted(places, key=lambda known: (abs(known - step), known))[:3]
            raise TrajectoryError(f"step: no checkpoint at {step}; nearest: {sorted(near)}")
        place = places[step]
        modules = {
            module.name: LoraModule(A=module.A[place], B=module.B[place], scale=module.scale)
            for module in self.modules
        }
        return LoraAdapter(
            modules=modules,
            name=f"{self.source} at step {step}",
            fingerprint=fingerprint_modules(modules),
        )

    def fingerprint(self) -> str:
        """Hash of every step, scale and factor; what it was read from and its losses do not count.

        Returns:
            32 digits.
        """
        digest = hashlib.sha256(repr(self.steps.tolist()).encode())
        for module in self.modules:
            digest.update(f"{module.name} {module.scale!r}".encode())
            for factor in (module.A, module.B):
                digest.update(repr(tuple(factor.shape)).encode())
                digest.update(factor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def norms(self, factor: Literal["A", "B"]) -> Float[Tensor, " t"]:
        """Frobenius norm of a factor over all modules, at each checkpoint; float64."""
        squares = torch.zeros(len(self), dtype=torch.float64)
        for module in self.modules:
            squares += getattr(module, factor).double().flatten(1).square().sum(1)
        return squares.sqrt()

    def rows(self) -> list[dict[str, Any]]:
        """One row a checkpoint: Frobenius norms of the factors, over all modules."""
        return [
            {"step": int(step), "norm_A": float(a), "norm_B": float(b)}
            for step, a, b in zip(self.steps, self.norms("A"), self.norms("B"), strict=True)
        ]


def load_trajectory(source: str | Path | Source) -> AdapterTrajectory:
    """Read the checkpoints of a LoRA.

    An adapter beside the checkpoint folders is left alone: it need not be that of the last step.

    Args:
        source: a run of `train_organism` that kept checkpoints, a saved trajectory, a folder with
            `checkpoint-STEP` folders, or such a folder of a Hub repository.

    Raises:
        TrajectoryError: no checkpoints; one that is damaged or of another adapter, named.
        SourceError: there is no such source.
    """
    parsed = parse_source(source)
    folder = locate_source(parsed, allow_patterns=[*_FILES, *_OWN])
    for place in (folder / "results" / TRAJECTORY_NAME, folder):
        if (place / JSON_NAME).is_file() and read_kind(place) == AdapterTrajectory.kind:
            return read_result(place, AdapterTrajectory)
    return read_checkpoints(folder, name=str(source))


def find_base(source: str | Path | Source) -> str | None:
    """The base that a trajectory says it was trained on, as a source; None where it does not say.

    A run's own record, else the adapter configuration of the last checkpoint.

    Raises:
        TrajectoryError: a last checkpoint that is damaged.
        ArtifactError: a record of a run that is damaged.
        SourceError: there is no such source.
    """
    folder = locate_source(parse_source(source), allow_patterns=[*_FILES, *_OWN, _PLAN])
    if (folder / _PLAN).is_file():
        named = RunFolder.open(folder).plan.get("base")
        return named if isinstance(named, str) else None
    found = find_checkpoints(folder)
    return _load_checkpoint(found[max(found)]).base_name if found else None


def read_checkpoints(folder: Path, *, name: str) -> AdapterTrajectory:
    """Stack the adapters of all `checkpoint-STEP` folders in a folder.

    Raises:
        TrajectoryError: see `load_trajectory`.
    """
    found = find_checkpoints(folder)
    if not found:
        raise TrajectoryError(
            f"{name}: holds no checkpoint-STEP folders and no trajectory; train with "
            "checkpoint_every, or name the folder that the checkpoints are in"
        )
    adapters = {step: _load_checkpoint(place) for step, place in found.items()}
    rows = _read_history(found)
    return AdapterTrajectory(
        source=name,
        steps=torch.tensor(sorted(found)),
        modules=stack_adapters(adapters),
        logged_steps=torch.tensor([row["step"] for row in rows], dtype=torch.int64),
        losses=_column(rows, "loss"),
        penalties=_column(rows, "penalty"),
        gradient_norms=_column(rows, "grad_norm"),
    )


def stack_adapters(adapters: Mapping[int, LoraAdapter]) -> tuple[ModuleTrajectory, ...]:
    """Line up the adapters of ascending steps, module by module.

    Raises:
        TrajectoryError: one of them has other modules, shapes or scales than the first.
    """
    steps = sorted(adapters)
    first = adapters[steps[0]]
    for step in steps[1:]:
        if problem := _difference(first, adapters[step]):
            raise TrajectoryError(
                f"checkpoint-{step} is not of the adapter of checkpoint-{steps[0]}: {problem}"
            )
    return tuple(
        ModuleTrajectory(
            name=name,
            scale=first.modules[name].scale,
            A=torch.stack([adapters[step].modules[name].A for step in steps]),
            B=torch.stack([adapters[step].modules[name].B for step in steps]),
        )
        for name in sorted(first.modules)
    )


def _difference(first: LoraAdapter, other: LoraAdapter) -> str:
    if changed := sorted(set(first.modules) ^ set(other.modules)):
        return f"only one of them adapts {changed[0]}"
    for name, module in first.modules.items():
        theirs = other.modules[name]
        if (theirs.A.shape, theirs.B.shape) != (module.A.shape, module.B.shape):
            return f"{name} has A {tuple(theirs.A.shape)}, not {tuple(module.A.shape)}"
        if theirs.scale != module.scale:
            return f"{name} has scale {theirs.scale}, not {module.scale}"
    return ""


def _load_checkpoint(place: Path) -> LoraAdapter:
    try:
        return load_adapter(place, allow_noop=True)
    except ValueError as error:
        raise TrajectoryError(
            f"{place.name}: {error}; was it cut short? Delete the folder to go without it"
        ) from error


def _read_history(found: Mapping[int, Path]) -> list[dict[str, Any]]:
    """What was logged, of the last checkpoint that has a record."""
    for place in reversed(list(found.values())):
        path = place / "trainer_state.json"
        if path.is_file():
            return _read_log(path)
    return []


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
        return [row for row in history if "loss" in row and isinstance(row.get("step"), int)]
    except (ValueError, AttributeError, TypeError) as error:
        raise TrajectoryError(f"{path} is no record of a Trainer: {error}") from error


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    return torch.tensor([float(row.get(name, float("nan"))) for row in rows], dtype=torch.float64)
