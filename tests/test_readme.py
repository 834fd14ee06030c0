"""The README does what it says: its Python runs, its commands and links exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from emlens.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def list_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def list_commands(program: str) -> list[str]:
    lines = [line for block in list_blocks("console") for line in block.splitlines()]
    return [line[2:] for line in lines if line.startswith(f"$ {program} ")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_python_examples_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = list_blocks("python")
    assert blocks
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_there_are_commands_to_check() -> None:
    assert len(list_commands("emlens")) >= 3
    assert len(list_commands("make")) == 2


@pytest.mark.parametrize("line", list_commands("emlens"))
def test_a_command_has_the_flags_that_the_readme_gives_it(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: Any = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not getattr(command, "commands", {}), f"no such command: {line}"
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("line", list_commands("make"))
def test_a_make_target_of_the_readme_exists(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_a_link_of_the_readme_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = list_blocks("text")[-1].splitlines()
    inside = {line.split()[0] for line in tree if re.match(r"  \S", line)}
    assert [name for name in inside if not (ROOT / "emlens" / name).exists()] == []
    shown = {name.rstrip("/").removesuffix(".py") for name in inside}
    there = {
        p.stem
        for p in (ROOT / "emlens").iterdir()
        if not p.name.startswith("__") and p.suffix in {"", ".py"}
    }
    assert there - shown == set()
