import shutil
from pathlib import Path

import pytest

from scripts.mutants import ROOT, Mutant, break_file, judge_mutant, judge_mutants, read_mutants

SOURCE = "def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n"
TESTS = "from calc import double\n\ndef test_double():\n    assert double(2) == 4\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Plugins take pytest five times as long to start as these tests need.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "calc.py").write_text(SOURCE)
    (tmp_path / "test_calc.py").write_text(TESTS)
    return tmp_path


def make_mutant(old: str, new: str, *tests: str) -> Mutant:
    return Mutant(
        what="planted", file="calc.py", old=old, new=new, tests=tests or ("test_calc.py",)
    )


def test_a_noticed_defect_is_killed_and_an_unnoticed_one_survives(package: Path):
    # 2 + x is 2 * x at x = 2: the planted test cannot see it.
    mutants = [make_mutant("2 * x", "5 * x"), make_mutant("2 * x", "2 + x")]
    assert judge_mutants(mutants, package) == ["killed", "SURVIVED"]
    assert (package / "calc.py").read_text() == SOURCE


def test_a_file_is_restored_after_its_defect(package: Path):
    assert judge_mutant(make_mutant("3 * x", "4 * x"), package) == "SURVIVED"
    assert (package / "calc.py").read_text() == SOURCE


def test_tests_that_fail_anyway_kill_nothing(package: Path):
    (package / "test_calc.py").write_text("def test_wrong():\n    assert False\n")
    (verdict,) = judge_mutants([make_mutant("2 * x", "5 * x")], package)
    assert verdict.startswith("INVALID (without the defect")


def test_tests_that_do_not_exist_kill_nothing(package: Path):
    assert judge_mutant(make_mutant("2 * x", "5 * x", "gone.py"), package).startswith("INVALID")


@pytest.mark.parametrize(
    ("old", "new"),
    [("4 * x", "5 * x"), ("* x", "+ x"), ("2 * x", "2 *"), ("2 * x", "2 * x")],
    ids=["absent", "twice", "not Python", "no change"],
)
def test_an_entry_that_does_not_fit_is_invalid(package: Path, old: str, new: str):
    assert judge_mutant(make_mutant(old, new), package).startswith("INVALID")
    assert (package / "calc.py").read_text() == SOURCE


@pytest.mark.parametrize("mutant", read_mutants(), ids=lambda m: m.what)
def test_every_listed_defect_still_fits_its_source(mutant: Mutant):
    break_file(mutant, ROOT)
    for test in mutant.tests:
        assert (ROOT / test.split("::")[0]).exists()


def test_the_copy_that_is_broken_is_the_one_that_is_tested(tmp_path: Path):
    """An installed package of the same name must not stand before the copy."""
    for name in ("emlens", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    (tmp_path / "test_version.py").write_text(
        "import emlens\n\ndef test_version():\n    assert emlens.__version__ != 'broken'\n"
    )
    mutant = Mutant(
        what="planted",
        file="emlens/__init__.py",
        old=f'__version__ = "{__import__("emlens").__version__}"',
        new='__version__ = "broken"',
        tests=("test_version.py",),
    )
    assert judge_mutant(mutant, tmp_path) == "killed"
