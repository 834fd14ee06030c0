"""Cards of latents of a tiny pair, beside passes and products done by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from emlens.codecs import CodecError
from emlens.features.cards import FeatureCard, FeatureCards
from emlens.features.compare import compare_features
from emlens.features.explain import explain_features
from emlens.features.explain_settings import ExplainSettings
from emlens.features.health import check_sae
from emlens.features.logit_lens import read_logit_lens
from emlens.models import load_adapter, load_pair
from emlens.models.lora import LoraAdapter, LoraModule
from emlens.models.views import lay_views
from emlens.numerics.validation import WidthError
from emlens.results import load_result
from emlens.sites import parse_site
from emlens.vectors import Direction, Provenance
from tests.activations.chats import make_chats, token_ids
from tests.features.planted import PLANTED, SITE, make_codec, make_pair
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

CODEC = make_codec()
LATENTS = (7, PLANTED)
CHATS = make_chats(12, seed=4)
SETTINGS = ExplainSettings(n_top=4, sample=60, before=3, after=2, n_tokens=5)


@pytest.fixture(scope="module")
def pair() -> Any:
    return make_pair(CODEC)


@pytest.fixture(scope="module")
def cards(pair) -> FeatureCards:
    return explain_features(pair, CODEC, latents=LATENTS, chats=CHATS, settings=SETTINGS)


@torch.no_grad()
def codes_by_hand(model: Any, chat: Any) -> np.ndarray:
    """[token, latent] of one chat, by a plain pass."""
    _, cache = model.run_with_cache(torch.tensor([token_ids(chat)[0]]))
    return (cache[SITE.hook_name][0] @ CODEC.W_enc).relu().numpy()


@pytest.fixture(scope="module")
def codes(pair) -> list[np.ndarray]:
    """[model, token, latent] of every chat."""
    return [np.stack([codes_by_hand(m, chat) for m in (pair.base, pair.tuned)]) for chat in CHATS]


@pytest.mark.parametrize("latent", LATENTS)
def test_top_windows_are_those_of_looking_at_every_token(cards, codes, latent):
    peaks = [own[:, :, latent].max(0) for own in codes]
    order = sorted(range(len(CHATS)), key=lambda k: -peaks[k].max())[:4]
    found = cards.card(latent).top
    assert [one.chat for one in found] == order
    for one in found:
        best = int(peaks[one.chat].argmax())
        assert (one.token, one.chat_id) == (best, CHATS[one.chat].id)
        assert one.code == pytest.approx(peaks[one.chat].max(), rel=1e-4)
        ids = token_ids(CHATS[one.chat])[0]
        part = slice(max(0, best - 3), best + 3)
        words = make_tokenizer().convert_ids_to_tokens(ids[part])
        assert [piece.strip() for piece in one.pieces] == words
        expected = codes[one.chat][:, part, latent]
        np.testing.assert_allclose(np.array(one.codes), expected, rtol=1e-3, atol=1e-5)
        assert f"«{one.pieces[best - one.start]}»" in one.text
    active = sum((own[:, :, latent].max(0) > 0).sum() for own in codes)
    n_tokens = sum(own.shape[1] for own in codes)
    assert cards.card(latent).active_share == pytest.approx(active / n_tokens)
    assert cards.n_tokens == n_tokens


def test_cards_say_how_well_the_codec_fits_the_texts_they_are_cut_from(pair, cards):
    own = check_sae(pair, CODEC, chats=CHATS)
    assert cards.health.to_dict() == own.to_dict()
    alone = explain_features(pair.base, CODEC, latents=(7,), chats=CHATS[:3], settings=SETTINGS)
    assert alone.health.streams == ("model",)
    assert alone.health.n_prompts == 3
    assert alone.cards[0].directions == ()
    diff = compare_features(pair, CODEC, chats=CHATS)
    for latent in LATENTS:
        (near,) = cards.card(latent).directions
        assert near.cosine == pytest.approx(float(diff.decoder_cosine[latent]), abs=1e-6)
        assert "mean difference of the two models" in near.name


def test_the_planted_latent_is_more_active_in_the_tuned_model(cards):
    assert cards.models == ("base", "tuned")
    for one in cards.card(PLANTED).top:
        base, tuned = one.codes
        assert tuned[one.token - one.start] > base[one.token - one.start] + 1


def test_sampled_windows_come_from_every_tenth(cards, codes):
    latent = LATENTS[0]
    found = cards.card(latent).sampled
    assert [one.decile for one in found] == list(range(1, 11))
    values = [one.code for one in found]
    assert values == sorted(values)
    every = np.concatenate([own[:, :, latent].max(0) for own in codes])
    active = np.sort(every[every > 0])
    for one in found:
        assert one.code == pytest.approx(codes[one.chat][:, one.token, latent].max(), rel=1e-4)
    if len(active) <= SETTINGS.sample:
        parts = np.array_split(active, 10)
        assert all(
            part[0] * 0.999 <= one.code <= part[-1] * 1.001
            for part, one in zip(parts, found, strict=True)
        )


def test_where_a_codec_does_not_look_no_code_is_shown(pair):
    late = explain_features(
        pair.base,
        CODEC,
        latents=(7,),
        chats=CHATS,
        settings=replace(SETTINGS, positions="all[4:]", before=20),
    )
    assert late.models == ("model",)
    for one in late.cards[0].top:
        assert one.token >= 4
        (shown,) = one.codes
        assert one.start == 0
        assert shown[:4] == (None,) * 4
        assert None not in shown[4:]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_lens_is_the_hosts_own_norm_and_unembedding(name):
    model: Any = lay_views(make_tiny(name), make_tokenizer())
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, 24, generator=generator)
    lenses = read_logit_lens(model, vectors, n_tokens=5)
    with torch.no_grad():
        normed = model.ln_final(vectors[None])[0]
        logits = normed @ model.W_U + model.unembed.b_U
        if model.cfg.output_logits_soft_cap > 0:
            cap = model.cfg.output_logits_soft_cap
            logits = cap * torch.tanh(logits / cap)
        logits = (logits - logits.mean(1, keepdim=True)).numpy()
        W_U = model.W_U.numpy()
    cosines = (vectors.numpy() @ W_U) / np.linalg.norm(W_U, axis=0)
    cosines = cosines / np.linalg.norm(vectors.numpy(), axis=1, keepdims=True)
    for lens, own, angles in zip(lenses, logits, cosines, strict=True):
        for found, values, sign in (
            (lens.promoted, own, -1),
            (lens.suppressed, own, 1),
            (lens.aligned, angles, -1),
            (lens.opposed, angles, 1),
        ):
            order = np.argsort(sign * values, kind="stable")[:5]
            assert [one.token for one in found] == order.tolist()
            assert [one.value for one in found] == pytest.approx(values[order], rel=1e-4, abs=1e-5)
            words = make_tokenizer().convert_ids_to_tokens(order.tolist())
            assert [one.text for one in found] == words


def test_latents_outside_the_residual_stream_have_no_lens(pair):
    inside = make_codec(40, 9, site=parse_site("post.1"))
    found = explain_features(pair.base, inside, latents=(2,), chats=CHATS[:3], settings=SETTINGS)
    assert found.cards[0].lens is None
    assert found.cards[0].writes == ()
    assert found.cards[0].top


def direction(vector: torch.Tensor, site: str = "resid_post.0") -> Direction:
    return Direction(
        site=parse_site(site), vector=vector, provenance=Provenance(construction="data")
    )


def test_cosines_stand_beside_those_of_random_vectors(pair):
    near = CODEC.W_dec[PLANTED] + CODEC.W_dec[1]
    rank1 = LoraModule(A=torch.ones(1, 40), B=-CODEC.W_dec[PLANTED, :, None], scale=2.0)
    span = torch.stack([CODEC.W_dec[1], CODEC.W_dec[7], CODEC.W_dec[1]], 1)
    rank3 = LoraModule(A=torch.ones(3, 24), B=span, scale=1.0)
    query = LoraModule(A=torch.ones(1, 24), B=torch.ones(24, 1), scale=1.0)
    adapter = LoraAdapter(
        modules={
            "model.layers.1.mlp.down_proj": rank1,
            "model.layers.2.self_attn.o_proj": rank3,
            "model.layers.0.self_attn.q_proj": query,
        },
        name="planted",
    )
    found = explain_features(
        pair.base,
        CODEC,
        latents=LATENTS,
        chats=CHATS[:2],
        directions=[direction(3 * near)],
        adapter=adapter,
        settings=SETTINGS,
    )
    seven, planted = found.cards
    assert planted.directions[0].name == "resid_post.0 data"
    assert planted.directions[0].cosine == pytest.approx(2**-0.5, abs=1e-5)
    assert planted.directions[0].random == pytest.approx(24**-0.5)
    assert seven.directions[0].cosine == pytest.approx(0, abs=1e-5)
    assert [one.name for one in planted.writes] == list(adapter.modules)[:2]
    assert [one.cosine for one in planted.writes] == pytest.approx([-1, 0], abs=1e-5)
    assert [one.cosine for one in seven.writes] == pytest.approx([0, 1], abs=1e-5)
    assert [one.dimensions for one in seven.writes] == [1, 2]
    assert seven.writes[1].random == pytest.approx((2 / 24) ** 0.5)
    assert found.rows()[1]["nearest"].startswith("model.layers.1.mlp.down_proj: -1.00")


def test_a_pairs_own_adapter_is_compared_with():
    peft_model: Any = make_peft("gemma2", target_modules=["down_proj", "o_proj"], r=1)
    pair = load_pair(lay_views(make_tiny("gemma2"), make_tokenizer()), load_adapter(peft_model))
    found = explain_features(pair, CODEC, latents=(0,), chats=CHATS[:2], settings=SETTINGS)
    writes = {one.name: one.cosine for one in found.cards[0].writes}
    assert len(writes) == 6
    name = "model.layers.1.mlp.down_proj"
    assert pair.adapter is not None
    B = pair.adapter.modules[name].B[:, 0]
    # What Gemma's norm after the module makes of it, up to its length.
    block: Any = peft_model.base_model.model.model.layers[1]
    in_stream = B * (1 + block.post_feedforward_layernorm.weight)
    expected = torch.nn.functional.cosine_similarity(in_stream, CODEC.W_dec[0], dim=0)
    assert writes[name] == pytest.approx(float(expected), abs=1e-5)


def test_an_explainer_is_asked_about_each_finished_card(pair, cards, tmp_path):
    seen: list[FeatureCard] = []

    def explain(card: FeatureCard) -> str:
        seen.append(card)
        return f"latent {card.latent}"

    settings = replace(SETTINGS, explainer=explain)
    found = explain_features(pair, CODEC, latents=LATENTS, chats=CHATS, settings=settings)
    assert tuple(seen) == cards.cards
    assert [card.explanation for card in found.cards] == ["latent 7", "latent 5"]
    assert load_result(found.save(tmp_path / "cards")).to_dict() == found.to_dict()
    with pytest.raises(KeyError, match="latent 3 has no card"):
        found.card(3)


def test_wrong_input_is_named(pair):
    given: dict[str, Any] = {"latents": (1,), "chats": CHATS[:2], "settings": SETTINGS}
    outside: dict[str, Any] = given | {"latents": (-1,)}
    with pytest.raises(CodecError, match=r"numbered from 0, and got \[-1\]"):
        explain_features(pair, CODEC, **outside)
    with pytest.raises(ValueError, match=r"one at z.0 has axes"):
        explain_features(pair, CODEC, directions=[direction(torch.ones(24), "z.0")], **given)
    with pytest.raises(WidthError, match=r"expected \[n, 24\]"):
        read_logit_lens(pair.base, torch.ones(2, 20), n_tokens=3)
    with pytest.raises(ValueError, match="n_tokens: got 98, expected 1 to 97"):
        read_logit_lens(pair.base, torch.ones(2, 24), n_tokens=98)
    with pytest.raises(ValueError, match="per_decile: got -1"):
        replace(SETTINGS, per_decile=-1)
