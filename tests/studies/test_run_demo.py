"""The demo from end to end: on tiny models in seconds, on the real one when there is time."""

import importlib
import json
from pathlib import Path

import pytest

from emlens.results import load_result
from emlens.runs import PlanChangedError
from emlens.studies import DemoResult, run_demo

study = importlib.import_module(run_demo.__module__)
STAGES = {"load", "answers", "diff_heldout", "nulls_heldout", "diff_answers"}


def run_tiny(tiny: Path, out: Path, *, quick: bool = True) -> DemoResult:
    sources = {name: str(tiny / name) for name in ("base", "tuned", "twin")}
    return run_demo(out, quick=quick, **sources)


def test_the_report_holds_proof_comparisons_answers_and_seconds(tiny: Path, tmp_path: Path):
    result = run_tiny(tiny, tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    kinds = [part["schema"].split("/")[1] for part in report["results"]]
    assert kinds == ["adapter_proof", "model_diff", "null_band", "model_diff", "adapter_proof"]
    assert len(report["extra"]["answers"]) == 2
    assert set(report["extra"]["answers"][0]["answers"]) == {"base", "tuned", "twin"}
    assert set(result.seconds) >= STAGES
    assert report["extra"]["seconds"] == result.seconds
    assert (result.modules_in_effect, result.modules) == (6, 6)
    assert min(result.kl_heldout, result.kl_answers, result.kl_nulls_high) > 0
    assert Path(result.report).read_text().startswith("<!")
    assert load_result(result.save(tmp_path / "saved")) == result


def test_a_second_run_computes_nothing_and_finds_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed again")

    first = run_tiny(tiny, tmp_path / "run")
    for name in ("load_base", "load_pair", "compare_models", "compare_nulls", "answer_questions"):
        monkeypatch.setattr(study, name, refuse)
    assert run_tiny(tiny, tmp_path / "run") == first


def test_an_interrupted_demo_goes_on_where_it_was(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "compare_nulls", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tiny, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(study, "answer_questions", interrupt)
        assert set(run_tiny(tiny, tmp_path / "run").seconds) >= STAGES


def test_a_full_demo_is_another_plan_than_a_quick_one(tiny: Path, tmp_path: Path):
    run_tiny(tiny, tmp_path / "run")
    with pytest.raises(PlanChangedError, match=r"size\.questions was 2, now "):
        run_tiny(tiny, tmp_path / "run", quick=False)


def test_what_is_no_adapter_is_refused(tiny: Path, tmp_path: Path):
    sources = {"base": str(tiny / "base"), "tuned": str(tiny / "tuned")}
    with pytest.raises(ValueError, match=r"twin: .* is no adapter"):
        run_demo(tmp_path / "run", quick=True, twin=str(tiny / "base"), **sources)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_demo_works_on_the_shipped_model(tmp_path: Path):
    result = run_demo(tmp_path / "run", quick=True)
    assert result.modules_in_effect == result.modules > 0
    assert result.kl_heldout > result.kl_nulls_high
    changed = [row for row in result.answers if row.answers["base"] != row.answers["tuned"]]
    assert changed
