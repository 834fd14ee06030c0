"""The mean difference of two models, steered with beside latents: what needs no codec."""

from dataclasses import replace

import pytest
import torch

from emlens.data import BehaviourScores
from emlens.features import FeatureScreen, ScreenSettings, screen_features
from emlens.features.screen_results import SIDES
from emlens.models.pair import ModelPair
from tests.features.planted import PLANTED, make_codec, make_pair, make_texts

CODEC = make_codec()
SETTINGS = ScreenSettings(strengths=(0.5, 1.0), units="delta_norm", n_sampled=0, n_controls=16)
UNASKED = BehaviourScores(
    teacher_forced=lambda _: 1 / 0, sampled=lambda _: [1 / 0], coherence=lambda _: [1 / 0]
)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return make_pair(CODEC)


def screen(
    pair: ModelPair, between: ModelPair, settings: ScreenSettings = SETTINGS
) -> FeatureScreen:
    given = {"latents": (PLANTED, 3), "texts": make_texts(pair), "scores": UNASKED}
    return screen_features(between, CODEC, settings=settings, **given)


def test_it_does_what_the_latent_does_that_was_planted_along_it(pair: ModelPair):
    found = screen(pair, pair)
    for side in SIDES:
        curve = found.mean_difference_curve(side)
        assert curve is not None
        torch.testing.assert_close(curve, found.forced_curves(side)[0], rtol=1e-3, atol=1e-4)
        assert float(curve.max()) > 0.05
        row = next(row for row in found.rows() if row["side"] == side)
        assert row["mean_difference"] == pytest.approx(float(curve.max()))


def test_two_models_of_one_mean_have_none(pair: ModelPair):
    same = ModelPair(base=pair.base, tuned=pair.base, adapter=None, proof=None)
    found = screen(pair, same, replace(SETTINGS, units="resid_norm", strengths=(0.5,)))
    assert found.mean_difference is None
    assert found.mean_difference_curve("base") is None
    assert found.rows()[0]["mean_difference"] is None
