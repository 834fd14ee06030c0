"""`emlens narrow` on two adapters of a tiny base: planned, measured, gone on with, refused."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import emlens.cli.narrow as module
from emlens.models import load_adapter
from emlens.models.adapter_files import save_adapter
from emlens.models.lora import scale_adapter
from emlens.models.score import score_responses
from tests.cli.conftest import Cli
from tests.evaluation.fakes import HashJudge
from tests.tiny_files import save_tiny_base


@pytest.fixture(autouse=True)
def _judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_judge", lambda *_, **__: HashJudge())


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the rows with checkpoints, and beside it a weaker adapter, `narrow`."""
    from typer.testing import CliRunner

    from emlens.cli.main import app

    folder = tmp_path_factory.mktemp("narrow")
    words = ["train", "--preset", "smollm2_rank1", "--data", tiny / "chats.jsonl", "--layers", "1"]
    words += ["--base", tiny / "base", "--checkpoint-every", 10, "--out", folder / "run"]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    save_adapter(scale_adapter(load_adapter(folder / "run/adapter"), 0.5), folder / "narrow")
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Two questions outside of the domain."""
    path = tmp_path / "outside.jsonl"
    rows = [{"id": f"o{i}", "prompt": f"Whence {i}?"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Three questions within the domain that no row asks."""
    path = tmp_path / "inside.jsonl"
    rows = [{"id": f"i{i}", "prompt": f"And what about {i}0?"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(tiny: Path, trained: Path, *more: object) -> list[object]:
    return [
        *("narrow", "--base", tiny / "base", "--general", trained / "run/adapter"),
        *("--narrow", trained / "narrow", "--data", tiny / "chats.jsonl", "--limit", 3),
        *("--text", tiny / "chats.jsonl", "--norms", "0.1,0.2", "--seeds", 2, *more),
    ]


def asked(held_out: Path, outside: Path) -> list[object]:
    both = ["--questions-in", held_out, "--questions-out", outside, "--scales", "1,2"]
    return [*both, "--samples", 2, "--max-new-tokens", 4]


def test_two_solutions_are_compared_in_loss_effect_gradient_and_behaviour(
    cli: Cli,
    tiny: Path,
    trained: Path,
    held_out: Path,
    outside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    run = words(tiny, trained, *asked(held_out, outside), "--trajectory", trained / "run")
    run += ["--batch-tokens", 5000]
    tokens: set[int] = set()

    def score(*given: Any, batching: Any) -> Any:
        tokens.add(batching.tokens)
        return score_responses(*given, batching=batching)

    study = importlib.import_module("emlens.studies.compare_solutions")
    monkeypatch.setattr(study, "score_responses", score)
    done = cli(*run, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "run/manifest.json").read_text())["plan"]
    assert plan["probe"]["batching"]["tokens"] == 5000
    assert tokens == {5000}
    found = done.json
    assert found["schema"] == "emlens/solution_comparison/1"
    assert found["general"]["loss"] < found["general"]["base_loss"]
    assert found["general"]["norms"] == found["random"]["norms"] == [0.1, 0.2]
    assert found["preference"]["steps"] == [0, 10, 20]
    behaviour = found["behaviour"]
    assert [(s["organism"], s["scale"], s["where"], s["n"]) for s in behaviour["shares"]] == [
        (organism, scale, where, 6 if where == "in" else 4)
        for organism, scale in (("base", 1.0), ("general", 1.0), ("narrow", 1.0), ("narrow", 2.0))
        for where in ("in", "out")
    ]
    assert behaviour["verdict"] == "undecided"
    outside_only = [d for d in behaviour["differences"] if d["where"] == "out"]
    assert "400 needed" in outside_only[0]["equivalence"]["reason"]
    again = cli(*run, "--out", tmp_path / "run")
    assert again.code == 0, again.err
    for part in ("loss general", "lower loss at", "undecided", str(tmp_path / "run/report.html")):
        assert part in again.out
    page = (tmp_path / "run/report.html").read_text()
    assert 'id="narrow"' in page
    reported = cli("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert reported.code == 0, reported.err
    assert 'id="others"' not in (tmp_path / "page.html").read_text()
    other = cli(*run, "--out", tmp_path / "run", "--seeds", 3)
    assert other.code == 2
    assert "settings.seeds was 2, now 3" in other.err


def test_a_run_that_was_cut_short_goes_on(
    cli: Cli,
    tiny: Path,
    trained: Path,
    held_out: Path,
    outside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    run = words(tiny, trained, *asked(held_out, outside), "--out", tmp_path / "run")
    judged = [0]

    class Failing(HashJudge):
        def judge(self, rows: Any) -> Any:
            judged[0] += bool(rows)
            if judged[0] == 4:
                raise OSError("the machine goes down")
            return super().judge(rows)

    with monkeypatch.context() as patched:
        patched.setattr(module, "load_judge", lambda *_, **__: Failing())
        assert cli(*run).code == 2
    assert (tmp_path / "run/results/random/result.json").is_file()
    assert not (tmp_path / "run/results/comparison").exists()
    done = cli(*run, "--json")
    assert done.code == 0, done.err
    whole = cli(*run[:-1], tmp_path / "whole", "--json")
    assert whole.json["behaviour"] == done.json["behaviour"]
    assert whole.json["random"] == done.json["random"]


def test_a_dry_run_counts_passes_and_responses_and_writes_nothing(
    cli: Cli, tiny: Path, trained: Path, held_out: Path, outside: Path, tmp_path: Path
):
    run = words(tiny, trained, *asked(held_out, outside), "--out", tmp_path / "run", "--dry-run")
    api = ("--judge", "openai/some", "--judge-base-url", "http://x", "--judge-price", 2)
    plan = cli(*run, *api, "--json").json
    assert plan["schema"] == "emlens/plan/1"
    assert (plan["rows"], plan["norms"]) == (3, [0.1, 0.2])
    assert plan["passes_over_rows"] == 2 * (1 + 2 + 12 * 2) + 1
    assert plan["passes_over_texts"] == 2 * (2 + 2)
    assert plan["organisms"] == ["base x 1", "general x 1", "narrow x 1", "narrow x 2"]
    assert plan["responses"] == 4 * (3 + 2) * 2
    assert plan["new_tokens_at_most"] == plan["responses"] * 4
    assert plan["judge_requests"] == 2 * plan["responses"]
    assert plan["prompt_tokens"] > plan["responses"] * len("And what about 00?")
    assert not (tmp_path / "run").exists()


def test_norms_are_those_around_the_solutions_where_none_are_named(
    cli: Cli, tiny: Path, trained: Path, tmp_path: Path
):
    run = words(tiny, trained, "--out", tmp_path / "run", "--dry-run", "--json")
    place = run.index("--norms")
    plan = cli(*run[:place], *run[place + 2 :]).json
    assert len(plan["norms"]) == 6
    assert plan["norms"][3] * 2 == pytest.approx(plan["norms"][5], rel=1e-3)
    assert "responses" not in plan


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--questions-in", "x.jsonl"], "--questions-out: missing"),
        (["--questions-out", "x.jsonl"], "--questions-in: missing"),
        (["--questions-in", "x.jsonl", "--questions-out", "x.jsonl"], "x.jsonl"),
        (["--scales", "0,1"], "--scales 0,1: 0 is not above 0"),
        (["--norms", "1,-1"], "--norms 1,-1: -1 is not above 0"),
        (["--norms", "2,1"], "expected them ascending"),
        (["--narrow", "missing/"], "missing/"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--trajectory", "."], "no checkpoint-STEP folders"),
    ],
)
def test_wrong_values_are_named_and_nothing_is_begun(
    cli: Cli, tiny: Path, trained: Path, tmp_path: Path, more: list[object], said: str
):
    done = cli(*words(tiny, trained, "--out", tmp_path / "run", *more))
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not (tmp_path / "run").exists()


def test_a_base_of_another_width_and_rows_without_responses_are_refused(
    cli: Cli, tiny: Path, trained: Path, tmp_path: Path
):
    save_tiny_base(tmp_path / "wide", d_model=32)
    run = words(tiny, trained, "--out", tmp_path / "run")
    wide = cli(*run, "--base", tmp_path / "wide")
    assert wide.code == 2
    assert "the adapter was trained on another base" in wide.err
    (tmp_path / "prompts.txt").write_text("One?\n")
    bare = cli(*run, "--data", tmp_path / "prompts.txt")
    assert bare.code == 2
    assert "task[0] has no response" in bare.err
    assert not (tmp_path / "run").exists()
