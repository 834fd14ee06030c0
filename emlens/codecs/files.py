"""Codecs in folders: our own, and those of sae_lens, which is not needed; nothing is downloaded.

A folder may come from a stranger: configurations have at most 1 MB; weights are safetensors, whose
shapes are compared with the configuration before they are read; no link may leave the folder.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emlens.artifacts import JSON_NAME, read_json, read_kind, read_result
from emlens.codecs.codec import CodecError
from emlens.codecs.crosscoder import Crosscoder
from emlens.codecs.runtime import Sae
from emlens.codecs.sae_lens_config import SaeLensConfig, read_sae_lens_config
from emlens.codecs.sae_lens_weights import build_sae, check_shapes
from emlens.encoding import ArtifactError

MAX_CONFIG_BYTES = 1 << 20
"""Of a JSON file; sae_lens writes some 5 kB."""
MAX_WEIGHTS_BYTES = 1 << 36
"""64 GiB, twice the largest that is published (a million latents of a 4,608 wide model)."""
CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
CODEC_FILES = (JSON_NAME, "tensors-*.safetensors", CONFIG, WEIGHTS, SCALER)
"""What is read of a folder."""
_KINDS: dict[str, type[Sae | Crosscoder]] = {"sae": Sae, "crosscoder": Crosscoder}


def save_sae(codec: Sae | Crosscoder, folder: str | Path) -> Path:
    """Write a codec as `load_sae` reads it back, bit for bit.

    Returns:
        The folder: `result.json` and `tensors-DIGEST.safetensors`, whole or not at all.
    """
    return codec.save(folder)


def is_own(folder: Path) -> bool:
    """Whether a folder holds what `save_sae` writes."""
    return (folder / JSON_NAME).exists()


def is_sae_lens(folder: Path) -> bool:
    """Whether a folder holds what sae_lens writes."""
    return (folder / CONFIG).exists()


def read_own(folder: Path) -> Sae | Crosscoder:
    """Read what `save_sae` wrote.

    Raises:
        CodecError: it is damaged, not whole, or no codec.
    """
    check_file(folder, JSON_NAME, MAX_CONFIG_BYTES)
    for file in folder.glob("tensors*.safetensors"):
        check_file(folder, file.name, MAX_WEIGHTS_BYTES)
    try:
        kind = read_kind(folder)
        if kind not in _KINDS:
            raise CodecError(f"{folder} holds a {kind}, expected one of {', '.join(_KINDS)}")
        return read_result(folder, _KINDS[kind])
    except ArtifactError as error:
        raise CodecError(str(error)) from error


def read_sae_lens(folder: Path, *, name: str, dtype: torch.dtype | None) -> Sae:
    """Read a folder that sae_lens wrote: an inference model, or a checkpoint with its scale.

    Raises:
        CodecError: a file is missing, damaged or hostile, or says what is not supported, named.
    """
    with naming(folder):
        config = read_sae_lens_config(read_config(folder, CONFIG))
        file = check_file(folder, WEIGHTS, MAX_WEIGHTS_BYTES)
        scale = read_config(folder, SCALER).get("scaling_factor") if _has(folder, SCALER) else None
        if scale is not None and not (type(scale) in (int, float) and 0 < scale < math.inf):
            raise CodecError(f"{SCALER}: scaling_factor is {scale!r}, expected a positive number")
        tensors = _read_weights(file, config)
        factor = scale if config.scaled else None
        return build_sae(config, tensors, name=name, scaling_factor=factor, dtype=dtype)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a small file of a folder.

    Raises:
        CodecError: there is none, or it is too large.
    """
    try:
        return read_json(check_file(folder, name, MAX_CONFIG_BYTES))
    except ArtifactError as error:
        raise CodecError(str(error)) from error


def check_file(folder: Path, name: str, most_bytes: int) -> Path:
    """A file of a folder, once it is sure that it is plain, there, and not too large.

    Links are followed inside the folder, and to the files that the Hub's cache keeps beside it.

    Raises:
        CodecError: it is not.
    """
    path = folder / name
    real, home = path.resolve(), folder.resolve()
    blobs = [parent / "blobs" for parent in home.parents if (parent / "snapshots").is_dir()]
    if not any(real.is_relative_to(place) for place in (home, *blobs)):
        raise CodecError(f"{name} is a link that leaves {folder}: copy what it points to into it")
    if not real.is_file():
        raise CodecError(f"{name} is missing in {folder}, or no plain file")
    if (size := real.stat().st_size) > most_bytes:
        raise CodecError(f"{name} has {size} bytes, expected at most {most_bytes}")
    return path


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Errors inside begin with where what they are about came from."""
    try:
        yield
    except CodecError as error:
        raise CodecError(f"{source}: {error}") from error


def _has(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def _read_weights(file: Path, config: SaeLensConfig) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in names}
            # What older versions wrote beside the weights; of all ones it says nothing.
            scaled = shapes.pop("scaling_factor", None) is not None
            if scaled and not bool((stored.get_tensor("scaling_factor") == 1).all()):
                raise CodecError("weights: scaling_factor: scaled codes are not supported")
            # One threshold for all latents: that of a BatchTopK that still trains.
            single = shapes.pop("topk_threshold", None) == ()
            if single:
                shapes["threshold"] = (config.d_sae,)
            check_shapes(shapes, config)
            tensors = {name: stored.get_tensor(name) for name in names if name in shapes}
            if single:
                threshold = stored.get_tensor("topk_threshold").to(tensors["b_enc"].dtype)
                tensors["threshold"] = threshold.expand(config.d_sae).clone()
            return tensors
    except (SafetensorError, ValueError, OSError) as error:
        if isinstance(error, CodecError):
            raise
        raise CodecError(f"{file.name} is truncated or no safetensors file: {error}") from error
