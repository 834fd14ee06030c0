"""Versions are judged by what the installed package declares."""

from pathlib import Path

import pytest

from emlens.models import environment
from emlens.models.environment import (
    VersionCheck,
    check_environment,
    check_versions,
    judge_version,
)


@pytest.mark.parametrize(
    ("installed", "tested", "verdict"),
    [
        ("3.9.0", ">=3.9,<4", "tested"),
        ("2.13.0+cpu", ">=2.10", "tested"),
        ("2.10.0rc1", ">=2.10", "tested"),
        ("0.22", ">=0.20,<0.22", "outside"),
        ("0.19.9", ">=0.20,<0.22", "outside"),
        (None, ">=1", "missing"),
        ("1.0", None, "unknown"),
        ("1.0", "", "unknown"),
    ],
)
def test_a_version_is_inside_its_range_or_not(
    installed: str | None, tested: str | None, verdict: str
):
    assert judge_version("p", installed, tested).verdict == verdict


def test_the_ranges_are_those_of_the_project_file():
    import tomllib

    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {line.split(">")[0]: line for line in project["dependencies"]}
    for check in check_versions():
        if check.name == "python":
            assert check.tested == project["requires-python"]
        else:
            assert check.tested
            assert set(check.tested.split(",")) == set(
                declared[check.name].removeprefix(check.name).split(",")
            )


def test_what_is_wrong_outweighs_what_is_unknown():
    def check(*verdicts: str) -> str:
        tested = {"tested": ">=1", "outside": "<1", "unknown": None, "missing": ">=1"}
        made: list[VersionCheck] = [
            judge_version("p", None if v == "missing" else "1.0", tested[v]) for v in verdicts
        ]
        assert [c.verdict for c in made] == list(verdicts)
        state = check_environment()
        return type(state)(**{**vars(state), "versions": tuple(made)}).verdict

    assert check("tested", "tested") == "tested"
    assert check("unknown", "tested") == "unknown"
    assert check("unknown", "outside") == "outside"
    assert check("unknown", "missing") == "missing"


def test_a_cache_is_measured_without_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to(tmp_path / "gguf" / "a")
    monkeypatch.setenv("EMLENS_CACHE", str(tmp_path))
    states = {cache.name: cache for cache in check_environment().caches}
    assert (states["emlens"].path, states["emlens"].n_bytes) == (str(tmp_path), 1000)
    monkeypatch.setenv("EMLENS_CACHE", str(tmp_path / "not" / "yet"))
    missing = {cache.name: cache for cache in check_environment().caches}["emlens"]
    assert missing.n_bytes == 0
    assert missing.free_bytes > 0


def test_the_demo_model_is_ready_once_it_was_dequantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(environment, "locate_source", lambda source: file)
    monkeypatch.setenv("EMLENS_CACHE", str(tmp_path / "cache"))
    state = check_environment()
    assert (state.demo_model, state.demo_model_ready) == (str(file), False)
    folder = environment.gguf_folder(file)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert check_environment().demo_model_ready


def test_this_machine_has_memory_and_threads():
    state = check_environment()
    cpu = state.devices[0]
    assert cpu.name.startswith("cpu")
    assert cpu.free_bytes is None or 0 < cpu.free_bytes <= cpu.total_bytes
    assert state.threads >= 1
    assert state.hub_offline
