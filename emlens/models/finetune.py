"""Fine-tune a loaded Hugging Face model, as a LoRA or one added vector, and take that off again.

It knows token ids and labels, no chats: use `emlens.organisms.train_organism` to train on
conversations and to get a folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from emlens.artifacts import write_json_atomic, write_tensors_atomic
from emlens.models.adapter_start import put_adapter_on
from emlens.models.training_loop import (
    IGNORED,
    Trainable,
    TrainerRun,
    TrainingExample,
    TrainingLog,
    check_examples,
    collate_examples,
    restored_randomness,
    run_trainer,
)

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_VECTOR = "vector.safetensors"


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
class TrainedLora:
    """A LoRA as peft would save it, and how it got there."""

    tensors: Mapping[str, Tensor]
    """By the names that peft writes, in float32, on the CPU."""
    config: Mapping[str, Any]
    """The content of adapter_config.json; it names no base."""
    log: TrainingLog


@dataclass(frozen=True, kw_only=True)
class TrainedVector:
    """A vector added to a module's output at every token, and how it got there."""

    vector: Float[Tensor, " d_model"]
    """What is added, its factor included; float32, on the CPU."""
    log: TrainingLog


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


def check_start(model: PreTrainedModel, folder: Path) -> None:
    """Refuse an adapter that training on `model` could not go on with; the model is as it was.

    Args:
        model: the base.
        folder: PEFT folder of the adapter.

    Raises:
        ValueError: it cannot be honoured or does not fit; it names the first module.
    """
    with restored_randomness(), _restored(model):
        put_adapter_on(model, folder).unload()


def finetune_lora(
    model: PreTrainedModel,
    examples: Sequence[TrainingExample],
    *,
    lora: LoraSettings,
    run: TrainerRun,
    start_from: Path | None = None,
) -> TrainedLora:
    """Train a LoRA on `model`, then take it off again; the model is as it was, also after an error.

    torch's, numpy's and Python's random states are put back.

    Args:
        model: The base, in any dtype, on the device to train on.
        examples: Sequences with their labels.
        lora: Where the LoRA goes and how large it is.
        run: How it is trained.
        start_from: A PEFT folder to go on training, instead of a LoRA that starts at zero; its
            own rank, alpha and modules then hold.

    Raises:
        TrainingDivergedError: A loss or gradient is not finite; it names the step.
        ValueError: Examples that cannot be trained on, a module name the model lacks, or an
            adapter that does not fit it.
    """
    if start_from is None:
        check_lora_targets(model, lora)
    check_examples(examples, model.config.get_text_config().vocab_size)
    with restored_randomness(), _restored(model):
        set_seed(run.seed)
        tuned = _put_on(model, lora, start_from)
        try:
            log = run_trainer(
                Trainable(
                    model=tuned,
                    save=lambda folder: _save_lora(tuned, folder),
                    load=lambda folder: _load_lora(tuned, folder),
                ),
                examples,
                run,
            )
            return TrainedLora(tensors=_lora_tensors(tuned), config=_plain_config(tuned), log=log)
        finally:
            tuned.unload()


def finetune_vector(
    model: PreTrainedModel,
    examples: Sequence[TrainingExample],
    *,
    module: str,
    factor: float,
    run: TrainerRun,
) -> TrainedVector:
    """Train one vector, added times `factor` to a module's output at all tokens, from zero on.

    Args:
        model: As in `finetune_lora`; it is as it was afterwards.
        examples: Sequences with their labels.
        module: Name of the module, such as `model.layers.15.mlp.down_proj`.
        factor: What the vector is multiplied by: it makes steps in the output larger.
        run: How it is trained.

    Raises:
        TrainingDivergedError: A loss or gradient is not finite; it names the step.
        ValueError: Examples that cannot be trained on.
    """
    check_examples(examples, model.config.get_text_config().vocab_size)
    with restored_randomness(), _restored(model):
        model.requires_grad_(False)
        wrapped = _WithVector(model, model.get_submodule(module), factor)
        try:
            log = run_trainer(
                Trainable(model=wrapped, save=wrapped.save, load=wrapped.load),
                examples,
                run,
            )
            vector = (factor * wrapped.vector).detach().float().cpu().clone()
            return TrainedVector(vector=vector, log=log)
        finally:
            wrapped.remove()


def read_vector_state(folder: Path, *, factor: float) -> Float[Tensor, " d_model"]:
    """What was added at a checkpoint of `finetune_vector`, its factor included.

    Raises:
        OSError: the folder holds no such state.
    """
    return (factor * load_file(folder / _VECTOR)["vector"]).float()


def finetune_whole(
    model: PreTrainedModel,
    examples: Sequence[TrainingExample],
    *,
    run: TrainerRun,
) -> TrainingLog:
    """Train every parameter of a model in place: give it a copy of its own.

    Args:
        model: What is trained, in float32; left in evaluation mode.
        examples: Sequences with their labels.
        run: How it is trained.

    Raises:
        TrainingDivergedError: A loss or gradient is not finite; it names the step.
        ValueError: Examples that cannot be trained on.
    """
    check_examples(examples, model.config.get_text_config().vocab_size)
    model.requires_grad_(True)
    try:
        return run_trainer(
            Trainable(
                model=model,
                save=lambda folder: _save_whole(model, folder),
                load=lambda folder: model.load_state_dict(load_file(folder / "model.safetensors")),
            ),
            examples,
            run,
        )
    finally:
        model.requires_grad_(False)
        model.eval()


def find_gradients(
    model: PreTrainedModel, folder: Path, examples: Sequence[TrainingExample]
) -> dict[str, Tensor]:
    """Gradient of the mean loss with respect to each B of an adapter, by module name.

    Args:
        model: The base; it is as it was afterwards.
        folder: PEFT folder of the adapter.
        examples: Sequences with their labels, each token of all of them counted the same.

    Returns:
        [d_out rank] in float32 on the CPU.
    """
    check_examples(examples, model.config.get_text_config().vocab_size)
    labelled = sum(int((example.labels[1:] != IGNORED).sum()) for example in examples)
    with _restored(model):
        tuned: Any = put_adapter_on(model, folder)
        try:
            for example in examples:
                batch = collate_examples([example])
                batch = {name: part.to(model.device) for name, part in batch.items()}
                own = int((example.labels[1:] != IGNORED).sum())
                (tuned(**batch).loss * (own / labelled)).backward()
            return {
                name.split("base_model.model.", 1)[1].split(".lora_B", 1)[
                    0
                ]: parameter.grad.detach().float().cpu().clone()
                for name, parameter in tuned.named_parameters()
                if ".lora_B" in name and parameter.grad is not None
            }
        finally:
            tuned.unload()


class _WithVector(nn.Module):
    """A model with a vector added at one module, the vector alone trainable."""

    def __init__(self, model: PreTrainedModel, module: nn.Module, factor: float):
        super().__init__()
        self.model, self.config, self.factor = model, model.config, factor
        width, device = model.config.get_text_config().hidden_size, model.device
        self.vector = nn.Parameter(torch.zeros(width, device=device))
        self._handle = module.register_forward_hook(self._add)
        self._on = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def remove(self) -> None:
        """Leave the model without the vector."""
        self._handle.remove()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base, by the name that a peft model has for it: penalties ask for it."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def save(self, folder: Path) -> None:
        write_tensors_atomic(folder / _VECTOR, {"vector": self.vector.detach()})

    def load(self, folder: Path) -> None:
        with torch.no_grad():
            self.vector.copy_(load_file(folder / _VECTOR)["vector"])

    def _add(self, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + (self.factor * self.vector).to(output.dtype) if self._on else output


def _save_whole(model: nn.Module, folder: Path) -> None:
    write_tensors_atomic(folder / "model.safetensors", model.state_dict())


def _put_on(model: PreTrainedModel, lora: LoraSettings, start_from: Path | None) -> PeftModel:
    if start_from is not None:
        return put_adapter_on(model, start_from)
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


def _save_lora(tuned: PeftModel, folder: Path) -> None:
    """A PEFT folder without the name of the base on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors_atomic(folder / _WEIGHTS, _lora_tensors(tuned))
    write_json_atomic(folder / _CONFIG, _plain_config(tuned))


def _load_lora(tuned: PeftModel, folder: Path) -> None:
    set_peft_model_state_dict(tuned, load_file(folder / _WEIGHTS))


def _lora_tensors(tuned: PeftModel) -> dict[str, Tensor]:
    # Left to itself, peft would look for the base's config on the Hub.
    found = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    return {name: tensor.detach().float().cpu().clone() for name, tensor in found.items()}


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
