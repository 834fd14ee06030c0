"""`emlens report`: one page about runs that are there."""

import json
from pathlib import Path

import pytest

from emlens.evaluation import Question, compare_evaluations, evaluate, read_evaluation
from emlens.models.generate import Sampling
from emlens.runs import RunFolder
from emlens.studies.stages import StageTimes
from tests.cli.conftest import Cli
from tests.evaluation.fakes import HashJudge, make_model


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from emlens.data import load_chats
    from emlens.studies import DiffSettings, diff_finetunes

    folder = tmp_path_factory.mktemp("report") / "run"
    chats = load_chats(tiny / "chats.jsonl")
    settings = DiffSettings(nulls=1)
    diff_finetunes(tiny / "base", [tiny / "tuned"], chats, settings=settings, out=folder)
    return folder


def test_a_page_is_made_of_all_results_of_all_runs(cli: Cli, run: Path, tmp_path: Path):
    other = RunFolder.start(tmp_path / "other", {"kind": "sample"})
    other.save_result("times", StageTimes(seconds={"load": 1.5, "total": 2.5}))
    done = cli("report", run, other.path, "--out", tmp_path / "page.html", "--json")
    assert done.code == 0, done.err
    assert done.json["n_results"] == 4
    report = json.loads(Path(done.json["json"]).read_text())
    kinds = [result["schema"].split("/")[1] for result in report["results"]]
    assert kinds == ["model_diff", "null_band", "adapter_proof"]
    assert report["seconds"] == {"other load": 1.5}
    assert "<html" in Path(done.json["report"]).read_text()


def test_a_single_saved_result_can_be_reported(cli: Cli, run: Path, tmp_path: Path):
    done = cli("report", run / "results" / "01_diff", "--out", tmp_path / "page.html")
    assert (done.code, done.out.split(":")[0]) == (0, "1 results")


def test_what_holds_no_results_is_refused(cli: Cli, tmp_path: Path):
    RunFolder.start(tmp_path / "empty", {"kind": "sample"})
    for folder in ("empty", "missing"):
        done = cli("report", tmp_path / folder, "--out", tmp_path / "page.html")
        assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_is_no_html_file_is_refused(cli: Cli, run: Path, tmp_path: Path):
    done = cli("report", run, "--out", tmp_path / "page.pdf")
    assert done.code == 2
    assert "ends in .html" in done.err


def test_evaluations_and_their_difference_have_figures(cli: Cli, tmp_path: Path):
    questions = [Question(id=f"q{i}", paraphrases=(f"What about w{i}?",)) for i in range(3, 6)]
    runs = []
    for seed in range(2):
        sampling = Sampling(n=6, max_new_tokens=4, seed=seed)
        out = tmp_path / f"run{seed}"
        evaluate(make_model(), questions, judge=HashJudge(), out=out, sampling=sampling)
        runs.append(read_evaluation(out))
    difference = compare_evaluations(*runs).save(tmp_path / "difference")
    page = tmp_path / "page.html"
    done = cli("report", tmp_path / "run0", tmp_path / "run1", difference, "--out", page, "--json")
    assert done.code == 0, done.err
    report = json.loads(page.with_suffix(".json").read_text())
    kinds = [result["schema"].split("/")[1] for result in report["results"]]
    assert kinds == ["evaluation", "evaluation", "behaviour_difference"]
    text = page.read_text()
    assert text.count('<div class="plot"') == 4  # both together, each alone, their difference
    assert 'id="others"' not in text


def test_the_times_of_one_run_keep_their_names_and_total(cli: Cli, tmp_path: Path):
    run = RunFolder.start(tmp_path / "run", {"kind": "sample"})
    seconds = {"load": 1.5, "total": 2.5}
    run.save_result("times", StageTimes(seconds=seconds))
    page = tmp_path / "page.html"
    assert cli("report", run.path, "--out", page).code == 0
    assert json.loads(page.with_suffix(".json").read_text())["seconds"] == seconds
