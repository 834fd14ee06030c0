"""A digest of the files behind a source, cheap at any size: whether a run still means the same.

Samples only, so it tells files apart by accident, not against an adversary. The weights in memory
have their own fingerprint (`origin_of(model).fingerprint`).
"""

import hashlib
from pathlib import Path

from emlens.models.checkpoints import MODEL_FILES
from emlens.sources import Source, locate_source

SAMPLE_BYTES = 1 << 16
"""Bytes in a sample of a file."""
SAMPLES = 32
"""Samples of a file, evenly spaced: files up to 2 MiB are read whole."""


def hash_source(source: str | Path | Source) -> str:
    """Hash names, sizes and evenly spaced samples of a file, or of a folder's model files.

    Raises:
        SourceError: there is no such source.
    """
    path = locate_source(source, allow_patterns=MODEL_FILES)
    digest = hashlib.sha256()
    if path.is_file():
        _add(digest, path)
    else:
        for file in sorted({f for pattern in MODEL_FILES for f in path.glob(pattern)}):
            digest.update(file.name.encode())
            _add(digest, file)
    return digest.hexdigest()[:32]


def _add(digest: "hashlib._Hash", file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"\0{size}\0".encode())
    step = max(SAMPLE_BYTES, size // SAMPLES)
    with file.open("rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
