from pathlib import Path

import pytest

from scripts.check_sizes import ROOT, check_tree


def plant(root: Path, source: str) -> list[str]:
    (root / "emlens").mkdir()
    (root / "emlens" / "planted.py").write_text(source)
    count, violations = check_tree(root)
    assert count == 1
    return violations


def make_function(lines: int) -> str:
    return "\n".join(["def f():", *["    pass"] * (lines - 1)])


def test_the_project_itself_is_within_the_bounds():
    count, violations = check_tree(ROOT)
    assert count > 5
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n" * 400,
        make_function(80),
        "def f(a, b, c, /, d, *, e, f, g): ...",
        "class C:\n    def f(self, a, b, c, d, e, f, g): ...",
    ],
)
def test_what_reaches_a_bound_passes(tmp_path: Path, source: str):
    assert plant(tmp_path, source) == []


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("x = 1\n" * 401, "emlens/planted.py: 401 lines"),
        (make_function(81), "emlens/planted.py:1: f: 81 lines"),
        ("async " + make_function(81), "emlens/planted.py:1: f: 81 lines"),
        ("def f(a, b, c, /, d, *, e, f, g, h): ...", "8 parameters"),
        ("def f(a, b, c, d, e, f, *args, **kwargs): ...", "8 parameters"),
        ("class C:\n    def f(self, a, b, c, d, e, f, g, h): ...", "8 parameters"),
        ("class C:\n    @staticmethod\n    def f(a, b, c, d, e, f, g, h): ...", "8 parameters"),
        ("def g():\n    def f(a, b, c, d, e, f, g, h): ...", "planted.py:2: f: 8 parameters"),
    ],
)
def test_what_passes_a_bound_is_named(tmp_path: Path, source: str, named: str):
    violations = plant(tmp_path, source)
    assert len(violations) == 1
    assert named in violations[0]
