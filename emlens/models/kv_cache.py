"""A preallocated key-value cache with the interface that HookedTransformer's forward asks for."""

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
        self.previous_attention_mask = torch.empty((batch, 0), dtype=torch.long, device=device)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.entries[layer]

    def append_attention_mask(self, mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch all"]:
        """Extend the padding mask; returns all of it."""
        self.previous_attention_mask = torch.cat([self.previous_attention_mask, mask], dim=-1)
        return self.previous_attention_mask
