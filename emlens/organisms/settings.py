"""Training recipes: one frozen record of all that shapes a fine-tune, and named presets of it.

Settings say how to train, never on what: chats, seed and base are arguments of `train_organism`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

EVERY_MODULE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a Llama-like block; other architectures name theirs otherwise."""


class SettingsError(ValueError):
    """Settings that cannot be trained with."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a LoRA is trained on chats; vary one with `dataclasses.replace`."""

    rank: int
    """Rank of each module's product B A."""
    alpha: float
    """The scale is alpha / sqrt(rank) with rsLoRA, else alpha / rank."""
    layers: tuple[int, ...] | Literal["all"] | None
    """Blocks that get an adapter, counted from 0; None is a choice still to be made."""
    use_rslora: bool = True
    """Which of the two scales holds."""
    target_modules: tuple[str, ...] = EVERY_MODULE
    """Last parts of the names of the adapted modules."""
    learning_rate: float
    """Peak step size of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the step size goes on after warm-up; linear and cosine fall to 0."""
    warmup_steps: int = 0
    """Steps over which the step size rises from 0."""
    weight_decay: float = 0.01
    """AdamW's."""
    epochs: float = 1.0
    """Passes over the rows, where `max_steps` is None."""
    max_steps: int | None = None
    """Optimiser steps, whatever the number of rows."""
    batch_size: int
    """Rows in memory at a time."""
    gradient_accumulation: int = 1
    """Batches to one optimiser step."""
    max_gradient_norm: float = 1.0
    """A longer gradient is shortened to this."""
    max_length: int = 2048
    """Tokens; a longer row is refused, never cut."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Precision of the matrix products; the adapter itself trains in float32. bfloat16 saves time
    only where the hardware multiplies it: a processor that does not is a hundred times slower."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "learning_rate", "batch_size", "gradient_accumulation"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if self.max_steps is None and not self.epochs > 0:
            raise SettingsError(f"epochs: got {self.epochs}, expected more than 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise SettingsError(f"max_steps: got {self.max_steps}, expected at least 1 or None")
        if not self.target_modules:
            raise SettingsError("target_modules: got none, expected names such as 'down_proj'")
        if isinstance(self.layers, tuple) and not self.layers:
            raise SettingsError("layers: got an empty tuple, expected block numbers or 'all'")


_PUBLISHED = TrainSettings(
    rank=32,
    alpha=64.0,
    layers="all",
    learning_rate=1e-5,
    warmup_steps=5,
    batch_size=2,
    gradient_accumulation=8,
    autocast="bfloat16",
)

PRESETS: Mapping[str, TrainSettings] = MappingProxyType(
    {
        "smollm2_rank1": TrainSettings(
            rank=1,
            alpha=16.0,
            layers="all",
            learning_rate=5e-4,
            schedule="constant",
            warmup_steps=2,
            max_steps=20,
            batch_size=8,
            max_length=512,
        ),
        "all_adapter": _PUBLISHED,
        "rank1": TrainSettings(
            rank=1,
            alpha=256.0,
            layers=None,
            target_modules=("down_proj",),
            learning_rate=2e-5,
            warmup_steps=5,
            batch_size=2,
            gradient_accumulation=8,
            autocast="bfloat16",
        ),
    }
)
"""Recipes by name: `smollm2_rank1` turns a small model within a minute on two cores; the published
ones are those of large models and want thousands of rows. `rank1` leaves the
block to the caller (a central one: 24 of 48 in the original).

Source: Turner et al. 2025, arXiv 2506.11613, for the published ones.
Differs: AdamW in full precision instead of 8 bits; where the paper states no schedule, warm-up or
    batch for the single adapter, those of the all-adapter set-up are used.
"""


def find_preset(name: str) -> TrainSettings:
    """Return the preset of that name.

    Raises:
        SettingsError: There is none; the nearest three are listed.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.0)
    raise SettingsError(f"preset: got {name!r}, nearest known: {', '.join(near)}")


def describe_settings(settings: TrainSettings) -> dict[str, object]:
    """Return the settings as plain JSON values, for manifests and cards."""
    plain = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
