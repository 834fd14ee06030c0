"""PEFT adapter folders: read under a verdict for every config field, written back in full.

Nothing that a config names is imported or downloaded. Weights come from safetensors only.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emlens.artifacts import write_json_atomic, write_tensors_atomic
from emlens.models.adapter_config import (
    MAX_CONFIG_BYTES,
    judge_config,
    match_pattern,
    read_adapter_config,
    read_text,
)
from emlens.models.adapter_targets import check_targets
from emlens.models.lora import EMBEDDINGS, LoraAdapter, LoraModule
from emlens.sources import Source, locate_source, parse_source

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "emlens.json"]


def load_adapter(
    source: "str | Path | Source | PeftModel", *, allow_noop: bool = False
) -> LoraAdapter:
    """Read a LoRA adapter; its base is not needed and never fetched.

    Args:
        source: a PEFT folder, a Hub repository, ``emlens:NAME``, or a live un-merged peft model.
        allow_noop: accept an adapter whose every B is zero (a step-0 checkpoint, a control).

    Raises:
        ValueError: a config field or a tensor that cannot be honoured, named.
    """
    if isinstance(source, PeftModel):
        return _checked(_read_live(source), allow_noop=allow_noop)
    parsed = source if isinstance(source, Source) else parse_source(source)
    folder = locate_source(parsed, allow_patterns=ADAPTER_FILES)
    config = read_adapter_config(folder)
    verdicts = judge_config(config)
    tensors = _read_tensors(folder)
    modules = _pair_factors(tensors, config)
    every_layer = check_targets(modules, config)
    recorded = _read_record(folder)
    adapter = LoraAdapter(
        modules=modules,
        name=str(source),
        base_name=read_text(recorded, "base") or read_text(config, "base_model_name_or_path"),
        base_revision=read_text(config, "revision"),
        base_fingerprint=read_text(recorded, "base_fingerprint"),
        fingerprint=fingerprint_modules(modules),
        verdicts=verdicts,
        every_layer=every_layer,
    )
    return _checked(adapter, allow_noop=allow_noop)


def fingerprint_modules(modules: Mapping[str, LoraModule]) -> str:
    """Hash every factor and scale of an adapter."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        module = modules[name]
        digest.update(f"{name} {module.scale!r}".encode())
        for factor in (module.A, module.B):
            digest.update(factor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        hint = (
            "its weights are pickled (adapter_model.bin), which can run code when opened; convert "
            "them to safetensors once, in a sandbox, with peft's save_pretrained"
            if pickle.exists()
            else "adapter_model.safetensors is missing"
        )
        raise ValueError(f"{folder}: {hint}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


_FACTORS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}


def _pair_factors(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, LoraModule]:
    """Consume every tensor exactly once, as the A or B of one module."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, factor = _parse_key(key)
        held = factors.setdefault(module, {})
        if factor in held:
            raise ValueError(f"adapter tensors: {module} has two factors {factor}")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"adapter tensor {key}: expected a matrix of floats, got {tensor.dtype} "
                f"of shape {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"adapter tensor {key} holds NaN or infinite values")
        held[factor] = tensor
    if not factors:
        raise ValueError("the adapter holds no LoRA tensors")
    return {name: _build_module(name, held, config) for name, held in sorted(factors.items())}


def _parse_key(key: str) -> tuple[str, str]:
    for ending, factor in _FACTORS.items():
        if key.endswith("." + ending):
            module = key.removesuffix("." + ending)
            return module.removeprefix("base_model.model."), factor
    raise ValueError(
        f"adapter tensor {key!r} is neither a LoRA factor A nor B; saved modules, biases and "
        "magnitudes are not supported: merge with peft and load the merged checkpoint"
    )


def _build_module(name: str, held: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraModule:
    missing = {"A", "B"} - set(held)
    if missing:
        raise ValueError(f"adapter tensors: {name} has no factor {missing.pop()}")
    A, B = held["A"], held["B"]
    rank = int(match_pattern(config.get("rank_pattern") or {}, name, config["r"]))
    if A.shape[0] != rank or B.shape[1] != rank:
        raise ValueError(
            f"adapter tensors: {name} has A {tuple(A.shape)} and B {tuple(B.shape)}, but the "
            f"config gives it rank {rank}"
        )
    alpha = float(match_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"]))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraModule(A=A, B=B, scale=scale)


def _read_record(folder: Path) -> dict[str, Any]:
    """Read emlens's own note beside an adapter: its base and how it was trained."""
    path = folder / "emlens.json"
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        return {}
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    return record if isinstance(record, dict) else {}


def _checked(adapter: LoraAdapter, *, allow_noop: bool) -> LoraAdapter:
    if not allow_noop and not any(m.B.any() and m.scale for m in adapter.modules.values()):
        raise ValueError(
            f"{adapter.name}: every B or every scale is zero, so the adapter does nothing "
            "(a checkpoint of step 0?); pass allow_noop=True if that is wanted"
        )
    return adapter


def _read_live(model: PeftModel) -> LoraAdapter:
    """Read the active, un-merged LoRA of a peft model in memory."""
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"peft model: expected one active adapter, got {list(active)}")
    config = model.peft_config[active[0]]
    fields = {k: v for k, v in config.to_dict().items() if k != "peft_type"}
    fields = json.loads(json.dumps(fields, default=_jsonable)) | {"peft_type": "LORA"}
    verdicts = judge_config(fields)
    modules = {}
    for name, layer in model.get_base_model().named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or active[0] not in scaling:
            continue
        if getattr(layer, "merged", False):
            raise ValueError(f"peft model: {name} is already merged; pass the merged base model")
        modules[name] = _live_module(layer, active[0], float(scaling[active[0]]))
    return LoraAdapter(
        modules=modules,
        name=f"live adapter {active[0]!r}",
        base_name=str(config.base_model_name_or_path),
        base_revision=config.revision or None,
        fingerprint=fingerprint_modules(modules),
        verdicts=verdicts,
    )


def _live_module(layer: Any, adapter: str, scale: float) -> LoraModule:
    if adapter in layer.lora_A:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return LoraModule(A=A.detach().clone(), B=B.detach().clone(), scale=scale)


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def save_adapter(adapter: LoraAdapter, folder: str | Path) -> Path:
    """Write an adapter as a PEFT folder that peft and emlens read back with the same effect.

    The folder appears whole or not at all. Scales become ``lora_alpha`` = scale * rank per module,
    so rsLoRA is written out.

    Raises:
        ValueError: a folder in use.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: {folder} is not empty; name a new one")
    names = sorted(adapter.modules)
    first = adapter.modules[names[0]]
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.scale * first.rank,  # pyright: ignore[reportArgumentType]
        target_modules=names,
        rank_pattern={n: m.rank for n, m in adapter.modules.items() if m.rank != first.rank},
        alpha_pattern={
            n: m.scale * m.rank  # pyright: ignore[reportArgumentType]
            for n, m in adapter.modules.items()
            if m.scale * m.rank != first.scale * first.rank
        },
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(name.rsplit(".", 1)[-1] in CONV1D for name in names),
    )
    fields = json.loads(json.dumps(config.to_dict(), default=_jsonable))
    fields |= {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    fields["base_model_name_or_path"] = adapter.base_name
    fields["revision"] = adapter.base_revision
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        embedding = name.rsplit(".", 1)[-1] in EMBEDDINGS and not name.endswith("lm_head")
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else _LINEAR_ENDS
        tensors[f"base_model.model.{name}.{ends[0]}"] = module.A.contiguous()
        tensors[f"base_model.model.{name}.{ends[1]}"] = module.B.contiguous()
    record = {"base": adapter.base_name, "base_fingerprint": adapter.base_fingerprint}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        draft = Path(name) / "adapter"
        draft.mkdir()
        write_tensors_atomic(draft / "adapter_model.safetensors", tensors)
        write_json_atomic(draft / "adapter_config.json", fields)
        write_json_atomic(draft / "emlens.json", record)
        if folder.exists():
            folder.rmdir()
        draft.replace(folder)
    return folder


CONV1D = ("c_attn", "c_proj", "c_fc")
"""GPT-2's modules, whose class stores weights transposed; peft wants to be told."""
_LINEAR_ENDS = ("lora_A.weight", "lora_B.weight")
