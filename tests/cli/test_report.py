"""`emlens report`: one page about runs that are there."""

import json
from pathlib import Path

import pytest

from emlens.runs import RunFolder
from emlens.studies.answer_questions import Answer, Answers
from emlens.studies.stages import StageTimes
from tests.cli.conftest import Cli


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
    answers = Answers(answers=(Answer(question="Who?", answers={"base": "Me."}),))
    other.save_result("answers", answers)
    other.save_result("times", StageTimes(seconds={"load": 1.5}))
    done = cli("report", run, other.path, "--out", tmp_path / "page.html", "--json")
    assert done.code == 0, done.err
    assert done.json["n_results"] == 5
    report = json.loads(Path(done.json["json"]).read_text())
    kinds = [result["schema"].split("/")[1] for result in report["results"]]
    assert kinds == ["model_diff", "null_band", "adapter_proof"]
    assert report["extra"]["answers"] == [{"question": "Who?", "answers": {"base": "Me."}}]
    assert report["extra"]["seconds"] == {"other load": 1.5}
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
