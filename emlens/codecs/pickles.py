"""Tensors in pickled files, which some published codecs are: read without running code.

The one place of emlens where such files are opened. torch's restricted unpickler builds tensors and
containers alone; before it is asked, the archive's sizes are compared with bounds, as a small file
may claim to unpack to a large one.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from emlens.codecs.codec import CodecError
from emlens.codecs.files import MAX_WEIGHTS_BYTES, check_file


def read_pickled_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read a `.pt` file that holds names and tensors.

    Raises:
        CodecError: anything else than that, or more than `MAX_WEIGHTS_BYTES`.
    """
    file = check_file(folder, name, MAX_WEIGHTS_BYTES)
    _check_archive(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own, and whatever a damaged archive leads to
        raise CodecError(
            f"{name} holds more than tensors, or is damaged, and was not read: {error}"
        ) from error
    if not isinstance(found, Mapping):
        raise CodecError(f"{name} holds a {type(found).__name__}, expected names and tensors")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CodecError(f"{name}: {key!r} is a {type(value).__name__}, expected a tensor")
        # A tensor's shape is its file's claim: strides of zero make any size of a few bytes.
        if value.is_sparse or value.nbytes > value.untyped_storage().nbytes():
            raise CodecError(f"{name}: {key} is larger than what is stored of it")
    return dict(found)


def _check_archive(file: Path) -> None:
    if not zipfile.is_zipfile(file):
        raise CodecError(f"{file.name} is no archive as torch.save writes them since 1.6")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CodecError(f"{file.name} is damaged: {error}") from error
    packed = [one.filename for one in members if one.compress_type != zipfile.ZIP_STORED]
    if packed or sum(one.file_size for one in members) > file.stat().st_size:
        raise CodecError(f"{file.name} unpacks to more than it is, which torch.save never writes")
