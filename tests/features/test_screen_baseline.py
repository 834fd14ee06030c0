"""The mean difference of two models, steered with beside latents: what needs no codec."""

from dataclasses import replace

import pytest
import torch

from emlens.data import BehaviourScores, Chat, Message
from emlens.features import FeatureScreen, ScreenSettings, screen_features
from emlens.features.screen_results import SIDES
from emlens.models import Sampling
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
    pair: ModelPair,
    between: ModelPair,
    settings: ScreenSettings = SETTINGS,
    scores: BehaviourScores = UNASKED,
) -> FeatureScreen:
    given = {"latents": (PLANTED, 3), "texts": make_texts(pair), "scores": scores}
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
    assert [row["directions"] for row in found.trials()] == ["latents", "random"] * 2


def test_responses_are_sampled_under_it_as_under_the_latent_planted_along_it(pair: ModelPair):
    scores = replace(
        UNASKED,
        sampled=lambda chats: [100.0 * len(set(words_of(chat))) / 6 for chat in chats],
        coherence=lambda chats: [100.0] * len(chats),
    )
    chats = [Chat((Message("user", f"w{40 + k} w{50 + k}"),)) for k in range(3)]
    sampling = Sampling(n=2, temperature=0.4, max_new_tokens=6)
    settings = replace(SETTINGS, strengths=(1.0, 4.0), chats=chats, sampling=sampling, n_sampled=2)
    found = screen(pair, pair, settings, scores)
    plainly = dict(zip(SIDES, found.sampled_plainly, strict=True))
    for side, curve in plainly.items():
        planted = found.curve(PLANTED, side=side)
        assert (curve.side, curve.points, curve.p) == (side, planted.points, planted.p)
        assert any(point.effect and point.effect.value for point in curve.points)
        # It is no latent, and none of the controls that both are held against.
        chance = [c for c in found.sampled if c.side == side and c.latent is None]
        assert {c.control for c in chance} == set(range(16))
        assert planted.p == (1 + sum(c.effect >= planted.effect for c in chance)) / 17
    row, *_ = found.plain_rows()
    assert (row["side"], row["latent"], row["strength"]) == ("base", "mean difference", 4.0)
    assert [t["trials"] for t in found.trials()] == [4, 32, 2] * 2


def words_of(chat: Chat) -> list[str]:
    assert chat.response is not None
    return chat.response.content.split()
