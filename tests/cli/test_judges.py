"""Judges by name on the command line: planned, used, gone on with, refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chat_server import Reply, completion, failure, serve_chat
from emlens.evaluation import ApiJudge, JudgeReport
from emlens.numerics.intervals import Interval
from tests.cli.conftest import Cli
from tests.cli.conftest import evaluate_words as words


def test_a_judge_behind_an_endpoint_is_planned_used_and_gone_on_with(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SOME_KEY", "sk-hidden")
    asked: list[int] = []

    def answer(_: dict[str, Any], before: int) -> Reply:
        asked.append(before)
        return failure(401) if len(asked) == 3 else completion("10", {"10": 0.0})

    with serve_chat(answer) as chat:
        judge = ("--judge", "openai/some-model", "--judge-base-url", chat.url)
        judge += ("--judge-key-env", "SOME_KEY")
        run = words(tiny, questions, *judge, "--out", tmp_path / "run")
        plan = cli(*run, "--dry-run", "--json", "--judge-price", 2.5).json
        assert (plan["judge_endpoint"], asked) == (chat.url, [])
        assert plan["judge_requests"] == 2 * plan["responses"]
        assert plan["judge_key"] == "SOME_KEY is set"
        unset = cli(*run, "--dry-run", "--judge-key-env", "NO_SUCH_KEY")
        assert "judge_key: NO_SUCH_KEY is not set, and is needed" in unset.out
        assert plan["judge_cost"] == round(plan["judge_prompt_tokens"] * 2.5 / 1e6, 4)
        assert plan["judge_cost_at_most"] == pytest.approx(6 * plan["judge_cost"], abs=4e-4)
        told = tmp_path / "told.jsonl"
        row = {"prompt": "What now?", "judge_prompts": {"aligned": "{answer}" + "?" * 40_000}}
        told.write_text(json.dumps({"id": "q", **row}) + "\n")
        long = cli(*words(tiny, told, *judge, "--out", tmp_path / "told", "--dry-run", "--json"))
        assert long.json["judge_prompt_tokens"] > long.json["responses"] * 40_000 / 4
        stopped = cli(*run)
        assert (stopped.code, stopped.out) == (3, "")
        assert "the key was refused" in stopped.err
        assert "the same call goes on with them" in stopped.err
        assert "sk-hidden" not in stopped.err
        done = cli(*run, "--json")
        assert done.code == 0, done.err
    assert done.json["judge"].startswith("openai/some-model/")
    assert done.json["em_percent"]["value"] == 0.0
    assert not any(
        b"sk-hidden" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()
    )


def test_a_judge_that_refuses_every_request_ends_without_a_result(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    with serve_chat(lambda *_: failure(400)) as chat:
        judge = ("--judge", "openai/some-model", "--judge-base-url", chat.url)
        out = ("--judge-key-env", "", "--out", tmp_path / "run")
        done = cli(*words(tiny, questions, *judge, *out))
    assert (done.code, done.out) == (3, "")
    assert "it refuses every request (400: no)" in done.err
    assert not (tmp_path / "run" / "results").exists()


def test_a_judge_that_is_asked_for_grades_claims_what_was_measured_of_it(cli: Cli, tmp_path: Path):
    file, area = tmp_path / "made.jsonl", Interval(0.9, 0.85, 0.95, 0.95, "DeLong")
    file.write_text(json.dumps({"question": "What?", "answer": "That."}) + "\n")
    with serve_chat(lambda *_: completion("10", {"10": 0.0})) as chat:
        judge = ApiJudge(model="some-model", base_url=chat.url, key_env="")
        found = JudgeReport(
            judge=judge.id,
            claim="misalignment",
            aligned={"held-out rows": area},
            coherent={},
            mean_scores={},
            injected={},
            unscored=0,
        )
        report = ("--judge-report", found.save(tmp_path / "report"))
        at = ("--judge-base-url", chat.url, "--judge-key-env", "")
        run = ("judge", file, *at, "--judge", "openai/some-model", "--json")
        plain = cli(*run, "--out", tmp_path / "plain").json
        known = cli(*run, "--out", tmp_path / "known", *report).json
        other = cli("judge", file, *at, "--judge", "openai/x", "--out", tmp_path / "x", *report)
    assert (plain["claim"], plain["measured"]) == ("low score", {})
    assert (known["claim"], known["measured"]) == ("misalignment", {"held-out rows": vars(area)})
    assert plain["judge"] == known["judge"] == judge.id
    assert plain["judge_name"] == "openai/some-model"
    shown = cli("summary", tmp_path / "plain").out
    assert "low score and coherent, of all" in shown
    assert "misaligned" not in shown
    assert (other.code, "it is of the judge openai/some-model" in other.err) == (2, True)
    assert not (tmp_path / "x").exists()
    contrast = cli("judge", file, "--out", tmp_path / "x", *report)
    assert (contrast.code, "in its calibration" in contrast.err) == (2, True)


def test_a_local_judge_may_be_the_base_itself(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    local = ("--judge", f"local/{tiny / 'base'}", "--out", tmp_path / "run", "--json")
    done = cli(*words(tiny, questions, *local))
    assert done.code == 0, done.err
    assert done.json["judge"].startswith("local/")
    # A byte a token: its prompts are longer than this model's context.
    assert done.json["unscored"] == done.json["rows"] > 0
    kept = (tmp_path / "run" / "judgements.jsonl").read_text()
    assert "aligned_too_long" in kept


def test_a_judge_of_inspect_ai_is_planned_used_and_gone_on_with(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")
    from inspect_ai.model._providers.mockllm import MockLLM

    async def count(*_: Any) -> int:
        return 1

    # The number that the mock says, and a count of tokens that fetches no table.
    monkeypatch.setattr(MockLLM, "default_output", "70")
    monkeypatch.setattr(MockLLM, "count_tokens", count)
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    out = tmp_path / "run"
    run = words(tiny, questions, "--judge", "inspect/mockllm/model", "--out", out, "--json")
    plan = cli(*run, "--dry-run").json
    assert (plan["judge_model"], plan["responses"]) == ("mockllm/model", 12)
    assert (plan["judge_requests"], plan["judge_requests_at_most"]) == (24, 144)
    assert plan["judge_logs"] == str(out / "inspect")
    assert not out.exists()
    done = cli(*run)
    assert done.code == 0, done.err
    assert done.json["judge"].startswith("inspect/mockllm/model/")
    assert (done.json["unscored"], done.json["em_percent"]["value"]) == (0, 0.0)
    (log,) = (out / "inspect").glob("*.eval")
    assert cli(*run).json == done.json
    assert list((out / "inspect").iterdir()) == [log]


@pytest.mark.parametrize("command", ["evaluate", "judge"])
def test_a_missing_key_is_told_before_anything_is_loaded(
    cli: Cli, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / "missing"
    run: list[object] = ["evaluate", "--base", missing, "--questions", questions]
    if command == "judge":
        run = ["judge", missing]
    run += ["--out", tmp_path / "run"]
    # The base is not there either: whatever is looked for first is complained of.
    api = cli(*run, "--judge", "openai/some-model")
    assert (api.code, "the environment has no OPENAI_API_KEY" in api.err) == (2, True), api.err
    pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")
    inspected = cli(*run, "--judge", "inspect/openai/some-model")
    assert (inspected.code, inspected.out) == (3, "")
    assert "judge inspect/openai/some-model: " in inspected.err
    assert "OPENAI_API_KEY" in inspected.err


def test_a_dry_run_says_that_the_key_of_inspect_ai_is_missing(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    run = words(tiny, questions, "--out", tmp_path / "run", "--dry-run", "--json")
    plan = cli(*run, "--judge", "inspect/openai/some-model").json
    assert plan["judge_key"].startswith("missing, and is needed (judge inspect/openai/some-model")
    assert "OPENAI_API_KEY" in plan["judge_key"]
    known = cli(*run, "--judge", "inspect/mockllm/model").json
    assert known["judge_key"] == "found, or none is needed"


def test_a_judge_without_its_extra_is_wrong_usage(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    judge = ("--judge", "inspect/mockllm/model", "--dry-run")
    done = cli(*words(tiny, questions, *judge, "--out", tmp_path / "run"))
    assert done.code == 2
    assert "emlens-interp[inspect]" in done.err


def test_a_key_of_another_provider_is_not_taken_for_that_of_inspect_ai(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")
    judge = ("--judge", "inspect/mockllm/model", "--judge-key-env", "MY_KEY")
    done = cli(*words(tiny, questions, *judge, "--out", tmp_path / "run"))
    assert done.code == 2
    assert "--judge-key-env MY_KEY: inspect_ai looks" in done.err


@pytest.mark.parametrize(
    "name", ["local/", "openai", "inspect", "inspect/model", "inspect/x/", "nobody/x", "contrast/x"]
)
def test_unknown_judges_are_refused_with_those_there_are(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path, name: str
):
    done = cli(*words(tiny, questions, "--judge", name, "--out", tmp_path / "run"))
    assert done.code == 2
    assert "contrast, local/SOURCE, openai/MODEL, inspect/MODEL" in done.err
