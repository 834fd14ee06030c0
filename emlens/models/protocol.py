"""What the rest of emlens may rely on in a model, so that the host library can change.

Write code against these protocols above this package; inside it, use the host's own types.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class HookedConfig(Protocol):
    """The sizes of a hooked model, by TransformerLens's names."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_key_value_heads: int | None
    dtype: torch.dtype


@runtime_checkable
class HookedModel(Protocol):
    """A model whose activations can be read and changed at named hook points."""

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook points by name."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the model; takes ``attention_mask``, ``start_at_layer`` and ``stop_at_layer``."""
        ...
