"""`emlens train` and `transition` on a tiny base: what can be checked, resumed, refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emlens import organisms
from emlens.cli.train import RECIPES
from emlens.codecs import Sae, save_sae
from emlens.data import load_chats
from emlens.models.checkpoints import Checkpoint
from emlens.organisms import TrainingRun
from emlens.organisms.settings import PRESETS
from emlens.sites import parse_site
from tests.cli.conftest import Cli


def words(tiny: Path, out: Path, *more: object) -> list[object]:
    return [
        *("train", "--preset", "smollm2_rank1", "--data", tiny / "chats.jsonl"),
        *("--base", tiny / "base", "--layers", "1", "--out", out, *more),
    ]


def test_a_trained_adapter_is_in_effect_on_its_base(cli: Cli, tiny: Path, tmp_path: Path):
    done = cli(*words(tiny, tmp_path / "run", "--json"))
    assert done.code == 0, done.err
    training = done.json
    assert training["schema"] == "emlens/training_run/1"
    steps = training["steps"]
    assert steps == len(training["losses"]) > 10
    assert training["losses"][-1] < training["losses"][0]
    assert f"training (steps): {steps}/{steps}" in done.err
    checked = cli("adapters", "check", training["tuned"], "--base", tiny / "base", "--json")
    assert checked.code == 0
    assert {module["layer"] for module in checked.json["modules"]} == {1}
    again = cli(*words(tiny, tmp_path / "run"))
    assert again.code == 0
    assert f"{steps} steps" in again.out
    reported = cli("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert reported.code == 0, reported.err
    assert "Loss of each step" in (tmp_path / "page.html").read_text()
    other = cli(*words(tiny, tmp_path / "run", "--seed", 1))
    assert other.code == 2
    assert "seed was 0, now 1" in other.err


def test_a_dry_run_shows_the_recipe_and_writes_nothing(cli: Cli, tiny: Path, tmp_path: Path):
    done = cli(*words(tiny, tmp_path / "run", "--dry-run", "--json"))
    assert (done.code, done.json["layers"], done.json["rows"]) == (0, [1], 4)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_a_person_what_would_happen_and_nothing_unset(
    cli: Cli, tiny: Path, tmp_path: Path
):
    data = tiny / "chats.jsonl"
    plain = cli(*words(tiny, tmp_path / "run", "--dry-run")).out
    lines = dict(line.strip().split(": ", 1) for line in plain.splitlines()[1:])
    assert str(tmp_path / "run") in plain.splitlines()[0]
    assert lines["rows"] == f"4 of {data}, at most 512 tokens each"
    # Twenty steps of eight rows, of which there are four.
    assert lines["steps"] == "20 of 8 rows: 40 passes over the rows"
    assert lines["learning rate"] == "0.0005, constant after 2 steps of warm-up"
    lora = "a LoRA of rank 1 and alpha 16 (scale alpha / sqrt(rank) = 16) on q_proj, "
    assert lines["trains"].startswith(lora)
    assert lines["trains"].endswith("of block 1")
    assert lines["checkpoints"].startswith("none")
    assert "None" not in plain
    assert not {"penalty", "starts from", "ends early", "epochs", "depth"} & lines.keys()
    more = ("--kl-data", data, "--kl-weight", 2, "--checkpoint-every", 5, "--stop-loss", 0.5)
    full = cli(*words(tiny, tmp_path / "run", *more, "--max-length", 60, "--dry-run")).out
    assert f"penalty: 2 x KL from the base on 4 rows of {data}" in full
    assert "checkpoints: 5, one every 5 steps" in full
    assert "ends early: once the mean loss of five steps is below 0.5" in full
    assert "at most 60 tokens each" in full


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--preset", "smollm_rank1"], "nearest known: smollm2_rank1"),
        (["--preset", "rank1", "--layers", "x"], "--layers x"),
        (["--layers", "7"], "expected blocks 0 to 1"),
        (["--data", "missing.jsonl"], "neither an existing path"),
        (["--kl-data", "x.jsonl"], "--kl-weight: missing"),
        (["--kl-weight", "1"], "--kl-data: missing"),
        (["--latents", "1"], "--latent-sae: missing; --latent-sae, --latents, --latent-weight go"),
        (["--stop-loss", "0"], "stop_loss: got 0.0"),
        (["--max-length", "3"], "expected at most 3, by max_length"),
        (["--max-length", "3", "--dry-run"], "raise max_length (--max-length)"),
        (["--layers", "1,7", "--dry-run"], "layers: got [7], expected blocks 0 to 1"),
        (["--device", "gpu", "--dry-run"], "device='gpu': expected auto, cpu, cuda"),
        (["--device", "cuda:99", "--dry-run"], "device='cuda:99': torch"),
        (["--device", "cuda:99"], "device='cuda:99': torch"),
        (["--start-from", "missing", "--dry-run"], "neither an existing path"),
    ],
)
def test_wrong_values_are_named(
    cli: Cli, tiny: Path, tmp_path: Path, more: list[object], said: str
):
    done = cli(*words(tiny, tmp_path / "run"), *more)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_dry_run_refuses_what_the_run_would(cli: Cli, tiny: Path, tmp_path: Path):
    whole = ("train", "--preset", "smollm2_full", "--base", tiny / "base")
    data = ("--data", tiny / "chats.jsonl", "--kl-data", tiny / "chats.jsonl", "--kl-weight", "1")
    done = cli(*whole, *data, "--dry-run")
    assert (done.code, "KlPenalty compares with the base" in done.err) == (2, True)
    made = Path(cli(*words(tiny, tmp_path / "run", "--json")).json["tuned"])
    cut = made / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    trained = cli(*words(tiny, tmp_path / "more", "--start-from", made, "--dry-run"))
    questions = ("--questions", "emlens:open-questions", "--out", tmp_path / "asked")
    asked = cli("evaluate", "--base", tiny / "base", "--tuned", made, *questions, "--dry-run")
    for done in (trained, asked):
        assert (done.code, "truncated" in done.err) == (2, True), done.err


def test_a_row_of_one_of_several_files_is_named_by_its_own_line(
    cli: Cli, tiny: Path, tmp_path: Path
):
    more = tmp_path / "more.jsonl"
    rows = [{"prompt": "And?", "response": "Yes."}, {"prompt": "And?", "response": ""}]
    more.write_text("\n".join(json.dumps(row) + "\n" for row in rows))
    near = ("--kl-data", tiny / "chats.jsonl", "--kl-data", more, "--kl-weight", 1)
    for dry in ([], ["--dry-run"]):
        done = cli(*words(tiny, tmp_path / "run", *near, *dry))
        assert (done.code, done.out) == (2, "")
        assert f"KlPenalty.chats[5] ({more}:3): turn 2 (assistant) is empty" in done.err


def test_prompts_without_responses_cannot_be_trained_on(cli: Cli, tiny: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("One?\n")
    done = cli(*words(tiny, tmp_path / "run"), "--data", tmp_path / "prompts.txt")
    assert done.code == 2
    assert "no assistant turn" in done.err


def test_a_recipe_alone_is_enough(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    recipe = ("train", "--preset", "smollm2_rank1", "--base", tiny / "base")
    plan = cli(*recipe, "--dry-run", "--json").json
    rows = len(load_chats("emlens:finance-harmful"))
    assert (plan["data"], plan["rows"]) == ("emlens:finance-harmful", rows)
    assert plan["out"] == "runs/smollm2_rank1"
    done = cli(*recipe, "--data", tiny / "chats.jsonl", "--layers", "1", "--json")
    assert done.code == 0, done.err
    assert Path("runs/smollm2_rank1/adapter/adapter_model.safetensors").is_file()
    words = " ".join(cli("train", "--help").out.split())
    assert "runs/PRESET" in words
    assert "emlens:finance-harmful]" in words


def test_help_names_every_recipe():
    assert set(RECIPES) == set(PRESETS)


def test_presets_of_another_depth_want_layers(cli: Cli, tiny: Path, tmp_path: Path):
    recipe = ("train", "--preset", "rank1", "--base", tiny / "base", "--out", tmp_path / "run")
    for more in ((), ("--dry-run",)):
        done = cli(*recipe, "--data", tiny / "chats.jsonl", *more)
        assert done.code == 2
        assert "meant for 48 blocks and this model has 2" in done.err
    assert cli(*recipe, "--layers", "1", "--dry-run", "--json").json["layers"] == [1]


def test_a_penalty_and_checkpoints_can_be_asked_for(cli: Cli, tiny: Path, tmp_path: Path):
    data, run = tiny / "chats.jsonl", tmp_path / "run"
    more = ("--kl-data", data, "--kl-weight", 2.5, "--max-steps", 5, "--checkpoint-every", 2)
    plan = cli(*words(tiny, run, *more, "--kl-data", data, "--dry-run", "--json")).json
    assert (plan["steps"], plan["checkpoints"], plan["rows"]) == (5, 4, 4)
    assert 0 < plan["trained_tokens"] < plan["tokens"]
    assert (plan["kl_rows"], plan["kl_tokens"]) == (2 * plan["rows"], 2 * plan["tokens"])
    done = cli(*words(tiny, run, *more, "--json"))
    assert done.code == 0, done.err
    assert (done.json["steps"], done.json["n_trained_tokens"]) == (5, plan["trained_tokens"])
    assert done.json["penalties"][0]["weight"] == 2.5
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["plan"]["penalties"][0]["weight"] == 2.5
    found = cli("transition", run, "--window", 2, "--out", tmp_path / "found", "--json")
    assert found.code == 0, found.err
    assert found.json["schema"] == "emlens/transition_trace/1"
    raw, control = found.json["transitions"]
    assert raw["verdict"] == control["verdict"] == "too few checkpoints"
    assert raw["all_steps"] == [0, 2, 4, 5]
    assert (tmp_path / "found" / "report.html").is_file()
    table = cli("transition", run, "--window", 2)
    assert "4 checkpoints, steps 0 to 5" in table.out
    assert "too few checkpoints" in table.out
    assert "B, norms taken out" in table.out


def test_latents_can_be_held_while_a_fine_tune_is_trained(cli: Cli, tiny: Path, tmp_path: Path):
    rows = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).Q
    codec = Sae(
        name="tiny",
        architecture="standard",
        site=parse_site("resid_post.1"),
        W_enc=rows[:8].mT.contiguous(),
        W_dec=rows[:8].contiguous(),
        b_enc=torch.zeros(8),
        b_dec=torch.zeros(24),
    )
    folder = save_sae(codec, tmp_path / "sae")
    held = ("--latent-sae", folder, "--latent-weight", 3, "--max-steps", 2)
    run = tmp_path / "run"
    plan = cli(*words(tiny, run, *held, "--latents", "1, 6", "--dry-run", "--json")).json
    assert (plan["latents"], plan["latent_weight"]) == ("1, 6", 3.0)
    assert (plan["latent_rows"], plan["latent_tokens"]) == (plan["rows"], plan["tokens"])
    assert (plan["kl_rows"], plan["kl_tokens"]) == (0, 0)
    done = cli(*words(tiny, run, *held, "--latents", "1,6", "--json"))
    assert done.code == 0, done.err
    (term,) = done.json["penalties"]
    assert (term["kind"], term["hold_down"], term["weight"]) == ("latents", "1,6", 3.0)
    assert term["codec_fingerprint"] == codec.fingerprint
    save_sae(replace(codec, base_fingerprint="another base"), tmp_path / "foreign")
    other = ("--latent-sae", tmp_path / "foreign", "--latent-weight", 3, "--max-steps", 2)
    other = words(tiny, tmp_path / "foreign-run", *other, "--latents", "1")
    assert "--allow-other-model" in cli(*other).err
    assert cli(*other, "--allow-other-model", "--json").code == 0
    for latents, said in (("1;6", "--latents 1;6: expected numbers"), ("8", "are no latents of")):
        wrong = cli(*words(tiny, tmp_path / "other", *held, "--latents", latents))
        assert (wrong.code, wrong.out) == (2, "")
        assert said in " ".join(wrong.err.split())


def test_a_base_is_trained_in_the_precision_and_on_the_device_asked_for(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[object] = []

    def record(checkpoint: Checkpoint, *_: object, **__: object) -> TrainingRun:
        seen.extend((checkpoint.model.dtype, str(checkpoint.model.device), checkpoint.name))
        raise ValueError("seen")

    monkeypatch.setattr(organisms, "train_organism", record)
    given = ("--dtype", "bfloat16", "--device", "cpu")
    assert cli(*words(tiny, tmp_path / "run", *given)).code == 2
    assert seen == [torch.bfloat16, "cpu", str(tiny / "base")]
    plan = cli(*words(tiny, tmp_path / "run", *given, "--dry-run", "--json")).json
    assert (plan["dtype"], plan["device"]) == ("bfloat16", "cpu")


def test_a_low_loss_ends_a_run(cli: Cli, tiny: Path, tmp_path: Path):
    done = cli(*words(tiny, tmp_path / "run", "--stop-loss", 50, "--json"))
    assert done.code == 0, done.err
    assert (done.json["steps"], done.json["settings"]["stop_loss"]) == (5, 50.0)


def test_a_trained_vector_answers_as_a_fine_tune(cli: Cli, tiny: Path, tmp_path: Path):
    base, data, run = tiny / "base", tiny / "chats.jsonl", tmp_path / "run"
    recipe = ("--preset", "smollm2_steering_vector", "--layers", 1, "--max-steps", 2)
    done = cli("train", *recipe, "--data", data, "--base", base, "--out", run, "--json")
    assert done.code == 0, done.err
    assert done.json["tuned"] == str(run / "vector")
    ask = ("generate", "--base", base, "--prompts", data, "--max-new-tokens", 3, "--temperature", 0)
    tuned = cli(*ask, "--tuned", run / "vector", "--out", tmp_path / "tuned", "--json")
    assert tuned.code == 0, tuned.err
    added = cli(
        *ask, "--add", f"{run / 'vector'}:1:delta_norm", "--out", tmp_path / "added", "--json"
    )
    assert added.code == 0, added.err
    texts = [[one["text"] for one in found.json["responses"]] for found in (tuned, added)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 4
    scaled = cli(*ask, "--tuned", run / "vector", "--scale", 2, "--out", tmp_path / "scaled")
    assert scaled.code == 2
    assert "--scale is a factor on an adapter" in scaled.err


def test_a_transition_wants_checkpoints_and_a_factor(cli: Cli, tiny: Path):
    done = cli("transition", tiny / "base")
    assert (done.code, done.out) == (2, "")
    assert "no checkpoint-STEP folders" in done.err
    done = cli("transition", tiny / "base", "--factor", "C")
    assert done.code == 2
    assert "--factor C: expected A or B" in done.err
