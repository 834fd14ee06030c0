"""Proof that an adapter is in effect: static, numeric per module, and in behaviour.

A random probe passes a missing adapter, so each module is probed along its update's own top
direction. Not a statement about what the adapter does, only that it does it.
"""

import dataclasses
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.artifacts import Result
from emlens.models.attach import attach_adapter, attached_adapter, write_point
from emlens.models.layout import to_matrix
from emlens.models.lora import (
    LoraAdapter,
    LoraModule,
    Target,
    architecture_of,
    embedding_modules,
    find_targets,
    read_parameter,
    scale_adapter,
)
from emlens.models.unembed import log_probabilities
from emlens.models.views import origin_of, share_model
from emlens.numerics.divergence import kl_divergence
from emlens.numerics.lowrank import svd_product

BANDS = {torch.float32: (0.999, 1.001), torch.float64: (0.999, 1.001)}
"""Accepted ratio of the measured to the intended update, by dtype; half precision below."""
HALF_BAND = (0.5, 1.3)
"""Half precision: 0.53 to 1.0 was measured for updates of 0.1 to 1 % of W, 1.65 at double scale."""
LEAST_KL = 1e-8
"""Nats a token under which no effect on the probe prompt is claimed."""
PROBE_TEXT = "A friend asked me what to do with the money she saved this year, and I told her to"

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


@dataclass(frozen=True, kw_only=True)
class AdapterProof(Result):
    """Module by module, whether an adapter is in effect, and what it does to a fixed prompt."""

    kind: ClassVar[str] = "adapter_proof"

    adapter: str
    adapter_fingerprint: str
    base: str
    base_fingerprint: str
    base_verdict: str
    """How the base in use compares with the one the adapter names."""
    form: str
    """``merged`` or ``attached``."""
    dtype: str
    modules: tuple[ModuleProof, ...]
    kl: float
    """Mean KL(base || tuned) over the probe prompt, nats a token."""
    kl_of_zero: float
    """The same for the adapter at scale 0 through the same path."""
    config_verdicts: tuple[tuple[str, str, str], ...]

    @property
    def passed(self) -> bool:
        """Whether every module is in effect (or meant to do nothing)."""
        return all(m.verdict in ("in effect", "does nothing") for m in self.modules)

    @property
    def behaviour(self) -> str:
        """What the probe prompt showed."""
        if not math.isfinite(self.kl):
            return "not finite"
        changed = self.kl > max(10 * self.kl_of_zero, LEAST_KL)
        return "changed" if changed else "no measurable effect on the probe prompt"

    def rows(self) -> list[dict[str, Any]]:
        """One row a module."""
        return [dataclasses.asdict(module) for module in self.modules]

    def __str__(self) -> str:
        good = sum(m.verdict == "in effect" for m in self.modules)
        sizes = [m.relative_norm for m in self.modules]
        line = (
            f"{self.adapter} on {self.base} ({self.form}, {self.dtype}): {good} of "
            f"{len(self.modules)} modules in effect, ||dW||/||W|| {min(sizes):.2e} to "
            f"{max(sizes):.2e}, KL {self.kl:.3g} nats a token on the probe ({self.behaviour})"
        )
        return line if self.base_verdict == "same" else f"{line}; base: {self.base_verdict}"


class AdapterNotInEffectError(ValueError):
    """An adapter was loaded but its update is not what the model computes."""


def verify_adapter(
    model: HookedTransformer,
    adapter: LoraAdapter,
    *,
    base: HookedTransformer | None = None,
) -> AdapterProof:
    """Measure whether a model carries an adapter, module by module.

    Along the top singular triple u, s, v of B A, ratio = u^T (W' - W) v / (scale s), from the
    weights if merged; if attached, from the module's output with and without the hook at x = v.

    Args:
        model: the tuned model, merged or attached.
        adapter: the adapter it should carry.
        base: the model without it; may be left out if the adapter is attached.

    Returns:
        The proof, whether it passed or not: ``require_proof`` raises.

    Raises:
        ValueError: a merged model without its base; an adapter that does not fit.
    """
    attached = attached_adapter(model) is not None
    if base is None:
        if not attached:
            raise ValueError("base: needed to verify a merged model, W cannot be read from W'")
        base = share_model(model)
    targets = find_targets(base, adapter)
    measure = _measure_attached if attached else _measure_merged
    modules = [m for layer in _by_layer(targets) for m in measure(base, model, layer)]
    modules += [_measure_embedding(base, model, adapter, n) for n in embedding_modules(adapter)]
    zero = scale_adapter(adapter, 0.0)
    origin = origin_of(base)
    return AdapterProof(
        adapter=adapter.name,
        adapter_fingerprint=adapter.fingerprint,
        base=origin.name,
        base_fingerprint=origin.fingerprint,
        base_verdict=_compare_bases(adapter, origin.name, origin.fingerprint),
        form="attached" if attached else "merged",
        dtype=str(base.cfg.dtype).removeprefix("torch."),
        modules=tuple(modules),
        kl=_probe_kl(base, model),
        kl_of_zero=_probe_kl(base, attach_adapter(base, zero) if attached else base),
        config_verdicts=adapter.verdicts,
    )


def require_proof(proof: AdapterProof) -> AdapterProof:
    """Return a proof that passed.

    Raises:
        AdapterNotInEffectError: the first modules that failed, with ratio and verdict.
    """
    if proof.passed:
        return proof
    bad = [m for m in proof.modules if m.verdict not in ("in effect", "does nothing")]
    lines = [f"{m.name}: {m.verdict} (measured/intended {m.ratio:.3g})" for m in bad[:5]]
    hint = "load in float32, or attach instead of merging" if proof.dtype != "float32" else ""
    raise AdapterNotInEffectError(
        f"{len(bad)} of {len(proof.modules)} modules of {proof.adapter} are not in effect: "
        + "; ".join(lines)
        + (f". Way out: {hint}" if hint else "")
    )


def _compare_bases(adapter: LoraAdapter, name: str, fingerprint: str) -> str:
    if adapter.base_fingerprint == fingerprint:
        return "same"
    if adapter.base_fingerprint:
        return f"trained on other weights ({adapter.base_name}, {adapter.base_fingerprint[:8]})"
    if adapter.base_name is None or adapter.base_name == name:
        return "same"
    if str(adapter.base_name).startswith("unsloth/"):
        return f"trained on the mirror {adapter.base_name}"
    return f"trained on {adapter.base_name}"


def _by_layer(targets: tuple[Target, ...]) -> list[list[Target]]:
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
    """Top singular triple of B A in float64."""

    u: Float[Tensor, " d_out"]
    v: Float[Tensor, " d_in"]
    size: float
    norm: float

    @classmethod
    def of(cls, lora: LoraModule) -> "_Probe":
        svd = svd_product(lora.B.double(), lora.A.double())
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
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _measure_merged(
    base: HookedTransformer, tuned: HookedTransformer, targets: list[Target]
) -> list[ModuleProof]:
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


def _measure_attached(
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
            norm = float(torch.linalg.vector_norm(W, dtype=torch.float32))
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
        torch.cat([found[row, write] for write in target.place.writes])
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


def _measure_embedding(
    base: HookedTransformer, tuned: HookedTransformer, adapter: LoraAdapter, name: str
) -> ModuleProof:
    """An embedding or unembedding, merged: compared as matrices."""
    lora = adapter.modules[name]
    probe = _Probe.of(lora)
    unembeds = name.endswith("lm_head")
    W, W2 = ((m.unembed.W_U if unembeds else m.embed.W_E).detach().mT for m in (base, tuned))
    change = W2.float() - W.float()
    along = float(probe.u @ (change.double() @ probe.v))
    ratio = along / probe.size if probe.size else along
    norm = float(W.float().norm())
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


@torch.no_grad()
def _probe_kl(base: HookedTransformer, tuned: HookedTransformer) -> float:
    """Mean KL(base || tuned) over a fixed prompt, nats a token."""
    if base is tuned:
        return 0.0
    if base.tokenizer is not None:
        ids = torch.tensor([base.tokenizer(PROBE_TEXT).input_ids])
    else:
        ids = torch.arange(16)[None] * 7 % base.cfg.d_vocab
    ids = ids.to(base.W_E.device)
    mask = torch.ones_like(ids)
    log_p, log_q = (
        log_probabilities(m, m(ids, attention_mask=mask, stop_at_layer=m.cfg.n_layers)[0])
        for m in (base, tuned)
    )
    return float(kl_divergence(log_p, log_q).mean())
