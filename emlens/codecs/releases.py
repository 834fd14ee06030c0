"""The releases that sae_lens knows: which there are, and those that it reads itself."""

import difflib
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch

from emlens.codecs.codec import CodecError
from emlens.codecs.convert import convert_sae
from emlens.codecs.pickles import read_pickled_tensors
from emlens.codecs.runtime import Sae
from emlens.codecs.sae_lens_config import read_sae_lens_config
from emlens.codecs.sae_lens_package import import_sae_lens
from emlens.sources import locate_source

_PICKLED = (".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True)
class Release:
    """One codec of a release."""

    release: str
    """Name of the release."""
    sae_id: str
    """Which codec of it."""
    source: str
    """Where it lies on the Hub."""
    loader: str | None
    """What sae_lens calls the layout of its files; None for its own."""
    base_name: str
    """Model it was trained on."""
    neuronpedia_id: str | None
    """Where its latents are described."""


def find_release(release: str, sae_id: str | None) -> Release:
    """Look a codec up in sae_lens's registry; nothing is downloaded.

    Raises:
        CodecError: the release or the id is unknown (the nearest three are listed) or the id is not
            given; or sae_lens is not installed.
    """
    import_sae_lens()
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise CodecError(
            f"source: {release!r} is no path and no release that sae_lens knows; nearest: "
            f"{_nearest(release, directory)}"
        )
    entry = directory[release]
    if sae_id is None:
        raise CodecError(
            f"sae_id: {release} has {len(entry.saes_map)} codecs; name one, such as "
            f"{', '.join(list(entry.saes_map)[:3])}"
        )
    if sae_id not in entry.saes_map:
        raise CodecError(
            f"sae_id: {release} has no {sae_id!r}; nearest: {_nearest(sae_id, entry.saes_map)}"
        )
    return Release(
        release=release,
        sae_id=sae_id,
        source=f"{entry.repo_id}/{entry.saes_map[sae_id]}",
        loader=entry.conversion_func,
        base_name=entry.model,
        neuronpedia_id=entry.neuronpedia_id.get(sae_id),
    )


def load_with_sae_lens(found: Release, *, name: str, dtype: torch.dtype | None) -> Sae:
    """Have sae_lens read a codec of a release, and convert it.

    Its configuration is judged before its weights are fetched. Weights that are pickled are opened
    here first, restricted to tensors and to a size.

    Raises:
        CodecError: it is not supported, named, or sae_lens cannot read it.
    """
    sae_lens = import_sae_lens()
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    try:
        with warnings.catch_warnings():
            # What they say is decided by `read_sae_lens_config`, or an error.
            warnings.simplefilter("ignore", UserWarning)
            read_sae_lens_config(load_sae_config_from_huggingface(found.release, found.sae_id))
            if found.source.endswith(_PICKLED):
                file = locate_source(found.source)
                read_pickled_tensors(file.parent, file.name)
            sae = sae_lens.SAE.from_pretrained(
                found.release,
                found.sae_id,
                device="cpu",
                dtype=str(dtype or torch.float32).removeprefix("torch."),
            )
    except CodecError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CodecError(f"sae_lens could not load it: {type(error).__name__}: {error}") from error
    return convert_sae(sae, name=name)


def _nearest(name: str, known: Collection[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
