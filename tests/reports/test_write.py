"""Writing: both files or none, the page from the JSON, the JSON from the results."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from emlens.artifacts import ArtifactError
from emlens.reports import ReportError, read_report, render_report, write_report
from tests.reports.synthetic import make_diff, make_extra, make_null, make_proof


def test_a_page_and_its_json_are_written_side_by_side(tmp_path: Path):
    results = [make_proof(n_layers=2), make_diff(n_chats=2), make_null()]
    path = write_report(results, tmp_path / "new" / "report.html", extra=make_extra())
    assert path == tmp_path / "new" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    report = read_report(path.with_suffix(".json"))
    assert path.read_text(encoding="utf-8") == render_report(report)
    assert report["schema"] == "emlens/report/1"
    assert [r["schema"] for r in report["results"]] == [r.schema() for r in results]
    extra = json.loads(json.dumps(make_extra()))
    assert report["seconds"] == extra.pop("seconds")
    assert report["extra"] == extra
    assert {"python", "torch"} <= set(report["versions"])


def test_vectors_stay_with_the_saved_results_and_all_else_is_in_the_json(tmp_path: Path):
    diff = make_diff(n_chats=1)
    path = write_report([diff], tmp_path / "r.html")
    (written,) = read_report(path.with_suffix(".json"))["results"]
    whole = json.loads(json.dumps(diff.to_dict()))
    for name in ("mean_base", "mean_tuned", "top_directions"):
        del whole["activations"][name]
    assert written == whole


def test_a_report_is_written_over_an_older_one(tmp_path: Path):
    write_report([make_proof(n_layers=1)], tmp_path / "r.html")
    write_report([make_proof(n_layers=2)], tmp_path / "r.html")
    (proof,) = read_report(tmp_path / "r.json")["results"]
    assert len(proof["modules"]) == 14
    assert "14 of 14 modules" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_cannot_be_shown_is_refused_before_anything_is_written(tmp_path: Path):
    old = write_report([make_proof(n_layers=1)], tmp_path / "r.html").read_bytes()
    with pytest.raises(ReportError, match="answers"):
        write_report([make_proof()], tmp_path / "r.html", extra={"answers": [{"question": 1}]})
    with pytest.raises(TypeError, match=r"extra\.when"):
        write_report([make_proof()], tmp_path / "r.html", extra={"when": object()})
    assert (tmp_path / "r.html").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["report.json", "report", "folder.html"])
def test_a_path_that_is_no_page_is_refused(tmp_path: Path, name: str):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match=r"ends in \.html"):
        write_report([make_proof(n_layers=1)], tmp_path / name)


def test_a_report_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="results: got none"):
        write_report([], tmp_path / "r.html")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": "emlens/report/1", "resu', "not whole JSON"),
        ("[]", "expected an object"),
        ('{"schema": "emlens/report/9", "results": []}', "emlens/report/9"),
        ('{"schema": "emlens/model_diff/1"}', "write_report"),
        ("{}", "schema is None"),
        ('{"schema": "emlens/report/1", "results": [3]}', "list of objects"),
    ],
)
def test_what_is_not_a_report_is_named(tmp_path: Path, text: str, said: str):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=said) as caught:
        read_report(file)
    assert str(file) in str(caught.value)


def test_a_missing_report_is_named(tmp_path: Path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_any_saved_result_can_be_reported(tmp_path: Path):
    from dataclasses import dataclass

    from emlens.artifacts import Result

    @dataclass(frozen=True, kw_only=True)
    class Unheard(Result):
        kind: ClassVar[str] = "unheard"
        depth: float
        parts: tuple[Any, ...] = ()

    path = write_report([Unheard(depth=0.125)], tmp_path / "r.html")
    assert "0.125" in path.read_text(encoding="utf-8")
