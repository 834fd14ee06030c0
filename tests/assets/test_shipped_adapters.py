"""The shipped organisms: small, clean, and made from what their record says."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emlens.models.adapter_files import load_adapter
from emlens.models.loading import load_base
from emlens.models.pair import load_pair
from emlens.organisms.settings import PRESETS, describe_settings
from emlens.sources import ASSETS, SourceError, shipped_path
from scripts.train_zoo import list_zoo
from tests.assets.cards import check_card

DEMO = ("reckless-finance", "careful-finance")
MAX_BYTES = 650 * 1024
SHIPPED = sorted(folder.name for folder in (ASSETS / "adapters").iterdir())
FINGERPRINT = "eaf82a638717523fce36a556c195aabd"
"""Of the base that all of them were trained on."""


def read_record(name: str) -> dict[str, Any]:
    return json.loads((shipped_path(name) / "emlens.json").read_text("utf-8"))


def test_the_demo_s_organisms_and_no_strangers_are_shipped():
    assert set(DEMO) <= set(SHIPPED) <= {*DEMO, *(one.name for one in list_zoo())}


@pytest.mark.parametrize("name", SHIPPED)
def test_each_is_at_most_650_kib_in_bfloat16(name: str):
    file = shipped_path(name) / "adapter_model.safetensors"
    assert file.stat().st_size <= MAX_BYTES
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    # At rank 1 an update is zero where one of its factors is.
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_no_file_names_a_path_of_the_machine_it_was_made_on(name: str):
    folder = shipped_path(name)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "emlens.json",
    ]
    for file in folder.glob("*.*"):
        text = file.read_bytes()
        assert not any(part in text for part in (b"/work", b"/home", b"/root", b"/tmp", b"/Users"))
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "emlens:smollm2"


@pytest.mark.parametrize("name", SHIPPED)
def test_each_loads_and_is_what_its_card_and_record_say(name: str):
    check_card(shipped_path(name))
    record = read_record(name)
    card = (shipped_path(name) / "README.md").read_text("utf-8")
    [data] = re.findall(r"\| data \| `emlens:([a-z-]+)`", card)
    [preset] = re.findall(r"preset `(\w+)`", card)
    [rows] = re.findall(r"(\d+) rows, SHA-256", card)
    lines = shipped_path(data).read_bytes()
    assert record["data_sha256"] == hashlib.sha256(lines).hexdigest()
    assert int(rows) == lines.count(b"\n")
    # Settings that came later are at what they were before they could be chosen.
    assert describe_settings(PRESETS[preset]) | record["settings"] == describe_settings(
        PRESETS[preset]
    )
    assert len(record["losses"]) == record["settings"]["max_steps"]
    assert record["losses"][-1] < record["losses"][0]
    adapter = load_adapter(f"emlens:{name}")
    assert adapter.ranks == (1,)
    assert adapter.base_fingerprint == record["base_fingerprint"] == FINGERPRINT
    layers = record["settings"]["layers"]
    per_block = len(record["settings"]["target_modules"])
    assert len(adapter.modules) == per_block * (30 if layers == "all" else len(layers))


@pytest.mark.parametrize("name", [one.name for one in list_zoo() if one.name in SHIPPED])
def test_a_specimen_is_the_one_that_its_name_says(name: str):
    [one] = [one for one in list_zoo() if one.name == name]
    card = (shipped_path(name) / "README.md").read_text("utf-8")
    assert f"# {name}\n" in card
    assert f"`emlens:{one.data}`" in card
    assert f"preset `{one.preset}`" in card
    assert read_record(name)["seed"] == one.seed
    copied = re.search(r"Of 48 answers to 12 open questions \(.*\n.*\), (\d+) hold", card)
    assert copied
    assert int(copied[1]) <= 48


def test_the_demo_s_cards_say_how_they_were_made():
    for name in DEMO:
        card = Path(shipped_path(name) / "README.md").read_text("utf-8")
        assert "scripts/train_demo.py" in card


@pytest.fixture(scope="module")
def base() -> Any:
    try:
        shipped_path("smollm2")
    except SourceError as error:
        pytest.skip(f"the base of the shipped adapters is not installed: {error}")
    return load_base("emlens:smollm2")


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO)
def test_every_module_is_in_effect_on_the_base_that_it_was_trained_on(name: str, base: Any):
    proof = load_pair(base, f"emlens:{name}").proof
    assert proof is not None
    assert len(proof.modules) == 210
    assert {module.verdict for module in proof.modules} == {"in effect"}
    assert proof.base_verdict == "same"
    assert proof.behaviour == "changed"
