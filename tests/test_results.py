"""Loading by kind: the table in the code decides, never the file."""

import ast
import contextlib
import dataclasses
import importlib
import json
import sys
import typing
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import pytest

from emlens import results
from emlens.artifacts import Result
from emlens.encoding import ArtifactError, Decoder
from emlens.results import RESULT_CLASSES, load_result, result_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Result):
    kind: ClassVar[str] = "test_sample"
    value: int


@pytest.fixture
def _with_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sample_results", sys.modules[__name__])
    table = MappingProxyType({**RESULT_CLASSES, "test_sample": "sample_results:Sample"})
    monkeypatch.setattr(results, "RESULT_CLASSES", table)


@pytest.mark.usefixtures("_with_sample")
def test_a_saved_result_is_loaded_by_its_kind_alone(tmp_path: Path):
    loaded = load_result(Sample(value=3).save(tmp_path))
    assert isinstance(loaded, Sample)
    assert loaded == Sample(value=3)
    assert load_result(tmp_path / "result.json") == loaded


def test_an_unknown_kind_names_the_nearest(tmp_path: Path):
    Sample(value=3).save(tmp_path)
    file = tmp_path / "result.json"
    file.write_text(file.read_text().replace("test_sample", "model_dif"))
    with pytest.raises(ArtifactError, match=r"kind is 'model_dif'.* nearest: model_diff, "):
        load_result(tmp_path)


@pytest.mark.parametrize(
    "kind", ["os:system", "emlens.results:load_result", "__class__", "os.path"]
)
def test_no_name_from_a_file_is_imported(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was imported")

    (tmp_path / "result.json").write_text(json.dumps({"schema": f"emlens/{kind}/1", "class": kind}))
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ArtifactError, match="does not know"):
        load_result(tmp_path)


@pytest.mark.parametrize("kind", RESULT_CLASSES)
def test_each_entry_of_the_table_is_the_class_of_its_kind(kind: str):
    cls = result_class(kind)
    assert issubclass(cls, Result)
    assert cls.kind == kind
    assert f"{cls.__module__}:{cls.__name__}" == RESULT_CLASSES[kind]


def check_readable(hint: object) -> None:
    """Fail (TypeError) where an annotation, or one within it, is none that can be read back."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        for field in dataclasses.fields(hint):
            check_readable(hints[field.name])
        return
    with contextlib.suppress(ArtifactError):
        Decoder("test", {}).value(hint, None, "field")
    if typing.get_origin(hint) is not typing.Literal:
        for argument in typing.get_args(hint):
            if argument is not ...:
                check_readable(argument)


@pytest.mark.parametrize("kind", RESULT_CLASSES)
def test_each_class_of_the_table_has_only_fields_that_can_be_read_back(kind: str):
    check_readable(result_class(kind))


@pytest.mark.parametrize(
    "hint", [object, set[str], tuple[bytes, ...], dict[str, Path], Path | None]
)
def test_the_check_of_fields_notices_what_cannot_be_read_back(hint: object):
    with pytest.raises(TypeError, match="cannot read back"):
        check_readable(hint)


def test_every_result_of_the_package_can_be_loaded_by_its_kind():
    declared = {}
    for path in sorted(Path(results.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                declared |= dict.fromkeys(_kinds(node), node.name)
    assert len(declared) > 20
    assert {kind: name.split(":")[1] for kind, name in RESULT_CLASSES.items()} == declared


def _kinds(node: ast.ClassDef) -> list[str]:
    return [
        line.value.value
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and line.target.id == "kind"
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
        and "ClassVar" in ast.unparse(line.annotation)
    ]
