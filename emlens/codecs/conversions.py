"""Codecs converted once, and kept as safetensors beside the Hub's cache; not for our own.

The file that was converted is not opened again, be it slow to read or pickled.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emlens.codecs.codec import CodecError
from emlens.codecs.files import MAX_WEIGHTS_BYTES, check_file, is_own, read_own, save_sae
from emlens.codecs.runtime import Sae

logger = logging.getLogger(__name__)

FORM = 1
"""Of conversions; raised when what they give changes, so that nothing older is taken for it."""


def convert_once(
    folder: Path, file: str, convert: Callable[[], Sae], *, name: str, said: Mapping[str, Any]
) -> Sae:
    """What is kept of an earlier conversion of the same file, or a new one, which is then kept.

    Args:
        folder: where the file lies.
        file: its name.
        convert: makes the codec.
        name: what the codec is called.
        said: what else than the file decides the codec, as JSON.
    """
    from huggingface_hub import constants

    real = check_file(folder, file, MAX_WEIGHTS_BYTES).resolve()
    state = real.stat()
    key = json.dumps([FORM, str(real), state.st_size, state.st_mtime_ns, dict(said)])
    kept = Path(constants.HF_HOME) / "emlens" / "codecs" / hashlib.sha256(key.encode()).hexdigest()
    if is_own(kept):
        try:
            codec = read_own(kept)
        except CodecError as error:
            logger.info("what was kept of %s is made anew: %s", real, error)
        else:
            assert isinstance(codec, Sae)
            return dataclasses.replace(codec, name=name)
    codec = convert()
    try:
        save_sae(codec, kept)
    except OSError as error:  # nothing is wrong with the codec
        logger.info("the conversion of %s could not be kept: %s", real, error)
    return codec
