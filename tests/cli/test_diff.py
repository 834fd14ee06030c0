"""`emlens diff` on tiny models: results, resuming, refusals."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from emlens.results import load_result
from emlens.studies import diff_finetunes
from tests.cli.conftest import Cli, Done
from tests.tiny_files import save_tiny_base

study = importlib.import_module(diff_finetunes.__module__)


def words(tiny: Path, out: Path, *more: object) -> list[object]:
    base = ["diff", "--base", tiny / "base", "--tuned", tiny / "tuned"]
    return [*base, "--prompts", tiny / "chats.jsonl", "--out", out, *more]


@pytest.fixture(scope="module")
def finished(cli: Cli, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A finished run and what it printed."""
    out = tmp_path_factory.mktemp("diff") / "run"
    return out, cli(*words(tiny, out, "--json"))


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_json_is_the_result_and_nothing_else(cli: Cli, tiny: Path, tmp_path: Path):
    run = tmp_path / "run"
    done = cli(*words(tiny, run, "--nulls", 2, "--tuned", tiny / "other", "--json"))
    assert done.code == 0, done.err
    document = done.json
    assert document["schema"] == "emlens/diff_run/1"
    assert document["tuned"] == [str(tiny / "tuned"), str(tiny / "other")]
    first, second = document["diffs"]
    assert first["logits"]["kl_base_tuned"] > 0
    assert first["logits"]["kl_base_tuned"] != second["logits"]["kl_base_tuned"]
    assert [len(band["kl_base_tuned"]) for band in document["nulls"]] == [2, 2]
    saved: Any = load_result(run / "results" / "01_diff")
    assert saved.logits.kl_base_tuned == first["logits"]["kl_base_tuned"]
    report = json.loads((run / "report.json").read_text())
    kinds = [result["schema"].split("/")[1] for result in report["results"]]
    assert kinds == ["adapter_proof", "model_diff", "null_band"] * 2


def test_the_same_command_goes_on_without_computing_again(
    cli: Cli, tiny: Path, finished: tuple[Path, Done], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed again")

    run, first = finished
    assert first.code == 0, first.err
    for name in ("load_base", "compare_models"):
        monkeypatch.setattr(study, name, refuse)
    again = cli(*words(tiny, run, "--json"))
    assert (again.code, again.json) == (0, first.json)


def test_a_run_interrupted_half_way_keeps_what_is_finished(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    command = words(tiny, tmp_path / "run", "--nulls", 1)
    with monkeypatch.context() as patch:
        patch.setattr(study, "load_base", interrupt)
        early = cli(*command)
        assert (early.code, "nothing was finished yet" in early.err) == (130, True)
    with monkeypatch.context() as patch:
        patch.setattr(study, "compare_nulls", interrupt)
        late = cli(*command)
        assert late.code == 130
        assert f"what is finished is in {tmp_path / 'run'}" in late.err
    assert (tmp_path / "run/results/01_diff/result.json").exists()
    assert not (tmp_path / "run/results/01_nulls").exists()
    assert [p for p in (tmp_path / "run").rglob("*") if p.suffix == ".tmp"] == []
    with monkeypatch.context() as patch:
        patch.setattr(study, "compare_models", interrupt)
        assert cli(*command).code == 0
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--nulls", 1], "settings.nulls was 0, now 1"),
        (["--limit", 2], "n_chats was 4, now 2"),
        (["--scale", "0.5"], "settings.scale was 1.0, now 0.5"),
        (["--sites", "mlp_out"], "settings.sites[0] was 'resid_post', now 'mlp_out'"),
    ],
)
def test_a_changed_plan_is_refused_naming_what_differs(
    cli: Cli, tiny: Path, finished: tuple[Path, Done], more: list[object], named: str
):
    run, _ = finished
    before = read_tree(run)
    for extra in ([], ["--dry-run"]):
        done = cli(*words(tiny, run, *more, *extra))
        assert (done.code, done.out) == (2, "")
        assert done.err.splitlines()[-1].startswith("PlanChangedError: ")
        assert named in done.err
    assert read_tree(run) == before


def test_other_weights_under_the_same_name_are_another_plan(cli: Cli, tiny: Path, tmp_path: Path):
    base = save_tiny_base(tmp_path / "base")
    command = [*words(tiny, tmp_path / "run"), "--base", base]
    assert cli(*command).code == 0
    save_tiny_base(base, seed=5)
    done = cli(*command)
    assert done.code == 2
    assert "base_files was" in done.err


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(cli: Cli, tiny: Path, tmp_path: Path):
    done = cli(*words(tiny, tmp_path / "run", "--dry-run", "--json"))
    assert done.code == 0
    assert done.json["settings"]["positions"] == ["response"]
    assert not (tmp_path / "run").exists()


def test_prompts_without_responses_are_compared_everywhere(cli: Cli, tiny: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One?\nTwo?\n")
    done = cli(*words(tiny, tmp_path / "run"), "--prompts", prompts, "--json")
    assert done.json["diffs"][0]["activations"]["positions"] == ["all"]


def test_a_full_checkpoint_can_be_compared_without_a_null_band(
    cli: Cli, tiny: Path, tmp_path: Path
):
    full = save_tiny_base(tmp_path / "full", seed=3)
    command = ["diff", "--base", tiny / "base", "--tuned", full]
    command += ["--prompts", tiny / "chats.jsonl", "--out", tmp_path / "run"]
    done = cli(*command, "--json")
    assert (done.code, done.json["proofs"]) == (0, [None])
    refused = cli(*command, "--nulls", 2)
    assert refused.code == 2
    assert "nulls: " in refused.err
    assert "no adapter" in refused.err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", "", "the file has no chats"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "bad.jsonl:2: not JSON"),
        ("nouser.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "no user turn"),
        ("long.jsonl", json.dumps({"prompt": "x" * 600}), "more than the model's context"),
        ("prompts.csv", "a,b\n", "expected a .jsonl or .txt file"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(
    cli: Cli, tiny: Path, tmp_path: Path, name: str, content: str, said: str
):
    (tmp_path / name).write_text(content)
    done = cli(*words(tiny, tmp_path / "run"), "--prompts", tmp_path / name)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sites", "resid_psot"], "nearest: resid_post"),
        (["--sites", "resid_psot", "--dry-run"], "nearest: resid_post"),
        (["--sites", "resid_post.9"], "out of range: the model has 2 layers"),
        (["--positions", "answer"], "positions"),
        (["--dtype", "float31"], "expected auto, float32"),
        (["--scale", "model.layers.9.x=1"], "modules the adapter does not have"),
        (["--tuned", "nowhere/at/all/x"], "x"),
        (["--prompts", "missing.jsonl"], "neither an existing path"),
    ],
)
def test_wrong_values_are_named(
    cli: Cli, tiny: Path, tmp_path: Path, more: list[object], said: str
):
    done = cli(*words(tiny, tmp_path / "run"), *more)
    assert done.code in (2, 3)
    assert (done.code == 3) == ("nowhere" in str(more))
    assert said in done.err
    assert "Traceback" not in done.err


def test_an_adapter_folder_as_base_says_where_it_belongs(cli: Cli, tiny: Path, tmp_path: Path):
    done = cli(*words(tiny, tmp_path / "run"), "--base", tiny / "tuned")
    assert done.code == 2
    assert "holds a LoRA adapter" in done.err
