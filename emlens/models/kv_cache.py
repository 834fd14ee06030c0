"""A preallocated key-value cache, and the pass that fills it; not for gradients.

It has the interface that HookedTransformer's forward asks for. Rows can leave it, and rows that
begin alike can begin as copies of one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer


@dataclass
class LayerCache:
    """Keys (rotated) and values of one layer, head-major so that attention copies nothing."""

    keys: Float[Tensor, "batch head capacity d_head"]
    values: Float[Tensor, "batch head capacity d_head"]
    length: int = 0

    @property
    def past_keys(self) -> Float[Tensor, "batch pos head d_head"]:
        """The keys so far, as the host expects to see them."""
        return self.keys[:, :, : self.length].transpose(1, 2)

    def append(
        self,
        keys: Float[Tensor, "batch pos head d_head"],
        values: Float[Tensor, "batch pos head d_head"],
    ) -> tuple[Float[Tensor, "batch all head d_head"], Float[Tensor, "batch all head d_head"]]:
        """Store new keys and values; returns all of them.

        Raises:
            ValueError: more positions than the cache was made for.
        """
        end = self.length + keys.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"cache of {self.keys.shape[2]} positions asked to hold {end}")
        self.keys[:, :, self.length : end] = keys.transpose(1, 2)
        self.values[:, :, self.length : end] = values.transpose(1, 2)
        self.length = end
        return (
            self.keys[:, :, :end].transpose(1, 2),
            self.values[:, :, :end].transpose(1, 2),
        )

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Move some rows, in rising order, to the front and forget the others."""
        for name in ("keys", "values"):
            held = getattr(self, name)
            held[: len(rows), :, : self.length] = held[rows, :, : self.length]
            setattr(self, name, held[: len(rows)])


class KeyValueCache:
    """One ``LayerCache`` a layer and the padding mask of everything seen.

    Args:
        model: the model that will fill it.
        batch: rows.
        capacity: the longest sequence, prompt and response together, in tokens.
    """

    frozen = False

    def __init__(self, model: HookedTransformer, *, batch: int, capacity: int):
        cfg = model.cfg
        heads = cfg.n_key_value_heads or cfg.n_heads
        device = model.W_E.device
        shape = (batch, heads, capacity, cfg.d_head)
        self.entries = [
            LayerCache(
                keys=torch.empty(shape, dtype=cfg.dtype, device=device),
                values=torch.empty(shape, dtype=cfg.dtype, device=device),
            )
            for _ in range(cfg.n_layers)
        ]
        self._mask = torch.ones((batch, capacity), dtype=torch.long, device=device)
        self.padded = False
        """Whether any position so far is padding."""

    def __getitem__(self, layer: int) -> LayerCache:
        return self.entries[layer]

    @property
    def length(self) -> int:
        """Positions held, padding included."""
        return self.entries[0].length

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one row: keys and values of all layers."""
        keys = [entry.keys for entry in self.entries]
        return sum(2 * k.shape[1] * k.shape[3] * k.element_size() for k in keys)

    def append_attention_mask(self, mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch all"]:
        """Extend the padding mask by that of the tokens about to be run; returns all of it."""
        end = self.length + mask.shape[1]
        self._mask[:, self.length : end] = mask
        self.padded = self.padded or not bool(mask.all())
        return self._mask[:, :end]

    def mask_until(self, end: int) -> Int[Tensor, "batch all"] | None:
        """The mask of the first positions, those about to be run counted as real; None if all."""
        return self._mask[:, :end] if self.padded else None

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Let all other rows leave; memory stays allocated until the cache is gone.

        Args:
            rows: in rising order.
        """
        for entry in self.entries:
            entry.keep(rows)
        self._mask = self._mask[rows]

    def spread(
        self, model: HookedTransformer, rows: Int[Tensor, " batch"], *, capacity: int
    ) -> "KeyValueCache":
        """A new cache with more room, whose rows begin as copies of rows of this one.

        Args:
            model: the model that fills both.
            rows: for each new row, the row it begins as; may repeat.
            capacity: as for the class.
        """
        made = KeyValueCache(model, batch=len(rows), capacity=capacity)
        for new, old in zip(made.entries, self.entries, strict=True):
            new.keys[:, :, : old.length] = old.keys[rows, :, : old.length]
            new.values[:, :, : old.length] = old.values[rows, :, : old.length]
            new.length = old.length
        made._mask[:, : self.length] = self._mask[rows, : self.length]
        made.padded = self.padded
        return made


def run_cached(
    model: HookedTransformer,
    ids: Int[Tensor, "batch pos"],
    cache: KeyValueCache | None,
    *,
    mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Run new tokens on top of what a cache holds; returns the stream after the last block.

    Args:
        model: a model loaded by emlens.
        ids: new tokens, on the model's device.
        cache: what came before, which grows; None for nothing, and to keep nothing.
        mask: 1 at real tokens, 0 at padding. None where all are real, or where the padding comes
            after the tokens that count: no real token sees what follows it.
    """
    offset = 0 if cache is None else cache.length
    if mask is not None and cache is not None:
        cache.append_attention_mask(mask)
    if cache is not None:
        mask = cache.mask_until(offset + ids.shape[1])
    resid = model.hook_embed(model.embed(ids))
    if model.cfg.positional_embedding_type == "standard":
        resid = resid + model.hook_pos_embed(model.pos_embed(ids, offset, mask))
    for layer, block in enumerate(model.blocks):
        entry = None if cache is None else cache[layer]
        resid = block(resid, past_kv_cache_entry=entry, attention_mask=mask)
    return resid
