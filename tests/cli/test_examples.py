"""Every `--help` holds an example, and the example works."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from emlens.cli.main import app
from tests.cli.conftest import Cli
from tests.cli.test_main import list_all

COMMANDS = dict(list_all(get_command(app)))


def read_example(command: Any) -> list[str]:
    """The words of the example in a command's help, the program's name left out."""
    text = command.epilog.replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.strip().startswith("emlens ")]
    return shlex.split(line)[1:]


def make_runs(cli: Cli, tiny: Path) -> None:
    """The finished runs that the example of `report` names, where it is called."""
    diff = ["diff", "--base", tiny / "base", "--tuned", tiny / "tuned"]
    assert cli(*diff, "--prompts", tiny / "chats.jsonl", "--out", "runs/diff").code == 0
    shutil.copytree("runs/diff", "runs/demo")


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS)
def test_the_example_of_each_command_works(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
):
    monkeypatch.chdir(tmp_path)
    words = read_example(COMMANDS[path])
    assert " ".join(["emlens", *words]).startswith(path)
    if path == "emlens report":
        make_runs(cli, tiny)
    flags = {flag for parameter in COMMANDS[path].params for flag in parameter.opts}
    done = cli(*words, *(["--dry-run"] if "--dry-run" in flags else []))
    assert done.code == 0, done.err
    assert done.out


@pytest.mark.parametrize("path", COMMANDS)
def test_the_example_is_printed_so_that_it_can_be_copied(cli: Cli, path: str):
    done = cli(*path.split()[1:], "--help")
    words = read_example(COMMANDS[path])
    printed = done.out.split("Example:")[1].replace("\\\n", " ")
    assert shlex.split(printed)[1:] == words
    assert max(len(line) for line in done.out.splitlines()) <= 80
