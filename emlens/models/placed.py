"""A LoRA's factors as and where a model computes: scaled, rounded, moved and stacked once.

For hooks, which run at every batch; proof, merging and hashes are of the adapter as it was read.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.layout import split_rows
from emlens.models.lora import LoraAdapter, Target, embedding_modules, find_targets


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedWrite:
    """What joins one hook point: B u, for some columns of what the group has read."""

    hook: str
    """The hook point, below the block."""
    columns: slice
    B: Float[Tensor, "d_out rank"]
    """The scale is in it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedGroup:
    """All modules of a block that read one tensor."""

    layer: int
    reads: str
    """As ``Place.reads``."""
    A: Float[Tensor, "ranks d_in"]
    """Of all of them, stacked."""
    writes: tuple[PlacedWrite, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedAdapter:
    """An adapter ready to be hooked into a model, and into all that share its sizes and place."""

    groups: tuple[PlacedGroup, ...]
    """In the order of their layers."""
    dtype: torch.dtype
    device: torch.device

    @property
    def first_layer(self) -> int:
        """The first block that it changes; 0 if none."""
        return self.groups[0].layer if self.groups else 0

    def fits(self, model: HookedTransformer) -> bool:
        """Whether a model still computes in this dtype and on this device."""
        return (self.dtype, self.device) == (model.cfg.dtype, model.W_E.device)


def place_adapter(adapter: LoraAdapter, model: HookedTransformer) -> PlacedAdapter:
    """Scale an adapter's B in float32 at least, and round and move all factors, once.

    Args:
        adapter: an adapter without embedding targets; not changed.
        model: a model that it fits.

    Raises:
        ValueError: an adapter that does not fit or targets embeddings.
    """
    require_attachable(adapter)
    by_input: dict[tuple[int, str], list[Target]] = defaultdict(list)
    for target in find_targets(model, adapter):
        by_input[target.layer, target.place.reads].append(target)
    with torch.inference_mode(False):  # kept for later passes, which may need gradients
        groups = tuple(_place_group(group, model) for group in by_input.values())
    return PlacedAdapter(groups=groups, dtype=model.cfg.dtype, device=model.W_E.device)


def _place_group(group: list[Target], model: HookedTransformer) -> PlacedGroup:
    dtype, device = model.cfg.dtype, model.W_E.device
    writes: list[PlacedWrite] = []
    start = 0
    for target in group:
        lora, place = target.lora, target.place
        columns = slice(start, start + lora.rank)
        start = columns.stop
        B = lora.scale * lora.B.to(torch.promote_types(dtype, torch.float32))
        for hook, rows in zip(place.writes, split_rows(B, place, model.cfg.d_head), strict=True):
            placed = rows.to(device, dtype).contiguous()
            writes.append(PlacedWrite(hook=hook, columns=columns, B=placed))
    A = torch.cat([target.lora.A for target in group]).to(device, dtype)
    first = group[0]
    return PlacedGroup(layer=first.layer, reads=first.place.reads, A=A, writes=tuple(writes))


def require_attachable(adapter: LoraAdapter) -> None:
    """Refuse an adapter of embeddings, which only merging supports.

    Raises:
        ValueError: it adapts an embedding.
    """
    embeddings = embedding_modules(adapter)
    if embeddings:
        raise ValueError(
            f"{adapter.name} adapts {', '.join(embeddings)}, which has no attached form; "
            "load it with form='merged'"
        )
