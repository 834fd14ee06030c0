"""The import gate itself: it passes on the package, and each kind of breach fails it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHECK], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", folder)
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "emlens", folder / "emlens", ignore=ignored)
    return folder


def test_the_package_keeps_its_contracts(checkout: Path):
    done = lint(checkout)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("planted", "source", "broken"),
    [
        ("unplaced/__init__.py", "", "every package has its floor BROKEN"),
        ("unplaced.py", "", "every package has its floor BROKEN"),
        ("numerics/planted.py", "import emlens.models", "its floor BROKEN"),
        ("diffing/planted.py", "import emlens.organisms", "its floor BROKEN"),
        ("data/planted.py", "def f():\n    import transformers", "model libraries BROKEN"),
        ("reports/planted.py", "from peft import LoraConfig", "model libraries BROKEN"),
        ("cli/planted.py", "import transformer_lens.utils", "model libraries BROKEN"),
        ("models/planted.py", "import sae_lens", "sae_lens BROKEN"),
    ],
)
def test_a_breach_is_found(checkout: Path, planted: str, source: str, broken: str):
    path = checkout / "emlens" / planted
    new_folder = not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    try:
        done = lint(checkout)
    finally:
        path.unlink()
        if new_folder:
            path.parent.rmdir()
    assert done.returncode == 1
    assert broken in " ".join(done.stdout.split())


def test_no_folder_with_code_escapes_the_gate_for_want_of_an_init():
    folders = {path.parent for path in (ROOT / "emlens").rglob("*.py")}
    assert [f for f in folders if not (f / "__init__.py").exists()] == []
