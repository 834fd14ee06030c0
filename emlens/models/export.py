"""A HookedTransformer written back as a Hugging Face folder that transformers and emlens load.

Attached adapters are merged first. Only unprocessed models that emlens loaded can be written.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM

from emlens.models.attach import attached_adapter
from emlens.models.changes import name_changes
from emlens.models.config import Architecture
from emlens.models.layout import Place, join_parts, to_matrix
from emlens.models.lora import architecture_of, read_parameter
from emlens.models.merge import merge_adapter
from emlens.models.tokenizer_needs import strip_filled_tokens
from emlens.models.views import origin_of, share_model


def save_checkpoint(model: HookedTransformer, folder: str | Path) -> Path:
    """Write a model, its tokenizer, chat template and generation config as a Hugging Face folder.

    The folder appears whole or not at all. ``tie_word_embeddings`` is false where W_U is no longer
    W_E transposed.

    Args:
        model: a model loaded by emlens, with or without an adapter.
        folder: where to; must not hold anything yet.

    Raises:
        ValueError: a folder in use, or a file; interventions or other hooks that act on the model,
            which no folder holds; or a bias that the Hugging Face class cannot hold.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file; name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: {folder} is not empty; name a new one")
    if changes := name_changes(model):
        raise ValueError(
            f"model: {changes}. The folder would hold the weights without them; "
            "fold_into_weights(model, interventions) makes interventions part of the weights"
        )
    adapter = attached_adapter(model)
    if adapter is not None:
        model = merge_adapter(share_model(model), adapter)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        _to_hugging_face(model).save_pretrained(draft)
        if model.tokenizer is not None:
            strip_filled_tokens(model.tokenizer).save_pretrained(draft)
        draft.chmod(0o755)  # a temporary folder is made for its owner alone
        if folder.exists():
            folder.rmdir()
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _to_hugging_face(model: HookedTransformer) -> Any:
    """Build the Hugging Face model over a HookedTransformer's weights."""
    architecture, origin = architecture_of(model), origin_of(model)
    config = type(origin.config)(**origin.config.to_dict())
    config.tie_word_embeddings = _is_tied(model)
    config.dtype = model.cfg.dtype
    config._name_or_path = ""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=model.cfg.dtype)
    tensors = hugging_face_tensors(model, architecture)
    expected = dict(hf.named_parameters())
    for name in sorted(set(tensors) - set(expected)):
        if config.tie_word_embeddings and name == f"{architecture.unembed}.weight":
            continue
        if bool(tensors[name].any()):
            raise ValueError(
                f"{name} is not zero, and {architecture.name} cannot hold it: what was folded adds "
                "something to every token (an addition, or an ablation toward a mean). Keep that "
                "as hooks (intervene), ablate without toward=, or export a model whose class has "
                "such biases, as GPT-2 and GPT-NeoX"
            )
    hf.load_state_dict({n: tensors[n].contiguous() for n in expected}, strict=False, assign=True)
    hf.tie_weights()
    if origin.generation_config is not None:
        hf.generation_config = origin.generation_config
    return hf


def _is_tied(model: HookedTransformer) -> bool:
    W_E, W_U = model.embed.W_E, model.unembed.W_U
    return W_E.data_ptr() == W_U.data_ptr() or torch.equal(W_E, W_U.mT)


def hugging_face_tensors(model: HookedTransformer, architecture: Architecture) -> dict[str, Tensor]:
    """Map a HookedTransformer's weights back to Hugging Face names and shapes."""
    trunk = architecture.trunk
    tensors = {
        f"{trunk}.{architecture.embed}.weight": read_parameter(model, "embed.W_E"),
        f"{architecture.unembed}.weight": read_parameter(model, "unembed.W_U").mT,
        f"{architecture.unembed}.bias": read_parameter(model, "unembed.b_U"),
    }
    if architecture.pos_embed:
        weight = read_parameter(model, "pos_embed.W_pos")
        tensors[f"{trunk}.{architecture.pos_embed}.weight"] = weight
    tensors |= _norm(model, architecture, "ln_final", f"{trunk}.{architecture.final_norm}")
    for layer in range(model.cfg.n_layers):
        ours, theirs = f"blocks.{layer}.", f"{trunk}.{architecture.blocks}.{layer}."
        for norm, name in architecture.norms.items():
            tensors |= _norm(model, architecture, ours + norm, theirs + name)
        for place in architecture.places:
            weight, bias = _linear(model, ours, place)
            tensors[f"{theirs}{place.module}.weight"] = weight
            if bias is not None:
                tensors[f"{theirs}{place.module}.bias"] = bias
    return tensors


def _norm(
    model: HookedTransformer, architecture: Architecture, ours: str, theirs: str
) -> dict[str, Tensor]:
    weight = read_parameter(model, f"{ours}.w")
    if architecture.norm_offset:
        weight = (weight - architecture.norm_offset).to(model.cfg.dtype)
    bias = dict(model.get_submodule(ours).named_parameters()).get("b")
    return {f"{theirs}.weight": weight} | (
        {} if bias is None else {f"{theirs}.bias": bias.detach()}
    )


def _linear(model: HookedTransformer, prefix: str, place: Place) -> tuple[Tensor, Tensor | None]:
    matrices = [to_matrix(read_parameter(model, prefix + n), place.kind) for n in place.parameters]
    d_head = model.cfg.d_head
    weight = join_parts(matrices, place, d_head)
    known = dict(model.named_parameters())
    biases = [known[prefix + n].detach().flatten() for n in place.biases if prefix + n in known]
    bias = join_parts(biases, place, d_head) if biases else None
    return (weight.mT if place.conv1d else weight), bias
