"""A planted training whose one latent grows: followed, gone on with, refused."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.data import ContrastTexts
from emlens.features import check_sae
from emlens.models.pair import load_pair
from emlens.organisms.trajectory import AdapterTrajectory, TrajectoryError, stack_adapters
from emlens.studies import FollowedTexts, LatentPath, follow_latents
from tests.activations.chats import make_chats
from tests.features.planted import PLANTED, make_codec, make_texts
from tests.studies.personas import make_adapter, make_base, read_mean

CODEC = make_codec()
SIZES = {0: 0.0, 1: 0.0, 2: 3.0, 3: 4.0, 4: 5.0}
module = sys.modules[follow_latents.__module__]


def make_trajectory(base: Any, latent: int, *, name: str) -> AdapterTrajectory:
    A = read_mean(base)
    adapters = {step: make_adapter(CODEC, latent, size=s, A=A) for step, s in SIZES.items()}
    none = torch.zeros(0)
    return AdapterTrajectory(
        source=name,
        steps=torch.tensor(sorted(SIZES)),
        modules=stack_adapters(adapters),
        logged_steps=none.long(),
        losses=none,
        penalties=none,
        gradient_norms=none,
    )


@pytest.fixture(scope="module")
def base() -> Any:
    return make_base()


@pytest.fixture(scope="module")
def texts(base: Any) -> FollowedTexts:
    pair = load_pair(base, make_adapter(CODEC, PLANTED, size=5.0))
    chats = tuple(make_chats(8))
    return FollowedTexts(chats=chats, contrast=make_texts(pair, n=6), positions="all")


def test_the_planted_latent_leaves_the_base_when_it_is_planted(
    base, texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = LatentPath(trajectory=make_trajectory(base, PLANTED, name="bad"))
    given: dict[str, Any] = {"codec": CODEC, "latents": (PLANTED, 3), "texts": texts}
    planted, still = follow_latents(base, path, out=tmp_path / "run", **given)
    assert planted.points == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert planted.departures.early == 2
    assert (planted.latent, still.latent) == (f"latent {PLANTED}", "latent 3")
    torch.testing.assert_close(still.latent_band.mean, still.latent_band.centre)
    assert (planted.n_latent_units, planted.n_behaviour_units) == (8, 6)
    last = load_pair(base, path.trajectory.adapter(4))
    own = check_sae(last, CODEC, chats=texts.chats, positions="all")
    assert planted.health is not None
    assert torch.equal(planted.health.explained_variance, own.explained_variance)
    assert planted.underpowered is own.underpowered
    assert torch.equal(planted.behaviour_band.mean, still.behaviour_band.mean)
    monkeypatch.setattr(module, "check_sae", None)
    monkeypatch.setattr(module, "read_latents", None)
    monkeypatch.setattr(module, "measure_odds_curve", None)
    again, _ = follow_latents(base, path, out=tmp_path / "run", **given)
    assert again.to_dict() == planted.to_dict()


def test_beside_a_twin_that_changes_as_much_nothing_leaves(base, texts, tmp_path: Path):
    path = LatentPath(
        trajectory=make_trajectory(base, PLANTED, name="bad"),
        twin=make_trajectory(base, PLANTED, name="good"),
        every=2,
    )
    (found,) = follow_latents(
        base, path, codec=CODEC, latents=(PLANTED,), texts=texts, out=tmp_path / "run"
    )
    assert found.points == (0.0, 2.0, 4.0)
    assert found.departures.early is None
    short = replace(
        path.trajectory,
        steps=path.trajectory.steps[:3],
        modules=stack_adapters({s: make_adapter(CODEC, 1, size=SIZES[s]) for s in (0, 1, 2)}),
    )
    with pytest.raises(TrajectoryError, match=r"twin: bad has checkpoints \[0, 2\]"):
        follow_latents(
            base,
            replace(path, twin=short),
            codec=CODEC,
            latents=(PLANTED,),
            texts=texts,
            out=tmp_path / "other",
        )
    assert not (tmp_path / "other").exists()


def test_too_few_units_and_unequal_classes_are_refused(base, texts):
    with pytest.raises(ValueError, match="chats: got 5 prompts"):
        replace(texts, chats=texts.chats[:5])
    with pytest.raises(ValueError, match="contrast: got 5 pairs"):
        replace(
            texts,
            contrast=ContrastTexts(
                positive=texts.contrast.positive[:5], negative=texts.contrast.negative[:5]
            ),
        )
    with pytest.raises(ValueError, match="6 misaligned and 5 aligned"):
        replace(
            texts,
            contrast=ContrastTexts(
                positive=texts.contrast.positive, negative=texts.contrast.negative[:5]
            ),
        )
    with pytest.raises(ValueError, match="every: got 0"):
        LatentPath(trajectory=make_trajectory(base, 1, name="x"), every=0)
