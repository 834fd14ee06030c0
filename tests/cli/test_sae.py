"""`emlens sae ...`: an autoencoder trained on a tiny base's activations, and held against it."""

from dataclasses import replace
from pathlib import Path

import pytest

from emlens.codecs import load_sae, save_sae
from emlens.sites import parse_site
from tests.cli.conftest import Cli
from tests.codecs.builders import make_sae


def words(tiny: Path, *more: object) -> list[object]:
    return [
        *("sae", "train", "--base", tiny / "base", "--site", "resid_post.1"),
        *("--data", tiny / "chats.jsonl", "--data", tiny / "chats.jsonl"),
        *("--d-sae", 4, "--k", 2, "--batch-rows", 16, "--held-out", 0.2, "--passes", 40),
        *("--batch-tokens", 96, *more),
    ]


@pytest.fixture(scope="module")
def trained(cli: Cli, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sae") / "run"
    done = cli(*words(tiny, "--positions", "all[2:]", "--out", out, "--json"))
    assert done.code == 0, done.err
    assert done.json["schema"] == "emlens/sae_training/1"
    assert done.json["positions"] == "all[2:]"
    return out


def test_an_autoencoder_is_trained_read_back_and_not_trained_again(
    cli: Cli, tiny: Path, trained: Path
):
    codec = load_sae(trained / "results" / "codec")
    assert (codec.d_sae, codec.d_in, str(codec.site)) == (4, 24, "resid_post.1")
    assert codec.positions == "all[2:]"
    assert codec.base_fingerprint is not None
    before = (trained / "results/codec/result.json").stat().st_mtime_ns
    again = cli(*words(tiny, "--positions", "all[2:]", "--out", trained))
    assert again.code == 0, again.err
    assert "run-activations" in again.out
    assert (trained / "results/codec/result.json").stat().st_mtime_ns == before
    other = cli(*words(tiny, "--positions", "all[2:]", "--out", trained, "--seed", 1))
    assert other.code == 2
    assert "seed was 0, now 1" in other.err


def test_a_check_says_how_well_it_fits_and_fails_where_it_does_not(
    cli: Cli, tiny: Path, trained: Path, tmp_path: Path
):
    given = ["--base", tiny / "base", "--prompts", tiny / "chats.jsonl"]
    done = cli("sae", "check", "--sae", trained, *given, "--tuned", tiny / "tuned", "--json")
    found = done.json
    assert found["schema"] == "emlens/sae_health/1"
    assert found["streams"] == ["base", "tuned"]
    assert done.code == int(min(found["explained_variance"]) < 0.6)
    blind = replace(make_sae(d_in=24, d_sae=8), site=parse_site("resid_post.1"))
    save_sae(blind, tmp_path / "blind")
    failed = cli("sae", "check", "--sae", tmp_path / "blind", *given)
    assert failed.code == 1
    assert "less than .6 of the variance" in failed.err
    assert "explained_variance" in failed.out
    save_sae(replace(blind, base_fingerprint="another base"), tmp_path / "foreign")
    foreign = ["sae", "check", "--sae", tmp_path / "foreign", *given]
    refused = cli(*foreign)
    assert (refused.code, refused.out) == (2, "")
    assert "--allow-other-model" in refused.err
    assert "less than .6 of the variance" in cli(*foreign, "--allow-other-model").err
    plan = cli("sae", "check", "--sae", trained, *given, "--dry-run", "--json").json
    assert (plan["architecture"], plan["prompts"]) == ("batchtopk", 4)


def test_a_dry_run_counts_tokens_and_steps_and_writes_nothing(cli: Cli, tiny: Path, tmp_path: Path):
    plan = cli(*words(tiny, "--out", tmp_path / "run", "--dry-run", "--json")).json
    assert plan["schema"] == "emlens/plan/1"
    assert plan["chats"] == 8
    held = round(0.2 * plan["tokens"])
    assert plan["steps"] == (plan["tokens"] - held) * 40 // 16
    assert plan["activations"].endswith("run-activations")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--architecture", "relu"], "expected one of topk, batchtopk, matryoshka"),
        (["--site", "resid_past.1"], "resid_past"),
        (["--d-sae", 4096], "least_firings"),
        (["--d-sae", 4096, "--dry-run"], "least_firings"),
        (["--k", 9], "k: got 9, more than the 4 latents"),
        (["--held-out", 1.5], "held_out: got 1.5"),
        (["--batch-rows", 100000], "expected at least one batch"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_wrong_values_are_named(
    cli: Cli, tiny: Path, tmp_path: Path, more: list[object], said: str
):
    done = cli(*words(tiny, "--out", tmp_path / "run", *more))
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not (tmp_path / "run" / "results").exists()
