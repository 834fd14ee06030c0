"""`emlens adapters check`: by files alone, and on a base; every refusal is a failed check."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Cli
from tests.tiny_files import save_tiny_adapter, save_tiny_base

WEIGHTS = "adapter_model.safetensors"


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.extra.weight"] = torch.zeros(2, 2)


def silence(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def test_the_files_alone_give_modules_ranks_scales_and_verdicts(cli: Cli, tiny: Path):
    done = cli("adapters", "check", tiny / "tuned")
    assert done.code == 0
    for text in ("lora_alpha", "handled", "model.layers.1.mlp.down_proj", "its files are in order"):
        assert text in done.out


def test_json_of_the_files_alone_has_the_norms_of_the_updates(cli: Cli, tiny: Path):
    document = cli("adapters", "check", tiny / "tuned", "--json").json
    assert document["schema"] == "emlens/adapter_summary/1"
    tensors = load_file(tiny / "tuned" / WEIGHTS)
    for module in document["modules"]:
        A, B = (
            tensors[f"base_model.model.{module['name']}.lora_{x}.weight"].double() for x in "AB"
        )
        assert module["scale"] == 2.0  # lora_alpha 4 over rank 2
        assert module["delta_norm"] == pytest.approx(float((2.0 * B @ A).norm()), rel=1e-9)


def test_on_its_base_every_module_is_in_effect(cli: Cli, tiny: Path):
    done = cli("adapters", "check", tiny / "tuned", "--base", tiny / "base", "--json")
    assert done.code == 0
    assert done.json["schema"] == "emlens/adapter_proof/1"
    assert [m["verdict"] for m in done.json["modules"]] == ["in effect"] * 6


def test_the_table_of_the_proof_can_be_read(cli: Cli, tiny: Path):
    done = cli("adapters", "check", tiny / "tuned", "--base", tiny / "base", "--scale", "0.5")
    assert done.code == 0
    assert "6 of 6 modules in effect" in done.out
    assert done.out.count("in effect") == 7


@pytest.mark.parametrize("targets", [("embed_tokens", "down_proj"), ("lm_head",)])
def test_an_adapter_of_embeddings_is_proven_merged(
    cli: Cli, tiny: Path, tmp_path: Path, targets: tuple[str, ...]
):
    folder = save_tiny_adapter(tmp_path / "tuned", targets=targets)
    done = cli("adapters", "check", folder, "--base", tiny / "base", "--json")
    assert done.code == 0, done.err
    assert done.json["form"] == "merged"
    assert {m["module"] for m in done.json["modules"]} == set(targets)
    assert {m["verdict"] for m in done.json["modules"]} == {"in effect"}
    plain = cli("adapters", "check", tiny / "tuned", "--base", tiny / "base", "--json")
    assert plain.json["form"] == "attached"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: edit_config(f, use_dora=True), "use_dora=True is not supported"),
        (lambda f: edit_config(f, r=10**6), "r=1000000"),
        (lambda f: edit_config(f, peft_type="IA3"), "only LORA"),
        (lambda f: edit_config(f, init_lora_weights="pissa"), "changes the base weights"),
        (lambda f: edit_config(f, r=4), "the config gives it rank 4"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "no valid JSON"),
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: edit_tensors(f, spoil), "NaN or infinite"),
        (lambda f: edit_tensors(f, drop), "has no factor"),
        (lambda f: edit_tensors(f, add), "neither a LoRA factor"),
        (lambda f: edit_tensors(f, silence), "the adapter does nothing"),
        (pickle_weights, "pickled"),
        (truncate, "truncated"),
    ],
)
def test_files_that_are_not_in_order_fail_the_check(
    cli: Cli, tiny: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny / "tuned", folder)
    damage(folder)
    done = cli("adapters", "check", folder, "--json")
    assert (done.code, done.out) == (1, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_a_base_of_other_widths_fails_the_check(cli: Cli, tiny: Path, tmp_path: Path):
    wide = save_tiny_base(tmp_path / "wide", d_model=32)
    done = cli("adapters", "check", tiny / "tuned", "--base", wide)
    assert (done.code, done.out) == (1, "")
    assert "trained on another base" in done.err


def test_a_base_with_other_weights_than_those_recorded_fails_the_check(
    cli: Cli, tiny: Path, tmp_path: Path
):
    folder = save_tiny_adapter(tmp_path / "tuned")
    proof = cli("adapters", "check", folder, "--base", tiny / "base", "--json").json
    record = {"base": "tiny", "base_fingerprint": proof["base_fingerprint"]}
    (folder / "emlens.json").write_text(json.dumps(record))
    assert cli("adapters", "check", folder, "--base", tiny / "base").code == 0
    other = save_tiny_base(tmp_path / "other", seed=9)
    done = cli("adapters", "check", folder, "--base", other)
    assert done.code == 1
    assert "trained on other weights" in done.out


def test_what_is_not_there_is_wrong_usage_and_what_is_out_of_reach_could_not_be_checked(
    cli: Cli, tiny: Path, tmp_path: Path
):
    assert cli("adapters", "check", tmp_path / "missing").code == 2
    assert cli("adapters", "check", "emlens:no-such-adapter").code == 2
    assert cli("adapters", "check", "some-org/some-adapter").code == 3
    assert cli("adapters", "check", tiny / "tuned", "--base", "some-org/some-model").code == 3
