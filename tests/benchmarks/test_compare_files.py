"""Files of earlier records that cannot be compared with."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as suite


@pytest.mark.parametrize("text", [None, '{"schema":', "[]"])
def test_an_earlier_file_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
):
    monkeypatch.setattr(suite, "run_row", lambda *_: pytest.fail("a row was run"))
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"--compare .*old\.json: (cannot be read|expected what)"):
        suite.main(["--only", "decode", "--compare", str(path)])


def test_a_run_of_another_size_is_refused_also_where_no_row_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(suite, "run_row", lambda *_: pytest.fail("a row was run"))
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": suite.SCHEMA, "size": "full", "rows": [], "failed": {}}))
    with pytest.raises(SystemExit, match="its size is 'full' and this run's 'toy'"):
        suite.main(["--size", "toy", "--only", "decode", "--compare", str(path)])
