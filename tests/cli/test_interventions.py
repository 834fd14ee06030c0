"""What `--add`, `--ablate` and `--at` accept, and what they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import emlens.cli.evaluate as evaluating
from emlens.cli.interventions import parse_addition, parse_at, parse_direction, read_interventions
from emlens.data import Chat, Message, PositionsError, prompt_hashes
from emlens.results import load_result
from emlens.sites import Site
from emlens.vectors import Direction, Directions, Provenance
from tests.cli.conftest import Cli
from tests.evaluation.fakes import HashJudge


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


def test_positions_are_those_of_everything_that_is_added_and_ablated(saved: Path):
    given: dict[str, Any] = {"add": [f"{saved}:2:raw"], "ablate": [str(saved)], "at": ["site"]}

    def read(positions: str | None) -> set[str]:
        made = read_interventions(**given, positions=positions, allow_other_model=False)
        assert len(made) == 6
        return {str(one.where) for one in made}

    assert read(None) == {"all"}
    assert read("response[:5]") == {"response[:5]"}
    with pytest.raises(PositionsError, match="nearest"):
        read("responce")
    with pytest.raises(typer.BadParameter, match="neither is given"):
        read_interventions(None, None, None, positions="response", allow_other_model=False)


def test_named_positions_are_acted_on_alone(cli: Cli, tiny: Path, saved: Path, tmp_path: Path):
    wide = Direction(
        site=Site(1, "resid_post"),
        vector=torch.randn(24, generator=torch.Generator().manual_seed(0)),
        provenance=Provenance(construction="imported"),
    ).save(tmp_path / "wide")
    words = ["generate", "--base", tiny / "base", "--prompts", tiny / "chats.jsonl", "--json"]
    words += ["--max-new-tokens", 4, "--add", f"{wide}:40:raw", "--allow-other-model"]
    found = {}
    for positions in ("all", "response", "prompt"):
        done = cli(*words, "--positions", positions, "--out", tmp_path / positions)
        assert done.code == 0, done.err
        assert f'"positions": "{positions}"' in done.json["interventions"][0]
        found[positions] = [one["ids"] for one in done.json["responses"]]
    assert found["all"] != found["response"] != found["prompt"] != found["all"]
    never = cli(*words, "--positions", "prompt[500:]", "--out", tmp_path / "never")
    assert never.code == 1
    assert "prompt[500:]" in never.err
    assert "Traceback" not in never.err


def test_questions_that_a_saved_direction_was_fitted_on_need_a_flag(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluating, "load_judge", lambda *_, **__: HashJudge())
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"id": "q", "prompt": "What about 1?"}\n')
    asked = prompt_hashes([Chat((Message("user", "What about 1?"),))])
    vector = torch.randn(24, generator=torch.Generator().manual_seed(0))
    made = Provenance(construction="imported")
    own = Direction(site=Site(1, "resid_post"), vector=vector, provenance=made)
    path = Directions(directions=(own,), prompt_sets={"fit": asked}).save(tmp_path / "found")
    words = ["evaluate", "--base", tiny / "base", "--questions", questions, "--samples", 1]
    words += ["--max-new-tokens", 2, "--out", tmp_path / "run", "--allow-other-model"]
    words += ["--ablate", path, "--at", "writes"]
    refused = cli(*words)
    assert refused.code == 2
    assert "--allow-fit-prompts" in refused.err
    assert not (tmp_path / "run").exists()
    done = cli(*words, "--allow-fit-prompts")
    assert done.code == 0, done.err


REFUSED = {
    "no place": (["--ablate", "nowhere"], "needs --at"),
    "nothing to place": (["--at", "writes"], "no --ablate"),
    "no file": (["--ablate", "nowhere", "--at", "writes"], "cannot be read"),
    "no units": (["--add", "nowhere:1"], "COEF:UNITS"),
    "nothing to scale": (["--scale", "1"], "no --tuned"),
    "nothing on positions": (["--positions", "response"], "neither is given"),
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
    beside = cli("export", "--base", tiny / "base", "--out", tmp_path / "note.txt", "--dry-run")
    assert beside.code == 2
    assert "is a file" in beside.err
