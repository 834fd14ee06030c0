"""What stands beside us: TransformerLens's own loading, its bridge, and Hugging Face generate."""

import contextlib
import copy
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from unittest import mock

import torch
import transformer_lens.loading_from_pretrained as loading
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.memory import free_memory
from benchmarks.timing import PeerLeftOutError
from emlens.models.lora import LoraAdapter
from emlens.models.views import lay_views

T = TypeVar("T")


def find_peers(makers: Mapping[str, Callable[[], T]], notes: list[str]) -> dict[str, T]:
    """Make, and check, each peer that can be run here.

    Args:
        makers: name -> what makes it; a wrong answer of a peer is an error like any other.
        notes: why a peer was left out is added to these.
    """
    found: dict[str, T] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except PeerLeftOutError as error:
            notes.append(str(error))
        except torch.OutOfMemoryError:
            notes.append(f"{name} is left out: it does not fit into the memory that is left")
        if name not in found:
            free_memory()  # only now has nobody the frames in which it failed
    return found


def load_own_way(hf: PreTrainedModel) -> HookedTransformer:
    """TransformerLens's own loading of a model in memory, without processing.

    ``from_pretrained_no_processing`` takes official names only and asks the Hub for their config,
    so the two functions that do this are replaced by the config of the very model given. All that
    follows is its own: conversion, construction, ``load_and_process_state_dict``.
    """
    cfg = copy.deepcopy(lay_views(hf, None, name="local").cfg)
    config: Any = hf.config
    cfg.rotary_base = config.rope_parameters["rope_theta"]

    def read_config(*_args: Any, **_kwargs: Any) -> Any:
        return copy.deepcopy(cfg)

    with (
        _quiet(),
        mock.patch.object(loading, "get_official_model_name", lambda name: name),
        mock.patch.object(loading, "get_pretrained_model_config", read_config),
    ):
        model = HookedTransformer.from_pretrained_no_processing(
            "local", hf_model=hf, dtype=hf.dtype
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def merge_plainly(hf: PreTrainedModel, adapter: LoraAdapter) -> PreTrainedModel:
    """A copy of a Hugging Face model with W + scale B A for every adapted module."""
    tuned = copy.deepcopy(hf)
    for name, lora in adapter.modules.items():
        weight = tuned.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + lora.scale * lora.B.float() @ lora.A.float())
    return tuned


def load_bridge(hf: PreTrainedModel, tokenizer: Any) -> Any:
    """A TransformerBridge around a model in memory, which it changes: give it one of its own."""
    with _quiet():
        return TransformerBridge.boot_transformers(
            "local", hf_model=hf, tokenizer=tokenizer, device=str(hf.device), dtype=hf.dtype
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep deprecation warnings and lines on standard output away from the table."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
    ):
        warnings.simplefilter("ignore")
        yield


def generate_hugging_face(hf: PreTrainedModel, ids: Tensor, n: int) -> Callable[[], Tensor]:
    """Greedy decoding of exactly ``n`` tokens, no end-of-text: [batch n].

    The model's own settings are replaced, since an end-of-text id in them could not be unset
    otherwise, and suppressing it (``min_new_tokens``) costs Hugging Face time and changes its ids.
    """
    hf.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=n, eos_token_id=None, pad_token_id=0
    )
    mask = torch.ones_like(ids)
    generate: Any = hf.generate
    return lambda: generate(ids, attention_mask=mask)[:, ids.shape[1] :]


def generate_own_way(model: HookedTransformer, ids: Tensor, n: int) -> Callable[[], Tensor]:
    """TransformerLens's own greedy decoding of exactly ``n`` tokens: [batch n]."""

    def generate() -> Tensor:
        done: Any = model.generate(
            ids,
            max_new_tokens=n,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=True,
            return_type="tokens",
            verbose=False,
        )
        return done[:, ids.shape[1] :]

    return generate
