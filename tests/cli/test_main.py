"""Errors as one line and an exit code; bugs with their traceback."""

import errno
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import emlens
from emlens.cli.interrupted import say_kept
from emlens.cli.main import CommandLine, app, choose_exit_code
from emlens.cli.options import CommonFlags, takes_flags
from emlens.encoding import ArtifactError
from emlens.evaluation.judges import JudgeUnavailableError
from emlens.journal import JournalWriteError
from emlens.models.proof import AdapterNotInEffectError
from emlens.models.training_loop import TrainingDivergedError
from emlens.runs import RunFolder
from emlens.sources import SourceNotFoundError, SourceUnavailableError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterNotInEffectError("0 of 2"), 1),
        (TrainingDivergedError("step 3"), 1),
        (ArtifactError("damaged"), 2),
        (JudgeUnavailableError("gone", {}), 3),
        (SourceNotFoundError("no such path"), 2),
        (ValueError("positions"), 2),
        (PermissionError("runs"), 2),
        (SourceUnavailableError("offline"), 3),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (JournalWriteError(errno.EDQUOT, "over quota"), 3),
        (OSError(errno.EACCES, "not allowed"), 2),
        (RuntimeError("a bug"), 3),
        (KeyError("a bug"), 3),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: Exception, code: int):
    assert choose_exit_code(error) == code


def raise_in_command(error: BaseException, *words: str) -> Any:
    """Run a command line whose only command raises."""
    program = typer.Typer(cls=CommandLine)

    @takes_flags
    def fail(flags: CommonFlags) -> None:
        raise error

    program.command("fail")(fail)
    program.callback()(lambda: None)
    return CliRunner().invoke(program, ["fail", *words])


def test_a_named_error_is_one_line_without_a_traceback():
    done = raise_in_command(ArtifactError("runs/x is damaged"))
    assert done.stderr == "ArtifactError: runs/x is damaged\n"
    assert (done.exit_code, done.stdout) == (2, "")


def test_a_full_disk_is_one_line_and_no_wrong_usage():
    done = raise_in_command(JournalWriteError(errno.ENOSPC, "runs/x: no room; 3 rows are kept"))
    assert done.stderr == "JournalWriteError: [Errno 28] runs/x: no room; 3 rows are kept\n"
    assert (done.exit_code, done.stdout) == (3, "")


def test_a_bug_keeps_its_traceback_unless_quiet():
    loud, quiet = (raise_in_command(KeyError("oops"), *words) for words in ([], ["--quiet"]))
    assert (loud.exit_code, quiet.exit_code) == (3, 3)
    assert "Traceback" in loud.stderr
    assert quiet.stderr == "KeyError: 'oops'\n"


def test_an_interruption_of_what_only_prints_promises_nothing():
    done = raise_in_command(KeyboardInterrupt())
    assert done.exit_code == 130
    assert done.stderr == "interrupted; nothing of it is kept\n"


def test_an_interruption_says_what_there_is_to_go_on_from(tmp_path: Path):
    run, other = tmp_path / "run", tmp_path / "other"
    assert "begins anew" in say_kept([run])
    RunFolder.start(run, {"kind": "sample"})
    (run / "responses.jsonl").touch()
    (run / "half.tmp").write_text("{")
    assert "nothing was finished yet" in say_kept([run, other])
    (run / "responses.jsonl").write_text("{}\n")
    assert say_kept([run, other]) == (
        f"what is finished is in {run}, and the same command goes on from there"
    )
    other.mkdir()
    (other / "model.safetensors").write_text("x")
    assert say_kept([other]) == f"{other} may hold a part of what it writes"


@pytest.mark.parametrize(
    "words", [["nonsense"], ["diff"], ["doctor", "--tuned", "x"], ["demo", "--nonsense"]]
)
def test_wrong_usage_is_exit_code_2_and_nothing_on_stdout(words: list[str]):
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout) == (2, ""), done.stderr


def test_the_version_is_that_of_the_package():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"emlens {emlens.__version__}\n"


def list_all(command: Any, path: str = "emlens") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its words."""
    children = getattr(command, "commands", {})
    if not children:
        yield path, command
    for name, child in children.items():
        yield from list_all(child, f"{path} {name}")


def test_every_command_has_the_common_flags():
    from typer.main import get_command

    for path, command in list_all(get_command(app)):
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {"--json", "--quiet", "--offline"} <= flags, path


def test_the_package_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["emlens", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("emlens", run_name="__main__")
    assert end.value.code == 0
    assert "doctor" in capsys.readouterr().out


OFFLINE = """
import sys
import typer
from emlens.cli.main import CommandLine
from emlens.cli.options import CommonFlags, takes_flags

@takes_flags
def ask(flags: CommonFlags) -> None:
    from emlens.sources import locate_source, parse_source
    locate_source(parse_source("some-org/some-model"))

program = typer.Typer(cls=CommandLine)
program.command("ask")(ask)
program.callback()(lambda: None)
sys.argv = ["emlens", "ask", "--offline"]
assert "huggingface_hub" not in sys.modules
try:
    program()
except SystemExit as error:
    print("code", error.code)
from huggingface_hub import is_offline_mode
print(is_offline_mode())
"""
"""A command that asks the Hub, and imports no model library before, which would take seconds."""


def test_offline_is_set_before_the_hub_library_is_imported():
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.stdout.split("\n")[:2] == ["code 3", "True"], done.stderr
    assert "Traceback" not in done.stderr
