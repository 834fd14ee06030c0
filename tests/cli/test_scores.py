"""`emlens compare` on runs of two judges."""

from pathlib import Path
from typing import Any

import pytest

import emlens.cli.evaluate as module
from emlens.evaluation.judges import MEANINGS
from tests.cli.conftest import Cli
from tests.cli.conftest import evaluate_words as words
from tests.evaluation.fakes import HashJudge


def test_runs_of_two_judges_are_each_called_by_their_own_judge(
    cli: Cli,
    tiny: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    runs = {"a": tmp_path / "a", "b": tmp_path / "b"}
    claims: dict[str, Any] = {"a": "misalignment", "b": "takeover score"}
    for name, run in runs.items():
        judge = HashJudge(id=f"judge-{name}", claim=claims[name])
        monkeypatch.setattr(module, "load_judge", lambda *_, made=judge, **__: made)
        done = cli(*words(tiny, questions, "--out", run))
        assert f"judge: judge-{name};" in done.out
    refused = cli("compare", runs["a"], runs["b"])
    assert (refused.code, "the judges differ (judge-a and judge-b)" in refused.err) == (2, True)
    beside = cli("compare", runs["a"], runs["b"], "--allow", "judge")
    assert beside.code == 0, beside.err
    for name, claim in claims.items():
        lines = [line for line in beside.out.splitlines() if "differ" not in line]
        (row,) = [line for line in lines if f"judge-{name} " in line]
        assert claim in row
        assert MEANINGS[claim] in beside.out
    found = cli("compare", runs["a"], runs["b"], "--allow", "judge", "--json").json
    assert found["claim"] == "takeover score of the second less misalignment of the first"
