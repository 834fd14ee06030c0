"""LoRA adapters merged into weights: a new model that owns only the matrices they touch.

Merging rounds to the model's dtype; where that loses the update, attach the adapter instead.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.adapter_files import fingerprint_modules
from emlens.models.attach import attached_adapter
from emlens.models.layout import from_matrix, iterate_parts, split_rows, to_matrix
from emlens.models.lora import (
    LoraAdapter,
    LoraModule,
    Target,
    embedding_modules,
    find_targets,
    read_parameter,
)
from emlens.models.views import origin_of, share_model


def merge_adapter(model: HookedTransformer, adapter: LoraAdapter) -> HookedTransformer:
    """Return a new model with W + scale * B A; it shares every tensor the adapter left alone.

    The sum is made in float32 and rounded once. The argument stays as it was, but hooks on it are
    not carried over: merging into a model with an attached adapter is refused.

    Raises:
        ValueError: an adapter that does not fit or adapts both ends of tied embeddings, or a model
            with an adapter attached.
    """
    if attached_adapter(model) is not None:
        raise ValueError(
            "model already has an adapter attached; merge both into the base one after the other"
        )
    replaced = dict(merged_parameters(model, find_targets(model, adapter)))
    replaced |= _merged_embeddings(model, adapter)
    return share_model(
        model,
        replaced,
        name=f"{origin_of(model).name} + {adapter.name}",
        # Of the factors as they act: the same on every device, and another at another scale.
        edit=f"adapter {fingerprint_modules(adapter.modules)}",
    )


def merged_parameters(
    model: HookedTransformer, targets: tuple[Target, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (TransformerLens name, merged weight in Hugging Face's layout) for each part."""
    for target in targets:
        delta = make_update(target.lora, model.W_E.device)
        updates = split_rows(delta, target.place, model.cfg.d_head)
        for index, parameter, _, _ in iterate_parts(target.place):
            name = f"blocks.{target.layer}.{parameter}"
            matrix = to_matrix(read_parameter(model, name), target.place.kind)
            update = updates[index]
            wide = torch.promote_types(matrix.dtype, update.dtype)
            merged = (matrix.to(wide) + update).to(matrix.dtype)
            if target.place.conv1d:
                merged = merged.mT.contiguous().mT  # keep the checkpoint's own storage order
            yield name, from_matrix(merged, target.place.kind, model.cfg.d_head)


def make_update(lora: LoraModule, device: torch.device) -> Float[Tensor, "d_out d_in"]:
    """Return scale * B A, multiplied on a device: the factors travel, not their product."""
    return replace(lora, A=lora.A.to(device), B=lora.B.to(device)).delta()


def _merged_embeddings(model: HookedTransformer, adapter: LoraAdapter) -> dict[str, Tensor]:
    """Merge embedding targets; a tied unembedding follows the embedding."""
    merged: dict[str, Tensor] = {}
    names = embedding_modules(adapter)
    W_E, W_U = model.embed.W_E.detach(), model.unembed.W_U.detach()
    tied = W_E.data_ptr() == W_U.data_ptr()
    if tied and len(names) > 1:
        raise ValueError(
            f"{adapter.name} adapts {' and '.join(names)}, which are one matrix in this base: "
            "peft's forward gives each its own update, peft's merge gives both the sum. Merge it "
            "with peft and load the merged checkpoint, if the sum is what you want"
        )
    for name in names:
        delta = make_update(adapter.modules[name], W_E.device)
        wide = torch.promote_types(W_E.dtype, delta.dtype)
        if name.endswith("lm_head") and not tied:
            merged["unembed.W_U"] = (W_U.mT.to(wide) + delta).to(W_U.dtype).mT
            continue
        # peft's factors of an embedding give [d_model d_vocab], those of an lm_head the transpose
        update = delta if name.endswith("lm_head") else delta.mT
        merged["embed.W_E"] = (W_E.to(wide) + update).to(W_E.dtype)
        if tied:
            merged["unembed.W_U"] = merged["embed.W_E"].mT
    return merged
