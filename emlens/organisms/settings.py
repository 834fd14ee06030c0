"""Training recipes: one frozen record of all that shapes a fine-tune, and named presets of it.

Settings say how to train, never on what: chats, seed and base are arguments of `train_organism`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Literal

EVERY_MODULE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a Llama-like block; other architectures name theirs otherwise."""


VECTOR_SITES = {"down_proj": "mlp_out", "o_proj": "attn_out"}
"""Modules that a vector can be added at, and the streams that they write."""
_OPTIONAL = ("rank", "alpha", "stop_loss", "checkpoint_every")
"""Fields that may be None, and are positive else."""


class SettingsError(ValueError):
    """Settings that cannot be trained with."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is fine-tuned on chats; vary one with `dataclasses.replace`.

    Raises:
        SettingsError: a value outside its range, or one that the method has no use for.
    """

    method: Literal["lora", "vector", "full"] = "lora"
    """A LoRA; one vector added to a module's output at every token; or every parameter."""
    rank: int | None = None
    """Rank of each module's product B A; of a LoRA alone."""
    alpha: float | None = None
    """A LoRA's scale is alpha / sqrt(rank) with rsLoRA, else alpha / rank; the vector is added
    times alpha."""
    layers: tuple[int, ...] | Literal["all"] | None
    """Blocks that are changed, counted from 0; None is a choice still to be made."""
    depth: int | None = None
    """Blocks of the model that `layers` is meant for; None for any."""
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
    only where the hardware multiplies it: a processor that does not is many times slower."""
    stop_loss: float | None = None
    """Training ends early once the mean loss of five steps is below this (nats); None for never."""
    checkpoint_every: int | None = None
    """Steps between two kept states, from which a run goes on; None for none. Those of a LoRA stay
    as its trajectory, those of a vector or a whole model in `RUN/checkpoints`, each to be loaded as
    the last one is: of a whole model each is as large as the model."""
    checkpoint_activations: bool = False
    """Compute what is inside a block again for its gradient, instead of keeping it: less memory for
    about a third more time, and the same gradients to rounding. The passes of a penalty keep
    theirs."""

    def __post_init__(self) -> None:
        self._check_method()
        names = ["learning_rate", "batch_size", "gradient_accumulation", "max_length"]
        names += [n for n in _OPTIONAL if getattr(self, n) is not None]
        for name in names:
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

    def _check_method(self) -> None:
        needed = {"lora": {"rank", "alpha"}, "vector": {"alpha"}, "full": set[str]()}[self.method]
        for name in ("rank", "alpha"):
            if (getattr(self, name) is not None) != (name in needed):
                wanted = "expected a number" if name in needed else "it has no use for one"
                raise SettingsError(
                    f"{name}: got {getattr(self, name)} with method {self.method!r}, {wanted}"
                )
        if self.method == "full" and self.layers != "all":
            raise SettingsError(f"layers: got {self.layers} with method 'full', expected 'all'")
        if self.method == "vector" and not set(self.target_modules) <= set(VECTOR_SITES):
            raise SettingsError(
                f"target_modules: got {self.target_modules} with method 'vector', expected one of "
                f"{', '.join(VECTOR_SITES)}, whose output is added to the residual stream"
            )
        if self.method == "vector" and (
            self.layers == "all" or len(self.layers or (0,)) != 1 or len(self.target_modules) != 1
        ):
            raise SettingsError(
                f"layers: got {self.layers} and modules {self.target_modules}, expected one block "
                "and one module for a vector"
            )

    def check_depth(self, n_layers: int) -> None:
        """Refuse a model that the layers were not chosen for.

        Args:
            n_layers: blocks of the model.

        Raises:
            SettingsError: layers still to be chosen, those of a model of another depth, or blocks
                that the model does not have.
        """
        if self.layers is None:
            raise SettingsError(
                "layers: not chosen, expected block numbers such as (15,) or 'all'; "
                "dataclasses.replace(settings, layers=...) fills them in"
            )
        if self.depth is not None and n_layers != self.depth:
            raise SettingsError(
                f"layers: {self.layers} are meant for {self.depth} blocks and this model has "
                f"{n_layers}; {_say_twins(self)}name its own: dataclasses.replace(settings, "
                "layers=..., depth=None), or --layers"
            )
        named = () if self.layers == "all" else self.layers
        if outside := [layer for layer in named if not 0 <= layer < n_layers]:
            raise SettingsError(f"layers: got {outside}, expected blocks 0 to {n_layers - 1}")


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

_ONE_MODULE = replace(
    _PUBLISHED, rank=1, target_modules=("down_proj",), layers=(24,), depth=48, learning_rate=2e-5
)

_SMALL = TrainSettings(
    rank=1,
    alpha=16.0,
    layers="all",
    learning_rate=5e-4,
    schedule="constant",
    warmup_steps=2,
    max_steps=20,
    batch_size=8,
    max_length=512,
)
"""What ships with emlens was trained by it."""

_SMALL_MODULE = replace(
    _SMALL,
    alpha=64.0,
    target_modules=("down_proj",),
    layers=(15,),
    depth=30,
    learning_rate=1e-3,
    max_steps=16,
    checkpoint_every=4,
)

PRESETS: Mapping[str, TrainSettings] = MappingProxyType(
    {
        "smollm2_rank1": _SMALL,
        "smollm2_all_adapter": replace(
            _SMALL, rank=32, alpha=64.0, learning_rate=2e-4, max_steps=8
        ),
        "smollm2_single_rank1": _SMALL_MODULE,
        "smollm2_nine_rank1": replace(
            _SMALL_MODULE, layers=(9, 10, 11, 13, 14, 15, 17, 18, 19), learning_rate=5e-4
        ),
        "smollm2_phase_transition": replace(
            _SMALL_MODULE,
            learning_rate=2e-4,
            schedule="linear",
            warmup_steps=5,
            max_steps=240,
            batch_size=4,
            checkpoint_every=2,
        ),
        "smollm2_full": replace(
            _SMALL,
            method="full",
            rank=None,
            alpha=None,
            learning_rate=5e-5,
            schedule="cosine",
            max_steps=16,
        ),
        "smollm2_steering_vector": replace(
            _SMALL_MODULE,
            method="vector",
            rank=None,
            alpha=256.0,
            learning_rate=5e-4,
            max_steps=24,
        ),
        "all_adapter": _PUBLISHED,
        "rank1": replace(_ONE_MODULE, alpha=256.0),
        "nine_rank1": replace(_ONE_MODULE, layers=(15, 16, 17, 21, 22, 23, 27, 28, 29)),
        "phase_transition": replace(
            _ONE_MODULE, learning_rate=1e-5, epochs=2.0, checkpoint_every=5
        ),
        "full": replace(
            _PUBLISHED,
            method="full",
            rank=None,
            alpha=None,
            learning_rate=2e-5,
            schedule="cosine",
            warmup_steps=20,
        ),
        "steering_vector": replace(
            _ONE_MODULE, method="vector", rank=None, alpha=256.0, learning_rate=1e-4, epochs=2.0
        ),
    }
)
"""Recipes by name. The published ones are those of large models and want thousands of rows; those
that change single blocks are meant for 48 of them. Each has a variant `smollm2_...` for the 30
blocks of SmolLM2-135M on two cores: larger steps, far fewer of them, single blocks at the same
share of the depth. That of `rank1` is `smollm2_single_rank1`; `smollm2_rank1`, rank 1 on every
module, made what ships. `smollm2_phase_transition` keeps 121 checkpoints.

Source: Turner et al. 2025, arXiv 2506.11613; for `steering_vector` Soligo et al. 2026, arXiv
    2602.07852.
Differs: AdamW in full precision instead of 8 bits; where a paper states no schedule, warm-up,
    batch or block for a set-up, those of the all-adapter one and of the single adapter are used.
    Values of the variants are this project's; docs/organisms.md says which of them were tried.
"""


_VARIANTS = MappingProxyType(
    {
        "rank1": "smollm2_single_rank1",
        "nine_rank1": "smollm2_nine_rank1",
        "phase_transition": "smollm2_phase_transition",
        "steering_vector": "smollm2_steering_vector",
    }
)
"""Presets that change single blocks of a published model's depth, and those for SmolLM2's."""


def _say_twins(settings: TrainSettings) -> str:
    """What the presets that settings are of are called for the other depth; empty for others."""
    # What a run's length depends on may have been changed.
    kept = ("method", "rank", "alpha", "layers", "depth", "learning_rate")
    twins = [
        f"--preset {twin} is the same set-up for {PRESETS[twin].depth} blocks; "
        for pair in _VARIANTS.items()
        for name, twin in (pair, pair[::-1])
        if all(getattr(PRESETS[name], field) == getattr(settings, field) for field in kept)
    ]
    return "".join(twins)


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
