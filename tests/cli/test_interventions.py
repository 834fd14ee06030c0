"""What `--add`, `--ablate` and `--at` accept, and what they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from emlens.cli.interventions import parse_addition, parse_at, parse_direction, read_interventions
from emlens.results import load_result
from emlens.sites import Site
from emlens.vectors import Direction, Directions, Provenance
from tests.cli.conftest import Cli


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made = Provenance(construction="imported")
    rows = [
        Direction(site=Site(layer, "resid_post"), vector=torch.ones(4) + layer, provenance=made)
        for layer in range(3)
    ]
    return Directions(directions=tuple(rows)).save(tmp_path / "found")


def test_a_direction_is_a_file_or_one_site_of_it(saved: Path):
    assert len(parse_direction(str(saved)).load()) == 3
    one = parse_direction(f"{saved}@resid_post.1").load()
    assert (one.site, one.vector.tolist()) == (Site(1, "resid_post"), [2.0] * 4)


def test_one_site_of_a_file_keeps_what_was_made_beside_it(saved: Path):
    loaded: Any = load_result(saved)
    whole: Any = replace(
        loaded,
        covariance_matched=torch.arange(24.0).reshape(3, 2, 4),
        top3_share=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    )
    whole.save(saved)
    assert parse_direction(str(saved)).load_with_controls().sites == whole.sites
    one = parse_direction(f"{saved}@resid_post.1").load_with_controls()
    assert one.directions == whole.directions[1:2]
    assert torch.equal(one.covariance_matched, whole.covariance_matched[1:2])
    assert one.top3_share.tolist() == [0.2]
    assert one.shuffled is None
    single = whole.directions[1].save(saved.with_name("single"))
    assert parse_direction(f"{single}@resid_post.1").load_with_controls().covariance_matched is None


def test_a_file_whose_name_holds_an_at_is_found(saved: Path):
    odd = saved.rename(saved.with_name("a@b"))
    assert parse_direction(str(odd)).site is None
    assert parse_direction(f"{odd}@resid_post.1").site == "resid_post.1"


@pytest.mark.parametrize("text", ["@resid_post.1", "file@"])
def test_half_a_direction_is_refused(text: str):
    with pytest.raises(typer.BadParameter, match=r"FILE or FILE@SITE"):
        parse_direction(text)


def test_an_addition_names_its_units():
    found = parse_addition("a:b@resid_post.1:-2.5:raw")
    assert (str(found.file.path), found.file.site) == ("a:b", "resid_post.1")
    assert (found.coefficient, found.units) == (-2.5, "raw")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file:2", "COEF:UNITS"),
        ("f:2:kg", "units 'kg'"),
        ("f:x:raw", "not a number"),
        ("f:nan:raw", "finite"),
        ("f:inf:raw", "finite"),
    ],
)
def test_anything_else_is_no_addition(text: str, reason: str):
    with pytest.raises(typer.BadParameter, match=reason):
        parse_addition(text)


def test_where_an_ablation_acts_is_never_assumed():
    assert parse_at(["writes"]) == "writes"
    assert parse_at(["resid_post", "mlp_out.3"]) == ("resid_post", "mlp_out.3")
    with pytest.raises(typer.BadParameter, match="needs --at"):
        parse_at(None)
    with pytest.raises(typer.BadParameter, match="stands alone"):
        parse_at(["writes", "resid_post"])
    with pytest.raises(typer.BadParameter, match="no --ablate"):
        read_interventions(None, None, ["writes"], allow_other_model=False)
    assert read_interventions(None, None, None, allow_other_model=False) == ()


REFUSED = {
    "no place": (["--ablate", "nowhere"], "needs --at"),
    "nothing to place": (["--at", "writes"], "no --ablate"),
    "no file": (["--ablate", "nowhere", "--at", "writes"], "cannot be read"),
    "no units": (["--add", "nowhere:1"], "COEF:UNITS"),
    "nothing to scale": (["--scale", "1"], "no --tuned"),
    "no factor": (["--tuned", "nowhere", "--scale", "x"], "not a number"),
}


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
@pytest.mark.parametrize("reason", REFUSED)
def test_a_dry_run_refuses_what_the_run_would(
    cli: Cli, tiny: Path, tmp_path: Path, command: str, reason: str
):
    given, message = REFUSED[reason]
    asks = {"generate": ["--prompts", tiny / "chats.jsonl"], "export": []}
    asks["evaluate"] = ["--questions", "emlens:open-questions"]
    words = [command, "--base", tiny / "base", *asks[command], "--out", tmp_path / "out"]
    done = cli(*words, *given, "--dry-run")
    assert done.code == 2
    assert message in done.err
    assert cli(*words, "--dry-run").code == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_a_dry_run_finds_the_models(cli: Cli, tiny: Path, tmp_path: Path, command: str):
    asked = {"generate": ["--prompts", "emlens:open-questions"], "export": []}
    words = asked.get(command, ["--questions", "emlens:open-questions"])
    words = [command, "--base", tiny / "base", *words, "--out", tmp_path / "run", "--dry-run"]
    assert cli(*words).code == 0
    done = cli(*words, "--tuned", "emlens:nonsense")
    assert done.code == 2
    assert "emlens:nonsense is not shipped" in done.err
    assert cli(*words, "--tuned", tmp_path / "absent").code == 2


def test_a_dry_export_into_a_folder_in_use_is_refused(cli: Cli, tiny: Path, tmp_path: Path):
    (tmp_path / "note.txt").write_text("kept")
    done = cli("export", "--base", tiny / "base", "--out", tmp_path, "--dry-run")
    assert done.code == 2
    assert "is not empty" in done.err
