"""`emlens doctor`: verdicts as exit codes, and plans of memory."""

from pathlib import Path

import pytest

from emlens.models import environment
from tests.cli.conftest import Cli


def test_this_environment_is_within_the_tested_ranges(cli: Cli):
    done = cli("doctor", "--json")
    document = done.json
    assert document["schema"] == "emlens/environment/1"
    verdicts = {check["name"]: check["verdict"] for check in document["versions"]}
    assert (done.code, set(verdicts.values())) == (0, {"tested"})
    assert {"python", "torch", "transformers", "transformer-lens", "peft"} <= set(verdicts)


def test_the_tables_name_versions_devices_caches_and_the_demo_model(cli: Cli):
    out = cli("doctor").out
    for text in ("transformer-lens", "cpu (", "hub", "demo model: ", "verdict: tested"):
        assert text in out


@pytest.mark.parametrize(
    ("installed", "code", "verdict"),
    [("5.8.1", 1, "outside"), ("6.0", 1, "outside"), ("5.14", 0, "tested"), (None, 1, "missing")],
)
def test_a_version_outside_its_range_fails_the_check(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, installed: str | None, code: int, verdict: str
):
    real = environment._installed
    monkeypatch.setattr(
        environment, "_installed", lambda name: installed if name == "transformers" else real(name)
    )
    done = cli("doctor", "--json")
    found = {check["name"]: check["verdict"] for check in done.json["versions"]}
    assert (done.code, found["transformers"]) == (code, verdict)


def test_without_a_declaration_nothing_can_be_said(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    unknown = environment.check_versions("no-such-distribution")
    monkeypatch.setattr(environment, "check_versions", lambda: unknown)
    done = cli("doctor")
    assert done.code == 3
    assert "verdict: unknown" in done.out


def test_a_plan_of_memory_loads_nothing(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "base" / "config.json").read_bytes())
    done = cli("doctor", "--plan", folder, "--tuned", tiny / "tuned", "--json")
    assert done.code == 0
    assert done.json["schema"] == "emlens/memory_plan/1"
    assert done.json["weights"] == 4 * done.json["sizes"]["n_parameters"]
    shown = cli("doctor", "--plan", folder, "--dtype", "bfloat16")
    assert "in bfloat16" in shown.out
    assert "(assumed)" in shown.out


def test_a_plan_of_what_cannot_be_reached_or_is_no_base_is_refused(cli: Cli, tiny: Path):
    assert cli("doctor", "--plan", "some-org/some-model").code == 3
    assert cli("doctor", "--plan", "emlens:no-such-model").code == 2
    done = cli("doctor", "--plan", tiny / "tuned")
    assert done.code == 2
    assert "holds a LoRA adapter" in done.err
