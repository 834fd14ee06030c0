"""Train a LoRA on a loaded Hugging Face model: peft puts it on, transformers' Trainer steps it.

It knows token ids and labels, no chats: use `emlens.organisms.train_organism` to train on
conversations and to get a folder. It is no place for full fine-tunes.
"""

import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from emlens.data.progress import tell_progress

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that takes no part in the loss (the value that torch's cross-entropy skips)."""

Penalty = Callable[[nn.Module], Float[Tensor, ""]]
"""An extra loss term: called with the tuned model at every backward pass."""


class TrainingDivergedError(ArithmeticError):
    """The loss or the gradient stopped being a finite number."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Which LoRA is put on."""

    rank: int
    alpha: float
    use_rslora: bool
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    target_modules: tuple[str, ...]
    """Last parts of module names, such as `down_proj`."""
    layers: tuple[int, ...] | None = None
    """Blocks that get it, counted from 0; None for every block."""


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
    """Precision of the matrix products; weights keep theirs and the LoRA is kept in float32."""


@dataclass(frozen=True, kw_only=True)
class TrainedLora:
    """A LoRA as peft would save it, and how it got there."""

    tensors: Mapping[str, Tensor]
    """By the names that peft writes, in float32, on the CPU."""
    config: Mapping[str, Any]
    """The content of adapter_config.json; it names no base."""
    losses: tuple[float, ...]
    """Mean loss per trained token (nats) of each optimiser step, before that step; no penalties."""
    gradient_norms: tuple[float, ...]
    """L2 norm of the gradient of each step, before clipping."""
    seconds: float
    """Wall time of the steps."""


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


def check_lora_targets(model: nn.Module, lora: LoraSettings) -> None:
    """Refuse module names and blocks that the model lacks; peft drops those that do not match.

    Raises:
        ValueError: It names them, and what the model has.
    """
    linear = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if missing := sorted(set(lora.target_modules) - set(known)):
        raise ValueError(
            f"target_modules: the model has no {', '.join(missing)}; it has {', '.join(known)}"
        )
    numbers = (part for name in linear for part in name.split(".") if part.isdigit())
    n_layers = 1 + max((int(number) for number in numbers), default=-1)
    if outside := [layer for layer in lora.layers or () if not 0 <= layer < n_layers]:
        raise ValueError(f"layers: got {outside}, expected blocks 0 to {n_layers - 1}")


class _FiniteSteps(TrainerCallback):
    """Collects loss and gradient norm of each step; stops at the first that is no number."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []

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
                "the base model's weights"
            )
        self.losses.append(loss)
        self.gradient_norms.append(norm)
        logger.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, loss)
        tell_progress("training (steps)", state.global_step, state.max_steps)


class _PenalisedTrainer(Trainer):
    """Adds the penalties to the loss that is differentiated, not to the loss that is reported."""

    penalties: tuple[Penalty, ...] = ()

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        accumulated = self.args.gradient_accumulation_steps
        for penalty in self.penalties:
            (penalty(model) / accumulated).backward()
        return loss


def finetune_lora(
    model: PreTrainedModel,
    examples: Sequence[TrainingExample],
    *,
    lora: LoraSettings,
    trainer: TrainerSettings,
    seed: int,
    penalties: Sequence[Penalty] = (),
    start_from: Path | None = None,
) -> TrainedLora:
    """Train a LoRA on `model`, then take it off again; the model is as it was, also after an error.

    Nothing is written but a temporary folder, and torch's, numpy's and Python's random states
    are put back.

    Args:
        model: The base, in any dtype, on the device to train on.
        examples: Sequences with their labels.
        lora: Where the LoRA goes and how large it is.
        trainer: Step sizes, batches and length of the run.
        seed: Of the LoRA's start and of the order of the examples.
        penalties: Extra terms of the loss.
        start_from: A PEFT folder to go on training, instead of a LoRA that starts at zero; its
            own rank, alpha and modules then hold.

    Raises:
        TrainingDivergedError: A loss or gradient is not finite; it names the step.
        ValueError: Examples that cannot be trained on, or a module name the model lacks.
    """
    if start_from is None:
        check_lora_targets(model, lora)
    check_examples(examples, model.config.get_text_config().vocab_size)
    with _restored_randomness(), _restored(model), tempfile.TemporaryDirectory() as scratch:
        set_seed(seed)
        tuned = _put_on(model, lora, start_from)
        try:
            steps = _FiniteSteps()
            runner = _PenalisedTrainer(
                model=tuned,
                args=_arguments(trainer, scratch, seed=seed, device=model.device),
                train_dataset=list(examples),  # pyright: ignore[reportArgumentType]
                data_collator=collate_examples,
                callbacks=[steps],
            )
            runner.remove_callback(PrinterCallback)
            runner.penalties = tuple(penalties)
            began = time.perf_counter()
            runner.train()
            seconds = time.perf_counter() - began
            return TrainedLora(
                tensors={
                    name: tensor.detach().float().cpu().clone()
                    for name, tensor in _lora_tensors(tuned).items()
                },
                config=_plain_config(tuned),
                losses=tuple(steps.losses),
                gradient_norms=tuple(steps.gradient_norms),
                seconds=seconds,
            )
        finally:
            tuned.unload()


def _put_on(model: PreTrainedModel, lora: LoraSettings, start_from: Path | None) -> PeftModel:
    if start_from is not None:
        try:
            return PeftModel.from_pretrained(model, str(start_from), is_trainable=True)
        except BaseException:
            _remove_lora(model)
            raise
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=lora.use_rslora,
        target_modules=list(lora.target_modules),
        layers_to_transform=None if lora.layers is None else list(lora.layers),
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    assert isinstance(tuned, PeftModel)
    return tuned


def _remove_lora(model: PreTrainedModel) -> None:
    """Put back the linear modules that an interrupted injection has already wrapped."""
    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if base is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, base)


def _arguments(
    trainer: TrainerSettings, scratch: str, *, seed: int, device: torch.device
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=trainer.batch_size,
        gradient_accumulation_steps=trainer.gradient_accumulation,
        learning_rate=trainer.learning_rate,
        lr_scheduler_type=trainer.schedule,
        warmup_steps=trainer.warmup_steps,
        weight_decay=trainer.weight_decay,
        max_grad_norm=trainer.max_gradient_norm,
        num_train_epochs=trainer.epochs,
        max_steps=-1 if trainer.max_steps is None else trainer.max_steps,
        bf16=trainer.autocast == "bfloat16",
        optim="adamw_torch",
        use_cpu=device.type == "cpu",
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def _lora_tensors(tuned: PeftModel) -> dict[str, Tensor]:
    # Left to itself, peft would look for the base's config on the Hub.
    return get_peft_model_state_dict(tuned, save_embedding_layers=False)


def _plain_config(tuned: PeftModel) -> dict[str, Any]:
    """What peft would write, without the path of the base on this machine."""
    config = tuned.peft_config["default"].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain["peft_type"] = "LORA"
    plain["task_type"] = "CAUSAL_LM"
    plain["base_model_name_or_path"] = None
    plain["inference_mode"] = True
    return plain


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back what peft and the Trainer switch on a model: gradients wanted, training mode."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training, attributes = model.training, set(vars(model))
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        model.train(training)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        if use_cache is not None:
            config.use_cache = use_cache  # pyright: ignore[reportOptionalMemberAccess]


@contextmanager
def _restored_randomness() -> Iterator[None]:
    """Leave the caller's random states alone: the Trainer seeds all of them."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
