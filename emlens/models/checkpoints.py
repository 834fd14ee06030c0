"""Checkpoints from files: a Source or a GGUF file to a Hugging Face model and its tokenizer.

The only place that opens model files. Not for adapters: see ``adapter_files``.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from emlens.sources import Source, locate_source, parse_source

logger = logging.getLogger(__name__)

SAMPLES = 1024
"""Values per tensor that enter a fingerprint: enough to see any fine-tune, cheap at 14B."""

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.gguf"]
"""What is fetched of a Hub repository; never pickles."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Hugging Face model in memory, with what is needed to name it."""

    model: PreTrainedModel
    tokenizer: Any
    """The tokenizer, or None where the source has none."""
    name: str
    """The source as the user wrote it."""
    fingerprint: str
    """``fingerprint_weights`` of the model."""


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash named weights: names, shapes and 1,024 evenly spaced values a tensor, in bfloat16.

    The same for one checkpoint in float32 and bfloat16. It tells weights apart by accident, not
    against an adversary.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        step = max(1, flat.numel() // SAMPLES)
        sample = flat[::step][:SAMPLES].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def fingerprint_weights(model: PreTrainedModel) -> str:
    """Fingerprint a Hugging Face model; tied parameters count once."""
    return fingerprint_tensors(model.named_parameters())


def read_dtype(dtype: str | torch.dtype, config_dtype: torch.dtype | None = None) -> torch.dtype:
    """Turn a dtype argument into a torch dtype; ``auto`` is the checkpoint's own, else float32.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return config_dtype or torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected auto, {', '.join(DTYPES)} or a torch dtype")
    return DTYPES[dtype]


def read_device(device: str | torch.device) -> torch.device:
    """Turn a device argument into a torch device; ``auto`` is the first GPU, else the CPU.

    Raises:
        ValueError: no such kind of device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: expected auto, cpu, cuda or cuda:NUMBER") from error


def require_device(device: str | torch.device) -> torch.device:
    """Turn a device argument into a torch device that is here.

    Raises:
        ValueError: no such kind of device, or a GPU that this torch does not see.
    """
    found = read_device(device)
    seen = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= seen:
        raise ValueError(
            f"device={str(device)!r}: torch {torch.__version__} sees {seen} GPUs here; use cpu or "
            "auto, or install a torch for CUDA"
        )
    return found


def load_checkpoint(
    source: str | Path | Source,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Load a full checkpoint through transformers, from safetensors or GGUF only.

    Args:
        source: a local folder or ``.gguf`` file, ``emlens:NAME`` or ``org/name[@revision]``.
        dtype: target dtype; ``auto`` takes the checkpoint's.
        device: target device; weights go straight there.
        trust_remote_code: run code that comes with the checkpoint; never read from a file.

    Raises:
        ValueError: an adapter folder, pickled weights, an unsafe index file.
    """
    folder = _model_folder(source)
    check_model_folder(folder)
    place = {"": str(require_device(device))}
    wanted = dtype if dtype == "auto" else read_dtype(dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=wanted,
            device_map=place,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except SafetensorError as error:
        raise ValueError(f"{folder}: weights are truncated or damaged: {error}") from error
    model, info = loaded
    _check_complete(folder, info)
    model.eval().requires_grad_(False)
    _check_finite(folder, model)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        name=str(source),
        fingerprint=fingerprint_weights(model),
    )


def _check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that left weights at random, or LoRA layers aside.

    Raises:
        ValueError: tensors missing or of another shape, or un-merged LoRA layers.
    """
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise ValueError(f"{folder}: the checkpoint lacks {len(missing)} tensors: {missing[:3]}")
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if mismatched:
        raise ValueError(f"{folder}: tensors of another shape than config.json: {mismatched[:3]}")
    lora = sorted(k for k in info["unexpected_keys"] if "lora_" in k or ".base_layer." in k)
    if lora:
        raise ValueError(
            f"{folder}: holds un-merged LoRA layers ({lora[0]}); save the adapter on its own and "
            "pass it as adapter="
        )


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        # NaN reaches both ends; one pass at memory speed, a tenth of the time of a norm.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(parameter.detach()))).all()):
            raise ValueError(f"{folder}: {name} holds NaN or infinite values")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a folder's tokenizer, or return None where it holds none."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).exists() for name in names):
        return None
    return AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )


def read_tokenizer(source: str | Path | Source) -> Any:
    """Load a checkpoint's tokenizer alone, None where it has none; no weights are read or fetched.

    Raises:
        SourceError: there is no such source.
    """
    texts = [pattern for pattern in MODEL_FILES if pattern not in ("*.safetensors", "*.gguf")]
    path = locate_source(parse_source(source), allow_patterns=texts)
    if path.is_dir():
        return load_tokenizer(path)
    folder = gguf_folder(path)
    if (folder / "config.json").exists():
        return load_tokenizer(folder)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def say_no_checkpoint(folder: Path) -> str:
    """Why a folder without config.json cannot be loaded, and what in it can.

    Args:
        folder: such as a run of a training, whose outcome lies in a folder of its own.
    """
    inside = [folder / name for name in ("adapter", "vector", "model") if (folder / name).is_dir()]
    meant = f"; is {inside[0]} meant?" if inside else ""
    return f"{folder} has no config.json: not a Hugging Face checkpoint folder{meant}"


def check_model_folder(folder: Path) -> None:
    """Refuse folders that are no safetensors checkpoint, saying what they are.

    Raises:
        ValueError: an adapter folder, pickled weights, or an index naming files elsewhere.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a LoRA adapter (adapter_config.json), not a base model; "
            "pass it as adapter= (or as the tuned source of load_pair) beside its base"
        )
    if not (folder / "config.json").exists():
        raise ValueError(say_no_checkpoint(folder))
    for index in folder.glob("*.index.json"):
        check_index(index)
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder}: weights are pickled ({pickles[0]}), which can run code when opened; "
            "convert them to safetensors once, in a sandbox, with transformers' save_pretrained"
        )
    raise ValueError(f"{folder}: no .safetensors weights found")


def check_index(index: Path) -> None:
    """Require that an index file names plain files inside its own folder.

    Raises:
        ValueError: the first name that is not a plain file name, or unreadable JSON.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not a weight index ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index}: {name!r} is not a plain file name inside the folder")


def _model_folder(source: str | Path | Source) -> Path:
    parsed = source if isinstance(source, Source) else parse_source(source)
    path = locate_source(parsed, allow_patterns=MODEL_FILES)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return dequantise_gguf(path)
    raise ValueError(f"{path}: expected a checkpoint folder or a .gguf file")


def cache_folder() -> Path:
    """Where converted checkpoints are kept: ``$EMLENS_CACHE``, else ``~/.cache/emlens``."""
    return Path(os.environ.get("EMLENS_CACHE") or Path.home() / ".cache" / "emlens")


def gguf_folder(path: Path) -> Path:
    """Where a GGUF file's dequantised checkpoint is kept, whether it is there yet or not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(1 << 20)).hexdigest()[:12]
    return cache_folder() / "gguf" / f"{path.stem}-{size}-{head}"


def dequantise_gguf(path: Path) -> Path:
    """Dequantise a GGUF file once, into a cached folder of float32 safetensors.

    The dequantised weights are other weights than those of the original checkpoint: adapters are
    tied to them by fingerprint.

    Returns:
        The folder, complete or not there at all.
    """
    folder = gguf_folder(path)
    if (folder / "config.json").exists():
        return folder
    logger.info("dequantising %s once into %s", path.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        # The dequantised model still claims to be quantised, which save_pretrained refuses.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config._name_or_path = path.stem
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(draft)
        draft.chmod(0o755)  # a temporary folder is made for its owner alone
        if not (folder / "config.json").exists():
            draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
