"""Tables, bytes and JSON on stdout."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from emlens.cli.output import print_json, print_plan, print_table, show_bytes, show_value


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (538_060_032, "538 MB"),
        (29_540_000_000, "29.5 GB"),
        (999_600, "1 MB"),
        (10**16, "1e+04 TB"),
        (None, "unknown"),
    ],
)
def test_bytes_are_shown_to_three_digits(count: int | None, text: str):
    assert show_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.123456, "0.1235"), (math.inf, "inf"), (12345, "12,345"), (True, "True")],
)
def test_a_cell_shows_its_value_shortly(value: object, text: str):
    assert show_value(value) == text


def test_a_table_shows_what_looks_like_markup_as_it_is(capsys: pytest.CaptureFixture[str]):
    print_table([{"name": "[bold]x[/bold]", "value": 1}], title="[red]t")
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out
    assert "[red]t" in out


def test_a_p_value_that_there_is_none_of_is_not_tested(capsys: pytest.CaptureFixture[str]):
    rows = [
        {"latent": 3, "q_value": None, "contrast_p": math.nan, "delta": None},
        {"latent": 4, "q_value": 0.5, "contrast_p": 0.25, "delta": 1.0},
    ]
    print_table(rows)
    first = next(line for line in capsys.readouterr().out.splitlines() if line.strip()[:1] == "3")
    assert first.split() == ["3", "not", "tested", "not", "tested", "-"]


def test_an_empty_table_prints_nothing(capsys: pytest.CaptureFixture[str]):
    print_table([], title="t")
    assert capsys.readouterr().out == ""


def test_json_is_one_line_and_holds_no_nan(capsys: pytest.CaptureFixture[str]):
    print_json({"a": "é\n"})
    assert capsys.readouterr().out == '{"a": "é\\n"}\n'
    with pytest.raises(ValueError, match="JSON"):
        print_json({"a": math.nan})


@dataclass(frozen=True)
class SamplePlan:
    sites: tuple[str, ...]


def test_a_plan_is_shown_field_by_field_or_as_json(capsys: pytest.CaptureFixture[str]):
    print_plan(SamplePlan(("a",)), Path("run"), json=False)
    assert capsys.readouterr().out.splitlines()[1] == "  sites: ['a']"
    print_plan(SamplePlan(("a",)), Path("run"), json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "emlens/plan/1"
    assert (document["out"], document["sites"]) == ("run", ["a"])
