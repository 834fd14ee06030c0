"""Sparse codecs from where they are: shipped, a folder, the Hub, a release that sae_lens knows.

`load_sae` only finds and reads; whether a codec fits a model is `check_fits`.
"""

import dataclasses
from pathlib import Path

import torch

from emlens.codecs.codec import CodecError
from emlens.codecs.crosscoder import Crosscoder
from emlens.codecs.files import (
    CODEC_FILES,
    CONFIG,
    WEIGHTS,
    is_own,
    is_sae_lens,
    naming,
    read_own,
    read_sae_lens,
)
from emlens.codecs.frozen import DTYPES
from emlens.codecs.published import (
    DICTIONARY_CONFIG,
    DICTIONARY_LEARNING,
    QWEN_SCOPE,
    default_positions,
    is_dictionary,
    read_dictionary,
    read_qwen_scope,
)
from emlens.codecs.releases import find_release, load_with_sae_lens
from emlens.codecs.runtime import Sae
from emlens.sources import SHIPPED_PREFIX, Source, locate_source, offline_hint, parse_source

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_READ_HERE = ("dictionary_learning_1", "qwen_scope")
"""Layouts, by sae_lens's names, that are pickled and that we read ourselves."""
_OF_A_RUN = "results/codec"
"""Where training leaves a codec in its run folder."""
_OF_RUNS = tuple(f"{_OF_A_RUN}/{name}" for name in CODEC_FILES)
_FILES = (*CODEC_FILES, *_OF_RUNS, DICTIONARY_LEARNING, DICTIONARY_CONFIG)


def load_sae(
    source: str | Path | Source,
    *,
    sae_id: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    allow_other_model: bool = False,
) -> Sae:
    """Load a sparse autoencoder.

    Args:
        source: a folder, ``emlens:NAME`` or a Hub folder that holds what `save_sae`, `train_sae`,
            sae_lens or dictionary_learning write; or a release in sae_lens's registry.
        sae_id: which of a release; of a folder or a Hub repository, the subfolder.
        dtype: what it computes in; ``auto`` is how it is stored.
        device: where it goes; ``auto`` is the first GPU, else the CPU.
        allow_other_model: use it also on weights that it was not trained on, if they have its
            sizes; see `emlens.codecs.allow_other_model`.

    Raises:
        CodecError: a codec that is unknown (the nearest three are listed), damaged, or of a kind
            that is not supported, named; or a release, without sae_lens.
        SourceError: a source that cannot be had.
    """
    wanted, place = _read_dtype(dtype), _read_device(device)
    name = str(source) if sae_id is None else f"{source}#{sae_id}"
    if isinstance(source, str) and _names_release(source):
        codec = _load_release(source, sae_id, name=name, dtype=wanted)
    else:
        codec = _load_files(_inside(source, sae_id), name=name, dtype=wanted)
    if not isinstance(codec, Sae):
        raise CodecError(f"{source} holds a crosscoder: load it with load_crosscoder")
    known = None if allow_other_model else codec.base_fingerprint
    return dataclasses.replace(codec, name=name, base_fingerprint=known).to(place, wanted)


def load_crosscoder(
    source: str | Path | Source,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
) -> Crosscoder:
    """Load a crosscoder.

    Args:
        source: a folder, ``emlens:NAME`` or a Hub folder that holds what `save_sae` or
            `train_crosscoder` write.
        dtype: what it computes in; ``auto`` is how it is stored.
        device: where it goes; ``auto`` is the first GPU, else the CPU.

    Raises:
        CodecError: no crosscoder, or a damaged one.
        SourceError: a source that cannot be had.
    """
    wanted, place = _read_dtype(dtype), _read_device(device)
    codec = _load_files(parse_source(source), name=str(source), dtype=wanted)
    if not isinstance(codec, Crosscoder):
        raise CodecError(f"{source} holds an autoencoder: load it with load_sae")
    return dataclasses.replace(codec, name=str(source)).to(device=place, dtype=wanted)


def _read_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto" and dtype not in _DTYPES:
        raise CodecError(f"dtype: got {dtype!r}, expected auto, {', '.join(_DTYPES)}")
    return _DTYPES.get(dtype)


def _read_device(device: str | torch.device) -> str | torch.device:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _names_release(source: str) -> bool:
    """Whether a text can be a release: no path, nothing shipped, and without the Hub's slash."""
    if not source.strip() or source.startswith(SHIPPED_PREFIX) or "/" in source:
        return False
    try:
        return not Path(source).expanduser().exists()
    except OSError:  # longer than the file system allows
        return True


def _inside(source: str | Path | Source, sae_id: str | None) -> Source:
    parsed = parse_source(source)
    if sae_id is None:
        return parsed
    if parsed.kind == "shipped" or ".." in Path(sae_id).parts or Path(sae_id).is_absolute():
        raise CodecError(f"sae_id: {sae_id!r} is no folder inside {source}")
    return parse_source(Path(parsed.path, sae_id) if parsed.path else f"{parsed.text}/{sae_id}")


def _load_files(source: Source, *, name: str, dtype: torch.dtype | None) -> Sae | Crosscoder:
    place = locate_source(source, allow_patterns=_FILES)
    if place.is_file():
        if not QWEN_SCOPE.fullmatch(place.name):
            raise CodecError(f"{source}: expected a folder, or layerN.sae.pt of Qwen Scope")
        return read_qwen_scope(place.parent, place.name, name=name, collection=source.text)
    for folder in (place, place / _OF_A_RUN):
        if is_own(folder):
            return read_own(folder)
    _check_whole(source, place)
    if is_sae_lens(place):
        return read_sae_lens(place, name=name, dtype=dtype)
    if is_dictionary(place):
        codec = read_dictionary(place, name=name)
        positions = default_positions(source, base_name=codec.base_name)
        return dataclasses.replace(codec, positions=positions)
    raise CodecError(
        f"{source}: holds no codec: expected result.json (emlens), cfg.json (sae_lens) or ae.pt "
        f"(dictionary_learning); {_say_where_else(source, place)}"
    )


def _check_whole(source: Source, place: Path) -> None:
    """Refuse a Hub folder whose weights are not here: offline, what is cached may be a part of it.

    Raises:
        CodecError: they are not.
    """
    hint = offline_hint() if source.kind == "hub" else ""
    if hint and is_sae_lens(place) and not (place / WEIGHTS).exists():
        raise CodecError(f"{source}: {CONFIG} is in the local cache, and {WEIGHTS} is not{hint}")


def _say_where_else(source: Source, place: Path) -> str:
    if source.kind == "hub":  # what lies in folders inside it was not fetched
        return f"is it in a folder inside? Name it: {source}/FOLDER, or sae_id{offline_hint()}"
    return f"is it a subfolder? There are {_list_folders(place)}"


def _list_folders(place: Path) -> str:
    names = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "") if names else "none"


def _load_release(release: str, sae_id: str | None, *, name: str, dtype: torch.dtype | None) -> Sae:
    found = find_release(release, sae_id)
    with naming(name):
        if found.loader in _READ_HERE:
            codec = _load_files(parse_source(found.source), name=name, dtype=dtype)
            assert isinstance(codec, Sae)
        else:
            codec = load_with_sae_lens(found, name=name, dtype=dtype)
        return dataclasses.replace(
            codec,
            neuronpedia_id=found.neuronpedia_id or codec.neuronpedia_id,
            base_name=codec.base_name or found.base_name,
        )
