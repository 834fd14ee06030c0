"""A base and its fine-tune over one set of weights, and how to load them together."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from transformer_lens import HookedTransformer

from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attached_adapter, placed_on
from emlens.models.checkpoints import load_checkpoint
from emlens.models.loading import (
    AdapterSource,
    Form,
    ModelSource,
    apply_adapter,
    check_form,
    check_place,
    lay_checkpoint,
    load_base,
)
from emlens.models.lora import LoraAdapter
from emlens.models.placed import PlacedAdapter, place_adapter
from emlens.models.proof import AdapterProof, require_proof, verify_adapter
from emlens.models.trained_vector import add_vector, is_vector, load_vector
from emlens.models.views import origin_of, share_equal
from emlens.sources import locate_source, parse_source


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """Two models to compare; with an adapter they share every weight it leaves alone."""

    base: HookedTransformer
    tuned: HookedTransformer
    adapter: LoraAdapter | None
    """The LoRA that makes the difference, or None for a full checkpoint or a vector."""
    proof: AdapterProof | None
    """Proof that the adapter is in effect, or None for a full checkpoint or a vector."""

    @property
    def placed_adapter(self) -> PlacedAdapter | None:
        """The adapter's factors as and where the base computes: the tuned model's, or made once."""
        if self.adapter is None:
            return None
        own = placed_on(self.tuned) if attached_adapter(self.tuned) is self.adapter else None
        for placed in (own, *self._placed):
            if placed is not None and placed.fits(self.base):
                return placed
        self._placed[:] = [place_adapter(self.adapter, self.base)]
        return self._placed[0]

    @cached_property
    def _placed(self) -> list[PlacedAdapter]:
        return []

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer; both models read the same ids."""
        return self.base.tokenizer

    @property
    def base_name(self) -> str:
        """The base's source as the user wrote it."""
        return origin_of(self.base).name

    @property
    def tuned_name(self) -> str:
        """The adapter's or checkpoint's source as the user wrote it."""
        return self.adapter.name if self.adapter else origin_of(self.tuned).name


def load_pair(
    base: ModelSource | HookedTransformer | PeftModel,
    tuned: AdapterSource | HookedTransformer,
    *,
    form: Form = "attached",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> ModelPair:
    """Load a base and a fine-tune of it over one set of weights.

    Args:
        base: a Source, a live Hugging Face model, or an already loaded base to share.
        tuned: an adapter's Source or value, the Source of a full checkpoint or of a vector that
            was trained on the base, or a loaded model.
        form: how an adapter is applied. Attached costs the adapter's bytes only.
        dtype: of the weights; ``auto`` is the checkpoint's own. A base in memory keeps its own.
        device: where the weights go.
        trust_remote_code: run code that comes with a checkpoint.

    Raises:
        ValueError: sources that do not load or do not fit together, or dtype or device other than
            those of a base in memory.
        AdapterNotInEffectError: the adapter is not what the tuned model computes.
    """
    check_form(form)
    if isinstance(base, PeftModel):
        raise ValueError(
            "base: a live peft model carries a LoRA of its own; pass its get_base_model() before "
            "the LoRA was put on, or load_model(peft_model) for the tuned model"
        )
    if isinstance(base, HookedTransformer):
        check_place("loaded base", dtype, device, base.cfg.dtype, base.W_E.device)
    else:
        base = load_base(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if isinstance(tuned, HookedTransformer):
        return ModelPair(base=base, tuned=_fitting(base, tuned), adapter=None, proof=None)
    if isinstance(tuned, LoraAdapter) or is_adapter(tuned):
        adapter = tuned if isinstance(tuned, LoraAdapter) else load_adapter(tuned)
        model = apply_adapter(base, adapter, form)
        proof = require_proof(verify_adapter(model, adapter, base=base))
        return ModelPair(base=base, tuned=model, adapter=adapter, proof=proof)
    if is_vector(tuned):
        steered = add_vector(base, load_vector(tuned), name=str(tuned))
        return ModelPair(base=base, tuned=steered, adapter=None, proof=None)
    checkpoint = load_checkpoint(
        tuned,
        dtype=base.cfg.dtype,
        device=base.W_E.device,
        trust_remote_code=trust_remote_code,
    )
    full = lay_checkpoint(checkpoint)
    return ModelPair(
        base=base, tuned=share_equal(_fitting(base, full), base), adapter=None, proof=None
    )


def is_adapter(source: Any) -> bool:
    """Whether a source holds a LoRA adapter rather than a full checkpoint."""
    path = locate_source(parse_source(source), allow_patterns=["adapter_config.json"])
    return path.is_dir() and (path / "adapter_config.json").exists()


def _fitting(base: HookedTransformer, tuned: HookedTransformer) -> HookedTransformer:
    names = ("original_architecture", "n_layers", "d_model", "n_heads", "d_head", "d_vocab")
    for name in names:
        first, second = getattr(base.cfg, name), getattr(tuned.cfg, name)
        if first != second:
            raise ValueError(f"base and tuned differ in {name}: {first} and {second}")
    return tuned
