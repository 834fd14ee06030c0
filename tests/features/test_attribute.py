"""Attributions to first order: finite differences of a model's own loss, sums by hand, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.data import Batching, Chat, ContrastTexts, Message, tokenize_chat
from emlens.data.contrast import ContrastError
from emlens.features import attribute
from emlens.features.attribute import AttributionSums, attribute_features, pair_by_prompt
from emlens.interventions import generate_responses
from emlens.models import Sampling, attach_adapter, load_adapter
from emlens.models.response_gradients import read_response_gradients
from emlens.models.views import lay_views, share_model
from emlens.numerics.validation import WidthError
from emlens.sites import SiteError, parse_site
from tests.activations.chats import make_chats, token_ids
from tests.features.planted import PLANTED, SITE, make_codec
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

CODEC = make_codec()
PROMPTS = [chat.messages[0] for chat in make_chats(3, seed=6)]


def answers(seed: int, *, each: int = 1) -> tuple[Chat, ...]:
    said = make_chats(len(PROMPTS) * each, seed=seed)
    return tuple(Chat((PROMPTS[k % len(PROMPTS)], chat.messages[1])) for k, chat in enumerate(said))


TEXTS = ContrastTexts(positive=answers(7), negative=answers(8, each=2))


def tuned(name: str = "llama") -> Any:
    base = lay_views(make_tiny(name, dtype=torch.float64), make_tokenizer())
    return attach_adapter(base, load_adapter(make_peft(name)))


def response_loss(model: Any, chat: Chat, change: Any = None) -> float:
    """Cross-entropy of the response, in nats, under a change of its activations at the site."""
    ids, start, stop = token_ids(chat)

    def act(x: torch.Tensor, hook: Any) -> torch.Tensor:
        moved = x.clone()
        moved[0, start:stop] = change(x[0, start:stop])
        return moved

    hooks = [] if change is None else [(SITE.hook_name, act)]
    logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0]
    log_p = logits.log_softmax(-1)[torch.arange(start - 1, stop - 1), torch.tensor(ids[start:stop])]
    return float(-log_p.sum())


def activations(model: Any, chat: Chat) -> torch.Tensor:
    ids, start, stop = token_ids(chat)
    return model.run_with_cache(torch.tensor([ids]))[1][SITE.hook_name][0, start:stop]


@torch.no_grad()
def by_finite_differences(model: Any, latent: int, *, step: float = 1e-4) -> float:
    every = (*TEXTS.positive, *TEXTS.negative)
    mean = torch.cat([activations(model, chat) for chat in every]).mean(0)
    d = CODEC.W_dec[latent].double()

    def slope(chat: Chat) -> float:
        def change(amount: float) -> Any:
            return lambda x: x - amount * ((x - mean) @ d)[:, None] * d

        more, less = (response_loss(model, chat, change(s)) for s in (step, -step))
        return (more - less) / (2 * step) / len(activations(model, chat))

    found = 0.0
    for prompt in PROMPTS:
        for sign, chats in ((1, TEXTS.positive), (-1, TEXTS.negative)):
            own = [slope(chat) for chat in chats if chat.messages[0] == prompt]
            found += sign * float(np.mean(own)) / len(PROMPTS)
    return found


@pytest.mark.parametrize("tokens", [4096, 30])
def test_scores_are_slopes_of_the_loss_toward_the_mean(tokens):
    model = tuned()
    ranking = attribute_features(model, CODEC, texts=TEXTS, batching=Batching(tokens=tokens))
    assert ranking.by == "attribution"
    scores = dict(zip(ranking.latents.tolist(), ranking.scores.tolist(), strict=True))
    for latent in (0, PLANTED, 11):
        expected = by_finite_differences(model, latent)
        assert scores[latent] == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert max(abs(score) for score in scores.values()) > 1e-3


def test_a_blind_codec_marks_its_ranking():
    model, rows = (
        tuned(),
        torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1))).Q,
    )
    both = torch.cat([rows, -rows])  # every vector with both signs leaves nothing unsaid
    whole = make_codec(d_sae=48, W_dec=both, W_enc=both.mT.clone())
    for codec, blind in ((CODEC, True), (whole, False)):
        assert attribute_features(model, codec, texts=TEXTS).underpowered is blind


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.0", "z.1"])
def test_gradients_are_those_of_autograd_through_the_whole_model(site):
    model, at = tuned("qwen3"), parse_site(site)
    chats = [tokenize_chat(chat, model.tokenizer) for chat in TEXTS.positive]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    read_response_gradients(
        model, chats, site=at, visit=lambda row, x, g: found.update({row: (x, g)})
    )
    for row, chat in enumerate(TEXTS.positive):
        ids, start, stop = token_ids(chat)
        kept: list[torch.Tensor] = []

        def keep(x: torch.Tensor, hook: Any, kept: Any = kept) -> torch.Tensor:
            kept.append(x.detach().requires_grad_())
            return kept[0]

        logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(at.hook_name, keep)])[0]
        loss = torch.nn.functional.cross_entropy(
            logits[start - 1 : stop - 1], torch.tensor(ids[start:stop]), reduction="sum"
        )
        (expected,) = torch.autograd.grad(loss, kept[0])
        x, g = found[row]
        torch.testing.assert_close(x, kept[0].detach()[0, start:stop].flatten(1))
        torch.testing.assert_close(g, expected[0, start:stop].flatten(1), rtol=1e-8, atol=1e-10)
        assert not bool(g[-1].any())
        assert bool(g[0].any())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any("keep" in str(h) for h in model.hook_dict[at.hook_name]._forward_hooks.values())


def test_the_latent_that_the_output_rests_on_comes_first():
    site = parse_site("resid_post.2")
    codec = make_codec(site=site)
    base: Any = lay_views(make_tiny("llama"), make_tokenizer())
    reads = torch.linspace(-1, 1, base.cfg.d_vocab)[
        torch.randperm(base.cfg.d_vocab, generator=torch.Generator().manual_seed(1))
    ]
    W_U = 0.05 * base.unembed.W_U + 4 * torch.outer(codec.W_dec[PLANTED], reads)
    model = share_model(base, {"unembed.W_U": W_U}, name="reads one latent")
    prompts = [Chat((Message("user", f"w{k} w{k + 7} w{k + 30}"),)) for k in range(10, 18)]
    said = generate_responses(
        model, prompts, sampling=Sampling(n=1, temperature=0, max_new_tokens=8)
    ).responses
    own = tuple(
        Chat((*prompts[one.prompt_index].messages, Message("assistant", one.text)))
        for one in said
        if one.text
    )
    other = tuple(
        Chat((chat.messages[0], reply.messages[1]))
        for chat, reply in zip(own, make_chats(len(own), seed=9), strict=True)
    )
    texts = ContrastTexts(positive=own, negative=other)
    ranking = attribute_features(model, codec, texts=texts)
    assert ranking.top(1) == [PLANTED]
    scores = ranking.scores
    assert float(scores[0]) > 3 * float(scores[1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_sums_are_those_over_single_tokens_in_any_order(seed, sizes):
    generator = np.random.default_rng(seed)
    rows = [(generator.normal(size=(n, 4)), generator.normal(size=(n, 4))) for n in sizes]
    weights = generator.normal(size=len(rows))
    directions = generator.normal(size=(3, 4))
    mean = np.concatenate([x for x, _ in rows]).mean(0)
    expected = np.zeros(3)
    for k, own in enumerate(directions / np.linalg.norm(directions, axis=1, keepdims=True)):
        for (x, g), weight in zip(rows, weights, strict=True):
            parts = [-(slope @ own) * ((a - mean) @ own) for a, slope in zip(x, g, strict=True)]
            expected[k] += weight * np.mean(parts)
    parts = AttributionSums(4), AttributionSums(4)
    for k in generator.permutation(len(rows)):
        x, g = (torch.tensor(part) for part in rows[k])
        parts[k % 2].update(x, g, weight=float(weights[k]))
    parts[0].merge(parts[1])
    found = parts[0].result(torch.tensor(directions))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_direction_of_zero_has_no_attribution():
    sums = AttributionSums(3)
    sums.update(torch.ones(2, 3), torch.ones(2, 3), weight=1.0)
    sums.update(torch.zeros(1, 3), torch.ones(1, 3), weight=1.0)
    found = sums.result(torch.stack([torch.zeros(3), torch.ones(3)]))
    assert float(found[0]) == 0.0
    assert float(found[1]) != 0.0


def test_wrong_input_is_named():
    model = tuned()
    lonely = ContrastTexts(positive=TEXTS.positive[:2], negative=TEXTS.negative)
    with pytest.raises(ValueError, match="1 of 3 prompts are answered in one class only"):
        attribute_features(model, CODEC, texts=lonely)
    both = pair_by_prompt(lonely)
    assert (len(both.positive), len(both.negative)) == (2, 4)
    with pytest.raises(ContrastError, match="no text in either class"):
        pair_by_prompt(ContrastTexts(positive=TEXTS.positive[:1], negative=TEXTS.negative[1:2]))
    with pytest.raises(ValueError, match="has width 24"):
        attribute_features(model, make_codec(20), texts=TEXTS)
    with pytest.raises(SiteError, match="embed is not in a block"):
        read_response_gradients(model, [], site=parse_site("embed"), visit=lambda *_: None)
    with pytest.raises(WidthError, match=r"x has shape \(2, 3\), expected \[n, 4\]"):
        AttributionSums(4).update(torch.ones(2, 3), torch.ones(2, 3), weight=1.0)


def test_sums_stay_where_the_activations_lie(monkeypatch: pytest.MonkeyPatch):
    # Nothing can be brought back from this device, so that bringing anything would be an error.
    there, here = AttributionSums(4), AttributionSums(4)
    tokens = torch.ones(2, 4, device="meta"), torch.ones(2, 4)
    for _ in range(2):
        there.update(tokens[0], tokens[0], weight=1.0)
    here.update(tokens[1], tokens[1], weight=1.0)
    here.update(tokens[1] + 1, 3 * tokens[1], weight=1.0)
    there.merge(here)
    there.merge(AttributionSums(4))
    empty = AttributionSums(4)
    empty.merge(there)
    devices: list[str] = []
    plain = attribute.unit_vectors

    def watching(vectors: torch.Tensor) -> torch.Tensor:
        devices.append(vectors.device.type)
        return plain(vectors)

    monkeypatch.setattr(attribute, "unit_vectors", watching)
    for sums in (there, empty):
        with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
            sums.result(torch.eye(4))
    assert devices == ["meta", "meta"]
    expected = here.result(torch.eye(4))
    later = AttributionSums(4)
    later.merge(here)
    here.update(5 * tokens[1], tokens[1], weight=1.0)
    assert bool(expected.any())
    assert torch.equal(later.result(torch.eye(4)), expected)
    assert not torch.equal(here.result(torch.eye(4)), expected)


def test_scores_are_brought_over_once(monkeypatch: pytest.MonkeyPatch):
    moved: list[tuple[int, ...]] = []
    plain = torch.Tensor.cpu

    def counting(x: torch.Tensor) -> torch.Tensor:
        moved.append(tuple(x.shape))
        return plain(x)

    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    monkeypatch.setattr(attribute, "CHUNK", 8)
    sums = AttributionSums(4)
    for _ in range(3):
        sums.update(torch.ones(2, 4), torch.ones(2, 4), weight=1.0)
    sums.result(torch.eye(4).repeat(3, 1))
    assert moved == [(12,)]
