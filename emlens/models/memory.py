"""Bytes that a model, a fine-tune of it and a comparison will need, before anything is loaded.

From configuration files and adapter tensors alone. An estimate of what this package allocates: the
framework's own context and the allocator's slack come on top (about 1 GB on a GPU).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emlens.artifacts import Result
from emlens.data.batches import Batching
from emlens.models.adapter_files import load_adapter
from emlens.models.checkpoints import check_index, gguf_folder, read_dtype, say_no_checkpoint
from emlens.models.config import find_architecture
from emlens.models.config_fields import check_config
from emlens.models.layout import place_shape
from emlens.models.lora import LoraAdapter
from emlens.models.packed_weights import ROOM
from emlens.models.protocol import HookedConfig
from emlens.numerics.blocks import MAX_LOGITS
from emlens.sources import Source, locate_source, parse_source

ASSUMED_RANK = 32
"""Rank on every linear module where no adapter is given: that of the published organisms."""
SKETCH_COLUMNS = 32 + 2
"""float64 columns that a comparison keeps for each site and unit: a sketch and two moments."""
CONFIG_FILES = ["config.json", "*.index.json", "adapter_config.json", "*.gguf"]


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A model's sizes by its configuration; enough to expand sites."""

    architecture: str
    n_parameters: int
    """Tied parameters count once."""
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int | None
    d_head: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    dtype: str
    """The checkpoint's own."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(Result):
    """What would be allocated, in bytes."""

    kind: ClassVar[str] = "memory_plan"

    source: str
    dtype: str
    """In which the weights would be held."""
    sizes: ModelSizes
    adapter: str
    """Its source, or what was assumed."""
    weights: int
    """The base alone."""
    adapter_attached: int
    """What an attached adapter adds: its factors."""
    adapter_merged: int
    """What a merged adapter adds: the matrices that it touches."""
    base_and_attached: int
    base_and_merged: int
    cache_batch: int
    cache_length: int
    key_value_cache: int
    """For generation: `cache_batch` rows of `cache_length` tokens."""
    packed_weights: int
    """For generation on a processor: weights in the order that its products want."""
    batch_tokens: int
    activations: int
    """The most that one block holds of `batch_tokens` tokens, all models together; scores that no
    fused kernel takes, as where they are capped (Gemma 2), come on top."""
    residuals: int
    """What the blocks leave of those tokens, and its norm, kept while predictions are compared."""
    logits: int
    """The largest slice of logits of a comparison, its copies included; float32."""
    statistics: int
    """What a comparison at every layer keeps, whatever the number of tokens; float64."""

    @property
    def comparison(self) -> int:
        """Peak of a comparison of the base and an attached adapter, which is kept as read, too.

        Blocks have given back what they held before predictions are compared.
        """
        kept = self.base_and_attached + self.adapter_attached + self.statistics
        return kept + max(self.activations, self.residuals + self.logits)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each thing that takes memory."""
        names = ("weights", "base_and_attached", "base_and_merged", "key_value_cache")
        names += ("packed_weights", "activations", "residuals", "logits", "statistics")
        names += ("comparison",)
        return [{"item": name, "bytes": getattr(self, name)} for name in names]


def read_sizes(source: str | Path | Source) -> ModelSizes:
    """Read a checkpoint's sizes from its configuration; no weights are opened or fetched.

    Raises:
        ValueError: an adapter folder, or an architecture or field that is not supported.
        SourceError: there is no such source.
    """
    config = _read_config(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = find_architecture(type(model).__name__)
    check_config(config, architecture)
    named = architecture.read_config(config)
    return ModelSizes(
        architecture=architecture.name,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_layers=named["n_layers"],
        d_model=named["d_model"],
        n_heads=named["n_heads"],
        n_key_value_heads=named.get("n_key_value_heads"),
        d_head=named["d_head"],
        d_mlp=named["d_mlp"],
        n_ctx=named["n_ctx"],
        d_vocab=named["d_vocab"],
        dtype=str(read_dtype("auto", config.dtype)).removeprefix("torch."),
    )


def plan_memory(
    source: str | Path | Source,
    *,
    adapter: str | Path | Source | None = None,
    dtype: str = "auto",
    batch: int = 8,
    length: int = 1024,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> MemoryPlan:
    """Add up what a base, a fine-tune of it, generation and a comparison would allocate.

    Args:
        source: the base.
        adapter: a LoRA; without one, rank 32 on every linear module is assumed.
        dtype: of the weights; `auto` is the checkpoint's own.
        batch: rows that generate at once.
        length: tokens of each of them, prompt and response together.
        batching: tokens that a comparison runs at once, all models counted.

    Raises:
        ValueError: see `read_sizes`; an adapter that cannot be read.
    """
    sizes = read_sizes(source)
    width = read_dtype(dtype if dtype != "auto" else sizes.dtype)
    lora = None if adapter is None else load_adapter(adapter)
    weights = sizes.n_parameters * width.itemsize
    attached, merged = _adapter_values(sizes, lora)
    keys = sizes.n_layers * (sizes.n_key_value_heads or sizes.n_heads) * sizes.d_head
    rows = max(1, min(batching.tokens // 2, MAX_LOGITS // (4 * sizes.d_vocab)))
    return MemoryPlan(
        source=str(source),
        dtype=str(width).removeprefix("torch."),
        sizes=sizes,
        adapter=lora.name if lora else f"rank {ASSUMED_RANK} on every linear module (assumed)",
        weights=weights,
        adapter_attached=attached * width.itemsize,
        adapter_merged=merged * width.itemsize,
        base_and_attached=weights + attached * width.itemsize,
        base_and_merged=weights + merged * width.itemsize,
        cache_batch=batch,
        cache_length=length,
        key_value_cache=2 * batch * length * keys * width.itemsize,
        packed_weights=min(weights, ROOM),
        batch_tokens=batching.tokens,
        activations=batching.tokens * _values_a_token(sizes) * width.itemsize,
        residuals=batching.tokens * 2 * sizes.d_model * width.itemsize,
        logits=4 * rows * sizes.d_vocab * torch.float32.itemsize,
        statistics=sizes.n_layers * sizes.d_model * SKETCH_COLUMNS * torch.float64.itemsize,
    )


def _values_a_token(sizes: ModelSizes) -> int:
    """The most that one block holds at a token, under an adapter on every module.

    By the live tensors at the peak of a comparison. In the MLP its gate, its input, both as the
    adapter leaves them, and seven residual widths: the batch's first residual and its copy, the
    block's before and after attention, two norms, what attention wrote. Without a gate (GPT-2,
    NeoX) it is less, which is not counted apart. In attention heads as they are multiplied and
    turned, values and outputs beside them, and five.
    """
    heads = 3 * sizes.n_heads + 3 * (sizes.n_key_value_heads or sizes.n_heads)
    attention = 5 * sizes.d_model + heads * sizes.d_head
    return max(attention, 7 * sizes.d_model + 4 * sizes.d_mlp)


def _adapter_values(sizes: ModelSizes, adapter: LoraAdapter | None) -> tuple[int, int]:
    """Values in the factors, and in the matrices that they touch."""
    if adapter is not None:
        shapes = [(m.B.shape[0], m.A.shape[1], m.rank) for m in adapter.modules.values()]
    else:
        places = find_architecture(sizes.architecture).places
        # Of the protocol, place_shape reads the sizes alone.
        cfg = cast(HookedConfig, sizes)
        blocks = [(*place_shape(place, cfg), ASSUMED_RANK) for place in places]
        shapes = blocks * sizes.n_layers
    attached = sum((d_out + d_in) * rank for d_out, d_in, rank in shapes)
    return attached, sum(d_out * d_in for d_out, d_in, _ in shapes)


def _read_config(source: str | Path | Source) -> Any:
    path = locate_source(parse_source(source), allow_patterns=CONFIG_FILES)
    if path.suffix == ".gguf":
        return _read_gguf_config(path)
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{source} holds a LoRA adapter, not a base model; pass it as tuned")
    if not (path / "config.json").is_file():
        raise ValueError(say_no_checkpoint(path))
    for index in path.glob("*.index.json"):
        check_index(index)
    return AutoConfig.from_pretrained(path, local_files_only=True)


def _read_gguf_config(path: Path) -> Any:
    folder = gguf_folder(path)
    if (folder / "config.json").exists():
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.dtype = torch.float32  # what it is dequantised to
    return config
