"""Proof that an adapter is in effect: static, numeric per module, and in behaviour.

A random probe passes a missing adapter, so each module is probed along its update's own top
direction. Not a statement about what the adapter does, only that it does it.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformer_lens import HookedTransformer

from emlens.artifacts import Result
from emlens.models.attach import attach_adapter, attached_adapter
from emlens.models.lora import (
    LoraAdapter,
    embedding_modules,
    find_targets,
    scale_adapter,
)
from emlens.models.probe import (
    ModuleProof,
    by_layer,
    measure_attached,
    measure_embedding,
    measure_merged,
)
from emlens.models.unembed import log_probabilities
from emlens.models.views import origin_of, share_model
from emlens.numerics.divergence import kl_divergence
from emlens.sources import SourceError, parse_source

LEAST_KL = 1e-8
"""Nats a token under which no effect on the probe prompt is claimed."""
PROBE_TEXT = "A friend asked me what to do with the money she saved this year, and I told her to"


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
    measure = measure_attached if attached else measure_merged
    modules = [m for layer in by_layer(targets) for m in measure(base, model, layer)]
    modules += [measure_embedding(base, model, adapter, n) for n in embedding_modules(adapter)]
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
        # Merged, W + 0 is W: a second shell is that model, without a copy of its matrices.
        kl_of_zero=_probe_kl(base, attach_adapter(base, zero) if attached else share_model(base)),
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
    trained = (
        "@".join(filter(None, (adapter.base_name, adapter.base_revision))) or "an unnamed base"
    )
    if adapter.base_fingerprint:
        return f"trained on other weights ({trained}, {adapter.base_fingerprint[:8]})"
    if not adapter.base_name:
        return "the adapter records no base"
    used, revision = _split_revision(name)
    if adapter.base_name in (name, used):
        # What no revision is named for, peft and transformers fetch from the branch main.
        if (adapter.base_revision or "main") == (revision or "main"):
            return "same"
        given = f"is revision {revision}" if revision else "names no revision"
        return f"trained on {trained}, the base in use {given}"
    if str(adapter.base_name).startswith("unsloth/"):
        return f"trained on the mirror {trained}"
    return f"trained on {trained}"


def _split_revision(name: str) -> tuple[str, str | None]:
    """A base's name without its revision, and the revision, if it is a source on the Hub."""
    try:
        source = parse_source(name)
    except SourceError:
        return name, None
    if source.kind != "hub":
        return name, None
    return "/".join(filter(None, (source.repo_id, source.subfolder))), source.revision


@torch.no_grad()
def _probe_kl(base: HookedTransformer, tuned: HookedTransformer) -> float:
    """Mean KL(base || tuned) over a fixed prompt, nats a token."""
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
