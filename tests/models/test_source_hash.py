"""The digest of a source follows its files, not its name."""

import shutil
from pathlib import Path

import pytest

from emlens.models.source_hash import SAMPLE_BYTES, SAMPLES, hash_source
from emlens.sources import SourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    return source


def test_a_copy_has_the_same_digest(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "copy")
    assert hash_source(tmp_path / "copy") == hash_source(folder)


def test_what_is_no_model_file_does_not_count(folder: Path):
    before = hash_source(folder)
    (folder / "README.md").write_text("hello")
    assert hash_source(folder) == before


@pytest.mark.parametrize("place", [0, 5000, 256 * 64 - 1])
def test_one_changed_byte_of_a_small_file_is_seen(folder: Path, place: int):
    before = hash_source(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[place] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    assert hash_source(folder) != before


def test_names_and_sizes_count(folder: Path):
    seen = {hash_source(folder)}
    (folder / "config.json").rename(folder / "other.json")
    seen.add(hash_source(folder))
    (folder / "extra.json").write_text("")
    seen.add(hash_source(folder))
    assert len(seen) == 3


def test_large_files_are_sampled_to_the_end(tmp_path: Path):
    file = tmp_path / "model.gguf"
    size = 4 * SAMPLES * SAMPLE_BYTES
    file.write_bytes(b"\0" * size)
    before = hash_source(file)
    with file.open("r+b") as stream:
        stream.seek(size * 31 // 32)  # the last sample
        stream.write(b"x")
    assert hash_source(file) != before


def test_a_missing_source_is_named(tmp_path: Path):
    with pytest.raises(SourceError, match="nowhere"):
        hash_source(tmp_path / "nowhere")
