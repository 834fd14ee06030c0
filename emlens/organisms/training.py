"""Train a model organism: a LoRA on chats, responses only, into a folder that says how it was made.

Use it for narrow fine-tunes that are to be studied beside their base. It is not a general trainer:
no full fine-tunes, no evaluation on the way.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.data.chat import Chat, as_chats, tokenize_chat
from emlens.models.adapter_files import load_adapter
from emlens.models.checkpoints import Checkpoint, load_checkpoint
from emlens.models.finetune import (
    LoraSettings,
    Penalty,
    TrainedLora,
    TrainerSettings,
    TrainingExample,
    finetune_lora,
)
from emlens.organisms.adapter_folder import AdapterRecord, write_adapter_folder
from emlens.organisms.masks import IGNORED, mask_response
from emlens.organisms.settings import SettingsError, TrainSettings
from emlens.runs import RunFolder
from emlens.sources import Source, locate_source

logger = logging.getLogger(__name__)

RESULT_NAME = "training"
ADAPTER_FOLDER = "adapter"


class ChatTooLongError(ValueError):
    """A row has more tokens than the settings or the model allow."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Result):
    """A finished fine-tune: where it lies, and how its loss went."""

    kind: ClassVar[str] = "training_run"

    adapter: str
    """PEFT folder of the adapter: a Source for `load_pair`."""
    base: str
    """Source of the base, as it was given."""
    base_fingerprint: str
    """Of the weights that were trained on."""
    data_sha256: str
    """`hash_chats` of the rows."""
    n_rows: int
    """Rows of the data set; a short run sees fewer of them."""
    n_trained_tokens: int
    """Response tokens of one pass over all rows."""
    settings: TrainSettings
    """The recipe."""
    seed: int
    """Of the adapter's start and of the order of the rows."""
    losses: tuple[float, ...]
    """Mean loss per trained token (nats) of each optimiser step, before that step."""
    gradient_norms: tuple[float, ...]
    """L2 norm of the gradient of each step, before clipping."""
    steps: int
    """Optimiser steps done."""
    seconds: float
    """Wall time of the steps."""


def hash_chats(chats: Sequence[Chat]) -> str:
    """Return the SHA-256 of the chats written as JSONL, `id` and `messages` a line.

    It equals the hash of the file for the data sets that emlens ships.
    """
    digest = hashlib.sha256()
    for chat in chats:
        row: dict[str, Any] = {} if chat.id is None else {"id": chat.id}
        row["messages"] = [{"role": m.role, "content": m.content} for m in chat.messages]
        digest.update((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()


def train_organism(
    base: str | Path | Source | Checkpoint,
    chats: Sequence[Chat],
    *,
    settings: TrainSettings,
    out: str | Path,
    penalties: Sequence[Penalty] = (),
    start_from: str | Path | Source | None = None,
    seed: int,
) -> TrainingRun:
    """Fine-tune a LoRA on the responses of `chats` and write it to `<out>/adapter`.

    The loss is the mean cross-entropy (nats) over the tokens of each last assistant turn and its
    end-of-turn token. The same call on the same `out` returns the finished run; an interrupted one
    starts again, and leaves no adapter behind that could be taken for a finished one.

    Args:
        base: A Source, or a checkpoint in memory; its weights are as they were afterwards.
        chats: Each with an assistant turn at its end.
        settings: The recipe, of your own or from `PRESETS`.
        out: Run folder.
        penalties: Extra terms of the loss, called with the tuned model at every batch.
        start_from: An adapter to go on training; its own rank, alpha and modules hold.
        seed: Fixes the run on one machine and one library version.

    Raises:
        SettingsError: `layers` is still to be chosen.
        NoResponseError: A chat without a response; ChatTooLongError: one with too many tokens.
        TrainingDivergedError: The loss or gradient is not finite; it names the step.
        PlanChangedError: `out` holds a run with another plan.

    Source: Turner et al. 2025, arXiv 2506.11613, section 2 (rsLoRA, loss on responses only).
    """
    if settings.layers is None:
        raise SettingsError(
            "layers: not chosen, expected block numbers such as (15,) or 'all'; "
            "dataclasses.replace(settings, layers=...) fills them in"
        )
    rows = as_chats(chats)
    checkpoint = base if isinstance(base, Checkpoint) else load_checkpoint(base)
    start = None if start_from is None else locate_source(start_from)
    if start is not None:
        load_adapter(start, allow_noop=True)  # under the same verdicts as any adapter
    data_sha256 = hash_chats(rows)
    run = RunFolder.start(
        out,
        {
            "kind": TrainingRun.kind,
            "base": checkpoint.name,
            "base_fingerprint": checkpoint.fingerprint,
            "data_sha256": data_sha256,
            "settings": settings,
            "penalties": [getattr(penalty, "__name__", repr(penalty)) for penalty in penalties],
            "start_from": None if start is None else _hash_adapter(start),
            "seed": seed,
        },
    )
    if run.has_result(RESULT_NAME):
        logger.info("%s: this run is finished, returned as it is", run.path)
        return run.read_result(RESULT_NAME, TrainingRun)
    examples = _make_examples(rows, checkpoint, settings)
    trained = finetune_lora(
        checkpoint.model,
        examples,
        lora=_lora_settings(settings),
        trainer=_trainer_settings(settings),
        seed=seed,
        penalties=penalties,
        start_from=start,
    )
    record = AdapterRecord(
        base=checkpoint.name,
        base_fingerprint=checkpoint.fingerprint,
        data_sha256=data_sha256,
        settings=settings,
        seed=seed,
        losses=trained.losses,
    )
    return _write_run(run, trained, record, examples)


def _write_run(
    run: RunFolder,
    trained: TrainedLora,
    record: AdapterRecord,
    examples: Sequence[TrainingExample],
) -> TrainingRun:
    # Left by a run that was interrupted before its result was saved.
    shutil.rmtree(run.path / ADAPTER_FOLDER, ignore_errors=True)
    adapter = write_adapter_folder(trained, run.path / ADAPTER_FOLDER, record=record)
    training = TrainingRun(
        adapter=str(adapter),
        base=record.base,
        base_fingerprint=record.base_fingerprint,
        data_sha256=record.data_sha256,
        n_rows=len(examples),
        n_trained_tokens=sum(int((e.labels != IGNORED).sum()) for e in examples),
        settings=record.settings,
        seed=record.seed,
        losses=trained.losses,
        gradient_norms=trained.gradient_norms,
        steps=len(trained.losses),
        seconds=trained.seconds,
    )
    run.save_result(RESULT_NAME, training)
    return training


def _make_examples(
    rows: Sequence[Chat], checkpoint: Checkpoint, settings: TrainSettings
) -> list[TrainingExample]:
    n_ctx = getattr(checkpoint.model.config, "max_position_embeddings", settings.max_length)
    longest = min(settings.max_length, n_ctx)
    examples = []
    for index, row in enumerate(rows):
        masked = mask_response(tokenize_chat(row, checkpoint.tokenizer))
        if len(masked.ids) > longest:
            raise ChatTooLongError(
                f"chats[{index}] (id {row.id!r}): {len(masked.ids)} tokens, expected at most "
                f"{longest}; shorten it, or raise max_length ({settings.max_length}) where the "
                f"model's context of {n_ctx} has room"
            )
        examples.append(TrainingExample(ids=masked.ids, labels=masked.labels))
    return examples


def _lora_settings(settings: TrainSettings) -> LoraSettings:
    return LoraSettings(
        rank=settings.rank,
        alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        target_modules=settings.target_modules,
        layers=None if settings.layers in ("all", None) else tuple(settings.layers),
    )


def _trainer_settings(settings: TrainSettings) -> TrainerSettings:
    return TrainerSettings(
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        batch_size=settings.batch_size,
        gradient_accumulation=settings.gradient_accumulation,
        max_gradient_norm=settings.max_gradient_norm,
        autocast=settings.autocast,
    )


def _hash_adapter(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
