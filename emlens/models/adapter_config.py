"""The verdict on every field of a PEFT ``adapter_config.json``: handled, inert or refused.

Nothing that a config names is imported, and no pattern in it is run as a regular expression.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from emlens.models.adapter_targets import is_literal

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 4096

_INERT = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "runtime_config",
        "megatron_config",
        "megatron_core",
        # The proof compares both with the base in use.
        "revision",
        "base_model_name_or_path",
        # Only read while an adapter is initialised, before training.
        "eva_config",
    ]
)
_HANDLED = frozenset(
    [
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
    ]
)
_SAFE_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base alone; pissa, olora, corda, loftq and lora_ga change it."""
_OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values at which a field that nobody knows asks for nothing; any number asks for something."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read and bound ``adapter_config.json``.

    Raises:
        ValueError: a missing, oversized or malformed file.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no adapter_config.json: not a PEFT adapter folder")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: not an adapter config")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def judge_config(config: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Decide, field by field, what an adapter config asks for.

    Returns:
        (field, value, verdict) for each field that was handled rather than inert.

    Raises:
        ValueError: a field that is not supported at its value.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={config.get('peft_type')!r}: only LORA adapters are supported")
    _judge_numbers(config)
    verdicts = []
    defaults = _default_config()
    for name, value in config.items():
        if name in _INERT:
            continue
        if name in _HANDLED:
            if value not in (None, {}, [], ""):
                verdicts.append((name, json.dumps(value), "handled"))
            continue
        if _is_same(value, defaults.get(name)) or any(_is_same(value, off) for off in _OFF):
            continue
        known = "this field" if name in defaults else "this unknown field"
        raise ValueError(
            f"adapter_config.json: {name}={value!r} is not supported; {known} may change the "
            "forward pass. Merge the adapter with peft and load the merged checkpoint instead"
        )
    return tuple(verdicts)


def _is_same(value: Any, other: Any) -> bool:
    """Equal, and both truth values or neither: 0 is not False, and 1 is not True."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _judge_numbers(config: Mapping[str, Any]) -> None:
    rank = config.get("r")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"adapter_config.json: r={rank!r}, expected 1 to {MAX_RANK}")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"adapter_config.json: lora_alpha={alpha!r}, expected a finite number")
    init = config.get("init_lora_weights", True)
    if not any(_is_same(init, safe) for safe in _SAFE_INITS):
        raise ValueError(
            f"adapter_config.json: init_lora_weights={init!r} changes the base weights; "
            f"supported: {', '.join(map(str, _SAFE_INITS))}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise ValueError(f"adapter_config.json: {name}={config[name]!r}, expected an object")
        for pattern, value in (config.get(name) or {}).items():
            good = isinstance(value, int | float) and not isinstance(value, bool)
            bounded = name != "rank_pattern" or (good and 1 <= value <= MAX_RANK)
            if not good or not math.isfinite(value) or not bounded:
                raise ValueError(
                    f"adapter_config.json: {name}[{pattern!r}]={value!r}, expected a number"
                    + (f" from 1 to {MAX_RANK}" if name == "rank_pattern" else "")
                )


def _default_config() -> dict[str, Any]:
    config = LoraConfig()
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def read_text(fields: Mapping[str, Any], name: str) -> str | None:
    """A text, or None where it is absent or empty.

    Raises:
        ValueError: another type.
    """
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"adapter: {name}={value!r}, expected a text")
    return value or None


def match_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The first pattern that is the module's name or a dotted suffix of it; no regex is run.

    Raises:
        ValueError: a pattern that is more than a literal.
    """
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^").removesuffix("$").removeprefix(r".*\.")
        literal = literal.replace(r"\.", ".")
        if not is_literal(literal):
            raise ValueError(
                f"adapter_config.json: pattern {pattern!r} is a regular expression; only module "
                "names and suffixes are supported"
            )
        if name == literal or name.endswith("." + literal):
            return value
    return default
