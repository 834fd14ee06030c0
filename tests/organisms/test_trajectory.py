"""Trajectories from checkpoint folders that peft and the Trainer write, and from saved ones."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from emlens.organisms import trajectory as trajectory_module
from emlens.organisms.trajectory import (
    AdapterTrajectory,
    TrajectoryError,
    find_base,
    load_trajectory,
)
from emlens.results import load_result
from emlens.runs import RunFolder

STEPS = (0, 5, 12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of uneven steps, written by peft, with a Trainer's record in the last."""
    folder = tmp_path_factory.mktemp("foreign")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    tuned = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=["down_proj"]),
    )
    for step in STEPS:
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, float(step))
        tuned.save_pretrained(str(folder / f"checkpoint-{step}"))
    history = [
        {"step": 1, "loss": 3.0, "grad_norm": 0.5, "penalty": 0.25},
        {"step": 2, "loss": 2.0},
        {"step": 2, "train_runtime": 9.0},
    ]
    (folder / "checkpoint-12" / "trainer_state.json").write_text(
        json.dumps({"global_step": 12, "log_history": history})
    )
    # A later state at the top, as some released runs have it.
    tuned.save_pretrained(str(folder))
    return folder


def test_checkpoints_are_stacked_by_their_steps(run: Path):
    trajectory = load_trajectory(run)
    assert trajectory.steps.tolist() == list(STEPS)
    assert [m.name for m in trajectory.modules] == [
        f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)
    ]
    first = trajectory.modules[0]
    assert first.scale == pytest.approx(6 / 2**0.5)
    assert first.A.shape == (3, 2, 24)
    assert first.B.shape == (3, 16, 2)
    assert [float(b.mean()) for b in first.B] == [0.0, 5.0, 12.0]
    assert trajectory.logged_steps.tolist() == [1, 2]
    assert trajectory.losses.tolist() == [3.0, 2.0]
    assert trajectory.gradient_norms[0] == 0.5
    assert trajectory.gradient_norms[1].isnan()
    assert trajectory.penalties[0] == 0.25
    assert trajectory.penalties[1].isnan()
    norm = (2 * 16 * 2 * 25.0) ** 0.5
    assert trajectory.rows()[1]["norm_B"] == pytest.approx(norm)


def test_one_step_is_an_adapter_again(run: Path):
    trajectory = load_trajectory(run)
    adapter = trajectory.adapter(5)
    assert set(adapter.modules) == {m.name for m in trajectory.modules}
    assert bool((next(iter(adapter.modules.values())).B == 5).all())
    with pytest.raises(TrajectoryError, match=r"no checkpoint at 6; nearest: \[0, 5, 12\]"):
        trajectory.adapter(6)


def test_a_saved_trajectory_is_read_alone_or_out_of_a_run(run: Path, tmp_path: Path):
    trajectory = load_trajectory(run)
    trajectory.save(tmp_path / "run" / "results" / "trajectory")
    for place in (tmp_path / "run", tmp_path / "run" / "results" / "trajectory"):
        again = load_trajectory(place)
        assert torch.equal(again.modules[1].B, trajectory.modules[1].B)
    assert isinstance(load_result(tmp_path / "run" / "results" / "trajectory"), AdapterTrajectory)


def test_every_file_of_a_saved_trajectory_would_be_fetched(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = load_trajectory(run).save(tmp_path / "saved")
    asked: list[list[str]] = []

    def locate(_source: object, *, allow_patterns: list[str]) -> Path:
        asked.append(allow_patterns)
        return folder

    monkeypatch.setattr(trajectory_module, "locate_source", locate)
    load_trajectory("org/name")
    files = [file.name for file in folder.iterdir()]
    assert list(filter_repo_objects(files, allow_patterns=asked[0])) == files
    assert len(files) > 1


def test_every_step_and_factor_enters_the_fingerprint(run: Path):
    trajectory = load_trajectory(run)
    name = trajectory.fingerprint()
    assert replace(trajectory, source="elsewhere").fingerprint() == name
    assert load_trajectory(run).fingerprint() == name
    first = trajectory.modules[0]
    for changed in (
        replace(first, scale=first.scale * 2),
        replace(first, A=first.A.index_put((torch.tensor([1]),), torch.tensor(0.0))),
        replace(first, B=first.B + 1e-3),
        replace(first, name="model.layers.7.mlp.down_proj"),
    ):
        other = replace(trajectory, modules=(changed, *trajectory.modules[1:]))
        assert other.fingerprint() != name
    assert replace(trajectory, steps=torch.tensor([0, 5, 13])).fingerprint() != name


def test_norms_are_those_of_all_modules_together(run: Path):
    trajectory = load_trajectory(run)
    parts = [m.A.double().flatten(1) for m in trajectory.modules]
    torch.testing.assert_close(trajectory.norms("A"), torch.cat(parts, dim=1).norm(dim=1))


def test_the_base_is_what_a_run_or_the_last_checkpoint_names(run: Path, tmp_path: Path):
    assert find_base(run) is None
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    config = copy / "checkpoint-12" / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "some/base"}
    config.write_text(json.dumps(named))
    assert find_base(copy) == "some/base"
    RunFolder.start(tmp_path / "own", {"kind": "training_run", "base": "emlens:smollm2"})
    assert find_base(tmp_path / "own") == "emlens:smollm2"
    (tmp_path / "empty").mkdir()
    assert find_base(tmp_path / "empty") is None


def test_a_checkpoint_cut_short_is_named(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    weights = copy / "checkpoint-5" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(TrajectoryError, match=r"checkpoint-5: .*cut short"):
        load_trajectory(copy)
    weights.unlink()
    with pytest.raises(TrajectoryError, match=r"checkpoint-5: .*missing"):
        load_trajectory(copy)


def test_a_checkpoint_of_another_adapter_is_named(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    config = copy / "checkpoint-12" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    with pytest.raises(
        TrajectoryError, match="checkpoint-12 is not of the adapter of checkpoint-0"
    ):
        load_trajectory(copy)


def test_a_record_that_is_none_and_a_folder_without_checkpoints_are_named(
    run: Path, tmp_path: Path
):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "checkpoint-12" / "trainer_state.json").write_text("[1]")
    with pytest.raises(TrajectoryError, match="no record of a Trainer"):
        load_trajectory(copy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrajectoryError, match="no checkpoint-STEP folders"):
        load_trajectory(tmp_path / "empty")
