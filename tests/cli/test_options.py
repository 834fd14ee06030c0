"""Flags that need reading, and commands made of dataclasses."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from emlens.cli.options import CommonFlags, parse_scale, takes_flags
from emlens.cli.train import parse_layers


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (None, 1.0),
        ([], 1.0),
        (["0.5"], 0.5),
        (["-2"], -2.0),
        (["a.b=0.5"], {"a.b": 0.5}),
        (["a=1", "b=0"], {"a": 1.0, "b": 0.0}),
    ],
)
def test_a_scale_is_one_factor_or_factors_by_module(values: list[str] | None, scale: object):
    assert parse_scale(values) == scale


@pytest.mark.parametrize(
    "values", [["x"], ["a=x"], ["=1"], ["1", "2"], ["a=1", "2"], ["a=1", "a=2"], ["nan"], ["inf"]]
)
def test_anything_else_is_no_scale(values: list[str]):
    with pytest.raises(typer.BadParameter, match=f"--scale {values[-1]}|--scale {values[0]}"):
        parse_scale(values)


@pytest.mark.parametrize(
    ("text", "layers"), [("all", "all"), ("3", (3,)), ("3,15-17", (3, 15, 16, 17)), ("2,2", (2,))]
)
def test_layers_are_all_or_blocks_and_ranges(text: str, layers: object):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "5-3", "3,9-5", "1,,2"])
def test_anything_else_is_no_layers(text: str):
    with pytest.raises(typer.BadParameter, match="--layers"):
        parse_layers(text)


def test_a_commands_own_flags_come_before_the_common_ones():
    @dataclass(frozen=True, kw_only=True)
    class SampleFlags(CommonFlags):
        needed: Annotated[str, typer.Option("--needed")]
        number: Annotated[int, typer.Option("--number")] = 3

    seen: list[SampleFlags] = []

    def sample(flags: SampleFlags) -> None:
        """Say something."""
        seen.append(flags)

    sample.__annotations__["flags"] = SampleFlags
    command = takes_flags(sample)
    parameters = inspect.signature(command).parameters
    own = list(parameters)[1:]  # the first is typer's context, which is no flag
    assert own == ["needed", "number", "json", "quiet", "offline"]
    assert parameters["needed"].default is inspect.Parameter.empty
    assert parameters["number"].default == 3
    assert command.__doc__ == "Say something."
    context = typer.Context(typer.main.get_command(typer.Typer(callback=lambda: None)))
    command(typer_context=context, needed="x", number=4)
    assert seen == [SampleFlags(needed="x", number=4)]
    assert context.meta["emlens.flags"] == seen[0]
