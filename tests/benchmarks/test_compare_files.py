"""Files of earlier records that cannot be compared with."""

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
