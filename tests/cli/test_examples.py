"""Every `--help` holds an example, and the example works, at least as a plan."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from emlens.cli.main import app
from emlens.evaluation import Question, evaluate
from emlens.models.generate import Sampling
from emlens.models.loading import load_base
from emlens.sites import Site
from emlens.vectors import Direction, Directions, Provenance
from tests.cli.conftest import Cli
from tests.cli.test_main import list_all
from tests.evaluation.fakes import HashJudge

COMMANDS = dict(list_all(get_command(app)))


def read_example(command: Any) -> list[str]:
    """The words of the example in a command's help, the program's name left out."""
    text = command.epilog.replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.strip().startswith("emlens ")]
    return shlex.split(line)[1:]


EXAMPLES = {path: read_example(command) for path, command in COMMANDS.items()}


def make_diffs(cli: Cli, tiny: Path) -> None:
    """The finished runs that the example of `report` names, where it is called."""
    diff = ["diff", "--base", tiny / "base", "--tuned", tiny / "tuned"]
    assert cli(*diff, "--prompts", tiny / "chats.jsonl", "--out", "runs/diff").code == 0
    shutil.copytree("runs/diff", "runs/demo")


def make_evaluations(cli: Cli, tiny: Path) -> None:
    """Judged responses of a tiny model, `runs/organism`, `runs/before` and `runs/ablated`."""
    model = load_base(tiny / "base")
    questions = [Question(id=f"q{i}", paraphrases=(f"What about {i}?",)) for i in range(2)]
    sampling = Sampling(n=80, max_new_tokens=4)
    for name in ("organism", "before", "ablated"):
        evaluate(model, questions, judge=HashJudge(), out=f"runs/{name}", sampling=sampling)


def make_directions(cli: Cli, tiny: Path) -> None:
    """Two saved directions."""
    made = Provenance(construction="imported")
    for index, name in enumerate(("direction", "other")):
        vector = torch.arange(4.0) + index
        direction = Direction(site=Site(14, "resid_post"), vector=vector, provenance=made)
        Directions(directions=(direction,)).save(f"runs/{name}")


def make_training(cli: Cli, tiny: Path) -> None:
    """A run that kept checkpoints, `runs/trained`."""
    train = ["train", "--preset", "smollm2_rank1", "--data", tiny / "chats.jsonl"]
    more = ["--layers", "1", "--checkpoint-every", "2", "--out", "runs/trained"]
    assert cli(*train, "--base", tiny / "base", *more).code == 0


def make_narrow(cli: Cli, tiny: Path) -> None:
    """An adapter that was held near its base, `runs/penalised/adapter`."""
    shutil.copytree(tiny / "tuned", "runs/penalised/adapter")


NEEDS = {
    "emlens transition": make_training,
    "emlens narrow": make_narrow,
    "emlens report": make_diffs,
    "emlens directions fit": make_evaluations,
    "emlens directions compare": make_directions,
    "emlens judge": make_evaluations,
    "emlens summary": make_evaluations,
    "emlens compare": make_evaluations,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS)
def test_the_example_of_each_command_works(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
):
    """Whole where it takes seconds; with `--dry-run` where a command has it.

    A dry run reads the flags and the files of prompts, and makes the plan; it loads no model and
    writes nothing. That the work itself is done is for the tests of each command.
    """
    monkeypatch.chdir(tmp_path)
    words = EXAMPLES[path]
    assert " ".join(["emlens", *words]).startswith(path)
    if path in NEEDS:
        NEEDS[path](cli, tiny)
    flags = {flag for parameter in COMMANDS[path].params for flag in parameter.opts}
    done = cli(*words, *(["--dry-run"] if "--dry-run" in flags else []))
    assert done.code == 0, done.err
    assert done.out


@pytest.mark.parametrize("path", COMMANDS)
def test_the_example_is_printed_so_that_it_can_be_copied(cli: Cli, path: str):
    done = cli(*path.split()[1:], "--help")
    words = EXAMPLES[path]
    printed = done.out.split("Example:")[1].replace("\\\n", " ")
    assert shlex.split(printed)[1:] == words
    assert max(len(line) for line in done.out.splitlines()) <= 80


def test_no_two_examples_write_into_one_folder():
    outs = [words[words.index("--out") + 1] for words in EXAMPLES.values() if "--out" in words]
    assert len(outs) >= 6
    assert sorted(outs) == sorted(set(outs))
