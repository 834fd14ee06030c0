"""LoRA adapters as values: A, B and scale per module, found in a model.

For attaching see ``attach``, for merging ``merge``, for files ``adapter_files``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.config import Architecture, find_architecture
from emlens.models.layout import Place, place_shape
from emlens.models.views import require_views

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "lm_head")
"""Modules outside the blocks that an adapter may target, in the merged form only."""


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """One adapted linear module: its output gains scale * B (A x)."""

    A: Float[Tensor, "rank d_in"]
    """Reads the module's input."""
    B: Float[Tensor, "d_out rank"]
    """Writes to the module's output."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) under rsLoRA."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """Return the update scale * B A in float32 (float64 if the factors are)."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return self.scale * (self.B.to(dtype) @ self.A.to(dtype))


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """A LoRA fine-tune, by module: ``model.layers.3.mlp.down_proj`` -> factors and scale."""

    modules: Mapping[str, LoraModule]
    name: str
    """The source as the user wrote it."""
    base_name: str | None = None
    """The base that the adapter's config names, if any."""
    base_revision: str | None = None
    """The revision of that base that the config names, if any."""
    base_fingerprint: str | None = None
    """``fingerprint_weights`` of the base it was trained on, if recorded."""
    fingerprint: str = ""
    """Hash of every factor and scale."""
    verdicts: tuple[tuple[str, str, str], ...] = ()
    """(config field, value, what was done with it) for every field that was not inert."""
    every_layer: tuple[str, ...] = ()
    """Modules that the config asks for in every layer of its base, the layer left open:
    ``model.layers.*.mlp.down_proj``. Empty it where a part is taken on purpose."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it changes, ascending, by the first number in each module's name."""
        numbers = (next(filter(str.isdecimal, n.split(".")), None) for n in self.modules)
        return tuple(sorted({int(number) for number in numbers if number is not None}))

    @property
    def n_bytes(self) -> int:
        """Bytes of all factors as they are held."""
        factors = (f for m in self.modules.values() for f in (m.A, m.B))
        return sum(f.numel() * f.element_size() for f in factors)


def scale_adapter(adapter: LoraAdapter, scale: float | Mapping[str, float]) -> LoraAdapter:
    """Multiply the strength of an adapter, as a whole or module by module.

    Args:
        adapter: the adapter; it is not changed.
        scale: one factor, or factors by module name (modules not named keep theirs).

    Raises:
        ValueError: a module the adapter does not have.
    """
    if not isinstance(scale, Mapping):
        scale = dict.fromkeys(adapter.modules, float(scale))
    unknown = sorted(set(scale) - set(adapter.modules))
    if unknown:
        raise ValueError(
            f"scale names modules the adapter does not have: {unknown[:3]}; it has, for instance, "
            f"{sorted(adapter.modules)[:3]}"
        )
    modules = {
        name: replace(module, scale=module.scale * scale.get(name, 1.0))
        for name, module in adapter.modules.items()
    }
    changed = sorted(set(scale.values()))
    label = f"{adapter.name} x {changed[0]:g}" if len(changed) == 1 else f"{adapter.name} rescaled"
    return replace(adapter, modules=modules, name=label)


@dataclass(frozen=True)
class Target:
    """An adapted module found in a model: its block, its place and its factors."""

    name: str
    layer: int
    place: Place
    lora: LoraModule


def find_targets(model: HookedTransformer, adapter: LoraAdapter) -> tuple[Target, ...]:
    """Match an adapter's block modules with a model's places, in layer order.

    Raises:
        ValueError: a module that the model does not have, factors of another width, or a layer
            left out of those that the adapter's config asks for.
    """
    architecture = architecture_of(model)
    _check_every_layer(adapter, model.cfg.n_layers)
    places = {place.module: place for place in architecture.places}
    targets = []
    for name, lora in adapter.modules.items():
        if name.rsplit(".", 1)[-1] in EMBEDDINGS:
            _check_embedding(model, name, lora)
            continue
        layer, place = _locate(name, architecture, places, model.cfg.n_layers, adapter.name)
        expected = place_shape(place, model.cfg)
        got = (lora.B.shape[0], lora.A.shape[1])
        if got != expected:
            raise ValueError(
                f"{adapter.name}: {name} has an update of shape {got}, this base needs {expected}; "
                f"the adapter was trained on another base (its config names {adapter.base_name})"
            )
        targets.append(Target(name, layer, place, lora))
    return tuple(sorted(targets, key=lambda t: t.layer))


def _check_every_layer(adapter: LoraAdapter, n_layers: int) -> None:
    for opened in adapter.every_layer:
        names = [opened.replace("*", str(layer)) for layer in range(n_layers)]
        missing = [name for name in names if name not in adapter.modules]
        if missing:
            raise ValueError(
                f"{adapter.name}: its config targets {opened} in every layer of the base, which "
                f"has {n_layers}, but no tensor adapts {missing[0]}; the file is incomplete, or "
                "the adapter was trained on another base. For a part of it on purpose: "
                "dataclasses.replace(adapter, modules=PART, every_layer=())"
            )


def _locate(
    name: str,
    architecture: Architecture,
    places: Mapping[str, Place],
    n_layers: int,
    source: str,
) -> tuple[int, Place]:
    prefix = f"{architecture.trunk}.{architecture.blocks}."
    layer, _, module = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or not layer.isdecimal() or module not in places:
        raise ValueError(
            f"{source}: {name} is no module of {architecture.name}; expected {prefix}LAYER.MODULE "
            f"with MODULE one of {', '.join(places)}"
        )
    if int(layer) >= n_layers:
        raise ValueError(
            f"{source}: {name} is in layer {layer}, but this base has {n_layers} layers; "
            "the adapter was trained on another base"
        )
    return int(layer), places[module]


def _check_embedding(model: HookedTransformer, name: str, lora: LoraModule) -> None:
    expected = {model.cfg.d_vocab, model.cfg.d_model}
    got = (lora.B.shape[0], lora.A.shape[1])
    if set(got) != expected:
        raise ValueError(f"{name} has an update of shape {got}, this base needs {expected}")


def architecture_of(model: HookedTransformer) -> Architecture:
    """Return the table entry of a model that emlens loaded."""
    require_views(model)
    return find_architecture(str(model.cfg.original_architecture))


def embedding_modules(adapter: LoraAdapter) -> tuple[str, ...]:
    """Names of adapted embeddings and unembeddings, which only the merged form supports."""
    return tuple(n for n in adapter.modules if n.rsplit(".", 1)[-1] in EMBEDDINGS)


def read_parameter(model: HookedTransformer, name: str) -> Tensor:
    """Return a stored parameter by name, past properties that would repeat grouped heads."""
    owner, _, leaf = name.rpartition(".")
    value = model.get_submodule(owner)._parameters[leaf]
    assert value is not None
    return value.detach()
