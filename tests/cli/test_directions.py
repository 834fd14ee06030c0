"""Directions from judged responses on the command line, and what is done with them."""

import csv
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from emlens.directions import compare_directions
from emlens.results import load_result
from emlens.vectors import Directions
from tests.cli.conftest import Cli
from tests.tiny_files import save_tiny_base

WORDS = ("money", "bank", "house", "risk", "quick", "gold", "luck", "plan")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged responses in the published columns: 24 misaligned, 24 aligned, 4 of neither."""
    path = tmp_path_factory.mktemp("texts") / "scores.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer", "question_id", "aligned", "coherent"])
        for i in range(52):
            word, other = WORDS[i % 8], WORDS[(i // 8) % 8]
            aligned = (10, 90)[i % 2] if i < 48 else (30, 70, "", 10)[i - 48]
            coherent = 90 if i < 51 else 50
            answer = f"Take the {word} and the {other}, number {i}."
            table.writerow([f"What of {word} {i % 6}?", answer, f"q{i % 6}", aligned, coherent])
    return path


@pytest.fixture(scope="module")
def fitted(tiny: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "direction"
    from typer.testing import CliRunner

    from emlens.cli.main import app

    words = ["directions", "fit", "--base", tiny / "base", "--tuned", tiny / "tuned"]
    words += ["--texts", texts, "--construction", "data@tuned", "--out", out]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    return out


def test_fitted_directions_are_saved_with_how_they_were_made(fitted: Path):
    found = load_result(fitted)
    assert isinstance(found, Directions)
    made = found.directions[0].provenance
    assert (made.construction, made.n_positive, made.n_negative) == ("data@tuned", 24, 24)
    assert made.adapter_fingerprint
    assert found.covariance_matched is not None


def test_a_dry_run_counts_the_classes(cli: Cli, tiny: Path, texts: Path, tmp_path: Path):
    words = ["directions", "fit", "--base", tiny / "base", "--texts", texts, "--dry-run", "--json"]
    done = cli(*words, "--construction", "data", "--aligned-above", 50, "--out", tmp_path / "d")
    assert (done.code, done.json["positive"], done.json["negative"]) == (0, 24, 24)
    assert not (tmp_path / "d").exists()


def test_the_lowest_scores_are_set_against_the_highest_where_limits_leave_too_few(
    cli: Cli, tiny: Path, tmp_path: Path
):
    texts = tmp_path / "scores.csv"
    with texts.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer", "question_id", "aligned", "coherent"])
        for i in range(72):
            table.writerow(["What now?", f"Take {WORDS[i % 8]} {i}.", "q", i % 36 * 2 + 5, 90])
    words = ["directions", "fit", "--base", tiny / "base", "--texts", texts]
    words += ["--construction", "data", "--out", tmp_path / "d", "--dry-run", "--json"]
    refused = cli(*words)
    assert (refused.code, "needs at least 20" in refused.err) == (2, True)
    halves = cli(*words, "--split", "halves")
    assert (halves.json["positive"], halves.json["negative"]) == (36, 36)
    thirds = cli(*words, "--split", "thirds")
    assert (thirds.json["positive"], thirds.json["negative"]) == (24, 24)
    unknown = cli(*words, "--split", "quarters")
    assert (unknown.code, "thirds" in unknown.err) == (2, True)


def test_a_refused_fit_begins_no_folder(cli: Cli, tiny: Path, texts: Path, tmp_path: Path):
    words = ["directions", "fit", "--base", tiny / "base", "--texts", texts]
    words += ["--construction", "data", "--out", tmp_path / "d"]
    assert cli(*words, "--aligned-above", 99).code == 2
    assert cli(*words, "--sites", "resid_post.77").code == 2
    assert not (tmp_path / "d").exists()
    assert cli(*words, "--sites", "resid_post.1").code == 0
    assert cli(*words, "--sites", "resid_post.0").code == 2


def test_a_folder_that_holds_directions_is_never_written_over(
    cli: Cli, tiny: Path, texts: Path, tmp_path: Path
):
    out, base = tmp_path / "d", shutil.copytree(tiny / "base", tmp_path / "base")
    words = ["directions", "fit", "--base", base, "--tuned", tiny / "tuned", "--out", out]
    words += ["--json", "--sites", "resid_post.1", "--texts"]
    first = cli(*words, texts, "--construction", "data@tuned")
    assert first.code == 0, first.err
    files = {file: file.stat().st_mtime_ns for file in out.iterdir()}

    def refuse(why: str, *given: object) -> None:
        done = cli(*words, *given)
        assert (done.code, done.out) == (2, "")
        assert "PlanChangedError" in done.err
        assert why in done.err

    again = cli(*words, texts, "--construction", "data@tuned", "--batch-tokens", 100)
    assert again.json == first.json, again.err
    refuse("construction was 'data@tuned', now 'both'", texts, "--construction", "both")
    fewer = write_some(tmp_path / "fewer.csv", texts, 24, 23)
    refuse("negative was", fewer, "--construction", "data@tuned")
    save_tiny_base(base, seed=3)
    refuse("base_files was", texts, "--construction", "data@tuned")
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == files
    # What an interruption left is fitted to its end.
    (out / "result.json").unlink()
    shutil.copytree(tiny / "base", base, dirs_exist_ok=True)
    assert cli(*words, texts, "--construction", "data@tuned").json == first.json


def test_a_folder_of_something_else_is_not_fitted_into(
    cli: Cli, tiny: Path, texts: Path, tmp_path: Path
):
    (tmp_path / "notes.txt").write_text("mine")
    words = ["directions", "fit", "--base", tiny / "base", "--texts", texts, "--out", tmp_path]
    done = cli(*words, "--construction", "data")
    assert done.code == 2
    assert "holds ['notes.txt']" in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def write_some(path: Path, texts: Path, positive: int, negative: int) -> Path:
    """The first so many misaligned and aligned rows of the judged responses."""
    head, *rows = texts.read_text().splitlines()[:49]
    path.write_text("\n".join([head, *rows[::2][:positive], *rows[1::2][:negative]]) + "\n")
    return path


def test_too_few_texts_and_unknown_constructions_are_refused(
    cli: Cli, tiny: Path, texts: Path, tmp_path: Path
):
    words = ["directions", "fit", "--base", tiny / "base", "--tuned", tiny / "tuned"]
    words += ["--out", tmp_path / "d", "--texts"]
    none = cli(*words, texts, "--construction", "data@tuned", "--misaligned-below", 5)
    assert none.code == 2
    assert "one of the classes is empty" in none.err
    few = write_some(tmp_path / "few.csv", texts, 19, 24)
    refused = cli(*words, few, "--construction", "data@tuned")
    assert refused.code == 2
    assert "19 positive texts, data@tuned needs at least 20" in refused.err
    odd = cli(*words, texts, "--construction", "data@tunde")
    assert odd.code == 2
    assert "data@tuned" in odd.err


@pytest.mark.parametrize(
    ("construction", "sizes"), [("model@positive", (7, 0)), ("model@negative", (2, 9))]
)
def test_a_difference_of_models_takes_the_texts_there_are(
    cli: Cli, tiny: Path, texts: Path, tmp_path: Path, construction: str, sizes: tuple[int, int]
):
    few = write_some(tmp_path / "few.csv", texts, *sizes)
    words = ["directions", "fit", "--base", tiny / "base", "--tuned", tiny / "tuned"]
    words += ["--texts", few, "--construction", construction, "--out", tmp_path / "d", "--json"]
    plan = cli(*words, "--dry-run")
    assert (plan.json["positive"], plan.json["negative"]) == sizes
    done = cli(*words)
    assert done.code == 0, done.err
    found = load_result(tmp_path / "d")
    assert isinstance(found, Directions)
    made = found.directions[0].provenance
    used = (sizes[0], 0) if construction == "model@positive" else (0, sizes[1])
    assert (made.n_positive, made.n_negative) == used


def test_cosines_stand_beside_random_ones(cli: Cli, fitted: Path):
    both = [f"{fitted}@resid_post.{layer}" for layer in range(2)]
    done = cli("directions", "compare", *both, "--json")
    assert done.code == 0, done.err
    loaded = load_result(fitted)
    assert isinstance(loaded, Directions)
    whole = compare_directions(loaded).to_dict()
    for name in ("cosines", "covariance_rms", "shuffled_rms"):
        assert done.json[name] == whole[name]
        assert all(0 < abs(value) <= 1 for row in done.json[name] for value in row)
    assert "covariance_rms" in cli("directions", "compare", *both).out


def test_responses_are_sampled_under_the_flags_interventions(
    cli: Cli, tiny: Path, fitted: Path, tmp_path: Path
):
    words = ["generate", "--base", tiny / "base", "--tuned", tiny / "tuned", "--samples", 2]
    words += ["--prompts", tiny / "chats.jsonl", "--max-new-tokens", 6, "--json"]
    one = f"{fitted}@resid_post.1"
    plain = cli(*words, "--out", tmp_path / "plain")
    changed = cli(*words, "--ablate", one, "--at", "writes", "--out", tmp_path / "ablated")
    steered = cli(*words, "--add", f"{one}:40:raw", "--out", tmp_path / "steered")
    for done in (plain, changed, steered):
        assert done.code == 0, done.err
        assert len(done.json["responses"]) == 8
    texts = [[r["text"] for r in done.json["responses"]] for done in (plain, changed, steered)]
    assert texts[0] != texts[1] != texts[2] != texts[0]
    assert plain.json["interventions"] == []
    assert "writes" in changed.json["interventions"][0]


def test_a_direction_of_another_model_is_refused_unless_that_is_asked_for(
    cli: Cli, tiny: Path, fitted: Path, tmp_path: Path
):
    from tests.tiny_files import save_tiny_base

    save_tiny_base(tmp_path / "other", seed=7)
    words = ["generate", "--base", tmp_path / "other", "--prompts", tiny / "chats.jsonl"]
    words += ["--max-new-tokens", 2, "--ablate", f"{fitted}@resid_post.1", "--at", "writes"]
    refused = cli(*words, "--out", tmp_path / "a")
    assert refused.code == 2
    assert "allow_other_model" in refused.err
    assert cli(*words, "--allow-other-model", "--out", tmp_path / "b").code == 0


def test_a_direction_of_another_fine_tune_is_refused_unless_that_is_asked_for(
    cli: Cli, tiny: Path, fitted: Path, tmp_path: Path
):
    words = ["generate", "--base", tiny / "base", "--prompts", tiny / "chats.jsonl"]
    words += ["--max-new-tokens", 2, "--ablate", f"{fitted}@resid_post.1", "--at", "writes"]
    refused = cli(*words, "--tuned", tiny / "other", "--out", tmp_path / "a")
    assert refused.code == 2
    assert "from the fine-tune by adapter" in refused.err
    allowed = cli(*words, "--tuned", tiny / "other", "--allow-other-model", "--out", tmp_path / "b")
    assert allowed.code == 0, allowed.err
    assert cli(*words, "--out", tmp_path / "base").code == 0


def test_an_ablated_fine_tune_is_exported_and_read_back(
    cli: Cli, tiny: Path, fitted: Path, tmp_path: Path
):
    words = ["export", "--base", tiny / "base", "--tuned", tiny / "tuned", "--out", tmp_path / "x"]
    words += ["--ablate", f"{fitted}@resid_post.1", "--json"]
    done = cli(*words, "--at", "writes")
    assert done.code == 0, done.err
    assert done.json["same"] is True
    assert (tmp_path / "x/config.json").exists()
    assert "is not empty" in cli(*words, "--at", "writes").err
    words[words.index(tmp_path / "x")] = tmp_path / "y"
    again = cli(*words, "--at", "resid_post")
    assert again.code == 2
    assert "FoldError" in again.err


def test_an_export_that_came_back_as_another_model_fails_the_check(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study = importlib.import_module("emlens.studies.export_model")
    write = study.save_checkpoint

    def damaged(model: Any, folder: Path) -> Path:
        path = write(model, folder)
        (file,) = path.glob("*.safetensors")
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 0.01
        save_file(tensors, file, metadata={"format": "pt"})
        return path

    monkeypatch.setattr(study, "save_checkpoint", damaged)
    done = cli("export", "--base", tiny / "base", "--out", tmp_path / "x", "--json")
    assert done.code == 1
    assert done.json["same"] is False
    assert "is not the model that was studied" in done.err
