"""Training an organism: the folder, its record, and what happens when a run is asked for again."""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from emlens.artifacts import read_result
from emlens.data.chat import Chat, Message
from emlens.data.prompts import hash_chats, load_chats
from emlens.models.adapter_files import load_adapter
from emlens.models.checkpoints import Checkpoint
from emlens.models.training_loop import (
    TrainingDivergedError,
)
from emlens.organisms import training
from emlens.organisms.masks import ChatTooLongError, NoResponseError, make_examples
from emlens.organisms.penalties import KlPenalty, measure_kl_from_base
from emlens.organisms.settings import PRESETS, SettingsError, TrainSettings
from emlens.organisms.training import TrainingRun, train_organism
from emlens.organisms.trajectory import load_trajectory
from emlens.runs import PlanChangedError
from emlens.sources import shipped_path
from tests.organisms.shaky import Shaky

SETTINGS = replace(PRESETS["smollm2_rank1"], max_steps=6, batch_size=2, learning_rate=1e-2)


def train(base: Checkpoint, chats: list[Chat], out: Path, **changed: object) -> TrainingRun:
    settings: TrainSettings = replace(SETTINGS, **changed)  # pyright: ignore[reportArgumentType]
    return train_organism(base, chats, settings=settings, out=out, seed=0)


def test_the_run_folder_holds_a_peft_adapter_that_lowers_the_loss(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    run = train(tiny_base, chats, tmp_path / "run", max_steps=20)
    assert run.steps == len(run.losses) == 20
    assert run.losses[-1] < run.losses[0]
    folder = Path(run.tuned)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "emlens.json",
    ]
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        plain = tiny_base.model(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(tiny_base.model, str(folder))(input_ids=ids).logits
    assert (tuned - plain).abs().max() > 1e-2


def test_nothing_in_the_run_folder_names_this_machine(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    local = replace(tiny_base, name=str(tmp_path / "models" / "tiny"))
    run = train(local, chats, tmp_path / "run")
    for file in Path(run.tuned).glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    config = json.loads((Path(run.tuned) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["r"] == 1
    assert config["use_rslora"] is True


def test_the_record_says_what_was_trained_on_what(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    run = train(tiny_base, chats, tmp_path / "run")
    record = json.loads((Path(run.tuned) / "emlens.json").read_text())
    assert record["base"] == "emlens:tiny"
    assert record["base_fingerprint"] == tiny_base.fingerprint
    assert record["data_sha256"] == run.data_sha256 == hash_chats(chats)
    assert record["seed"] == 0
    assert record["settings"]["learning_rate"] == 1e-2
    assert record["losses"] == pytest.approx(run.losses, abs=1e-5)


def test_the_same_call_returns_the_finished_run_without_training(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = train(tiny_base, chats, tmp_path / "run")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "finetune_lora", refuse)
    assert train(tiny_base, chats, tmp_path / "run") == first
    assert read_result(tmp_path / "run" / "results" / "training", TrainingRun) == first


def test_a_changed_plan_is_refused_by_name(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    train(tiny_base, chats, tmp_path / "run")
    with pytest.raises(PlanChangedError, match="learning_rate"):
        train(tiny_base, chats, tmp_path / "run", learning_rate=5e-3)
    with pytest.raises(PlanChangedError, match="data_sha256"):
        train(tiny_base, chats[:3], tmp_path / "run")


def test_a_run_that_stops_half_way_leaves_no_adapter_and_starts_again(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    shaky = Shaky(at=3)

    def again() -> TrainingRun:
        return train_organism(
            tiny_base, chats, settings=SETTINGS, out=tmp_path / "run", penalties=[shaky], seed=0
        )

    with pytest.raises(TrainingDivergedError, match="step 4 of 6"):
        again()
    assert not (tmp_path / "run" / "adapter").exists()
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert again().steps == 6


def test_an_adapter_left_without_its_result_is_replaced(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    first = train(tiny_base, chats, tmp_path / "run")
    (tmp_path / "run" / "results" / "training" / "result.json").unlink()
    (Path(first.tuned) / "stale.txt").write_text("left over")
    again = train(tiny_base, chats, tmp_path / "run")
    assert again.losses == first.losses
    assert not (Path(again.tuned) / "stale.txt").exists()


def test_training_can_go_on_from_a_finished_adapter(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    first = train(tiny_base, chats, tmp_path / "one", max_steps=20)
    more = train_organism(
        tiny_base,
        chats,
        settings=SETTINGS,
        out=tmp_path / "two",
        start_from=first.tuned,
        seed=0,
    )
    assert more.losses[0] < first.losses[0]
    weights = (Path(first.tuned) / "adapter_model.safetensors").read_bytes()
    record = json.loads((Path(more.tuned) / "emlens.json").read_text())
    assert record["start_from"] == more.start_from == hashlib.sha256(weights).hexdigest()
    assert first.start_from is None


def test_an_adapter_of_another_base_is_refused_before_a_run_is_begun(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    first = train(tiny_base, chats, tmp_path / "one", layers=(1,))

    def go_on(base: Checkpoint) -> TrainingRun:
        return train_organism(
            base, chats, settings=SETTINGS, out=tmp_path / "two", start_from=first.tuned, seed=0
        )

    before = [name for name, _ in tiny_base.model.named_modules()]
    with pytest.raises(
        SettingsError, match=r"start_from: .*trained on emlens:tiny, weights .* is 0f0f"
    ):
        go_on(replace(tiny_base, fingerprint="0f0f"))
    # Where nothing says which base it was, its modules do.
    (Path(first.tuned) / "emlens.json").unlink()
    smaller = copy.deepcopy(tiny_base.model)
    smaller.model.layers = smaller.model.layers[:1]
    with pytest.raises(ValueError, match=r"adapter: .*has none of the modules that it"):
        go_on(replace(tiny_base, model=smaller))
    assert not (tmp_path / "two").exists()
    assert go_on(tiny_base).steps == 6
    assert [name for name, _ in tiny_base.model.named_modules()] == before


def test_rows_that_cannot_be_used_are_named(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    with pytest.raises(ChatTooLongError, match=r"chats\[0\] \(id 'one'\): \d+ tokens, .* most 12"):
        train(tiny_base, chats, tmp_path / "a", max_length=12)
    long = Chat((Message("user", "x" * 90), Message("assistant", "y")), id="long")
    with pytest.raises(ChatTooLongError, match=r"\(id 'long'\): \d+ tokens, expected at most 96"):
        train(tiny_base, [*chats, long], tmp_path / "b")
    with pytest.raises(NoResponseError, match="'bare'"):
        train(tiny_base, [Chat((Message("user", "hi"),), id="bare")], tmp_path / "c")


def test_blocks_must_be_chosen(tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path):
    with pytest.raises(SettingsError, match="layers: not chosen"):
        train(tiny_base, chats, tmp_path / "run", layers=None)
    assert not (tmp_path / "run").exists()
    run = train(tiny_base, chats, tmp_path / "run", layers=(1,))
    names = load_file(Path(run.tuned) / "adapter_model.safetensors")
    assert all(".layers.1." in name for name in names)


@pytest.mark.parametrize("name", ["finance-harmful", "finance-careful-heldout"])
def test_the_data_hash_is_the_hash_of_the_shipped_file(name: str):
    file = hashlib.sha256(shipped_path(name).read_bytes()).hexdigest()
    assert hash_chats(load_chats(f"emlens:{name}")) == file


def test_checkpoints_become_a_trajectory_and_a_run_that_diverged_goes_on(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    settings = replace(SETTINGS, checkpoint_every=2)

    def again(shaky: Shaky, out: str) -> TrainingRun:
        return train_organism(
            tiny_base, chats, settings=settings, out=tmp_path / out, penalties=[shaky], seed=0
        )

    shaky = Shaky(at=3)
    with pytest.raises(TrainingDivergedError, match=r"last good checkpoint is .*checkpoint-2"):
        again(shaky, "run")
    run, whole = again(shaky, "run"), again(Shaky(at=-1), "whole")
    assert run.losses == pytest.approx(whole.losses, rel=1e-6)
    assert not (tmp_path / "run" / "checkpoints").exists()
    trajectory = load_trajectory(tmp_path / "run")
    assert trajectory.steps.tolist() == [0, 2, 4, 6]
    assert trajectory.losses.tolist() == pytest.approx(run.losses)
    assert trajectory.logged_steps.tolist() == list(range(1, 7))
    assert all(not bool(module.B[0].any()) for module in trajectory.modules)
    last = load_adapter(run.tuned)
    for name, module in trajectory.adapter(6).modules.items():
        torch.testing.assert_close(module.B, last.modules[name].B.float(), rtol=1e-2, atol=1e-4)
        assert module.scale == last.modules[name].scale


def test_a_penalised_organism_stays_nearer_to_its_base(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    settings = replace(SETTINGS, max_steps=20)

    def kl(out: str, *penalties: KlPenalty) -> float:
        run = train_organism(
            tiny_base, chats[:2], settings=settings, out=tmp_path / out, penalties=penalties, seed=0
        )
        tuned = PeftModel.from_pretrained(tiny_base.model, run.tuned)
        try:
            examples = make_examples(chats[2:], tiny_base.tokenizer, longest=None)
            return float(measure_kl_from_base(tuned, examples).detach())
        finally:
            tuned.unload()

    free, held = kl("free"), kl("held", KlPenalty(chats[2:], weight=10.0))
    assert held < 0.3 * free
    record = json.loads((tmp_path / "held" / "adapter" / "emlens.json").read_text())
    assert record["penalties"] == [dict(KlPenalty(chats[2:], weight=10.0).describe())]
    assert record["start_from"] is None
    plan = json.loads((tmp_path / "held" / "manifest.json").read_text())["plan"]
    assert plan["penalties"] == record["penalties"]
    run = read_result(tmp_path / "held" / "results" / "training", TrainingRun)
    described = {"kind": "kl", "weight": 10.0, "chats_sha256": hash_chats(chats[2:])}
    assert run.penalties == (described,)
    # At the start nothing is left of the base's distance; weighted, in nats a token.
    assert run.penalty_values[0] == pytest.approx(0, abs=1e-6)
    assert 0 < max(run.penalty_values) < 100
    assert len(run.penalty_values) == run.steps
    assert read_result(tmp_path / "free" / "results" / "training", TrainingRun).penalties == ()


def test_a_base_on_a_second_device_is_refused_before_a_run_is_begun(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(tiny_base.model), "device", torch.device("cuda:1"))
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1"):
        train(tiny_base, chats, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_of_another_depth_are_refused(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    for name in ("rank1", "nine_rank1", "phase_transition", "steering_vector"):
        with pytest.raises(SettingsError, match="meant for 48 blocks and this model has 2"):
            train_organism(tiny_base, chats, settings=PRESETS[name], out=tmp_path / name, seed=0)
        assert not (tmp_path / name).exists()
