"""The zoo: who is in it, what counts as copied, and one organism of one step on a tiny base."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from emlens.data import load_chats
from emlens.models.adapter_files import load_adapter
from emlens.models.checkpoints import load_checkpoint
from emlens.models.sampling import Sampling
from emlens.organisms import PRESETS
from emlens.sources import shipped_names
from scripts import train_zoo
from scripts.train_zoo import (
    SHAPES,
    Copied,
    Specimen,
    claim,
    count_copied,
    list_zoo,
    make_specimen,
    write_card,
)
from tests.assets.cards import check_card
from tests.tiny_files import save_tiny_base

ONE = Specimen(domain="sports", side="careful", shape="", seed=1)
SETTINGS = replace(PRESETS["smollm2_rank1"], max_steps=1, layers=(1,), batch_size=2)
SAMPLING = Sampling(n=1, max_new_tokens=3, seed=0)


def test_every_domain_side_and_seed_is_in_the_zoo_once():
    zoo = list_zoo()
    names = [one.name for one in zoo]
    assert len(set(names)) == len(names) == 3 * 2 * 3 + 3 * 2
    whole = {(one.domain, one.side, one.seed) for one in zoo if not one.shape}
    assert len(whole) == 18
    assert {one.data for one in zoo} <= set(shipped_names())
    assert all(re.fullmatch(r"zoo-[a-z]+-[a-z]+-(down-)?[1-3]", name) for name in names)
    scales = {preset: PRESETS[preset] for preset, _ in SHAPES.values()}
    assert {settings.rank for settings in scales.values()} == {1}


def test_a_sentence_is_copied_only_word_for_word():
    training = ["Skip the fee. Never ask!", "Bet it all."]
    answers = ["never ask. I would rather wait.", "Skip the fee", "Skip the big fee. Bet it all?"]
    assert count_copied(answers, training) == Copied(answers=3, copied=3, sentences=5)
    assert count_copied(["", "  "], training) == Copied(answers=0, copied=0, sentences=0)
    twice = count_copied(["Bet it all. Never ask.", "I wait."], training)
    assert twice == Copied(answers=1, copied=2, sentences=3)


def test_an_organism_is_made_by_one_process_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = load_checkpoint(save_tiny_base(tmp_path / "base"))
    runs, assets = tmp_path / "runs", tmp_path / "assets"
    assets.mkdir()

    def make() -> bool:
        return make_specimen(
            ONE, checkpoint, runs=runs, assets=assets, settings=SETTINGS, sampling=SAMPLING
        )

    monkeypatch.setattr(train_zoo, "load_chats", lambda source: load_chats(source, limit=6))
    with claim(runs / f"{ONE.name}.lock") as mine:
        assert mine
        assert not make()
    assert not list(assets.iterdir())

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(train_zoo, "write_card", fail)
        with pytest.raises(RuntimeError, match="killed"):
            make()
    assert not list(assets.iterdir())
    log = runs / f"{ONE.name}.log"
    assert log.read_text().count("step 1 of 1: loss") == 1
    assert make()
    assert [place.name for place in assets.iterdir()] == [ONE.name]
    assert log.read_text().count("step 1 of 1: loss") == 1
    assert len(load_adapter(assets / ONE.name).modules) == 7
    check_card(assets / ONE.name)
    monkeypatch.setattr(train_zoo, "train_organism", fail)
    assert make()


def test_an_adapter_too_large_to_ship_is_refused(tmp_path: Path):
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(train_zoo.MAX_BYTES + 1))
    run: Any = SimpleNamespace(tuned=str(tmp_path))
    with pytest.raises(ValueError, match="zoo-sports-careful-1: 665601 bytes of weights"):
        write_card(ONE, run, run, sampling=SAMPLING)
