"""Results on disk: what is saved comes back, and nothing else is taken for it."""

import dataclasses
import json
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int
from torch import Tensor

import emlens
from emlens.artifacts import (
    Result,
    read_kind,
    read_result,
    write_json_atomic,
    write_text_atomic,
)
from emlens.encoding import ArtifactError


@dataclasses.dataclass(frozen=True)
class Part:
    label: str
    weights: Float[Tensor, " d"] | None
    pairs: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Whole(Result):
    kind: ClassVar[str] = "test_whole"
    name: str
    count: int
    ratio: float
    passed: bool
    side: Literal["left", "right"]
    layer: int | str
    step: int | None
    matrix: Float[Tensor, "n d"]
    ids: Int[Tensor, " n"]
    kept: Bool[Tensor, " n"]
    parts: tuple[Part, ...]
    shape: tuple[int, str]
    by_site: dict[str, Part]
    losses: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Result):
    kind: ClassVar[str] = "test_plain"
    value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested(Result):
    kind: ClassVar[str] = "test_nested"
    inner: Plain
    other: Plain | None


def make_whole(**changes: Any) -> Whole:
    part = Part(label="a.b", weights=torch.arange(3.0), pairs=(("x", 0.5), ("y", math.inf)))
    values: dict[str, Any] = {
        "name": "ünïcode </script>",
        "count": 3,
        "ratio": 0.1,
        "passed": True,
        "side": "left",
        "layer": "all",
        "step": None,
        "matrix": torch.arange(6, dtype=torch.float64).reshape(3, 2).T / 7,
        "ids": torch.tensor([3, 1]),
        "kept": torch.tensor([True, False]),
        "parts": (part, dataclasses.replace(part, weights=None, pairs=())),
        "shape": (2, "d"),
        "by_site": {"resid_post": part},
        "losses": [1.0, 2.0],
    }
    return Whole(**(values | changes))


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    document = json.loads((folder / "result.json").read_text())
    change(document)
    (folder / "result.json").write_text(json.dumps(document))
    return folder


def test_every_kind_of_field_comes_back_as_it_was(tmp_path: Path):
    whole = make_whole()
    assert whole.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert same(read_result(tmp_path / "new" / "folder", Whole), whole)
    assert same(read_result(tmp_path / "new" / "folder" / "result.json", Whole), whole)


def test_results_within_results_come_back(tmp_path: Path):
    for other in (None, Plain(value=2.0)):
        nested = Nested(inner=Plain(value=1.0), other=other)
        assert read_result(nested.save(tmp_path), Nested) == nested


@settings(max_examples=50, deadline=None)
@given(value=st.floats())
def test_every_float_survives_and_the_file_is_strict_json(
    value: float, tmp_path_factory: pytest.TempPathFactory
):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    folder = Plain(value=value).save(tmp_path_factory.getbasetemp() / "floats")
    json.loads((folder / "result.json").read_text(), parse_constant=refuse)
    got = read_result(folder, Plain).value
    np.testing.assert_equal(got, value)
    assert math.copysign(1, got) == math.copysign(1, value) or math.isnan(value)


def test_non_finite_tensors_survive_and_are_named_in_the_json(tmp_path: Path):
    matrix = torch.tensor([[math.nan, 1.0], [math.inf, -math.inf]])
    whole = make_whole(matrix=matrix)
    shown = whole.to_dict()
    assert shown["matrix"] == [["NaN", 1.0], ["Infinity", "-Infinity"]]
    json.dumps(shown, allow_nan=False)
    got = read_result(whole.save(tmp_path), Whole).matrix
    assert torch.equal(got.nan_to_num(7, 8, 9), matrix.nan_to_num(7, 8, 9))


def test_the_dictionary_is_flat_and_begins_with_its_schema():
    shown = make_whole().to_dict()
    assert list(shown)[:4] == ["schema", "emlens_version", "name", "count"]
    assert shown["schema"] == "emlens/test_whole/1"
    assert shown["emlens_version"] == emlens.__version__
    assert shown["ids"] == [3, 1]
    assert shown["parts"][0] == {
        "label": "a.b",
        "weights": [0.0, 1.0, 2.0],
        "pairs": [["x", 0.5], ["y", "Infinity"]],
    }


def test_the_default_row_holds_the_plain_values():
    row = {"name": "ünïcode </script>", "count": 3, "ratio": 0.1, "passed": True}
    assert make_whole().rows() == [row | {"side": "left", "layer": "all", "step": None}]


def test_the_notebook_table_escapes_its_text_and_is_short():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Long(Result):
        kind: ClassVar[str] = "test_long"

        def rows(self) -> list[dict[str, Any]]:
            return [{"<b>": "<img src=x onerror=alert(1)>", "i": i, "f": 1 / 3} for i in range(25)]

    shown = Long()._repr_html_()
    assert "<img" not in shown
    assert "<b>" not in shown
    assert "&lt;img src=x" in shown
    assert shown.count("<tr>") == 21
    assert "5 more rows" in shown
    assert "0.3333<" in shown


def test_saving_again_replaces_everything(tmp_path: Path):
    make_whole().save(tmp_path)
    make_whole(matrix=torch.zeros(2, 3), name="second").save(tmp_path)
    assert read_result(tmp_path, Whole).name == "second"
    Plain(value=1.0).save(tmp_path)
    assert read_result(tmp_path, Plain) == Plain(value=1.0)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_the_kind_is_read_without_the_class(tmp_path: Path):
    assert read_kind(Plain(value=1.0).save(tmp_path)) == "test_plain"
    for schema in (None, 3, "test_plain", "emlens/test_plain", "emlens/a/b/1", "emlens/a/x"):
        edit(tmp_path, lambda document, schema=schema: document.update(schema=schema))
        with pytest.raises(ArtifactError, match="not a result that emlens saved"):
            read_kind(tmp_path)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another schema": (
        lambda d: d.update(schema="emlens/test_plain/1"),
        "expected 'emlens/test_wh",
    ),
    "a later version": (lambda d: d.update(schema="emlens/test_whole/2"), "test_whole/2"),
    "an unknown field": (lambda d: d.update(matrx=1), r"unknown fields \['matrx'\].*'matrix'"),
    "a missing field": (lambda d: d.pop("step"), r"lacks the fields \['step'\]"),
    "a missing nested field": (lambda d: d["parts"][1].pop("label"), r"parts.1 lacks .*'label'"),
    "an unknown nested field": (lambda d: d["by_site"]["resid_post"].update(z=1), "by_site.resid"),
    "text for a number": (lambda d: d.update(count="3"), "count is '3', expected int"),
    "a bool for a number": (lambda d: d.update(count=True), "count is True, expected int"),
    "a fraction for a count": (lambda d: d.update(count=3.5), "count is 3.5, expected int"),
    "a number for a bool": (lambda d: d.update(passed=1), "passed is 1, expected bool"),
    "null for text": (lambda d: d.update(name=None), "name is None, expected str"),
    "text for a float": (lambda d: d.update(ratio="nan"), "ratio is 'nan', expected float"),
    "another literal": (lambda d: d.update(side="up"), r"side is 'up', expected one of \['left'"),
    "no member of a union": (lambda d: d.update(layer=1.5), "layer is 1.5, expected str"),
    "a short tuple": (lambda d: d.update(shape=[2]), r"shape is \[2\], expected 2 items"),
    "a number for a tuple": (lambda d: d.update(parts=3), "parts is 3, expected a list"),
    "a number for a dict": (lambda d: d.update(by_site=3), "by_site is 3, expected an object"),
    "a number for a dataclass": (lambda d: d["parts"].append(3), "parts.2 is 3, expected an obj"),
    "numbers for a tensor": (lambda d: d.update(matrix=[[1.0]]), "matrix is .* expected a refer"),
    "an unknown tensor": (lambda d: d.update(matrix={"tensor": "m"}), "no tensor 'm'"),
    "a tensor of another rank": (lambda d: d.update(matrix={"tensor": "ids"}), "matrix is torch.i"),
    "a tensor nobody names": (lambda d: d["parts"][0].update(weights=None), r"\['parts.0.weights'"),
    "another digest": (lambda d: d.update(tensors_sha256="0" * 64), "has no tensors-0{16}.safe"),
    "no digest": (lambda d: d.update(tensors_sha256=None), "there is no tensor 'matrix'"),
    "a path for a digest": (lambda d: d.update(tensors_sha256="../../x"), "expected 64 digits"),
    "a number for a digest": (lambda d: d.update(tensors_sha256=3), "tensors_sha256 is 3, expec"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_json_is_an_error_that_names_the_damage(tmp_path: Path, damage: str):
    change, message = DAMAGE[damage]
    edit(make_whole().save(tmp_path), change)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_result(tmp_path, Whole)
    assert "result.json" in str(caught.value) or "tensors" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", '{"schema": "emlens/te', "[]", '{"a": NaN}', "\x00", "[" * 100_000, "9" * 5000]
)
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, text: str):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"not whole JSON|expected an object"):
        read_result(tmp_path, Plain)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "result.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ArtifactError, match="not whole JSON"):
        read_result(tmp_path, Plain)


def test_a_folder_without_a_result_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_result(path, Plain)


def test_a_value_the_class_itself_refuses_is_a_damaged_file(tmp_path: Path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Positive(Result):
        kind: ClassVar[str] = "test_positive"
        value: float

        def __post_init__(self) -> None:
            if self.value <= 0:
                raise ValueError("value must be positive")

    edit(Positive(value=1.0).save(tmp_path), lambda document: document.update(value=-1.0))
    with pytest.raises(ArtifactError, match="is not valid: value must be positive"):
        read_result(tmp_path, Positive)


def test_what_cannot_be_saved_is_refused_by_name_and_nothing_is_written(tmp_path: Path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(Result):
        kind: ClassVar[str] = "test_odd"
        items: tuple[Any, ...]

    for value in (tmp_path, {1: 2}, torch.ones(2, dtype=torch.complex64), {3}):
        with pytest.raises(TypeError, match=r"items\.1"):
            Odd(items=(1, value)).save(tmp_path / "odd")
    doubled = ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}},)
    with pytest.raises(TypeError, match="two tensors are called"):
        Odd(items=doubled).save(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    with pytest.raises(TypeError, match="cannot read back"):
        read_result(Odd(items=(1,)).save(tmp_path), Odd)


def test_a_field_may_not_take_a_name_of_the_header():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Taken(Result):
        kind: ClassVar[str] = "test_taken"
        schema: str  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"\['schema'\]"):
        Taken(schema="x").to_dict()


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write_text_atomic(tmp_path / "a.txt", "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_reader_never_sees_a_part_of_a_file(tmp_path: Path):
    file = write_text_atomic(tmp_path / "a.txt", "0" * 100_000)
    stop = threading.Event()

    def rewrite() -> None:
        digit = 0
        while not stop.is_set():
            digit = (digit + 1) % 10
            write_text_atomic(file, str(digit) * 100_000)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(200):
            assert re.fullmatch(r"(.)\1{99999}", file.read_text())
    finally:
        stop.set()
        writer.join()


def test_written_json_refuses_nan_and_has_the_usual_permissions(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "a.json", {"a": math.nan})
    assert not list(tmp_path.iterdir())
    (tmp_path / "usual").touch()
    file = write_json_atomic(tmp_path / "deep" / "a.json", {"a": [1, "ü"]})
    assert json.loads(file.read_text()) == {"a": [1, "ü"]}
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode
