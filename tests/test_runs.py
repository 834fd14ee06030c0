"""Run folders: the same plan goes on, another one is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest

from emlens.artifacts import Result
from emlens.encoding import ArtifactError
from emlens.runs import PlanChangedError, RunFolder


@dataclasses.dataclass(frozen=True)
class Settings:
    tokens: int
    rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number(Result):
    kind: ClassVar[str] = "test_number"
    value: int


def make_plan(**changes: Any) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "command": "diff",
        "seed": 0,
        "examples": True,
        "layers": (1, 2),
        "batching": Settings(tokens=16384, rate=0.5),
    }
    return plan | changes


def test_the_same_plan_goes_on_where_it_was(tmp_path: Path):
    first = RunFolder.start(tmp_path / "a" / "run", make_plan())
    assert not first.has_result("diff")
    first.save_result("diff", Number(value=3))
    again = RunFolder.start(tmp_path / "a" / "run", make_plan())
    assert again.has_result("diff")
    assert again.read_result("diff", Number) == Number(value=3)
    assert (tmp_path / "a/run/results/diff/result.json").is_file()
    assert again.plan == first.plan == RunFolder.open(tmp_path / "a" / "run").plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"layers": (1, 3)}, r"layers\[1\] was 2, now 3"),
        ({"layers": (1, 2, 3)}, r"layers was \[1, 2\], now \[1, 2, 3\]"),
        ({"batching": Settings(tokens=8, rate=0.5)}, r"batching\.tokens was 16384, now 8"),
        ({"nulls": 8}, "nulls was absent, now 8"),
        ({"examples": 1}, "examples was True, now 1"),
        ({"batching": None}, r"batching was \{'tokens'.*, now None"),
        ({"seed": 1, "command": "train"}, "command was 'diff', now 'train'; seed was 0, now 1"),
    ],
)
def test_another_plan_is_refused_naming_what_differs(
    tmp_path: Path, change: dict[str, Any], message: str
):
    run = RunFolder.start(tmp_path, make_plan())
    manifest = (tmp_path / "manifest.json").read_text()
    with pytest.raises(PlanChangedError, match=message):
        RunFolder.start(tmp_path, make_plan(**change))
    assert (tmp_path / "manifest.json").read_text() == manifest
    assert RunFolder.start(tmp_path, make_plan()) == run


def test_a_setting_that_is_gone_and_one_called_absent_differ(tmp_path: Path):
    RunFolder.start(tmp_path, {"seed": 0, "mode": "absent"})
    with pytest.raises(PlanChangedError, match="mode was 'absent', now absent"):
        RunFolder.start(tmp_path, {"seed": 0})


def test_a_plan_of_non_finite_settings_resumes(tmp_path: Path):
    RunFolder.start(tmp_path, {"limit": math.inf, "none": math.nan})
    RunFolder.start(tmp_path, {"limit": math.inf, "none": math.nan})
    with pytest.raises(PlanChangedError, match="limit was 'Infinity', now 3"):
        RunFolder.start(tmp_path, {"limit": 3.0, "none": math.nan})


def test_a_plan_with_a_value_that_is_no_setting_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match=r"plan\.out holds a PosixPath"):
        RunFolder.start(tmp_path / "run", {"out": tmp_path})
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ArtifactError, match=r"holds \['thesis.tex'\] but no manifest.json"):
        RunFolder.start(tmp_path, make_plan())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ArtifactError, match="is a file"):
        RunFolder.start(tmp_path / "thesis.tex", make_plan())


def test_what_an_interrupted_start_left_does_not_stop_the_next(tmp_path: Path):
    (tmp_path / ".manifest.json.12345678.tmp").touch()
    assert RunFolder.start(tmp_path, make_plan()).plan["seed"] == 0


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", json.dumps({"schema": "emlens/run/1"}), '{"plan": {}}']
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_text(text)
    for begin in (lambda: RunFolder.open(tmp_path), lambda: RunFolder.start(tmp_path, {})):
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            begin()
    with pytest.raises(ArtifactError, match="is no run folder"):
        RunFolder.open(tmp_path / "nowhere")


def test_only_results_saved_to_the_end_are_listed(tmp_path: Path):
    run = RunFolder.start(tmp_path, make_plan())
    assert run.result_names() == ()
    run.save_result("proof", Number(value=1))
    run.save_result("diff.nulls", Number(value=2))
    (tmp_path / "results" / "half").mkdir()
    assert run.result_names() == ("diff.nulls", "proof")
    assert not run.has_result("half")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", ".hidden", "a\n", "-rf"])
def test_a_result_name_cannot_leave_the_folder(tmp_path: Path, name: str):
    run = RunFolder.start(tmp_path, make_plan())
    with pytest.raises(ValueError, match="name is"):
        run.save_result(name, Number(value=1))
