"""From a Source, or a model in memory, to a HookedTransformer, with or without an adapter."""

from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer, PreTrainedModel

from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.checkpoints import (
    Checkpoint,
    load_checkpoint,
    load_tokenizer,
    read_device,
    read_dtype,
)
from emlens.models.lora import LoraAdapter
from emlens.models.merge import merge_adapter
from emlens.models.proof import require_proof, verify_adapter
from emlens.models.views import lay_views
from emlens.sources import Source

Form = Literal["merged", "attached"]
ModelSource = str | Path | Source | PreTrainedModel
AdapterSource = str | Path | Source | LoraAdapter


def load_model(
    source: ModelSource | PeftModel,
    *,
    adapter: AdapterSource | None = None,
    form: Form = "merged",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> HookedTransformer:
    """Load a model as a genuine HookedTransformer over one copy of its weights.

    Args:
        source: a Source, a GGUF file, or a live Hugging Face or peft model. An un-merged LoRA in a
            live peft model is read as the adapter.
        adapter: a LoRA to put on it, proven to be in effect before this returns.
        form: ``merged`` into the weights, or ``attached`` in permanent hooks.
        dtype: of the weights; ``auto`` is the checkpoint's own. A live model keeps its own.
        device: where the weights go; ``auto`` is the first GPU, else the CPU.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: an unsupported checkpoint, config field or adapter, named.
        AdapterNotInEffectError: the adapter is not what the model computes.
    """
    check_form(form)
    if isinstance(source, PeftModel):
        if adapter is not None:
            raise ValueError("adapter: the live peft model already carries one; pass one of them")
        adapter = load_adapter(source)
    base = load_base(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if adapter is None:
        return base
    lora = adapter if isinstance(adapter, LoraAdapter) else load_adapter(adapter)
    tuned = apply_adapter(base, lora, form)
    require_proof(verify_adapter(tuned, lora, base=base))
    return tuned


def check_form(form: str) -> None:
    """Require a known form.

    Raises:
        ValueError: anything but ``merged`` and ``attached``.
    """
    if form not in ("merged", "attached"):
        raise ValueError(f"form={form!r}: expected 'merged' or 'attached'")


def apply_adapter(base: HookedTransformer, adapter: LoraAdapter, form: Form) -> HookedTransformer:
    """Merge or attach an adapter, in a new shell over the base's storage."""
    return (merge_adapter if form == "merged" else attach_adapter)(base, adapter)


def load_base(
    source: ModelSource | PeftModel,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> HookedTransformer:
    """Load a base model; LoRA layers in a live model are looked through, never dropped unsaid.

    Raises:
        ValueError: an unsupported checkpoint, or dtype or device other than a live model's own.
    """
    if isinstance(source, PeftModel):
        checkpoint = _live_checkpoint(strip_lora(source), dtype, device)
    elif isinstance(source, PreTrainedModel):
        _refuse_lora_layers(source)
        checkpoint = _live_checkpoint(source, dtype, device)
    else:
        checkpoint = load_checkpoint(
            source, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    return lay_checkpoint(checkpoint)


def lay_checkpoint(checkpoint: Checkpoint) -> HookedTransformer:
    """Lay a HookedTransformer over a checkpoint in memory; see ``lay_views``."""
    return lay_views(
        checkpoint.model,
        checkpoint.tokenizer,
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint or None,
    )


def _live_checkpoint(
    model: PreTrainedModel, dtype: str | torch.dtype, device: str | torch.device
) -> Checkpoint:
    check_place("live model", dtype, device, model.dtype, model.device)
    return Checkpoint(
        model=model,
        tokenizer=_find_tokenizer(model),
        name=str(model.config._name_or_path or type(model).__name__),
        fingerprint="",
    )


def check_place(
    what: str,
    dtype: str | torch.dtype,
    device: str | torch.device,
    own_dtype: torch.dtype,
    own_device: torch.device,
) -> None:
    """Require that a model in memory is asked for as and where it is.

    Raises:
        ValueError: another dtype or device than its own.
    """
    if dtype != "auto" and read_dtype(dtype) != own_dtype:
        raise ValueError(f"dtype={dtype}: the {what} is {own_dtype}; convert it beforehand")
    asked = own_device if device == "auto" else read_device(device)
    # Without a number, `cuda` is any of them.
    if asked.type != own_device.type or asked.index not in (None, own_device.index):
        raise ValueError(f"device={device}: the {what} is on {own_device}; move it first")


def _find_tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer that lies where a live model came from, on disk or in the Hub's cache."""
    config: Any = model.config
    name = str(config._name_or_path or "")
    if not name:
        return None
    if Path(name).is_dir():
        return load_tokenizer(Path(name))
    try:  # of the model's own revision, where it is known
        return AutoTokenizer.from_pretrained(
            name, local_files_only=True, revision=getattr(config, "_commit_hash", None) or "main"
        )
    except (OSError, ValueError):
        return None  # not in the cache, or one that would have to run its own code


def _refuse_lora_layers(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A"):
            raise ValueError(
                f"{type(model).__name__} holds un-merged LoRA layers ({name}); loading it would "
                "drop them. Pass the PeftModel itself, or its base and adapter= separately"
            )


def strip_lora(model: PeftModel) -> PreTrainedModel:
    """Return the plain Hugging Face model under a peft model, sharing its weights.

    The peft model is left as it is: a second module tree is built around the same tensors.
    """
    wrapped: Any = model.get_base_model()
    with torch.device("meta"):
        plain: Any = type(wrapped)(wrapped.config)
    tensors = {}
    for name, value in wrapped.state_dict(keep_vars=True).items():
        clean = name.replace(".base_layer.", ".")
        if ".lora_" not in f".{clean}":
            tensors[clean] = value.detach()
    plain.load_state_dict(tensors, strict=True, assign=True)
    plain.tie_weights()
    _copy_buffers(wrapped, plain)
    return plain.eval()


def _copy_buffers(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Non-persistent buffers (rotary frequencies) are not in the state dict: take them over."""
    held = dict(source.named_buffers())
    for name, value in list(target.named_buffers()):
        if value.is_meta:
            owner, _, leaf = name.rpartition(".")
            target.get_submodule(owner)._buffers[leaf] = held[name]
