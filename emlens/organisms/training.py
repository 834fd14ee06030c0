"""Train a model organism on chats, responses only, into a folder that says how it was made.

Use it for narrow fine-tunes that are to be studied beside their base. It is no general trainer:
nothing is evaluated on the way.
"""

import copy
import hashlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.data.chat import Chat, as_chats
from emlens.data.prompts import hash_chats
from emlens.models.adapter_files import load_adapter
from emlens.models.checkpoint_folders import drop_resuming, find_checkpoints
from emlens.models.checkpoints import Checkpoint, load_checkpoint
from emlens.models.config import find_architecture
from emlens.models.finetune import (
    check_lora_targets,
    check_start,
    finetune_lora,
    finetune_vector,
    finetune_whole,
)
from emlens.models.trained_vector import check_vector_site
from emlens.models.training_loop import (
    Penalty,
    TrainerRun,
    TrainingExample,
    TrainingLog,
    check_device,
)
from emlens.organisms.adapter_folder import AdapterRecord, write_adapter_folder
from emlens.organisms.host_settings import lora_settings, trainer_settings
from emlens.organisms.kept_states import describe_vector, keep_models, keep_vectors
from emlens.organisms.masks import count_trained, make_examples
from emlens.organisms.penalties import Description, LossTerm
from emlens.organisms.settings import VECTOR_SITES, SettingsError, TrainSettings
from emlens.organisms.trajectory import TRAJECTORY_NAME, read_checkpoints
from emlens.runs import RunFolder
from emlens.sites import Site, parse_site
from emlens.sources import Source, locate_source

logger = logging.getLogger(__name__)

RESULT_NAME = "training"
ADAPTER_FOLDER, VECTOR_FOLDER, MODEL_FOLDER = "adapter", "vector", "model"
CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Result):
    """A finished fine-tune: where it lies, and how its loss went."""

    kind: ClassVar[str] = "training_run"

    tuned: str
    """What came out, which `load_pair` reads beside the base: a PEFT folder, a checkpoint, or the
    folder of a `Direction`."""
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
    penalties: tuple[Description, ...]
    """Extra terms of the loss, as they describe themselves: kind, weight, hash of the texts."""
    start_from: str | None
    """SHA-256 of the weights of the adapter that training went on from, whose rank, alpha and
    modules then hold instead of the recipe's; None where it began at zero."""
    seed: int
    """Of the adapter's start and of the order of the rows."""
    losses: tuple[float, ...]
    """Mean loss per trained token (nats) of each optimiser step, before that step."""
    penalty_values: tuple[float, ...]
    """Extra terms of each step together, weights included; empty where there are none."""
    gradient_norms: tuple[float, ...]
    """L2 norm of the gradient of each step, before clipping."""
    steps: int
    """Optimiser steps done."""
    seconds: float
    """Wall time of the steps."""


def train_organism(
    base: str | Path | Source | Checkpoint,
    chats: Sequence[Chat],
    *,
    settings: TrainSettings,
    out: str | Path,
    penalties: Sequence[LossTerm] = (),
    start_from: str | Path | Source | None = None,
    seed: int,
) -> TrainingRun:
    """Fine-tune on the responses of `chats` and write what comes of it into `<out>`.

    The loss is the mean cross-entropy (nats) over the tokens of each last assistant turn and its
    end-of-turn token. The same call on the same `out` returns the finished run; an interrupted one
    goes on from its last checkpoint, or starts again where none are kept, and leaves nothing behind
    that could be taken for a finished one. Checkpoints become one result, which `load_trajectory`
    reads.

    Args:
        base: A Source, or a checkpoint in memory; its weights are as they were afterwards.
        chats: Each with an assistant turn at its end.
        settings: The recipe, of your own or from `PRESETS`.
        out: Run folder.
        penalties: Extra terms of the loss, such as `KlPenalty`.
        start_from: An adapter to go on training, as when a misaligned one is trained on careful
            rows; its own rank, alpha and modules hold.
        seed: Fixes the run on one machine and one library version.

    Raises:
        SettingsError: `layers` is still to be chosen, or meant for another depth; or a penalty that
            compares with the base, where no adapter is trained.
        NoResponseError: A chat without a response; ChatTooLongError: one with too many tokens, of
            a penalty's too.
        ValueError: `start_from` was trained on another base, or does not fit this one.
        TrainingDivergedError: The loss or gradient is not finite; it names the step, and the last
            good checkpoint where any are kept.
        PlanChangedError: `out` holds a run with another plan.

    Source: Turner et al. 2025, arXiv 2506.11613, section 2 (rsLoRA, loss on responses only).
    """
    rows = as_chats(chats)
    checkpoint = base if isinstance(base, Checkpoint) else load_checkpoint(base)
    _check_base(checkpoint, settings)
    start = _find_start(start_from, settings, checkpoint)
    # Before the folder is begun: what is refused here leaves it free for the plan put right.
    longest = _find_longest(checkpoint, settings)
    examples = make_examples(rows, checkpoint.tokenizer, longest=longest)
    _check_targets(checkpoint, settings, start)
    _check_penalties(checkpoint, settings, penalties, start)
    shared: dict[str, Any] = {"batch_size": settings.batch_size, "longest": longest, "seed": seed}
    prepared = tuple(penalty.prepare(checkpoint.tokenizer, **shared) for penalty in penalties)
    data_sha256 = hash_chats(rows)
    run = RunFolder.start(
        out,
        {
            "kind": TrainingRun.kind,
            "base": checkpoint.name,
            "base_fingerprint": checkpoint.fingerprint,
            "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
            "data_sha256": data_sha256,
            "settings": settings,
            "penalties": [penalty.describe() for penalty in penalties],
            "start_from": None if start is None else _hash_adapter(start),
            "seed": seed,
        },
    )
    if run.has_result(RESULT_NAME):
        logger.info("%s: this run is finished, returned as it is", run.path)
        return run.read_result(RESULT_NAME, TrainingRun)
    work = _Work(
        run=run,
        checkpoint=checkpoint,
        examples=examples,
        settings=settings,
        data_sha256=data_sha256,
        seed=seed,
        penalties=prepared,
        start=start,
    )
    return work.finish(*work.train())


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One run on its way."""

    run: RunFolder
    checkpoint: Checkpoint
    examples: Sequence[TrainingExample]
    settings: TrainSettings
    data_sha256: str
    seed: int
    penalties: tuple[Penalty, ...]
    start: Path | None

    @property
    def states(self) -> Path:
        """Where checkpoints are kept while the run is on its way."""
        return self.run.path / CHECKPOINT_FOLDER

    def trainer_run(self) -> TrainerRun:
        return TrainerRun(
            settings=trainer_settings(self.settings),
            seed=self.seed,
            penalties=self.penalties,
            work=self.states,
        )

    def train(self) -> tuple[Path, TrainingLog]:
        """What came out, and how it went."""
        made = {"lora": self.train_lora, "vector": self.train_vector, "full": self.train_whole}
        return made[self.settings.method]()

    def train_lora(self) -> tuple[Path, TrainingLog]:
        trained = finetune_lora(
            self.checkpoint.model,
            self.examples,
            lora=lora_settings(self.settings),
            run=self.trainer_run(),
            start_from=self.start,
        )
        record = AdapterRecord(
            base=self.checkpoint.name,
            base_fingerprint=self.checkpoint.fingerprint,
            data_sha256=self.data_sha256,
            settings=self.settings,
            seed=self.seed,
            losses=trained.log.losses,
            penalties=tuple(self.run.plan["penalties"]),
            start_from=self.run.plan["start_from"],
        )
        place = self._clear(ADAPTER_FOLDER)
        return write_adapter_folder(trained, place, record=record), trained.log

    def train_vector(self) -> tuple[Path, TrainingLog]:
        factor = self.settings.alpha
        assert factor is not None
        module, site = _find_module(self.checkpoint, self.settings)
        trained = finetune_vector(
            self.checkpoint.model,
            self.examples,
            module=module,
            factor=factor,
            run=self.trainer_run(),
        )
        direction = describe_vector(
            trained.vector,
            site=site,
            base_fingerprint=self.checkpoint.fingerprint,
            note=f"trained on {len(self.examples)} rows, added at all tokens",
        )
        keep_vectors(self.states, factor=factor, like=direction)
        return direction.save(self._clear(VECTOR_FOLDER)), trained.log

    def train_whole(self) -> tuple[Path, TrainingLog]:
        model = copy.deepcopy(self.checkpoint.model).float()
        log = finetune_whole(
            model,
            self.examples,
            run=self.trainer_run(),
        )
        place = self._clear(MODEL_FOLDER)
        model.save_pretrained(str(place))
        if self.checkpoint.tokenizer is not None:
            self.checkpoint.tokenizer.save_pretrained(str(place))
        keep_models(self.states, like=place)
        return place, log

    def finish(self, tuned: Path, log: TrainingLog) -> TrainingRun:
        """Keep what was asked for of the checkpoints, and last the record of the run."""
        if self.settings.method == "lora" and find_checkpoints(self.states):
            name = str(self.run.path)
            self.run.save_result(TRAJECTORY_NAME, read_checkpoints(self.states, name=name))
        training = TrainingRun(
            tuned=str(tuned),
            base=self.checkpoint.name,
            base_fingerprint=self.checkpoint.fingerprint,
            data_sha256=self.data_sha256,
            n_rows=len(self.examples),
            n_trained_tokens=count_trained(self.examples),
            settings=self.settings,
            penalties=tuple(self.run.plan["penalties"]),
            start_from=self.run.plan["start_from"],
            seed=self.seed,
            losses=log.losses,
            penalty_values=log.penalties,
            gradient_norms=log.gradient_norms,
            steps=len(log.losses),
            seconds=log.seconds,
        )
        self.run.save_result(RESULT_NAME, training)
        if self.settings.method == "lora":
            shutil.rmtree(self.states, ignore_errors=True)
        for place in find_checkpoints(self.states).values():
            drop_resuming(place)
        return training

    def _clear(self, name: str) -> Path:
        """A place that a run interrupted before its result was saved may have filled."""
        place = self.run.path / name
        shutil.rmtree(place, ignore_errors=True)
        return place


def _check_base(checkpoint: Checkpoint, settings: TrainSettings) -> None:
    check_device(checkpoint.model.device)
    settings.check_depth(checkpoint.model.config.get_text_config().num_hidden_layers)


def _find_start(
    start_from: str | Path | Source | None, settings: TrainSettings, checkpoint: Checkpoint
) -> Path | None:
    if start_from is None:
        return None
    if settings.method != "lora":
        raise SettingsError(f"start_from: method {settings.method!r} has no adapter to go on with")
    start = locate_source(start_from)
    adapter = load_adapter(start, allow_noop=True)  # under the same verdicts as any adapter
    made = adapter.base_fingerprint
    if made and made != checkpoint.fingerprint:
        raise SettingsError(
            f"start_from: {start_from} was trained on {adapter.base_name}, weights {made}, and "
            f"{checkpoint.name} is {checkpoint.fingerprint}; name the base that it was trained on"
        )
    check_start(checkpoint.model, start)
    return start


def _check_targets(checkpoint: Checkpoint, settings: TrainSettings, start: Path | None) -> None:
    if settings.method == "lora" and start is None:
        check_lora_targets(checkpoint.model, lora_settings(settings))
    if settings.method == "vector":
        _find_module(checkpoint, settings)


def refuse_terms(settings: TrainSettings, penalties: Sequence[LossTerm]) -> None:
    """Refuse terms that a recipe cannot have, before any model is loaded.

    Raises:
        SettingsError: one that compares with the base, where no adapter is trained.
    """
    for penalty in penalties:
        if settings.method == "full" and penalty.needs_adapter:
            raise SettingsError(
                f"penalties: {type(penalty).__name__} compares with the base, and a full fine-tune "
                "has none in itself; train an adapter (method 'lora' or 'vector'), or leave it out"
            )


def _check_penalties(
    checkpoint: Checkpoint,
    settings: TrainSettings,
    penalties: Sequence[LossTerm],
    start: Path | None,
) -> None:
    named = settings.layers if isinstance(settings.layers, tuple) else ()
    if start is not None:
        named = load_adapter(start, allow_noop=True).layers
    refuse_terms(settings, penalties)
    for penalty in penalties:
        penalty.check_model(checkpoint.model, first_trained=min(named, default=0))


def _find_module(checkpoint: Checkpoint, settings: TrainSettings) -> tuple[str, Site]:
    """The full name of the module that a vector is added to, and the site that it writes.

    Raises:
        SettingsError: the model has no such module, or norms what it puts out.
    """
    assert isinstance(settings.layers, tuple)
    (layer,), (name,) = settings.layers, settings.target_modules
    stream = VECTOR_SITES[name]
    try:
        check_vector_site(find_architecture(type(checkpoint.model).__name__), stream)
    except ValueError as error:
        raise SettingsError(f"method: 'vector': {error}") from error
    places = [path for path, _ in checkpoint.model.named_modules() if path.endswith(f".{name}")]
    found = [path for path in places if str(layer) in path.split(".")]
    if len(found) != 1:
        raise SettingsError(
            f"target_modules: {name} in block {layer} is {len(found)} modules of this model, "
            "expected one"
        )
    return found[0], parse_site(f"{stream}.{layer}")


def _find_longest(checkpoint: Checkpoint, settings: TrainSettings) -> int:
    """Tokens that a row may have."""
    n_ctx = getattr(checkpoint.model.config, "max_position_embeddings", settings.max_length)
    return min(settings.max_length, n_ctx)


def _hash_adapter(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
