"""The training loop: transformers' Trainer over ids and labels, with checkpoints to go on from.

It knows neither LoRA nor chats: who calls it says what is trained, saved and loaded.
"""

import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from emlens.data.progress import tell_progress
from emlens.models.checkpoint_folders import (
    STATE,
    drop_resuming,
    find_checkpoints,
    find_last_whole,
    keep_good,
    save_start,
)
from emlens.models.checkpointed_activations import checkpointed_activations

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that takes no part in the loss (the value that torch's cross-entropy skips)."""
_EXTRA = "penalty"
"""Name of the extra terms in the Trainer's record, beside its own `loss`."""
SMOOTHED = 5
"""Steps over whose mean loss an early stop is decided."""

Penalty = Callable[[nn.Module, int], Float[Tensor, ""]]
"""An extra loss term: called with the tuned model and the number of the backward pass, from 0."""


class TrainingDivergedError(ArithmeticError):
    """The loss or the gradient stopped being a finite number."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How it is trained: AdamW over `max_steps`, or over `epochs` where that is None."""

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    weight_decay: float
    epochs: float
    max_steps: int | None
    batch_size: int
    gradient_accumulation: int
    max_gradient_norm: float
    autocast: Literal["none", "bfloat16"]
    """Precision of the matrix products; weights keep theirs and a LoRA is kept in float32."""
    stop_loss: float | None = None
    """Training ends once the mean loss of five steps is below this; None for never."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; None for none."""
    checkpoint_activations: bool = False
    """Compute what is inside a block again for its gradient, instead of keeping it."""


@dataclass(frozen=True, kw_only=True)
class TrainerRun:
    """One run of the trainer."""

    settings: TrainerSettings
    """Step sizes, batches and length."""
    seed: int
    """Of the order of the examples, and of a LoRA's start."""
    penalties: tuple[Penalty, ...] = ()
    """Extra terms of the loss."""
    work: Path | None = None
    """Where checkpoints go, `checkpoint-STEP`, from step 0 on; the same run goes on from the last
    whole one. Needed with `checkpoint_every`."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A model with what is trained of it, and how that goes to disk and back."""

    model: nn.Module
    save: Callable[[Path], object]
    """Writes the trained part into a folder."""
    load: Callable[[Path], object]
    """Reads it back into the model."""


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """How a run went."""

    losses: tuple[float, ...]
    """Mean loss per trained token (nats) of each optimiser step, before that step; no penalties."""
    penalties: tuple[float, ...]
    """Extra terms of each step together, weights included: the mean of its backward passes. Empty
    where there are none."""
    gradient_norms: tuple[float, ...]
    """L2 norm of the gradient of each step, before clipping."""
    seconds: float
    """Wall time of the steps, of the last call only where a run was gone on with."""


@dataclass(frozen=True, kw_only=True)
class TrainingExample:
    """One sequence; `labels` repeats the id where the token is trained on, else `IGNORED`."""

    ids: Int[Tensor, " pos"]
    labels: Int[Tensor, " pos"]


def collate_examples(examples: Sequence[TrainingExample]) -> dict[str, Int[Tensor, "batch pos"]]:
    """Pad on the right into `input_ids`, `labels` and `attention_mask`."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        labels[row, : len(example.labels)] = example.labels
        mask[row, : len(example.ids)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def check_examples(examples: Sequence[TrainingExample], d_vocab: int) -> None:
    """Refuse examples that would train on nothing or on ids the model does not have.

    Raises:
        ValueError: An empty list, or the index of the first example that cannot be used.
    """
    if not examples:
        raise ValueError("examples: got none, expected at least one to train on")
    for index, example in enumerate(examples):
        if example.ids.shape != example.labels.shape:
            raise ValueError(
                f"examples[{index}]: {len(example.ids)} ids and {len(example.labels)} labels, "
                "expected one label for each id"
            )
        if not (example.labels[1:] != IGNORED).any():
            raise ValueError(
                f"examples[{index}]: no token is trained on (every label is {IGNORED}); "
                "has this chat a response?"
            )
        if int(example.ids.max()) >= d_vocab or int(example.ids.min()) < 0:
            raise ValueError(
                f"examples[{index}]: token id {int(example.ids.max())} is outside the "
                f"vocabulary of {d_vocab}; was it tokenised for another model?"
            )


class _FiniteSteps(TrainerCallback):
    """Tells of each step; stops at a loss that is no number, or low enough."""

    def __init__(self, stop_loss: float | None, work: Path | None) -> None:
        self.stop_loss, self.work = stop_loss, work

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise TrainingDivergedError(
                f"training diverged at step {state.global_step} of {state.max_steps}: loss {loss}, "
                f"gradient norm {norm}; lower the learning rate ({args.learning_rate}) or check "
                f"the base model's weights{self._kept(state.global_step, loss)}"
            )
        logger.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, loss)
        tell_progress("training (steps)", state.global_step, state.max_steps)
        recent = [float(row["loss"]) for row in state.log_history if "loss" in row]
        if is_low(recent, self.stop_loss):
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy == "steps"

    def _kept(self, step: int, loss: float) -> str:
        """Say what is left, without the states that made the loss what it is."""
        # A loss is that of the weights before its step: the state kept there is the broken one.
        broken = None if np.isfinite(loss) else step - 1
        good = None if self.work is None else keep_good(self.work, step=broken)
        return "" if good is None else f". The last good checkpoint is {good}"

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object):
        """Of all checkpoints but the last, keep what was trained and the record."""
        for step, folder in find_checkpoints(Path(str(args.output_dir))).items():
            if step < state.global_step:
                drop_resuming(folder)


def is_low(losses: Sequence[float], stop_loss: float | None) -> bool:
    """Whether training ends here: the mean of the last five losses is below a bound."""
    recent = losses[-SMOOTHED:]
    return stop_loss is not None and len(recent) == SMOOTHED and float(np.mean(recent)) < stop_loss


class _Runner(Trainer):
    """Adds the penalties to the loss that is differentiated, not to the loss that is reported."""

    penalties: tuple[Penalty, ...] = ()
    trainable: Trainable
    _step, _inner = -1, 0
    _extra: Tensor | float = 0.0

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        # Counted from the Trainer's own step, so that a run that is gone on with counts on.
        if self.state.global_step != self._step:
            self._step, self._inner = self.state.global_step, 0
        place = self._step * self.args.gradient_accumulation_steps + self._inner
        self._inner += 1
        # The last step of an epoch may be of fewer batches.
        accumulated = self.current_gradient_accumulation_steps
        for penalty in self.penalties:
            value = penalty(model, place) / accumulated
            value.backward()
            self._extra = self._extra + value.detach()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Put the extra terms of a step beside its loss, in the record that checkpoints keep."""
        if self.penalties and "loss" in logs:
            logs[_EXTRA], self._extra = float(self._extra), 0.0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None):
        self.trainable.save(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.trainable.load(Path(resume_from_checkpoint))


def run_trainer(
    trainable: Trainable, examples: Sequence[TrainingExample], run: TrainerRun
) -> TrainingLog:
    """Train; torch's, numpy's and Python's random states are put back afterwards.

    Args:
        trainable: what is trained.
        examples: sequences with their labels.
        run: how.

    Raises:
        TrainingDivergedError: a loss or gradient is not finite; it names the step, and the last
            checkpoint, which stays.
        ValueError: checkpoints without a place for them, or activations of a model that cannot
            compute them twice.
    """
    settings, work = run.settings, run.work
    if settings.checkpoint_every is not None and work is None:
        raise ValueError("work: checkpoint_every is set, expected a folder for the checkpoints")
    with restored_randomness(), tempfile.TemporaryDirectory() as scratch:
        set_seed(run.seed)
        folder = Path(scratch) if settings.checkpoint_every is None or work is None else work
        last = find_last_whole(folder)
        if last is not None and (done := _read_finished(last, settings, len(examples))):
            trainable.load(last)
            return done
        model: Any = trainable.model
        runner = _Runner(
            model=model,
            args=_arguments(
                settings, folder, seed=run.seed, device=next(model.parameters()).device
            ),
            train_dataset=list(examples),  # pyright: ignore[reportArgumentType]
            data_collator=collate_examples,
            callbacks=[_FiniteSteps(settings.stop_loss, work)],
        )
        runner.remove_callback(PrinterCallback)
        runner.penalties, runner.trainable = run.penalties, trainable
        if settings.checkpoint_every is not None and last is None:
            save_start(folder, trainable.save)
        began = time.perf_counter()
        with checkpointed_activations(model, wanted=settings.checkpoint_activations):
            runner.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = time.perf_counter() - began
        return _make_log(runner.state.log_history, seconds)


def _make_log(history: Sequence[Any], seconds: float) -> TrainingLog:
    logged = [row for row in history if "loss" in row]
    return TrainingLog(
        losses=tuple(float(row["loss"]) for row in logged),
        penalties=tuple(float(row[_EXTRA]) for row in logged if _EXTRA in row),
        gradient_norms=tuple(float(row.get("grad_norm", 0.0)) for row in logged),
        seconds=seconds,
    )


def _read_finished(last: Path, settings: TrainerSettings, n: int) -> TrainingLog | None:
    """The log of a run whose last checkpoint is its end; None where it is to go on."""
    state = json.loads((last / STATE).read_text(encoding="utf-8"))
    log = _make_log(state["log_history"], 0.0)
    over = state["global_step"] >= count_steps(settings, n) or is_low(
        log.losses, settings.stop_loss
    )
    return log if over else None


def count_steps(settings: TrainerSettings, n: int) -> int:
    """Optimiser steps of a run on `n` examples that nothing ends early."""
    batches = -(-n // settings.batch_size)
    in_epoch = -(-batches // settings.gradient_accumulation)
    return settings.max_steps or math.ceil(settings.epochs * in_epoch)


def check_device(device: torch.device) -> None:
    """Refuse a device that the Trainer would move the model away from.

    Raises:
        ValueError: a CUDA device other than the first.
    """
    if device.type == "cuda" and device.index:
        raise ValueError(
            f"base: it lies on {device}, and the Trainer trains on cuda:0 alone; put it there, and "
            f"set CUDA_VISIBLE_DEVICES={device.index} to make that device the first"
        )


def _arguments(
    settings: TrainerSettings, folder: Path, *, seed: int, device: torch.device
) -> TrainingArguments:
    check_device(device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        bf16=settings.autocast == "bfloat16",
        optim="adamw_torch",
        use_cpu=device.type == "cpu",
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no" if settings.checkpoint_every is None else "steps",
        save_steps=settings.checkpoint_every or 500,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if arguments.n_gpu > 1:
        # Left alone it would copy the model to every device that it sees, where penalties find no
        # adapter, and multiply the batch by their number: another recipe on another machine.
        arguments._n_gpu = 1
    return arguments


@contextmanager
def restored_randomness() -> Iterator[None]:
    """Leave the caller's random states alone: the Trainer seeds all of them."""
    python, legacy = random.getstate(), np.random.get_state()
    # Of every device: seeding reaches them all. Before CUDA is in use none has a state.
    cuda = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(devices=list(cuda)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
