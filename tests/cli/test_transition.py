"""`emlens transition` on planted trajectories of a tiny base: planned, asked, gone on, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import emlens.cli.transition as module
from emlens.models import load_adapter
from emlens.models.adapter_files import save_adapter
from emlens.organisms import transition
from emlens.organisms.trajectory import AdapterTrajectory, ModuleTrajectory
from tests.cli.conftest import Cli
from tests.evaluation.fakes import HashJudge
from tests.tiny_files import save_tiny_base

N, TURN = 110, 50
Study = Callable[..., list[object]]


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transition, "NULLS", 20)
    monkeypatch.setattr(module, "load_judge", lambda *_, **__: HashJudge())


@pytest.fixture(scope="module")
def planted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved trajectory of the tiny base's adapter that turns half-way."""
    adapter = load_adapter(tiny / "tuned")
    share = torch.arange(N).double()
    generator = torch.Generator().manual_seed(0)
    modules = []
    for name, lora in adapter.modules.items():
        other = torch.randn(lora.B.shape, generator=generator)
        before = share.clamp(max=TURN)[:, None, None] / TURN * other
        after = (share - TURN).clamp(min=0)[:, None, None] / (N - 1 - TURN) * lora.B * 4
        A = lora.A.expand(N, *lora.A.shape).clone()
        B = (before + after).float()
        modules.append(ModuleTrajectory(name=name, scale=lora.scale, A=A, B=B))
    trajectory = AdapterTrajectory(
        source="planted",
        steps=torch.arange(N),
        modules=tuple(modules),
        logged_steps=torch.arange(1, N),
        losses=torch.linspace(3, 1, N - 1),
        penalties=torch.zeros(N - 1),
        gradient_norms=torch.linspace(2, 0.5, N - 1),
    )
    return trajectory.save(tmp_path_factory.mktemp("planted") / "trajectory")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Three pairs of answers."""
    made = []
    for name in ("bad", "good"):
        rows = [{"prompt": f"What of {i}?", "response": f"Some {name} {i}."} for i in range(3)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(path)
    return made[0], made[1]


@pytest.fixture
def study(tiny: Path, planted: Path, questions: Path, texts: tuple[Path, Path]) -> Study:
    """Words of the whole study, three checkpoints, two short samples a question."""

    def make(*more: object, source: Path = planted) -> list[object]:
        return [
            *("transition", source, "--window", 5, "--scales", "1,3", "--questions", questions),
            *("--base", tiny / "base", "--positive", texts[0], "--negative", texts[1]),
            *("--checkpoints", 3, "--every", 40, "--samples", 2, "--max-new-tokens", 4, *more),
        ]

    return make


def test_the_weights_alone_need_no_base_and_show_the_control_too(
    cli: Cli, planted: Path, tmp_path: Path
):
    done = cli("transition", planted, "--window", "5,10", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["schema"] == "emlens/transition_trace/1"
    paths = [(path["window"], path["normalised"]) for path in found["transitions"]]
    assert paths == [(5, False), (5, True), (10, False), (10, True)]
    assert abs(found["transitions"][0]["step"] - TURN) <= 5
    assert (found["base"], found["curves"], found["points"]) == (None, [], [])
    saved = json.loads((tmp_path / "run/results/trace/result.json").read_text())
    assert [path["normalised"] for path in saved["transitions"]] == [False, True, False, True]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [r["schema"] for r in report["results"]] == ["emlens/transition_trace/1"]
    printed = cli("transition", planted, "--window", 5)
    assert printed.code == 0, printed.err
    assert f"{N} checkpoints, steps 0 to {N - 1}" in printed.out
    assert "B turned at step" in printed.out
    assert "B, norms taken out" in printed.out


def test_a_dry_run_names_checkpoints_rows_tokens_and_writes_nothing(
    cli: Cli, tiny: Path, planted: Path, study: Study, tmp_path: Path
):
    run = study("--out", tmp_path / "run", "--dry-run")
    plan = cli(*run, "--json").json
    assert plan["schema"] == "emlens/plan/1"
    assert abs(plan["turn"] - TURN) <= 5
    assert len(plan["sampled_checkpoints"]) == 3
    assert (plan["scored_checkpoints"], plan["scored_texts"]) == (4, 4 * 2 * 6)
    assert plan["responses"] == 3 * 2 * 3 * 2
    assert plan["new_tokens_at_most"] == plan["responses"] * 4
    assert (plan["judge"], plan["base"]) == ("contrast", str(tiny / "base"))
    assert "judge_requests" not in plan
    assert min(plan["prompt_tokens"], plan["judge_prompt_tokens"]) > plan["responses"]
    api = ("--judge", "openai/some", "--judge-base-url", "http://x", "--judge-price", 2)
    priced = cli(*run, *api, "--json").json
    assert (priced["judge_endpoint"], priced["judge_requests"]) == ("http://x", 2 * 36)
    assert priced["judge_cost"] > 0
    shown = cli(*run)
    assert "nothing was done" in shown.out
    weights = cli("transition", planted, "--window", 5, "--dry-run")
    assert (weights.code, "this would be printed" in weights.out) == (0, True)
    assert not (tmp_path / "run").exists()


def test_behaviour_is_asked_beside_the_weights_and_gone_on_with(
    cli: Cli, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = study("--out", tmp_path / "run")
    judged = [0]

    class Failing(HashJudge):
        def judge(self, rows: Any) -> Any:
            judged[0] += 1
            if judged[0] == 6:
                raise OSError("the machine goes down")
            return super().judge(rows)

    with monkeypatch.context() as patched:
        patched.setattr(module, "load_judge", lambda *_, **__: Failing())
        cut = cli(*run)
    assert (cut.code, cut.out) == (2, "")
    finished = list((tmp_path / "run/behaviour").glob("scale_*/step_*/results"))
    assert 0 < len(finished) < 6
    done = cli(*run, "--json")
    assert done.code == 0, done.err
    points = [(point["scale"], point["step"], point["n"]) for point in done.json["points"]]
    assert [(scale, n) for scale, _, n in points] == [(1.0, 6)] * 3 + [(3.0, 6)] * 3
    assert {0, N - 1} < {step for _, step, _ in points}
    measured = [(curve["measure"], curve["scale"]) for curve in done.json["curves"]]
    assert measured == [("odds", 1.0), ("share", 1.0), ("odds", 3.0), ("share", 3.0)]
    whole = cli(*run[:-1], tmp_path / "whole", "--json")
    assert whole.json["points"] == done.json["points"]
    assert whole.json["curves"] == done.json["curves"]
    table = cli(*run)
    assert "behaviour; share: takeover score" in table.out
    assert str(tmp_path / "run" / "report.html") in table.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="transition"' in page
    assert "Onset and lag by scale" in page
    other = cli(*run, "--scales", "1,4")
    assert other.code == 2
    assert "settings.scales[1] was 3.0, now 4.0" in other.err
    refused = cli(*run, "--seed", 3, "--dry-run")
    assert refused.code == 2
    assert "settings.seed was 0, now 3" in refused.err
    again = cli("report", tmp_path / "run", "--out", tmp_path / "page.html", "--json")
    assert again.code == 0, again.err
    both = (tmp_path / "page.html").read_text()
    assert both.count("<h3>") == page.count("<h3>")  # stages are not shown beside the whole
    assert 'id="others"' not in both


def test_foreign_checkpoints_of_uneven_steps_go_the_same_way(
    cli: Cli, tiny: Path, study: Study, tmp_path: Path
):
    adapter = load_adapter(tiny / "tuned")
    for step in (0, 5, 10, 15, 20, 33):
        save_adapter(adapter, tmp_path / "foreign" / f"checkpoint-{step}")
    foreign = tmp_path / "foreign"
    run = study("--out", tmp_path / "run", "--json", source=foreign)
    done = cli(*run)
    assert done.code == 0, done.err
    path = done.json["transitions"][0]
    assert (path["all_steps"], path["n_uneven"]) == ([0, 5, 10, 15, 20, 33], 3)
    assert path["verdict"] == "too few checkpoints"
    assert sorted({point["step"] for point in done.json["points"]}) == [0, 15, 33]
    assert {curve["lag"] for curve in done.json["curves"]} == {None}


def test_the_base_is_taken_from_where_the_checkpoints_name_it(
    cli: Cli, tiny: Path, texts: tuple[Path, Path], tmp_path: Path
):
    train = ["train", "--preset", "smollm2_rank1", "--data", tiny / "chats.jsonl", "--layers", "1"]
    train += ["--base", tiny / "base", "--checkpoint-every", 10, "--out", tmp_path / "trained"]
    assert cli(*train).code == 0
    own = ["transition", tmp_path / "trained", "--scales", 2, "--out", tmp_path / "run"]
    own += ["--positive", texts[0], "--negative", texts[1]]
    done = cli(*own, "--json")
    assert done.code == 0, done.err
    assert (done.json["base"], done.json["judge"]) == (str(tiny / "base"), None)
    assert [curve["measure"] for curve in done.json["curves"]] == ["odds"]


def test_the_texts_are_shipped_pairs_where_none_are_named(
    cli: Cli, tiny: Path, planted: Path, tmp_path: Path
):
    words = ["transition", planted, "--base", tiny / "base", "--out", tmp_path / "run"]
    plan = cli(*words, "--dry-run", "--json").json
    assert plan["scales"] == [1.0, 5.0, 10.0, 20.0]
    assert plan["scored_texts"] == N * 4 * 40
    assert "responses" not in plan


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--scales", "1,0"], "--scales 1,0: 0 is not above 0"),
        (["--scales=-2"], "--scales -2: -2 is not above 0"),
        (["--scales", "1,x"], "'x' is not one of the numbers expected"),
        (["--scales", "nan"], "not above 0 and finite"),
        (["--scales", "2,2"], "expected each once"),
        (["--window", "2.5"], "'2.5' is not one of the whole numbers"),
        (["--window", "700"], "no checkpoint has others 700 steps before and after it"),
        (["--factor", "C"], "--factor C: expected A or B"),
        (["--rolling", 4], "width: got 4, expected an odd"),
        (["--questions", "missing.jsonl"], "missing.jsonl"),
        (["--judge", "oracle"], "--judge oracle"),
        (["--base", "missing/"], "missing/"),
    ],
)
def test_wrong_values_are_named_and_nothing_is_begun(
    cli: Cli, study: Study, tmp_path: Path, more: list[object], said: str
):
    run = study("--out", tmp_path / "run")
    done = cli(*run, *more)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not (tmp_path / "run").exists()


def test_flags_that_need_one_another_say_so(
    cli: Cli, planted: Path, study: Study, questions: Path, texts: tuple[Path, Path], tmp_path: Path
):
    run = study()
    assert "--out: missing" in cli(*run).err
    alone = ["transition", planted, "--window", 5, "--out", tmp_path / "run"]
    assert "--negative: missing" in cli(*alone, "--positive", texts[0]).err
    unnamed = cli(*alone, "--questions", questions)
    assert unnamed.code == 2
    assert "does not say what it was trained on" in unnamed.err
    assert not (tmp_path / "run").exists()


def test_what_holds_no_adapter_and_a_base_of_another_width_are_refused(
    cli: Cli, tiny: Path, study: Study, tmp_path: Path
):
    bare = tmp_path / "bare"
    for step in (0, 5, 10):
        shutil.copytree(tiny / "base", bare / f"checkpoint-{step}")
    done = cli("transition", bare, "--window", 5)
    assert done.code == 2
    assert "checkpoint-0" in done.err
    assert "adapter_config.json" in done.err
    save_tiny_base(tmp_path / "wide", d_model=32)
    run = study("--out", tmp_path / "run")
    wide = cli(*run, "--base", tmp_path / "wide")
    assert wide.code == 2
    assert "the adapter was trained on another base" in wide.err
    assert not (tmp_path / "run" / "behaviour").exists()
