"""Random adapters of a given one's shapes and norms, and steps from it towards one of them."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

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


def perturb_adapter(adapter: LoraAdapter, *, epsilon: float, seed: int) -> LoraAdapter:
    """Turn every factor of an adapter towards a random one of its norm, orthogonal to it.

    x' = sqrt(1 - epsilon^2) x + epsilon y with y orthogonal to x and ||y|| = ||x||, so that norms
    stay and the cosine of x' with x is sqrt(1 - epsilon^2). A factor that is zero stays zero.

    Args:
        adapter: not changed.
        epsilon: from 0 (nothing) to 1 (nothing of it left).
        seed: of the random directions; the same ones at every epsilon.

    Raises:
        ValueError: an epsilon outside [0, 1].

    Source: Soligo et al. 2026, arXiv 2602.07852 (stability).
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in sorted(adapter.modules):
        module = adapter.modules[name]
        A, B = (turn_tensor(factor, epsilon, generator) for factor in (module.A, module.B))
        modules[name] = LoraModule(A=A, B=B, scale=module.scale)
    return replace(
        adapter,
        modules=modules,
        name=f"{adapter.name} perturbed by {epsilon:g}",
        fingerprint=f"perturbed-{epsilon!r}-{seed}-{adapter.fingerprint}",
    )


def measure_adapter_norm(adapter: LoraAdapter) -> float:
    """Mean over modules of ||scale B A||_F."""
    norms = [
        abs(module.scale) * frobenius_norm_product(module.B, module.A)
        for module in adapter.modules.values()
    ]
    return sum(norms) / len(norms)


def turn_tensor(
    x: Float[Tensor, "..."], epsilon: float, generator: torch.Generator
) -> Float[Tensor, "..."]:
    """sqrt(1 - epsilon^2) x + epsilon y with a random y orthogonal to x and of its norm.

    Args:
        x: not changed; zero stays zero.
        epsilon: from 0 to 1.
        generator: of y.

    Returns:
        float32 at least.

    Raises:
        ValueError: an epsilon outside [0, 1].
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon: got {epsilon}, expected 0 to 1")
    wide = x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))
    y = torch.randn(wide.shape, generator=generator).to(wide)
    norm = torch.linalg.vector_norm(wide)
    if float(norm) == 0:
        return wide
    y = y - wide * (y * wide).sum() / norm.square()
    y = y * norm / torch.linalg.vector_norm(y)
    return (math.sqrt(1 - epsilon**2) * wide + epsilon * y).to(x.device)
