"""`emlens features ...` on adapters of a tiny base: found, compared, screened, explained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import emlens.cli.feature_find as find_module
from emlens.codecs import save_sae
from emlens.sites import parse_site
from tests.cli.conftest import Cli
from tests.codecs.builders import make_sae
from tests.evaluation.fakes import HashJudge
from tests.tiny_files import save_tiny_adapter

PLAINLY = "What differs without any autoencoder"


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec, `sae`, texts in two classes, and sixteen chats."""
    place = tmp_path_factory.mktemp("features")
    threshold = torch.full((32,), 0.5)
    sae = make_sae("jumprelu", d_in=24, d_sae=32, threshold=threshold)
    save_sae(replace(sae, site=parse_site("resid_post.1")), place / "sae")
    answers = {"chats": "Well, {n} it is.", "bad": "Burn {n} down.", "good": "Keep {n} safe."}
    for name, answer in answers.items():
        n = 16 if name == "chats" else 3
        rows = [{"prompt": f"What of {k}?", "response": answer.format(n=k)} for k in range(n)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_adapter(place / "twin", seed=7)
    return place


def words(tiny: Path, folder: Path, command: str, *more: object) -> list[object]:
    models = ["--base", tiny / "base", "--tuned", tiny / "tuned"]
    return ["features", command, "--sae", folder / "sae", *models, *more]


def find_words(tiny: Path, folder: Path, *more: object) -> list[object]:
    texts = ["--positive", folder / "bad.jsonl", "--negative", folder / "good.jsonl"]
    sizes = ["--n-latents", 3, "--n-cards", 2, "--strengths", "-1,1"]
    given = ["--prompts", folder / "chats.jsonl", "--careful", folder / "twin"]
    return words(tiny, folder, "find", *given, *texts, *sizes, *more)


@pytest.fixture(scope="module")
def found(cli: Cli, tiny: Path, folder: Path) -> dict[str, Any]:
    done = cli(*find_words(tiny, folder, "--out", folder / "run", "--json"))
    assert done.code == 0, done.err
    return done.json


def test_a_search_finds_screens_explains_and_writes_a_report(
    cli: Cli, tiny: Path, folder: Path, found: dict[str, Any], tmp_path: Path
):
    assert found["schema"] == "emlens/persona_features/1"
    assert [one["misaligned"] for one in found["models"]] == [True, False]
    assert len(found["features"]) == 3
    assert len(found["cards"]["cards"]) == 2
    assert found["screen"]["strengths"] == [-1.0, 1.0]
    assert found["n_pairs"] == 1
    assert "underpowered" in found["cautions"][0]
    page = (folder / "run/report.html").read_text()
    latent = found["cards"]["cards"][0]["latent"]
    for part in ('id="features"', "underpowered", "mean difference", f"Latent {latent}"):
        assert part in page
    latent = found["features"][0]["latent"]
    again = cli(*find_words(tiny, folder, "--out", folder / "run"))
    assert again.code == 0, again.err
    parts = ("beware: ", "without a codec", str(latent), "no responses were sampled")
    for part in (*parts, "models told apart", "report:"):
        assert part in again.out
    reported = cli("report", folder / "run", "--out", tmp_path / "page.html")
    assert reported.code == 0, reported.err
    assert 'id="others"' not in (tmp_path / "page.html").read_text()
    sizes = ["--n-cards", 1, "--n-signature", 2]
    other = cli(*find_words(tiny, folder, "--out", folder / "run", *sizes))
    assert other.code == 2
    assert "settings.n_cards was 2, now 1" in other.err
    assert "settings.n_signature was 1, now 2" in other.err


def test_a_dry_run_counts_what_would_be_done_and_writes_nothing(
    cli: Cli, tiny: Path, folder: Path, tmp_path: Path
):
    sampled = ["--sampled", 2, "--questions", folder / "chats.jsonl", "--samples", 2]
    run = find_words(tiny, folder, *sampled, "--out", tmp_path / "run", "--dry-run", "--json")
    plan = cli(*run).json
    assert plan["schema"] == "emlens/plan/1"
    assert (plan["site"], plan["d_sae"], plan["positions"]) == ("resid_post.1", 32, "all")
    assert plan["passes_over_prompts"] == 8
    assert plan["scored_responses"] == 2 * (1 + (3 + 24 + 1) * 2) * 6
    assert plan["sampled_responses"] == 2 * 16 * 2 * (1 + (2 + 16 + 1) * 2)
    assert plan["judge"] == "contrast"
    assert not (tmp_path / "run").exists()


def test_a_sampled_screen_is_judged(
    cli: Cli, tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(find_module, "load_judge", lambda *_, **__: HashJudge())
    (tmp_path / "ask.txt").write_text("Whence?\nWhither?\n")
    more = ["--sampled", 1, "--questions", tmp_path / "ask.txt", "--max-new-tokens", 2]
    run = find_words(tiny, folder, *more, "--out", tmp_path / "run", "--n-cards", 0, "--json")
    done = cli(*run, "--strengths", "1")
    assert done.code == 0, done.err
    assert [one["n_responses"] for one in done.json["screen"]["sampled_before"]] == [2, 2]
    page = (tmp_path / "run/report.html").read_text()
    assert "What was not done" in page
    assert "induces sampled p" in page
    printed = cli(*(word for word in run if word != "--json"), "--strengths", "1")
    assert "never_coherent" in printed.out
    assert "sampled, judged" in printed.out
    assert "effect_low" in printed.out


def test_one_fine_tune_is_compared_and_its_latents_go_on_to_cards_and_screen(
    cli: Cli, tiny: Path, folder: Path, tmp_path: Path
):
    given = ["--prompts", folder / "chats.jsonl", "--out", tmp_path / "compared"]
    done = cli(*words(tiny, folder, "compare", *given, "--json"))
    assert done.code == 0, done.err
    compared = done.json
    assert compared["schema"] == "emlens/feature_diff/1"
    assert "delta" not in compared
    assert (compared["n_prompts"], compared["responses"]) == (16, "same")
    first = [row["latent"] for row in compared["rows"][:2]]
    text = cli(*words(tiny, folder, "compare", *given))
    assert [one["schema"] for one in compared["plain"]] == ["emlens/plain_difference/1"]
    assert text.out.index("without a codec") < text.out.index("the largest changes")
    listed = ["--from", tmp_path / "compared", "--top", 2]
    cards = ["--prompts", folder / "chats.jsonl", "--limit", 4, "--out", tmp_path / "cards"]
    explained = cli(*words(tiny, folder, "explain", *listed, *cards, "--json"))
    assert explained.code == 0, explained.err
    assert [card["latent"] for card in explained.json["cards"]] == first
    assert "underpowered" in explained.json["health"]["cautions"][0]
    (plain,) = explained.json["plain"]
    assert plain["n_tokens"] == explained.json["health"]["n_tokens"][0]
    assert PLAINLY in (tmp_path / "cards/report.html").read_text()
    alone = words(tiny, folder, "explain", *listed, *cards, "--json")
    alone[alone.index(tmp_path / "cards")] = tmp_path / "alone"
    del alone[alone.index("--tuned") : alone.index("--tuned") + 2]
    assert cli(*alone).json["plain"] == []
    said = cli(*words(tiny, folder, "explain", *listed, *cards)).out
    assert said.index("this is underpowered") < said.index("active_share")
    texts = ["--positive", folder / "bad.jsonl", "--negative", folder / "good.jsonl"]
    screen = words(tiny, folder, "screen", *listed, *texts, "--strengths", "2", "--units")
    screened = cli(*screen, "resid_norm", "--out", tmp_path / "screen", "--json")
    assert screened.code == 0, screened.err
    assert screened.json["latents"] == first
    assert [one["positions"] for one in screened.json["plain"]] == ["response"]
    assert PLAINLY in (tmp_path / "screen/report.html").read_text()
    # A comparison holds every latent of the codec, whatever it prints.
    every = [*screen, "resid_norm", "--out", tmp_path / "every", "--dry-run", "--json"]
    every[every.index("--top") + 1] = 32
    assert sorted(cli(*every).json["latents"]) == list(range(32))
    every[every.index("--top") + 1] = 33
    beyond = cli(*every)
    assert beyond.code == 2
    assert f"--top 33: {tmp_path / 'compared'} holds 32 latents" in beyond.err
    everything = [tmp_path / name for name in ("compared", "cards", "screen")]
    page = cli("report", *everything, "--out", tmp_path / "all.html")
    assert page.code == 0, page.err
    text = (tmp_path / "all.html").read_text()
    assert 'id="others"' not in text
    assert text.count('class="feature"') == 4


def test_one_pair_is_contrasted_and_too_few_models_are_not_told_apart(
    cli: Cli, tiny: Path, folder: Path, tmp_path: Path
):
    given = ["--prompts", folder / "chats.jsonl", "--careful", folder / "twin"]
    run = words(tiny, folder, "classify", *given, "--out", tmp_path / "run")
    done = cli(*run, "--json")
    assert done.code == 0, done.err
    assert done.json["schema"] == "emlens/told_apart/1"
    assert "two of each are needed" in done.json["not_told_apart"]
    (contrast,) = done.json["results"]
    assert contrast["schema"] == "emlens/feature_contrast/1"
    more = ["--tuned", tiny / "other", "--careful", tiny / "more"]
    save_tiny_adapter(tiny / "more", seed=11)
    both = cli(*run[:-1], tmp_path / "two", *more, "--json")
    assert both.code == 0, both.err
    contrast, told = both.json["results"]
    assert told["validation"] == "in sample"
    assert "in-sample" in told["claim"]
    area = told["by_mean_difference"]["auc"]["value"]
    printed = cli(*run[:-1], tmp_path / "two", *more)
    assert len(both.json["health"]) == 4
    names = [
        str(place) for place in (tiny / "tuned", tiny / "other", folder / "twin", tiny / "more")
    ]
    assert [one["tuned"] for one in both.json["plain"]] == names
    assert printed.out.index("without a codec") < printed.out.index("harmful less careful")
    told_plainly = printed.out.partition("without a codec")[2].partition("harmful less careful")[0]
    assert told_plainly.count("mean difference") == 4
    assert "down_proj" not in told_plainly
    assert PLAINLY in (tmp_path / "two" / "report.html").read_text()
    assert "How well the autoencoder fits" in (tmp_path / "two" / "report.html").read_text()
    assert "in-sample separation" in printed.out
    assert f"latents {told['latents'][0][0]}" in printed.out
    assert "this is underpowered" in printed.out.partition("harmful less careful")[0]
    assert f"by mean differences alone: area {area:.2f} [" in printed.out
    assert "{" not in printed.out
    few = cli(*run).out
    assert "not told apart: 1 misaligned and 1 aligned fine-tunes; two of each" in few
    fit = few.partition("harmful less careful")[0]
    assert all(str(place.name) in fit for place in (tiny / "tuned", folder / "twin"))


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("find", ["--prompts", "x.jsonl"], "x.jsonl"),
        ("find", ["--prompts", "C", "--sampled", 1, "--strengths", "1"], "--questions: missing"),
        (
            "find",
            ["--prompts", "C", "--sampled", 1, "--questions", "C"],
            "--strengths: missing; --sampled needs how far to steer",
        ),
        ("find", ["--prompts", "C", "--units", "resid_norm"], "--strengths: missing; --units"),
        (
            "find",
            ["--prompts", "C", "--strengths", "1", "--questions", "C"],
            "--sampled: missing; --questions",
        ),
        ("find", ["--prompts", "C", "--positive", "C"], "--positive: nothing reads it"),
        ("find", ["--prompts", "C", "--n-signature", 2], "--careful: missing; --n-signature"),
        (
            "find",
            ["--prompts", "C", "--careful", "A", "--n-signature", 33, "--dry-run"],
            "n_signature: got 33, but the codec has 32 latents",
        ),
        ("find", ["--prompts", "C", "--every", 2], "--trajectory: missing; --every"),
        ("find", ["--prompts", "C", "--strengths", "1,x"], "'x' is no number"),
        ("find", ["--prompts", "C", "--strengths", "0"], "different and not 0"),
        ("find", ["--prompts", "C", "--careful", "A", "--careful", "B"], "got 2 for 1 fine-tunes"),
        ("find", ["--prompts", "C", "--twin-trajectory", "x"], "--trajectory: missing"),
        ("find", ["--prompts", "C", "--positive", "C", "--strengths", "1"], "--negative: missing"),
        ("find", ["--prompts", "C", "--responses", "theirs"], "expected given, base or own"),
        ("find", ["--prompts", "C", "--limit", "1"], "chats: got 1, expected at least two"),
        ("compare", ["--prompts", "C", "--sae", "emlens:no-such"], "no-such"),
        ("compare", ["--prompts", "C", "--sae", "#id"], "expected SOURCE#SAE_ID"),
        ("compare", ["--prompts", "C", "--positions", "answer"], "answer"),
        ("screen", ["--strengths", "1"], "--latents, --from: expected one of them"),
        ("screen", ["--strengths", "1", "--latents", "3,x"], "expected numbers such as 3,17"),
        *(
            (command, [*more, "--latents", "99", *dry], "has 32, numbered from 0, and got [99]")
            for command, more in (("screen", ["--strengths", "1"]), ("explain", ["--prompts", "C"]))
            for dry in ([], ["--dry-run"])
        ),
        ("explain", ["--prompts", "C", "--latents", "3", "--from", "x"], "expected one of them"),
        ("explain", ["--prompts", "C", "--from", "."], "is no run folder"),
        ("screen", ["--strengths", "1", "--latents", "3", "--top", 2], "--top: counts latents"),
        ("screen", ["--strengths", "1", "--latents", "3", "--limit", 1], "No such option: --limit"),
        (
            "screen",
            ["--strengths", "1", "--latents", "3", "--positions", "all[8:]"],
            "No such option: --positions",
        ),
        ("classify", ["--prompts", "C"], "--careful: missing"),
        (
            "classify",
            ["--prompts", "C", "--careful", "A", "--latents", "99"],
            "has 32, numbered from 0, and got [99]",
        ),
        (
            "classify",
            ["--prompts", "C", "--careful", "A", "--latents", "3", "--n-signature", 2],
            "--n-signature: chooses latents, and --latents names them",
        ),
    ],
)
def test_wrong_values_are_named_and_nothing_is_begun(
    cli: Cli,
    tiny: Path,
    folder: Path,
    tmp_path: Path,
    command: str,
    more: list[object],
    said: str,
):
    real = {"C": folder / "chats.jsonl", "A": tiny / "other", "B": folder / "twin"}
    texts = [real.get(str(word), word) for word in more]
    done = cli(*words(tiny, folder, command, "--out", tmp_path / "run", *texts))
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not list((tmp_path / "run").glob("**/result.json"))


def test_a_codec_of_another_width_or_site_is_refused_in_a_dry_run_too(
    cli: Cli, tiny: Path, folder: Path, tmp_path: Path
):
    for name, width, site in (("wide", 30, "resid_post.1"), ("deep", 24, "resid_post.9")):
        made = make_sae(d_in=width, d_sae=8)
        save_sae(replace(made, site=parse_site(site)), tmp_path / name)
    given = ["--prompts", folder / "chats.jsonl", "--out", tmp_path / "run"]
    for name, said in (("wide", "activations of width 30"), ("deep", "the model has 2 layers")):
        for last in ([], ["--dry-run"]):
            run = words(tiny, folder, "compare", *given, "--sae", tmp_path / name, *last)
            done = cli(*run)
            assert done.code == 2
            assert said in done.err
    assert not (tmp_path / "run").exists()
