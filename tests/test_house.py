"""What the whole repository keeps to: light imports, no foreign names, no blanket ignores."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    *("torch", "transformers", "transformer_lens", "peft", "sae_lens", "wandb", "plotly"),
    *("openai", "inspect_ai"),
)
HELP_SECONDS = 2.0
"""Wall time allowed to `emlens --help` on a busy machine; alone it takes a quarter of that."""
# Bracketed, so that this file does not hold what it looks for.
FOREIGN = re.compile(
    r"/w[o]rk/|/r[o]ot/|/t[m]p/w/|bash_j[o]bs|index-u[r]l|find-l[i]nks|pypi\.[o]rg"
    r"|T[O]DO|F[I]XME|X[X]X|NotImplementedE[r]ror|\bissue #?[0-9]|shared/(specs|tools|golden)"
)
BLANKET = re.compile(
    r"#\s*(ruff:\s*no[q]a|flake8:\s*no[q]a|type:\s*ign[o]re(?!\[)|mypy:"
    r"|(based)?pyright:\s*+(?!ign[o]re\[))"
)
VAGUE_FILES = {"utils.py", "helpers.py", "common.py", "misc.py", "base.py"}


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def list_files() -> list[Path]:
    """Files of the checkout that git does not ignore."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def find_lines(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(text.splitlines(), start=1)
            if pattern.search(line)
        ]
    return found


@pytest.mark.parametrize("statement", ["import emlens", "import emlens.cli.main"])
def test_importing_is_light(statement: str):
    out = run_python(f"{statement}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])")
    assert out.strip() == "[]"


def test_help_answers_at_once():
    def measure() -> float:
        start = time.perf_counter()
        run_python(
            "import sys; sys.argv = ['emlens', '--help']; import emlens.cli.main as m\n"
            "try:\n    m.main()\nexcept SystemExit as e:\n    assert not e.code"
        )
        return time.perf_counter() - start

    assert min(measure() for _ in range(3)) < HELP_SECONDS


def test_every_name_of_the_root_can_be_imported():
    import emlens

    assert sorted(emlens.__all__) == sorted(set(emlens.__all__))
    for name in emlens.__all__:
        assert getattr(emlens, name) is not None


def test_the_stub_and_the_package_name_the_same_things():
    import ast

    import emlens

    tree = ast.parse((ROOT / "emlens" / "__init__.pyi").read_text(encoding="utf-8"))
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert sorted(names) == sorted(emlens.__all__)


def test_the_project_speaks_of_itself_alone():
    assert find_lines(FOREIGN, list_files()) == []


def test_no_check_is_switched_off_for_a_whole_file_or_without_a_name():
    assert find_lines(BLANKET, [p for p in list_files() if p.suffix in {".py", ".pyi"}]) == []


def test_no_file_has_a_name_that_says_nothing():
    assert [p for p in list_files() if p.name in VAGUE_FILES] == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (FOREIGN, "see /wo" + "rk/main"),
        (FOREIGN, "# TO" + "DO: later"),
        (FOREIGN, "closes issue " + "#12"),
        (BLANKET, "# ruff: no" + "qa"),
        (BLANKET, "x = 1  # type: ig" + "nore"),
        (BLANKET, "# pyri" + "ght: basic"),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: re.Pattern[str], line: str):
    assert pattern.search(line)


def test_a_named_ignore_on_one_line_is_allowed():
    assert not BLANKET.search("x = f()  # pyright: ignore[reportArgumentType]")
    assert not BLANKET.search("x = f()  # type: ignore[arg-type]")


def test_the_version_is_the_same_everywhere():
    import emlens

    assert f"version: {emlens.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {emlens.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
