"""A public name, flag or JSON field changes only together with docs/api.json (and CHANGELOG.md)."""

import json
from typing import Any

import pytest

from scripts.write_api import API, describe, describe_api

WAY_OUT = "if it is meant: python scripts/write_api.py, and a line in CHANGELOG.md"


def flatten(api: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(api, dict):
        return {path: api}
    return {k: v for name, part in api.items() for k, v in flatten(part, f"{path}/{name}").items()}


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    return describe_api()


@pytest.mark.parametrize("part", ["names", "commands", "schemas"])
def test_what_is_promised_is_what_there_is(api: dict[str, Any], part: str):
    promised = flatten(json.loads(API.read_text(encoding="utf-8"))[part])
    there = flatten(api[part])
    differences = [
        f"{name}: promised {promised.get(name)!r}, there is {there.get(name)!r}"
        for name in sorted({*promised, *there})
        if promised.get(name) != there.get(name)
    ]
    assert not differences, "\n".join([WAY_OUT, *differences])


def test_every_command_can_be_asked_for_help(api: dict[str, Any]):
    from typer.testing import CliRunner

    from emlens.cli.main import app

    for command in api["commands"]:
        result = CliRunner().invoke(app, [*command.split()[1:], "--help"])
        assert result.exit_code == 0, f"{command}: {result.output}"


def test_a_signature_is_written_as_in_the_source():
    def f(base: str, *, rank: int = 1) -> list[str]:
        return [base] * rank

    assert describe(f) == "(base: str, *, rank: int=1) -> list[str]"


def test_a_class_is_described_by_its_public_members():
    class C:
        shown: int = 1
        _hidden: int = 2

        def act(self) -> None: ...

        def _hide(self) -> None: ...

    assert describe(C) == {"shown": "int", "act": "(self) -> None"}
