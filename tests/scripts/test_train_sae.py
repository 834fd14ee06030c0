"""The shipped autoencoder's script: all stages on a tiny base, each done once."""

import dataclasses
import json
import re

import pytest
import torch

from emlens.activations import ActivationShards
from emlens.codecs import load_sae, measure_fit
from emlens.data import load_chats
from emlens.models.sampling import Sampling
from scripts import gather_text, sae_texts, sae_work
from scripts.sae_texts import TooLittleTextError
from scripts.sae_work import Work
from scripts.train_sae import NAME, STAGES, run_stage
from tests.assets.cards import check_sae_card, read_fits
from tests.scripts.test_gather_text import PROSE, write
from tests.tiny_files import save_tiny_adapter, save_tiny_base

SETTINGS = dataclasses.replace(
    sae_work.SETTINGS,
    d_sae=32,
    k=4,
    steps=20,
    batch_rows=64,
    warmup_steps=2,
    decay_steps=5,
    dead_after_rows=500,
    held_out_rows=300,
    least_firings=10,
    checkpoint_every=5,
)


def refuse_too_little(work: Work, place) -> None:
    """Asking for more than there is: refused before the model answers, and by every later stage."""
    more = dataclasses.replace(work, train_tokens=10**6, runs=place / "more")
    more.runs.mkdir()
    given = {"folders": [place / "text"], "assets": place / "assets"}
    with pytest.raises(TooLittleTextError, match=r"1,000,000 are asked for"):
        run_stage("text", more, **given)
    assert not list(more.runs.iterdir())
    further = dataclasses.replace(work, train_tokens=10**6)
    with pytest.raises(TooLittleTextError, match="run --stage text first"):
        run_stage("capture", further, **given)
    with pytest.raises(TooLittleTextError, match="tokens were captured, and 1,000,000"):
        run_stage("train", further, **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where all stages have run, once and once more."""
    place = tmp_path_factory.mktemp("script")
    write(place / "text", "prose.txt", "\n\n".join(PROSE))
    work = Work(
        runs=place / "runs",
        base=str(save_tiny_base(place / "base")),
        tuned=str(save_tiny_adapter(place / "tuned")),
        site="resid_post.0",
        skipped=6,
        train_tokens=4600,
        answered=5,
        sampling=Sampling(n=1, max_new_tokens=6, seed=0),
        settings=SETTINGS,
    )
    work.runs.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gather_text, "PASSAGE", (100, 220))
        patched.setattr(sae_texts, "HELD_OUT_EVERY", 4)
        patched.setattr(
            sae_texts,
            "load_chats",
            lambda source: load_chats(source, limit=4 if "emlens:" in str(source) else None),
        )
        for stage in STAGES:
            run_stage(stage, work, folders=[place / "text"], assets=place / "assets")
        large = [*work.runs.rglob("*.safetensors"), *work.runs.glob("*.jsonl")]
        before = [file.stat().st_mtime_ns for file in large]
        patched.setattr(sae_texts, "generate_responses", lambda *_, **__: pytest.fail("sampled"))
        for stage in STAGES:
            run_stage(stage, work, folders=[place / "text"], assets=place / "assets")
        refuse_too_little(work, place)
    assert len(large) > 5
    assert [file.stat().st_mtime_ns for file in large] == before
    return work, place / "assets" / NAME


def test_texts_that_are_held_out_are_no_others(made):
    work, _ = made
    train, held = (
        [chat.messages for chat in load_chats(work.runs / f"{part}.jsonl")]
        for part in ("train", "held_out")
    )
    assert len(held) > 3
    assert len(train) in (3 * len(held), 3 * len(held) + 1, 3 * len(held) + 2, 3 * len(held) + 3)
    assert not set(held) & set(train)
    texts = " ".join(message.content for chat in train for message in chat)
    assert sum(PROSE[i] in texts for i in range(8)) >= 3
    answers = [json.loads(line) for line in (work.runs / "answers.jsonl").read_text().splitlines()]
    assert sum(len(row["prompts"]) for row in answers) == 5
    counts = json.loads((work.runs / "texts.json").read_text())
    # What is counted is what is captured, less the headers of answers that never come.
    for part in ("train", "held_out"):
        chats = load_chats(work.runs / f"{part}.jsonl")
        headers = sum(chat.response is None for chat in chats) * len("^assistant\n")
        assert counts[part] == len(ActivationShards.open(work.place(part))) - headers
    assert 4600 <= counts["train"] < 5000
    assert len(set(train)) == len(train)


def test_what_comes_out_can_be_loaded_and_is_calibrated_in_its_own_precision(made):
    work, folder = made
    sae = load_sae(folder)
    assert (sae.d_sae, sae.d_in, str(sae.site), sae.positions) == (
        32,
        24,
        "resid_post.0",
        "all[6:]",
    )
    assert load_sae(folder, dtype="auto").W_dec.dtype is torch.bfloat16
    assert sae.base_fingerprint == json.loads((work.runs / "base.json").read_text())
    held = ActivationShards.open(work.place("held_out"))
    assert held.streams == ("base", "tuned")
    assert measure_fit(sae, held.batches("resid_post.0", stream="base")).l0 == pytest.approx(
        4, rel=0.05
    )
    saved = json.loads((folder / "result.json").read_text())
    assert saved["name"] == f"emlens:{NAME}"


def test_the_card_says_what_was_measured(made):
    work, folder = made
    card = (folder / "README.md").read_text()
    sae = load_sae(folder)
    held = ActivationShards.open(work.place("held_out"))
    for source, stream in ((work.base, "base"), (work.tuned, "tuned")):
        fit = measure_fit(sae, held.batches("resid_post.0", stream=stream))
        line = (
            f"| `{source}` | {fit.explained_variance:.3f} | {fit.l0:.1f} | {fit.dead_share:.1%} |"
        )
        assert line in card
    n = len(ActivationShards.open(work.place("train")))
    assert f"trained on {n:,} tokens, fewer than the 2,000,000 that were aimed at" in card
    assert check_sae_card(folder).fingerprint == load_sae(folder, dtype="auto").fingerprint
    fits = read_fits(card)
    assert list(fits) == [work.base, work.tuned]
    assert fits[work.base][1] == pytest.approx(4, abs=0.2)
    assert not re.search(r"\{[a-z_]", card)
