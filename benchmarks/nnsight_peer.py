"""A pass, and the interventions of `decode_intervened`, through nnsight on Hugging Face's modules.

nnsight itself is imported while such a row runs: doing so gives every object a ``save``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import generate_hugging_face
from benchmarks.timing import PeerLeftOutError
from emlens.models.lora import LoraAdapter

MISSING = "nnsight is left out: it is not installed (pip install 'emlens-interp[bench]')"


def find_nnsight() -> str | None:
    """Its version, or None where it is not installed."""
    if find_spec("nnsight") is None:
        return None
    try:
        return version("nnsight")
    except PackageNotFoundError:
        return "of unknown version"


def trace_model(hf: Any, tokenizer: Any) -> Any:
    """A Hugging Face model in memory, wrapped.

    Raises:
        PeerLeftOutError: nnsight is not installed.
    """
    if find_nnsight() is None:
        raise PeerLeftOutError(MISSING)
    # Its classes refuse an attribute that every object has: `api_judging` needs them in the end.
    if find_spec("anyio") is not None:
        import_module("anyio._backends._asyncio")
    from nnsight import TransformersModel

    return TransformersModel(hf, tokenizer=tokenizer)


@contextmanager
def own_failures() -> Iterator[None]:
    """Leave nnsight out where nnsight itself fails; any other error stays one.

    Raises:
        PeerLeftOutError: with what it said. 0.8 loses its place in some loops, at any call.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("nnsight"):
            raise
        said = str(error).strip().splitlines()[-1]
        raise PeerLeftOutError(f"nnsight is left out: {type(error).__name__}: {said}") from error


def pass_once(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """One forward pass: logits [batch pos d_vocab]."""

    @torch.inference_mode()
    def run() -> Tensor:
        with model.trace(ids, use_cache=False):
            logits = model.lm_head.output.save()
        return logits

    return run


def decode_ablated(
    model: Any, hf: Any, ids: Tensor, n: int, direction: Tensor
) -> Callable[[], Tensor]:
    """Greedy decoding of ``n`` tokens [batch n], a direction taken out of every write."""
    generate_hugging_face(hf, ids, n)  # sets what is generated
    d, mask = direction.to(hf.device, hf.dtype), torch.ones_like(ids)

    @own_failures()
    def decode() -> Tensor:
        with model.generate(ids, attention_mask=mask) as tracer:
            for _ in tracer.iter[:n]:
                x = model.model.embed_tokens.output
                model.model.embed_tokens.output = x - (x @ d)[..., None] * d
                for layer in model.model.layers:
                    y = layer.self_attn.output
                    layer.self_attn.output = (y[0] - (y[0] @ d)[..., None] * d, *y[1:])
                    z = layer.mlp.output
                    layer.mlp.output = z - (z @ d)[..., None] * d
            said = tracer.result.save()
        return said[:, ids.shape[1] :]

    return decode


def decode_adapted(
    model: Any, hf: Any, ids: Tensor, n: int, adapter: LoraAdapter
) -> Callable[[], Tensor]:
    """The same with scale * B A x added to the output of each adapted ``down_proj``."""
    generate_hugging_face(hf, ids, n)
    mask = torch.ones_like(ids)
    factors = [
        (int(name.split(".")[2]), lora.scale, lora.A.to(hf.dtype), lora.B.to(hf.dtype))
        for name, lora in adapter.modules.items()
    ]

    @own_failures()
    def decode() -> Tensor:
        with model.generate(ids, attention_mask=mask) as tracer:
            for _ in tracer.iter[:n]:
                for layer, scale, A, B in factors:
                    place = model.model.layers[layer].mlp.down_proj
                    update = scale * (place.input @ A.mT @ B.mT)
                    place.output = place.output + update
            said = tracer.result.save()
        return said[:, ids.shape[1] :]

    return decode
