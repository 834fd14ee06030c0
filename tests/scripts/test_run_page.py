"""A page's examples run in order, and the first that fails ends it."""

import sys
from pathlib import Path

import pytest

from scripts.run_page import list_examples, main

PAGE = """
```python
open("first", "w").close()
```

```console
$ emlens doctor --json
$ pip install nothing
$ emlens summary \\
    "a run"
```

```text
$ emlens never
```
"""


def test_examples_come_in_the_order_of_the_page_and_nothing_else_does() -> None:
    found = list_examples(PAGE)
    assert [example[2:] for example in found[:1]] == [['open("first", "w").close()\n']]
    assert [example[3:] for example in found[1:]] == [["doctor", "--json"], ["summary", "a run"]]


def test_a_failing_example_ends_the_page_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "here"
    blocks = ["open('first', 'w').close()", "raise SystemExit(3)", "open('last', 'w').close()"]
    page.write_text("\n".join(f"```python\n{block}\n```" for block in blocks))
    monkeypatch.setattr(sys, "argv", ["run_page", str(page), "--folder", str(folder)])
    assert main() == 3
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert "s: python: open('first'" in capfd.readouterr().out
