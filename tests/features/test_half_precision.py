"""Half precision of models and codecs: numbers near those of float32, or the way out is named."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from emlens.codecs import CodecError, Sae
from emlens.data import Batching
from emlens.features import ExplainSettings, check_sae, compare_features, explain_features
from emlens.features.accumulate import FeatureAccumulator
from emlens.features.latents import read_latents
from emlens.features.reading import count_rows
from emlens.models.views import lay_views
from tests.activations.chats import make_chats
from tests.codecs.builders import draw, make_sae
from tests.features.planted import PLANTED, SITE, make_codec, make_pair
from tests.models.tiny import make_tiny, make_tokenizer

HALF = (torch.float16, torch.bfloat16)
CHATS = make_chats(6)
WINDOWS = ExplainSettings(n_top=2, sample=20, before=3, after=2)
WAY_OUT = r"x holds values beyond torch.float16.*load it in bfloat16 or float32"


@pytest.fixture(scope="module")
def pair() -> Any:
    return make_pair(make_codec())


@pytest.mark.parametrize("dtype", HALF)
def test_a_codec_in_half_precision_leaves_activations_their_digits(pair, dtype: torch.dtype):
    wide = replace(make_sae(d_in=24, d_sae=40), site=SITE)
    half = wide.to(dtype=dtype)
    found, expected = (compare_features(pair, own, chats=CHATS) for own in (half, wide))
    assert torch.equal(found.mean_difference, expected.mean_difference)
    share = 2e-3 if dtype == torch.float16 else 2e-2
    assert found.delta.sub(expected.delta).abs().max() < share * expected.mean_tuned.max()
    assert found.health.captured_share == pytest.approx(expected.health.captured_share, rel=share)


@pytest.mark.parametrize("dtype", HALF)
def test_small_changes_of_large_activations_are_summed_as_they_are(dtype: torch.dtype):
    codec = make_sae(d_in=12).to(dtype=dtype)
    x = 50 + draw(2, 100, 12, seed=1)
    x[1] = x[0] + 0.02
    found = FeatureAccumulator(2, n_prompts=1, d_in=12, d_sae=96)
    count_rows(found, codec, prompts=torch.zeros(100, dtype=torch.long), x=x)
    change = found.change()
    assert change is not None
    assert float(change.squares[0]) == pytest.approx(100 * 12 * 0.02**2, rel=1e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_activations_in_half_precision_are_taken_as_the_numbers_that_they_are(dtype: torch.dtype):
    model = lay_views(make_tiny("llama", dtype=dtype), make_tokenizer(), name="half")
    codec = make_codec()
    found = read_latents(model, codec, latents=(3, PLANTED), chats=CHATS, positions="response")
    alone = Batching(tokens=1)
    again = read_latents(
        model, codec, latents=(3, PLANTED), chats=CHATS, positions="response", batching=alone
    )
    torch.testing.assert_close(found.codes, again.codes, rtol=0.05, atol=0.02)
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, out: torch.Tensor) -> None:
        seen.append(out)

    handle = model.hook_dict[SITE.hook_name].register_forward_hook(keep)
    try:
        check_sae(model, codec, chats=CHATS[:1], positions="all")
        mean = read_latents(model, codec, latents=[PLANTED], chats=CHATS[:1], positions="all")
    finally:
        handle.remove()
    assert seen[-1].dtype == dtype
    by_hand = (seen[-1][0].float() @ codec.W_enc[:, PLANTED]).relu().double().mean()
    assert float(mean.codes[0, 0, 0]) == pytest.approx(float(by_hand), rel=1e-5)


def enlarge(pair: Any, tokens: slice, size: float) -> list[Any]:
    """Hooks under which activations at some tokens are beyond float16."""

    def change(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        big = out.clone()
        big[:, tokens] *= size / big[:, tokens].abs().amax(2, keepdim=True)
        return big

    models = (pair.base, pair.tuned)
    return [m.hook_dict[SITE.hook_name].register_forward_hook(change) for m in models]


def every_way(pair: Any, codec: Sae) -> list[Any]:
    return [
        lambda: check_sae(pair, codec, chats=CHATS).explained_variance,
        lambda: compare_features(pair, codec, chats=CHATS).delta,
        lambda: read_latents(pair, codec, latents=[PLANTED], chats=CHATS).codes,
        lambda: torch.tensor(
            [
                window.code
                for window in explain_features(
                    pair, codec, latents=[PLANTED], chats=CHATS, settings=WINDOWS
                )
                .card(PLANTED)
                .top
            ]
        ),
    ]


def test_what_float16_cannot_hold_is_refused_with_the_way_out_or_normalised_first(pair):
    half = make_codec().to(dtype=torch.float16)
    hooks = enlarge(pair, slice(None), 2e5)
    try:
        for read in every_way(pair, half):
            with pytest.raises(CodecError, match=WAY_OUT):
                read()
        scaled = replace(half, normalization="constant_norm_rescale")
        wide = scaled.to(dtype=torch.float32)
        # Codes alone can be had; what says how well they fit, the cards too, reconstructs.
        found, expected = (every_way(pair, c)[2]() for c in (scaled, wide))
        for read in (every_way(pair, scaled)[0], every_way(pair, scaled)[3]):
            with pytest.raises(CodecError, match=r"reconstructions .* bfloat16 or float32"):
                read()
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=5e-3)


def test_tokens_that_a_codec_leaves_out_are_not_encoded_for_the_texts_that_are_shown(pair):
    half = make_codec(positions="all[2:]").to(dtype=torch.float16)
    hooks = enlarge(pair, slice(0, 2), 2e5)
    try:
        for read in every_way(pair, half):
            assert bool(read().isfinite().all())
        (card,) = explain_features(
            pair, half, latents=[PLANTED], chats=CHATS, settings=WINDOWS
        ).cards
    finally:
        for hook in hooks:
            hook.remove()
    early = [one for one in (*card.top, *card.sampled) if one.start < 2]
    assert early
    assert all(
        row[: 2 - one.start] == (None,) * (2 - one.start) for one in early for row in one.codes
    )
