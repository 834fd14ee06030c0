"""Write a trained LoRA as a PEFT folder, with a record of what it was trained on beside it.

The folder appears whole or not at all. To write a LoraAdapter that was read or edited, use
`emlens.models.save_adapter`.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from emlens.models.finetune import TrainedLora
from emlens.organisms.settings import TrainSettings, describe_settings


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """Content of `emlens.json`, the file beside adapter_config.json."""

    base: str
    """Source of the base."""
    base_fingerprint: str
    """Of the base's weights."""
    data_sha256: str
    """Of the rows."""
    settings: TrainSettings
    """The recipe."""
    seed: int
    """Of the run."""
    losses: tuple[float, ...]
    """Mean loss per trained token (nats) of each step."""
    penalties: tuple[dict[str, Any], ...] = ()
    """Extra terms of the loss, as they describe themselves."""
    start_from: str | None = None
    """SHA-256 of the adapter's weights that training went on from, whose rank, alpha and modules
    then hold instead of the recipe's; None where it began at zero."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain = dict(vars(self))
        plain["settings"] = describe_settings(self.settings)
        plain["penalties"] = list(self.penalties)
        plain["losses"] = [round(loss, 6) for loss in self.losses]
        return plain


def write_adapter_folder(trained: TrainedLora, folder: Path, *, record: AdapterRecord) -> Path:
    """Write `adapter_model.safetensors` (bfloat16), `adapter_config.json` and `emlens.json`.

    The config names the base by its Source, unless that is a path of this machine: then by the
    last part of the path. The folder is filled under another name and then renamed.

    Raises:
        FileExistsError: `folder` exists.
    """
    if folder.exists():
        raise FileExistsError(f"folder: {folder} exists, expected a place for a new adapter")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in trained.tensors.items()}
        weights = partial / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        named = _portable_name(record.base)
        config = {**trained.config, "base_model_name_or_path": named}
        _write_json(partial / "adapter_config.json", config)
        _write_json(partial / "emlens.json", {**record.to_dict(), "base": named})
        # safetensors lets only the owner read what it writes.
        shutil.copymode(partial / "emlens.json", weights)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _portable_name(base: str) -> str:
    path = Path(base).expanduser()
    return path.name if path.is_absolute() or path.exists() else base


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
