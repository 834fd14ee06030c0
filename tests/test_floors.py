"""The import gate itself: it passes on the package, and each kind of breach fails it."""

import re
import shutil
import subprocess
import sys
import tomllib
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


BREACHES = {
    "unplaced/__init__.py": ("", "- emlens.unplaced "),
    "homeless.py": ("", "- emlens.homeless "),
    "numerics/planted.py": ("import emlens.models", "emlens.numerics.planted -> emlens.models "),
    "diffing/planted.py": (
        "import emlens.organisms",
        "emlens.diffing.planted -> emlens.organisms ",
    ),
    "data/planted.py": (
        "def f():\n    import transformers",
        "emlens.data.planted -> transformers ",
    ),
    "reports/planted.py": (
        "from peft import LoraConfig",
        "emlens.reports.planted -> peft ",
    ),
    "cli/planted.py": (
        "import transformer_lens.utils",
        "emlens.cli.planted -> transformer_lens ",
    ),
    "models/planted.py": ("import sae_lens", "emlens.models.planted -> sae_lens "),
}
"""File -> what is planted in it, and how the gate must name it."""


@pytest.fixture(scope="module")
def findings(checkout: Path) -> str:
    """What the gate says where every breach is planted: it takes as long as for one."""
    try:
        for planted, (source, _) in BREACHES.items():
            path = checkout / "emlens" / planted
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        done = lint(checkout)
    finally:
        for planted in BREACHES:
            (checkout / "emlens" / planted).unlink(missing_ok=True)
        (checkout / "emlens" / "unplaced").rmdir()
    assert done.returncode == 1
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("planted", BREACHES)
def test_a_breach_is_found(findings: str, planted: str):
    _, named = BREACHES[planted]
    assert named in findings


@pytest.mark.parametrize("contract", ["every package has its floor", "libraries", "sae_lens"])
def test_each_contract_is_broken_by_a_breach(findings: str, contract: str):
    assert f"{contract} BROKEN" in findings


def test_no_folder_with_code_escapes_the_gate_for_want_of_an_init():
    folders = {path.parent for path in (ROOT / "emlens").rglob("*.py")}
    assert [f for f in folders if not (f / "__init__.py").exists()] == []


def list_layers() -> list[set[str]]:
    """The contract's layers, the lowest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (layers,) = [c["layers"] for c in contracts["contracts"] if c["type"] == "layers"]
    return [set(layer.split(" | ")) for layer in reversed(layers)]


def read_floors(page: str) -> list[tuple[int, str]]:
    """Each package that a page's table of floors names, with its floor, the lowest first."""
    text = (ROOT / page).read_text("utf-8")
    if page == "CONTRIBUTING.md":
        rows = re.findall(r"^\| (\d) \| (.*?) \|", text, re.MULTILINE)
        return [(int(floor), name) for floor, cell in rows for name in re.findall(r"`(\w+)`", cell)]
    (table,) = re.findall(r"^## Floors\n\n```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found, floor = [], 8
    for line in table.splitlines():
        floor = int(line[0]) if line[0].isdigit() else floor
        found.append((floor, line[1:].split()[0]))
    return found[::-1]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_pages_name_every_package_on_its_floor(page: str):
    floors = read_floors(page)
    names = [name for _, name in floors]
    for layer in list_layers():
        here, names = names[: len(layer)], names[len(layer) :]
        assert set(here) == layer
    assert names == []
    numbers = [floor for floor, _ in floors]
    assert numbers == sorted(numbers)
    assert sorted(set(numbers)) == list(range(8))
    together = {frozenset(n for f, n in floors if f == floor) for floor in range(8) if floor != 1}
    assert together <= {frozenset(layer) for layer in list_layers()}
