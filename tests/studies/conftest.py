"""Tiny models on disk for studies."""

from pathlib import Path

import pytest

from emlens.codecs import save_sae
from tests.features.planted import make_codec
from tests.tiny_files import save_tiny_adapter, save_tiny_base


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, its adapters `tuned` and `twin`, and a codec of it, `sae`."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_base(folder / "base")
    save_tiny_adapter(folder / "tuned")
    save_tiny_adapter(folder / "twin", seed=2)
    save_sae(make_codec(), folder / "sae")
    return folder
