"""Weights of a codec: checked once, detached, and hashed; not for weights that still train."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from emlens.codecs.codec import CodecError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""In which codecs compute."""
HALF = (torch.bfloat16, torch.float16)
"""Those in which products are rounded to few digits, and in float16 end at 65,504: rows are
prepared in float32, and what is made of them is checked."""
# What a codec is called, and where its latents are described, changes none of its codes.
_NAMES = ("name", "neuronpedia_id", "base_name", "base_fingerprint")


Codec = TypeVar("Codec")


def freeze_weights(codec: Any, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Check a codec's weights, and put them in its fields without their gradients.

    Args:
        codec: a frozen dataclass, from its `__post_init__`.
        shapes: field -> shape; None where the architecture has no such weight.

    Raises:
        CodecError: a weight is missing, superfluous, not finite, or of another shape, dtype or
            device than it must be.
    """
    first: Tensor = getattr(codec, next(iter(shapes)))
    for name, shape in shapes.items():
        weight: Tensor | None = getattr(codec, name)
        if (weight is None) != (shape is None):
            said = "is missing" if weight is None else "has no place"
            raise CodecError(f"{name} {said} in the architecture {codec.architecture!r}")
        if weight is None or shape is None:
            continue
        if tuple(weight.shape) != shape:
            raise CodecError(
                f"{name} has shape {tuple(weight.shape)}, expected {shape}: sizes are those of the "
                "encoder; is it transposed?"
            )
        check_dtype(name, weight.dtype)
        if weight.dtype != first.dtype:
            raise CodecError(f"{name} is {weight.dtype}, expected {first.dtype} as the others are")
        if weight.device != first.device:
            raise CodecError(f"{name} is on {weight.device}, expected {first.device}")
        if not is_finite(weight):
            beyond = "it has values beyond float16 (load it in bfloat16 or float32), "
            raise CodecError(
                f"{name} holds NaN or infinity: {beyond if weight.dtype == torch.float16 else ''}"
                "the file is damaged, or training failed"
            )
        object.__setattr__(codec, name, weight.detach())


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise unless weights of a dtype can be computed with.

    Raises:
        CodecError: they cannot.
    """
    if dtype not in DTYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise CodecError(f"{name} is {dtype}, expected one of {known}")


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; in one pass and without a copy."""
    if x.is_meta or not x.numel():
        return True
    lowest, highest = x.detach().aminmax()
    return bool(lowest.isfinite() & highest.isfinite())


def fingerprint_codec(codec: Any) -> str:
    """Hash every weight of a codec and every field that shapes its codes."""
    digest = hashlib.sha256()
    fields = {field.name: getattr(codec, field.name) for field in dataclasses.fields(codec)}
    plain = {
        name: str(value)
        for name, value in fields.items()
        if not isinstance(value, Tensor) and name not in _NAMES
    }
    digest.update(json.dumps({"kind": codec.kind, **plain}, sort_keys=True).encode())
    for name, value in fields.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def move_codec(codec: Codec, device: torch.device | str | None, dtype: torch.dtype | None) -> Codec:
    """The same codec on another device or in another precision."""
    moved = {
        field.name: value.to(device=device, dtype=dtype)
        for field in dataclasses.fields(codec)  # pyright: ignore[reportArgumentType]
        if isinstance(value := getattr(codec, field.name), Tensor)
    }
    return dataclasses.replace(codec, **moved)  # pyright: ignore[reportArgumentType, reportReturnType]


def check_k(architecture: str, k: int | None, d_sae: int) -> None:
    """Raise unless a codec has a k where its architecture wants one, of at most its latents.

    Raises:
        CodecError: it has not.
    """
    if (architecture == "topk") != (k is not None):
        raise CodecError(
            f"k: got {k} for the architecture {architecture!r}; topk, and it alone, has a k"
        )
    if k is not None and not 0 < k <= d_sae:
        raise CodecError(f"k: got {k}, expected 1 to {d_sae}, the number of latents")
