"""A codec of other weights is refused by whatever runs a model, unless that was asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from emlens.codecs import CodecError, allow_other_model
from emlens.data import BehaviourScores
from emlens.features import (
    ScreenSettings,
    attribute_features,
    cap_latent,
    check_sae,
    compare_features,
    explain_features,
    read_latents,
    screen_features,
)
from emlens.interventions import intervene
from emlens.interventions.other_model import OtherModelError
from emlens.models.pair import ModelPair
from emlens.models.views import lay_views, origin_of
from tests.activations.chats import make_chats
from tests.features.planted import PLANTED, make_codec, make_pair, make_texts
from tests.models.tiny import make_ids, make_tiny, make_tokenizer

CODEC = make_codec()
FOREIGN = dataclasses.replace(CODEC, base_fingerprint="another base", base_name="org/other")
CHATS = make_chats(2)
SCORES = BehaviourScores(teacher_forced=lambda _: 0.0, sampled=lambda _: [], coherence=lambda _: [])
SCREEN = ScreenSettings(strengths=(1.0,), units="delta_norm", n_sampled=0)

Run = Callable[[ModelPair, Any], Any]
WAYS_IN: dict[str, Run] = {
    "check": lambda pair, codec: check_sae(pair, codec, chats=CHATS),
    "compare": lambda pair, codec: compare_features(pair, codec, chats=CHATS),
    "read": lambda pair, codec: read_latents(pair, codec, latents=[1], chats=CHATS),
    "explain": lambda pair, codec: explain_features(pair, codec, latents=[1], chats=CHATS),
    "attribute": lambda pair, codec: attribute_features(pair.tuned, codec, texts=make_texts(pair)),
    "screen": lambda pair, codec: screen_features(
        pair, codec, latents=[1], texts=make_texts(pair), scores=SCORES, settings=SCREEN
    ),
}


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return make_pair(CODEC)


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_codec_of_other_weights_is_refused(pair: ModelPair, way: str):
    said = r"on weights another base, .*org/other.* allow_other_model=True \(--allow-other-model\)"
    with pytest.raises(CodecError, match=said):
        WAYS_IN[way](pair, FOREIGN)


@pytest.mark.parametrize("way", ["check", "read", "attribute"])
def test_what_is_meant_or_not_known_or_the_same_is_used(pair: ModelPair, way: str):
    own = dataclasses.replace(CODEC, base_fingerprint=origin_of(pair.base).fingerprint)
    for codec in (allow_other_model(FOREIGN), CODEC, own):
        WAYS_IN[way](pair, codec)
    assert check_sae(pair, own, chats=CHATS).same_base is True
    assert check_sae(pair, allow_other_model(FOREIGN), chats=CHATS).same_base is None


def test_a_full_fine_tune_is_read_with_the_codec_of_its_base(pair: ModelPair):
    full = lay_views(make_tiny("llama", seed=7), make_tokenizer(), name="full")
    assert origin_of(pair.base).fingerprint not in origin_of(full).lineage
    own = dataclasses.replace(CODEC, base_fingerprint=origin_of(pair.base).fingerprint)
    both = ModelPair(base=pair.base, tuned=full, adapter=None, proof=None)
    found = compare_features(both, own, chats=CHATS, tuned_chats=CHATS)
    assert found.responses == "own"
    assert found.health.same_base is True
    with pytest.raises(CodecError, match="on weights"):
        compare_features(both, FOREIGN, chats=CHATS, tuned_chats=CHATS)
    with pytest.raises(CodecError, match="on weights"):
        check_sae(full, own, chats=CHATS)


def test_a_latent_is_held_on_the_weights_of_its_codec_alone(pair: ModelPair):
    def hold(codec: Any) -> None:
        with intervene(pair.tuned, cap_latent(codec, PLANTED, threshold=0.1, side="above")):
            pair.tuned(make_ids(1, 5))

    with pytest.raises(
        OtherModelError, match=r"from weights another base, not .*allow_other_model"
    ):
        hold(FOREIGN)
    hold(allow_other_model(FOREIGN))
    # The fine-tune is made of the base's weights.
    hold(dataclasses.replace(CODEC, base_fingerprint=origin_of(pair.base).fingerprint))


def test_leave_for_other_weights_changes_no_code():
    assert allow_other_model(CODEC) is CODEC
    allowed = allow_other_model(FOREIGN)
    assert (allowed.base_fingerprint, allowed.base_name) == (None, "org/other")
    assert allowed.fingerprint == FOREIGN.fingerprint


class PairedCodec:
    """A codec with decoder vectors of two models, as the type checker of the tests lets pass."""

    W_dec = torch.zeros(2, CODEC.d_sae, CODEC.d_in)

    def __getattr__(self, name: str) -> Any:
        return getattr(CODEC, name)


@pytest.mark.parametrize("name", ["check", "compare", "read", "explain"])
def test_a_crosscoder_is_refused_before_anything_runs(name: str):
    with pytest.raises(CodecError, match="a crosscoder reads two models at once"):
        WAYS_IN[name](make_pair(CODEC), PairedCodec())
