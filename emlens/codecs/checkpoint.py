"""The state of an interrupted training in one safetensors file: whole, or the one before it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor
from torch.optim import Optimizer

from emlens.artifacts import write_tensors_atomic
from emlens.encoding import ArtifactError, encode

_NAME = "checkpoint.safetensors"
_STATE = "state"
"""Name in the header of the JSON in which tensors stand by name."""


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> Path:
    """Keep a state; the one that was kept before goes only when this one is whole.

    Args:
        folder: where the run lies.
        state: nested dicts with str keys, lists and tuples of plain values and tensors.
    """
    tensors: dict[str, Tensor] = {}
    plain = encode(state, "", tensors)
    header = {_STATE: json.dumps(plain, allow_nan=False)}
    return write_tensors_atomic(folder / _NAME, tensors, metadata=header)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state that was kept, or None; tuples come back as lists.

    Raises:
        ArtifactError: the file is damaged, or no checkpoint.
    """
    file = folder / _NAME
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, "pt") as opened:
            plain = json.loads((opened.metadata() or {})[_STATE])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{file} is no checkpoint of a training: {error}") from error
    return _fill(plain, tensors)


def drop_checkpoint(folder: Path) -> None:
    """Remove what a finished run no longer needs."""
    (folder / _NAME).unlink(missing_ok=True)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimiser, in which parameters stand by number."""
    state = optimizer.state_dict()
    numbered = {str(number): dict(kept) for number, kept in state["state"].items()}
    return {"state": numbered, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Bring an optimiser of the same parameters to a state that was kept."""
    numbered = {int(number): kept for number, kept in state["state"].items()}
    optimizer.load_state_dict({"state": numbered, "param_groups": state["param_groups"]})


def _fill(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _fill(item, tensors) for key, item in value.items()}
    return [_fill(item, tensors) for item in value] if isinstance(value, list) else value
