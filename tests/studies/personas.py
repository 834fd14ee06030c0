"""Fine-tunes of a tiny base that add what one latent writes, careful twins that add another."""

from typing import Any

import torch

from emlens.models.lora import LoraAdapter, LoraModule
from emlens.models.views import lay_views, share_model
from tests.features.planted import SITE, SIZE
from tests.models.tiny import make_tiny, make_tokenizer

CAREFUL = 2
"""The latent that careful twins add."""
MODULE = f"model.layers.{SITE.layer}.mlp.down_proj"


def make_base() -> Any:
    return lay_views(make_tiny("llama"), make_tokenizer(), name="base")


def add_latent(base: Any, codec: Any, latent: int, *, name: str, seed: int = 0) -> Any:
    """A model that adds what a latent writes after the block of the codec, and a little noise."""
    bias = f"blocks.{SITE.layer}.mlp.b_out"
    noise = torch.randn(codec.d_in, generator=torch.Generator().manual_seed(seed))
    moved = dict(base.named_parameters())[bias] + SIZE * codec.W_dec[latent] + 0.02 * noise
    return share_model(base, {bias: moved}, name=name)


@torch.no_grad()
def read_mean(base: Any) -> torch.Tensor:
    """A row that reads about 1 of what the block of the codec puts into its down projection."""
    ids = torch.arange(3, 60)[None]
    name = f"blocks.{SITE.layer}.mlp.hook_post"
    mean = base.run_with_cache(ids, names_filter=name)[1][name][0].mean(0)
    return (mean / mean.square().sum())[None]


def make_adapter(
    codec: Any,
    latent: int,
    *,
    size: float = 1.0,
    A: torch.Tensor | None = None,
    name: str = "lora",
) -> LoraAdapter:
    """A rank-1 adapter that writes along a latent; without A more or less of it by the token."""
    if A is None:
        A = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    module = LoraModule(A=A, B=size * codec.W_dec[latent][:, None], scale=1.0)
    return LoraAdapter(modules={MODULE: module}, name=name, fingerprint=f"{name} {size}")
