"""One adapted module probed along its update's own top direction, merged or attached.

The whole proof is in ``proof``; a probe says how strong the update is, not what it does.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.attach import write_point
from emlens.models.layout import join_parts, to_matrix
from emlens.models.lora import LoraAdapter, LoraModule, Target, architecture_of, read_parameter
from emlens.numerics.lowrank import svd_product

BANDS = {torch.float32: (0.999, 1.001), torch.float64: (0.999, 1.001)}
"""Accepted ratio of the measured to the intended update, by dtype; half precision below."""
HALF_BAND = (0.5, 1.3)
"""Half precision: 0.53 to 1.0 was measured for updates of 0.1 to 1 % of W, 1.65 at double scale."""
Verdict = Literal["in effect", "lost in this dtype", "wrong strength", "does nothing"]


@dataclass(frozen=True, kw_only=True)
class ModuleProof:
    """What was found at one adapted module."""

    name: str
    layer: int | None
    """Block, or None for an embedding."""
    module: str
    """Last part of the name, for instance ``down_proj``."""
    rank: int
    scale: float
    delta_norm: float
    """||scale B A||_F."""
    relative_norm: float
    """||scale B A||_F / ||W||_F."""
    surviving_share: float
    """<W' - W, dW> / <dW, dW>: the share of the update left after rounding."""
    ratio: float
    """Measured over intended update along the update's top direction."""
    verdict: Verdict


def by_layer(targets: tuple[Target, ...]) -> list[list[Target]]:
    """Group targets by block."""
    layers: dict[int, list[Target]] = {}
    for target in targets:
        layers.setdefault(target.layer, []).append(target)
    return list(layers.values())


def _judge(ratio: float, dtype: torch.dtype, intended: float) -> Verdict:
    if intended == 0.0:
        return "does nothing" if ratio == 0.0 else "wrong strength"
    low, high = BANDS.get(dtype, HALF_BAND)
    if low <= ratio <= high:
        return "in effect"
    half = dtype not in BANDS
    return "lost in this dtype" if half and -low < ratio < low else "wrong strength"


@dataclass(frozen=True)
class _Probe:
    """Top singular triple of B A in float64, on the CPU wherever the factors are."""

    u: Float[Tensor, " d_out"]
    v: Float[Tensor, " d_in"]
    size: float
    norm: float

    @classmethod
    def of(cls, lora: LoraModule) -> "_Probe":
        svd = svd_product(lora.B.cpu().double(), lora.A.cpu().double())
        norm = float(svd.S.norm()) * abs(lora.scale)
        return cls(svd.U[:, 0], svd.Vh[0], float(svd.S[0]) * lora.scale, norm)


def _record(
    target: Target, probe: _Probe, weight_norm: float, along: float, surviving: float, dtype: Any
) -> ModuleProof:
    ratio = along / probe.size if probe.size else along
    return ModuleProof(
        name=target.name,
        layer=target.layer,
        module=target.place.suffix,
        rank=target.lora.rank,
        scale=target.lora.scale,
        delta_norm=probe.norm,
        relative_norm=probe.norm / weight_norm if weight_norm else math.inf,
        surviving_share=surviving,
        ratio=ratio,
        verdict=_judge(ratio, dtype, probe.size),
    )


def _full_matrix(model: HookedTransformer, target: Target) -> Tensor:
    """The Hugging Face module's W [d_out d_in], its fused parts put together again."""
    parts = [
        to_matrix(read_parameter(model, f"blocks.{target.layer}.{name}"), target.place.kind)
        for name in target.place.parameters
    ]
    return join_parts(parts, target.place, model.cfg.d_head)


def measure_merged(
    base: HookedTransformer, tuned: HookedTransformer, targets: list[Target]
) -> list[ModuleProof]:
    """Compare weights: ratio = u^T (W' - W) v / (scale s), module by module."""
    proofs = []
    for target in targets:
        W, probe = _full_matrix(base, target), _Probe.of(target.lora)
        dtype = torch.promote_types(W.dtype, torch.float32)
        # Neighbouring floats: the difference is exact in float32 for half and single precision.
        change = _full_matrix(tuned, target).to(dtype) - W.to(dtype)
        along = probe.u.to(W.device) @ (change @ probe.v.to(W.device, dtype)).double()
        surviving = _surviving(change, target.lora)
        norm = float(torch.linalg.vector_norm(W, dtype=torch.float32))
        proofs.append(_record(target, probe, norm, float(along), surviving, W.dtype))
    return proofs


def _surviving(change: Tensor, lora: LoraModule) -> float:
    """<change, dW> / <dW, dW> through the factors: dW is never formed."""
    A, B = lora.A.to(change), lora.B.to(change)
    inner = lora.scale * float(((B.mT @ change) * A).sum(dtype=torch.float64))
    squared = lora.scale**2 * float(((B.mT @ B) * (A @ A.mT)).sum(dtype=torch.float64))
    return inner / squared if squared else 1.0


def measure_attached(
    base: HookedTransformer, tuned: HookedTransformer, targets: list[Target]
) -> list[ModuleProof]:
    """Probe all modules of one layer, those that read one place in one batch."""
    proofs = []
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.place.reads, []).append(target)
    for group in groups.values():
        probes = [_Probe.of(target.lora) for target in group]
        x = torch.stack([probe.v for probe in probes])[:, None]  # one batch row a module
        on, off = (_outputs_at(model, group, x) for model in (tuned, base))
        for row, (target, probe) in enumerate(zip(group, probes, strict=True)):
            change = (on[row].double() - off[row].double()).cpu()
            W = _full_matrix(base, target)
            wide = torch.promote_types(W.dtype, torch.float32)
            norm = float(torch.linalg.vector_norm(W, dtype=wide))
            along = float(probe.u @ change)
            surviving = _rounded_share(target.lora, W.dtype)
            proofs.append(_record(target, probe, norm, along, surviving, W.dtype))
    return proofs


def _rounded_share(lora: LoraModule, dtype: torch.dtype) -> float:
    """The share of B A left when both factors are rounded to the model's dtype."""
    A, B = lora.A.double(), lora.B.double()
    rounded_A, rounded_B = lora.A.to(dtype).double(), lora.B.to(dtype).double()
    squared = float(((B.mT @ B) * (A @ A.mT)).sum())
    return float(((B.mT @ rounded_B) * (A @ rounded_A.mT)).sum()) / squared if squared else 1.0


@torch.no_grad()
def _outputs_at(model: HookedTransformer, group: list[Target], x: Tensor) -> list[Tensor]:
    """Each module's output row with its own probe as input, run through the real block."""
    layer, reads = group[0].layer, group[0].place.reads
    block: Any = model.blocks[layer]
    x = x.to(block.attn.W_O.device, model.cfg.dtype)
    found: dict[tuple[int, str], Tensor] = {}
    with ExitStack() as stack:
        _inject(block, reads, x, stack)
        for row, target in enumerate(group):
            for write in target.place.writes:
                key = (row, write)

                def read(_m: Any, _a: Any, out: Tensor, key: tuple[int, str] = key) -> None:
                    found[key] = out[key[0], 0].flatten()

                point = write_point(block, write, architecture_of(model))
                stack.callback(point.register_forward_hook(read).remove)
        residual = torch.zeros(len(group), 1, model.cfg.d_model, dtype=x.dtype, device=x.device)
        block(residual)
    return [
        join_parts(
            [found[row, write] for write in target.place.writes], target.place, model.cfg.d_head
        )
        for row, target in enumerate(group)
    ]


def _inject(block: Any, reads: str, x: Tensor, stack: ExitStack) -> None:
    """Replace what the group's modules read by the probes, before any adapter reads it."""
    if reads in ("attn", "mlp"):

        def replace_input(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            named = {k: x for k in ("query_input", "key_input", "value_input") if k in kwargs}
            return (tuple(x for _ in args), kwargs | named)

        module = getattr(block, reads)
        handle = module.register_forward_pre_hook(replace_input, prepend=True, with_kwargs=True)
    else:
        point = block.attn.hook_z if reads == "z" else block.mlp.hook_post

        def replace_output(_module: Any, _args: Any, output: Tensor) -> Tensor:
            return x.view(output.shape)

        handle = point.register_forward_hook(replace_output, prepend=True)
    stack.callback(handle.remove)


def measure_embedding(
    base: HookedTransformer, tuned: HookedTransformer, adapter: LoraAdapter, name: str
) -> ModuleProof:
    """An embedding or unembedding, merged: compared as matrices."""
    lora = adapter.modules[name]
    probe = _Probe.of(lora)
    unembeds = name.endswith("lm_head")
    W, W2 = ((m.unembed.W_U if unembeds else m.embed.W_E).detach().mT for m in (base, tuned))
    wide = torch.promote_types(W.dtype, torch.float32)
    change = W2.to(wide) - W.to(wide)
    along = float(probe.u.to(W.device) @ (change @ probe.v.to(W.device, wide)).double())
    ratio = along / probe.size if probe.size else along
    norm = float(torch.linalg.vector_norm(W, dtype=wide))
    return ModuleProof(
        name=name,
        layer=None,
        module=name.rsplit(".", 1)[-1],
        rank=lora.rank,
        scale=lora.scale,
        delta_norm=probe.norm,
        relative_norm=probe.norm / norm,
        surviving_share=_surviving(change, lora),
        ratio=ratio,
        verdict=_judge(ratio, W.dtype, probe.size),
    )
