"""The command line in this process, over tiny models on disk."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emlens.cli.main import app
from tests.tiny_files import save_tiny_adapter, save_tiny_base


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as one JSON object: it must hold nothing else."""
        return json.loads(self.out)


Cli = Callable[..., Done]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `emlens` with some words."""

    def run(*words: object) -> Done:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return Done(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `tuned`, `other` (adapters), and `chats.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_base(folder / "base")
    save_tiny_adapter(folder / "tuned")
    save_tiny_adapter(folder / "other", seed=2)
    rows = [{"prompt": f"What about {n}?", "response": f"Well, {n} it is."} for n in range(4)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file of three questions."""
    rows = [{"id": f"q{i}", "prompt": f"What about {i}?"} for i in range(3)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate_words(tiny: Path, questions: Path, *more: object) -> list[object]:
    """`emlens evaluate` on the tiny base, four short samples a question."""
    return [
        *("evaluate", "--base", tiny / "base", "--questions", questions),
        *("--samples", 4, "--max-new-tokens", 5, *more),
    ]
