"""A HookedTransformer laid over a Hugging Face model: parameters are views of its storage.

Nothing is copied but norm weights that the Hugging Face class stores with an offset. An edit in
place of a shared weight reaches every model that shares it; ``copy_weights`` undoes the sharing.
"""

import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedConfig, PreTrainedModel

from emlens.models.checkpoints import fingerprint_weights
from emlens.models.components import (
    FusedAttention,
    FusedBlock,
    FusedGatedMLP,
    FusedGroupedAttention,
    FusedLayerNorm,
    FusedRMSNorm,
    FusedUnembed,
    ScaledEmbed,
)
from emlens.models.config import Architecture, find_architecture
from emlens.models.config_fields import check_config
from emlens.models.layout import split_bias, split_weight, weight_matrix
from emlens.models.rotary import RotaryTables, SharedTables
from emlens.models.tokenizer_needs import fill_special_tokens
from emlens.models.weight_hash import hash_tensors


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model's weights came from; kept beside the model, never on it."""

    name: str
    """The source as the user wrote it, and what was merged into it."""
    checkpoint: str
    """``fingerprint_weights`` of the checkpoint."""
    config: PreTrainedConfig
    """The checkpoint's Hugging Face config."""
    generation_config: Any = None
    edits: tuple[str, ...] = ()
    """What was merged or folded into the checkpoint's weights, in that order, each by a hash."""

    @property
    def fingerprint(self) -> str:
        """The checkpoint's as long as the weights are its own, another after each edit."""
        return self.lineage[-1]

    @property
    def lineage(self) -> tuple[str, ...]:
        """Fingerprints of the checkpoint and of what each edit made of it, in that order."""
        found = [self.checkpoint]
        for edit in self.edits:
            text = json.dumps([found[-1], edit])
            found.append(hashlib.sha256(text.encode()).hexdigest()[:32])
        return tuple(found)


_ORIGINS: WeakKeyDictionary[HookedTransformer, Origin] = WeakKeyDictionary()


def origin_of(model: HookedTransformer) -> Origin:
    """Return where a model's weights came from.

    Raises:
        ValueError: a model that emlens did not load.
    """
    require_views(model)
    return _ORIGINS[model]


def lay_views(
    hf: PreTrainedModel, tokenizer: Any, *, name: str = "local", fingerprint: str | None = None
) -> HookedTransformer:
    """Lay a HookedTransformer over a Hugging Face model without copying its weights.

    Args:
        hf: a causal language model of a supported architecture, on one device.
        tokenizer: its tokenizer, or None.
        name: kept as ``cfg.model_name``.
        fingerprint: ``fingerprint_weights(hf)``, where it is known already.

    Returns:
        A model in evaluation mode, its parameters without gradients, unprocessed.

    Raises:
        ValueError: an unsupported architecture or config field, or weights that are not all on one
            device.
    """
    architecture = find_architecture(type(hf).__name__)
    check_config(hf.config, architecture)
    _require_one_device(hf)
    cfg = _read_cfg(hf, architecture, tokenizer, name)
    model = build_skeleton(cfg, architecture, make_rotary(hf, architecture))
    tensors = read_tensors(hf, architecture, cfg)
    fill_skeleton(model, tensors, tokenizer)
    _ORIGINS[model] = Origin(
        name=name,
        checkpoint=fingerprint or fingerprint_weights(hf),
        config=hf.config,
        generation_config=getattr(hf, "generation_config", None),
    )
    return model


def _require_one_device(hf: PreTrainedModel) -> None:
    """Refuse a model in pieces: a block's products would meet weights that are elsewhere."""
    homes: dict[torch.device, str] = {}
    for name, parameter in hf.named_parameters():
        homes.setdefault(parameter.device, name)
    if len(homes) == 1 and "meta" not in {device.type for device in homes}:
        return
    found = ", ".join(f"{name} on {device}" for device, name in homes.items())
    raise ValueError(
        f"{type(hf).__name__}: its weights are not all in the memory of one device ({found}; meta "
        "stands for weights offloaded or never loaded), as device_map='auto' leaves them where "
        "one device is too small. Load it with device_map={'': 'cuda:0'} or {'': 'cpu'}, in half "
        "precision if it is too large, or pass its source with device="
    )


def _read_cfg(
    hf: PreTrainedModel, architecture: Architecture, tokenizer: Any, name: str
) -> HookedTransformerConfig:
    own_bos = False
    if tokenizer is not None:
        # Only what stands first may be a beginning: some tokenizers append an end instead.
        own_bos = tokenizer.bos_token_id in tokenizer("").input_ids[:1]
    return HookedTransformerConfig(
        **architecture.read_config(hf.config),
        original_architecture=architecture.name,
        model_name=name,
        dtype=hf.dtype,
        device=str(hf.device),
        init_weights=False,
        default_prepend_bos=own_bos,
        tokenizer_prepends_bos=own_bos,
        tokenizer_name=None,
    )


def build_skeleton(
    cfg: HookedTransformerConfig,
    architecture: Architecture,
    rotary: Mapping[int, RotaryTables],
) -> HookedTransformer:
    """Build a HookedTransformer on the meta device with our components in place of the host's."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg, None, move_to_device=False)
        tables = SharedTables()
        blocks: Any = model.blocks
        for layer, block in enumerate(blocks):
            block.__class__ = FusedBlock
            block.attn = _attention(cfg, block.attn, layer, tables, rotary.get(layer))
            for norm in ("ln1", "ln2", "ln1_post", "ln2_post"):
                if hasattr(block, norm):
                    setattr(block, norm, _norm(cfg))
            if cfg.gated_mlp:
                block.mlp = FusedGatedMLP(cfg)
        model.ln_final = _norm(cfg)
        model.unembed = FusedUnembed(cfg)
        if architecture.scales_embedding:
            model.embed = ScaledEmbed(cfg)
    model.setup()
    return model


def _attention(
    cfg: HookedTransformerConfig,
    host: Any,
    layer: int,
    tables: SharedTables,
    rotary: RotaryTables | None,
) -> nn.Module:
    kind = FusedAttention if cfg.n_key_value_heads is None else FusedGroupedAttention
    attention = kind(cfg, host.attn_type, layer)
    attention.tables, attention.rotary = tables, rotary
    if attention.q_norm is not None:
        attention.q_norm = FusedRMSNorm(cfg, cfg.d_head)
        attention.k_norm = FusedRMSNorm(cfg, cfg.d_head)
    return attention


def _norm(cfg: HookedTransformerConfig) -> nn.Module:
    return FusedRMSNorm(cfg) if cfg.normalization_type == "RMS" else FusedLayerNorm(cfg)


def make_rotary(hf: PreTrainedModel, architecture: Architecture) -> dict[int, RotaryTables]:
    """Tabulate each layer's rotary angles with the checkpoint's own module, shared by type."""
    rotary = getattr(hf.get_submodule(architecture.trunk), "rotary_emb", None)
    if rotary is None:
        return {}
    config: Any = hf.config
    by_type = "rope_type" not in (config.rope_parameters or {"rope_type": None})
    kinds = config.layer_types if by_type else [None] * config.num_hidden_layers

    def tables(kind: str | None) -> RotaryTables:
        arguments = () if kind is None else (kind,)
        return RotaryTables(
            lambda positions, like: rotary(like, positions, *arguments),
            n_ctx=config.max_position_embeddings,
            like=torch.zeros(1, dtype=hf.dtype, device=hf.device),
        )

    made = {kind: tables(kind) for kind in set(kinds)}
    return {layer: made[kind] for layer, kind in enumerate(kinds)}


def read_tensors(
    hf: PreTrainedModel, architecture: Architecture, cfg: HookedTransformerConfig
) -> dict[str, Tensor]:
    """Map a Hugging Face model's weights to TransformerLens names, as views of their storage."""
    trunk = hf.get_submodule(architecture.trunk)
    blocks: Any = trunk.get_submodule(architecture.blocks)
    tensors: dict[str, Tensor] = {"embed.W_E": _weight(trunk, architecture.embed)}
    if architecture.pos_embed:
        tensors["pos_embed.W_pos"] = _weight(trunk, architecture.pos_embed)
    tensors["unembed.W_U"] = _weight(hf, architecture.unembed).mT
    tensors |= _read_norm(trunk, architecture.final_norm, "ln_final", architecture)
    for layer, block in enumerate(blocks):
        prefix = f"blocks.{layer}."
        for ours, theirs in architecture.norms.items():
            tensors |= _read_norm(block, theirs, prefix + ours, architecture)
        for place in architecture.places:
            module = block.get_submodule(place.module)
            matrix = weight_matrix(module.weight.detach(), place)
            for name, value in zip(
                place.parameters, split_weight(matrix, place, cfg.d_head), strict=True
            ):
                tensors[prefix + name] = value
            if module.bias is None:
                continue
            parts = split_bias(module.bias.detach(), place, cfg.d_head)
            for name, value in zip(place.biases, parts, strict=True):
                tensors[prefix + name] = value
    return tensors


def _weight(root: nn.Module, name: str) -> Tensor:
    weight = root.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _read_norm(
    root: nn.Module, theirs: str, ours: str, architecture: Architecture
) -> dict[str, Tensor]:
    weight = _weight(root, theirs)
    if architecture.norm_offset:
        weight = _wide(weight) + architecture.norm_offset
    bias = getattr(root.get_submodule(theirs), "bias", None)
    return {f"{ours}.w": weight} | ({} if bias is None else {f"{ours}.b": bias.detach()})


def _wide(weight: Tensor) -> Tensor:
    """Float32 at least: 1 + w rounds badly in half precision."""
    return weight if weight.dtype == torch.float64 else weight.float()


def fill_skeleton(
    model: HookedTransformer, tensors: Mapping[str, Tensor], tokenizer: Any
) -> HookedTransformer:
    """Give a meta-device skeleton its tensors; absent biases become zeros.

    Raises:
        ValueError: a tensor with no place, or a weight that no tensor fills.
    """
    cfg = model.cfg
    device = torch.device(str(cfg.device))
    named = dict(model.named_parameters())
    unplaced = sorted(set(tensors) - set(named))
    if unplaced:
        raise ValueError(f"weights without a place in HookedTransformer: {unplaced[:3]}")
    for name, empty in named.items():
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        value = tensors.get(name)
        if value is None:
            if not leaf.lstrip("_").startswith("b"):
                raise ValueError(f"the checkpoint has no weight for {name}")
            value = torch.zeros(tuple(empty.shape), dtype=cfg.dtype, device=device)
        if value.shape != empty.shape:
            raise ValueError(f"{name}: expected {tuple(empty.shape)}, got {tuple(value.shape)}")
        owner._parameters[leaf] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
    _restore_buffers(model, device)
    model.tokenizer = fill_special_tokens(tokenizer)
    return model.eval()


def _restore_buffers(model: HookedTransformer, device: torch.device) -> None:
    """Rebuild what the meta device left empty: masks and the host's rotary buffers."""
    for block in model.blocks:
        attn: Any = block.attn
        attn.mask = torch.empty((0, 0), dtype=torch.bool, device=device)
        attn.IGNORE = torch.tensor(-torch.inf, device=device)
        if attn.rotary is not None:
            attn.rotary_sin, attn.rotary_cos = attn.rotary.sin, attn.rotary.cos


def share_model(
    model: HookedTransformer,
    replaced: Mapping[str, Tensor] | None = None,
    *,
    name: str | None = None,
    edit: str | None = None,
) -> HookedTransformer:
    """Make a new HookedTransformer over the same storage, without the original's hooks.

    Args:
        model: a model laid by emlens.
        replaced: TransformerLens name -> tensor that the new model owns instead of sharing.
        name: what the new model is called; by default as the original.
        edit: what makes the replaced tensors other than the original's, as a hash or a text that
            decides it; by default a hash of the tensors. Empty where they hold the same numbers.

    Raises:
        ValueError: a model that emlens did not lay, or a replaced name it does not have.
    """
    require_views(model)
    blocks: Any = model.blocks
    rotary = {layer: block.attn.rotary for layer, block in enumerate(blocks)}
    rotary = {layer: tables for layer, tables in rotary.items() if tables is not None}
    architecture = find_architecture(str(model.cfg.original_architecture))
    shell = build_skeleton(copy.deepcopy(model.cfg), architecture, rotary)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    fill_skeleton(shell, tensors | dict(replaced or {}), model.tokenizer)
    origin = origin_of(model)
    if replaced and edit is None:
        edit = f"weights {hash_tensors(replaced.items())}"
    edits = (*origin.edits, edit) if edit else origin.edits
    _ORIGINS[shell] = dataclasses.replace(origin, name=name or origin.name, edits=edits)
    return shell


def require_views(model: Any) -> None:
    """Refuse models that emlens did not load.

    Raises:
        ValueError: what was given, and how to load it.
    """
    first = model.blocks[0].attn if hasattr(model, "blocks") else None
    if not isinstance(first, FusedAttention | FusedGroupedAttention):
        raise ValueError(
            f"expected a HookedTransformer loaded by emlens, got {type(model).__name__} loaded "
            "elsewhere; load it with emlens.load_model(SOURCE or the live Hugging Face model)"
        )


def share_equal(model: HookedTransformer, base: HookedTransformer) -> HookedTransformer:
    """Return a model that shares with ``base`` every tensor bit-equal to the base's."""
    theirs = dict(base.named_parameters(remove_duplicate=False))
    shared = {
        name: theirs[name]
        for name, value in model.named_parameters(remove_duplicate=False)
        if value.shape == theirs[name].shape and torch.equal(value, theirs[name])
    }
    return share_model(model, shared, edit="")
