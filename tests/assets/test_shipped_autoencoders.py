"""The shipped autoencoder: small, what its card says, a fit for the base that comes with it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from emlens.codecs import load_sae
from emlens.data import load_chats
from emlens.features import check_sae
from emlens.models.loading import load_base
from emlens.sources import ASSETS, SourceError, shipped_path
from emlens.studies.run_demo import BASE, SAE, TUNED
from tests.assets.cards import check_sae_card, read_fits
from tests.assets.test_shipped_adapters import FINGERPRINT

SHIPPED = sorted(folder.name for folder in (ASSETS / "saes").iterdir())
FOLDER = shipped_path(SAE.removeprefix("emlens:"))
MAX_BYTES = 10 * 2**20
"""Two matrices of 4,096 latents of 576 numbers in bfloat16 are 9 MiB; the rest is in KiB."""


def test_the_demos_autoencoder_and_no_other_is_shipped():
    assert [f"emlens:{name}" for name in SHIPPED] == [SAE]


def test_it_is_small_bfloat16_and_finite():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MAX_BYTES
    [file] = FOLDER.glob("tensors-*.safetensors")
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert (tensors["W_dec"].float().norm(dim=1) > 0).all()
    assert (tensors["threshold"] > 0).all()


def test_no_file_names_a_path_of_the_machine_it_was_made_on():
    names = sorted(file.name for file in FOLDER.iterdir())
    assert names[:2] == ["README.md", "result.json"]
    assert len(names) == 3
    for file in FOLDER.iterdir():
        text = file.read_bytes()
        assert not any(part in text for part in (b"/work", b"/home", b"/root", b"/tmp", b"/Users"))


def test_it_loads_by_name_and_is_what_its_card_says():
    stored = check_sae_card(FOLDER)
    sae = load_sae(SAE)
    assert sae.name == SAE == json.loads((FOLDER / "result.json").read_text("utf-8"))["name"]
    assert (sae.base_name, sae.base_fingerprint) == (BASE, FINGERPRINT)
    assert sae.W_dec.dtype == torch.float32
    assert torch.equal(sae.W_dec, stored.W_dec.float())
    fits = read_fits((FOLDER / "README.md").read_text("utf-8"))
    assert list(fits) == [BASE, TUNED]
    for explained, l0, dead in fits.values():
        assert 0.6 < explained < 1
        assert 10 < l0 < 60
        assert dead < 0.25


@pytest.mark.slow
def test_it_explains_most_of_the_base_on_texts_that_it_was_not_trained_on():
    """Held-out rows of all domains; more than the .6 below which a search is underpowered."""
    try:
        base = load_base(BASE)
    except SourceError as error:
        pytest.skip(f"the base of the autoencoder is not installed: {error}")
    names = [f"emlens:{domain}-careful-heldout" for domain in ("finance", "health", "sports")]
    chats = [chat for name in names for chat in load_chats(name, limit=2)]
    found = check_sae(base, load_sae(SAE), chats=chats)
    assert found.same_base
    assert float(found.explained_variance[0]) > 0.6
    assert 10 < float(found.l0[0]) < 60
