"""Random adapters of the same shapes and norms as a given one: the null of every comparison."""

from dataclasses import replace

import torch

from emlens.models.lora import LoraAdapter, LoraModule
from emlens.numerics.lowrank import frobenius_norm_product


def sample_null_adapters(like: LoraAdapter, *, n: int, seed: int) -> tuple[LoraAdapter, ...]:
    """Draw adapters with Gaussian factors and the same ||scale B A||_F at every module.

    Args:
        like: the adapter whose shapes, scales and norms they take.
        n: how many.
        seed: of the first; the k-th is the same whatever ``n``.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1 null adapter")
    return tuple(_sample(like, index, seed) for index in range(n))


def _sample(like: LoraAdapter, index: int, seed: int) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    modules = {name: _sample_module(like.modules[name], generator) for name in sorted(like.modules)}
    return replace(
        like,
        modules=modules,
        name=f"null {index} of {like.name}",
        base_fingerprint=like.base_fingerprint,
        fingerprint=f"null-{seed}-{index}-{like.fingerprint}",
    )


def _sample_module(like: LoraModule, generator: torch.Generator) -> LoraModule:
    A = torch.randn(like.A.shape, generator=generator)
    B = torch.randn(like.B.shape, generator=generator)
    wanted = frobenius_norm_product(like.B.double(), like.A.double())
    drawn = frobenius_norm_product(B.double(), A.double())
    # Half of the correction goes to each factor, so that neither leaves half precision's range.
    factor = (wanted / drawn) ** 0.5
    return LoraModule(A=A * factor, B=B * factor, scale=like.scale)
