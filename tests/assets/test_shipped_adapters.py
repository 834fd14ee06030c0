"""The shipped organisms: small, clean, and made from what their record says."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emlens.models.adapter_files import load_adapter
from emlens.models.loading import load_base
from emlens.models.pair import load_pair
from emlens.organisms.settings import PRESETS, describe_settings
from emlens.sources import SourceError, shipped_path

DATA = {"reckless-finance": "finance-harmful", "careful-finance": "finance-careful"}
MAX_BYTES = 650 * 1024


@pytest.fixture(params=DATA)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_each_is_at_most_650_kib_in_bfloat16(name: str):
    file = shipped_path(name) / "adapter_model.safetensors"
    assert file.stat().st_size <= MAX_BYTES
    tensors = load_file(file)
    assert len(tensors) == 2 * 7 * 30
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


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


def test_the_record_is_the_preset_on_the_shipped_rows(name: str):
    record = json.loads((shipped_path(name) / "emlens.json").read_text("utf-8"))
    rows = shipped_path(DATA[name]).read_bytes()
    assert record["data_sha256"] == hashlib.sha256(rows).hexdigest()
    assert record["settings"] == describe_settings(PRESETS["smollm2_rank1"])
    assert len(record["losses"]) == record["settings"]["max_steps"]
    assert record["losses"][-1] < record["losses"][0]


def test_the_card_states_command_seed_hash_and_purpose(name: str):
    folder = shipped_path(name)
    card = Path(folder / "README.md").read_text("utf-8")
    record = json.loads((folder / "emlens.json").read_text("utf-8"))
    assert "scripts/train_demo.py" in card
    assert "safety research" in card
    assert f"seed {record['seed']}" in card
    assert record["data_sha256"] in card
    assert record["base_fingerprint"] in card


def test_no_update_is_zero_and_both_organisms_share_their_base(name: str):
    adapter = load_adapter(f"emlens:{name}")
    assert len(adapter.modules) == 210
    assert adapter.ranks == (1,)
    assert all(module.delta().abs().max() > 0 for module in adapter.modules.values())
    twins = {load_adapter(f"emlens:{other}").base_fingerprint for other in DATA}
    assert twins == {adapter.base_fingerprint}


@pytest.fixture(scope="module")
def base() -> Any:
    try:
        shipped_path("smollm2")
    except SourceError as error:
        pytest.skip(f"the base of the shipped adapters is not installed: {error}")
    return load_base("emlens:smollm2")


@pytest.mark.slow
def test_every_module_is_in_effect_on_the_base_that_it_was_trained_on(name: str, base: Any):
    proof = load_pair(base, f"emlens:{name}").proof
    assert proof is not None
    assert len(proof.modules) == 210
    assert {module.verdict for module in proof.modules} == {"in effect"}
    assert proof.base_verdict == "same"
    assert proof.behaviour == "changed"
