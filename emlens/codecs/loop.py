"""The loop that every codec is trained in: checkpoints, curves, progress, and an end at NaN."""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.codecs.checkpoint import read_checkpoint, write_checkpoint
from emlens.codecs.codec import CodecError
from emlens.codecs.rows import TrainingRows
from emlens.codecs.settings import CodecSettings
from emlens.data.progress import tell_progress

logger = logging.getLogger(__name__)


class CodecDivergedError(CodecError):
    """The loss, the weights or the activations stopped being finite numbers; the step is named."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step, before its weights were changed."""

    loss: float
    """What was minimised."""
    explained_variance: float
    """Of the batch: 1 - squared error / squared distance from the batch's mean."""
    l0: float
    """Latents active at a row, on average."""
    dead_share: float
    """Share of the latents that are dead."""


@runtime_checkable
class Trainer(Protocol):
    """A codec on its way."""

    def step(self, batch: Float[Tensor, "... n d_in"], *, recording: bool) -> StepRecord | float:
        """Do one step; gives its loss, or where it is to be recorded all of it."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """What is trained."""
        ...

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as when that state was taken."""
        ...


@dataclass(frozen=True, kw_only=True)
class CodecCurves:
    """How a training went, every few steps."""

    step: Int[Tensor, " point"]
    """Number of the step, from 0."""
    loss: Float[Tensor, " point"]
    """What was minimised."""
    explained_variance: Float[Tensor, " point"]
    """Of the step's batch."""
    l0: Float[Tensor, " point"]
    """Latents active at a row of the batch, on average."""
    dead_share: Float[Tensor, " point"]
    """Share of the latents that were dead."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a loop leaves beside the trained weights."""

    curves: CodecCurves
    seconds: float
    """Of the steps, those before an interruption counted."""


def run_steps(
    trainer: Trainer, rows: TrainingRows, *, settings: CodecSettings, folder: Path, task: str
) -> Trained:
    """Train to the last step, from the last checkpoint where there is one.

    Args:
        trainer: as it is before its first step.
        rows: what it is trained on.
        settings: how many steps, and which of them are kept or recorded.
        folder: where checkpoints lie.
        task: name of the work, for progress.

    Raises:
        CodecDivergedError: something is not finite; the last checkpoint is kept.
        CorpusTooSmallError: the rows ended early.
    """
    kept = read_checkpoint(folder)
    first, seconds, points = 0, 0.0, []
    if kept is not None:
        trainer.restore(kept["trainer"])
        first, seconds, points = kept["step"], kept["seconds"], kept["points"]
        logger.info("%s: goes on from step %d", folder, first)
    batches = rows.batches(first)
    began = time.perf_counter()
    for step in range(first, settings.steps):
        tell_progress(task, step * settings.batch_rows, settings.rows)
        batch = next(batches)
        if not bool(batch.isfinite().all()):
            raise CodecDivergedError(
                f"activations: the batch of step {step} holds NaN or infinity; {_say_kept(folder)}"
            )
        recording = step % settings.record_every == 0 or step == settings.steps - 1
        done = trainer.step(batch, recording=recording)
        _check_loss(done, step, folder)
        if isinstance(done, StepRecord):
            points.append(
                [float(step), done.loss, done.explained_variance, done.l0, done.dead_share]
            )
            logger.info("step %d: %s", step, done)
        after = step + 1
        if settings.checkpoint_every and not after % settings.checkpoint_every:
            _check_weights(trainer, step, folder)
            spent = seconds + time.perf_counter() - began
            state = {"step": after, "seconds": spent, "points": points, "trainer": trainer.state()}
            write_checkpoint(folder, state)
    tell_progress(task, settings.rows, settings.rows)
    _check_weights(trainer, settings.steps - 1, folder)
    return Trained(curves=_draw(points), seconds=seconds + time.perf_counter() - began)


def _check_loss(done: StepRecord | float, step: int, folder: Path) -> None:
    loss = done.loss if isinstance(done, StepRecord) else done
    if not math.isfinite(loss):
        raise CodecDivergedError(
            f"the loss of step {step} is {loss}: the learning rate is probably too high; "
            f"{_say_kept(folder)}"
        )


def _check_weights(trainer: Trainer, step: int, folder: Path) -> None:
    if not all(bool(weight.isfinite().all()) for weight in trainer.parameters()):
        raise CodecDivergedError(
            f"after step {step} weights are not finite: the learning rate is probably too high; "
            f"{_say_kept(folder)}"
        )


def _say_kept(folder: Path) -> str:
    kept = read_checkpoint(folder)
    if kept is None:
        return "no checkpoint was kept"
    return f"the checkpoint before it, after {kept['step']} steps, is kept in {folder}"


def _draw(points: list[list[float]]) -> CodecCurves:
    table = torch.tensor(points, dtype=torch.float64)
    _, loss, explained_variance, l0, dead_share = (column.clone() for column in table.T)
    return CodecCurves(
        step=table[:, 0].long(),
        loss=loss,
        explained_variance=explained_variance,
        l0=l0,
        dead_share=dead_share,
    )
