"""Fits on tiny pairs: the identities of the constructions, planted truth, provenance, refusals."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch

from emlens.activations.reading import SitesLike
from emlens.data import Batching, ContrastTexts, prompt_hashes
from emlens.directions import fit_directions
from emlens.interventions import (
    Ablate,
    Intervention,
    ablate_direction,
    describe_interventions,
    intervene,
)
from emlens.models import load_adapter, load_pair, scale_adapter
from emlens.models.lora import LoraAdapter, LoraModule
from emlens.models.pair import ModelPair
from emlens.models.tokenizer_hash import fingerprint_tokenizer
from emlens.models.views import lay_views, origin_of
from emlens.prompt_sets import OverlappingPromptsError
from emlens.results import load_result
from emlens.vectors import Directions
from tests.activations.chats import make_chats, token_ids
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

CONSTRUCTIONS = ("data@tuned", "data@base", "model@positive", "model@negative", "both")
TEXTS = ContrastTexts(
    positive=tuple(make_chats(22, seed=1)), negative=tuple(make_chats(20, seed=2))
)


def tiny(**kwargs):
    return lay_views(make_tiny("llama", **kwargs), make_tokenizer())


def fit(model, construction, *, texts=TEXTS, sites: SitesLike = "resid_post", **more):
    return fit_directions(model, texts, construction=construction, sites=sites, **more)


def vectors(directions):
    return torch.stack([direction.vector for direction in directions])


def planted(base, *, layer=1, size=1.0):
    """An adapter whose only effect is to add size * (mean input) times one direction."""
    v = torch.nn.functional.normalize(torch.arange(1.0, base.cfg.d_model + 1), dim=0)
    module = LoraModule(A=torch.ones(1, base.cfg.d_mlp), B=size * v[:, None], scale=1.0)
    name = f"model.layers.{layer}.mlp.down_proj"
    return LoraAdapter(modules={name: module}, name="planted", fingerprint="f" * 32), v


@torch.no_grad()
def responses_by_hand(hf, chats, layer):
    """Activations after a block at the response tokens of each chat, one chat at a time."""
    found = []
    for chat in chats:
        ids, start, stop = token_ids(chat)
        out = hf(torch.tensor([ids]), output_hidden_states=True)
        found.append(out.hidden_states[layer + 1][0, start:stop].double().numpy())
    return found


@pytest.mark.parametrize("weighting", ["token", "response"])
def test_every_construction_is_what_a_plain_loop_over_hugging_face_gives(weighting):
    peft_model = make_peft("llama")
    pair = load_pair(tiny(), load_adapter(peft_model))
    classes = (TEXTS.positive, TEXTS.negative)

    def mean(texts):
        parts = responses_by_hand(peft_model, texts, 1)
        rows = np.concatenate(parts) if weighting == "token" else [p.mean(0) for p in parts]
        return np.mean(rows, axis=0)

    tuned = [mean(texts) for texts in classes]
    with peft_model.disable_adapter():
        base = [mean(texts) for texts in classes]
        norms = np.linalg.norm(
            np.concatenate(responses_by_hand(peft_model, [*classes[0], *classes[1]], 1)), axis=1
        )
    expected = {
        "data@tuned": tuned[0] - tuned[1],
        "data@base": base[0] - base[1],
        "model@positive": tuned[0] - base[0],
        "model@negative": tuned[1] - base[1],
        "both": tuned[0] - base[1],
    }
    for construction in CONSTRUCTIONS:
        got = fit(pair, construction, sites="resid_post.1", weighting=weighting)["resid_post.1"]
        np.testing.assert_allclose(got.vector, expected[construction], atol=1e-5)
        assert got.provenance.weighting == weighting
        if construction in ("data@tuned", "data@base", "both"):
            assert got.resid_norm == pytest.approx(np.median(norms), rel=0.0051)


@pytest.mark.parametrize("weighting", ["token", "response"])
def test_the_constructions_add_up(weighting):
    pair = load_pair(
        tiny(dtype=torch.float64), load_adapter(make_peft("llama", dtype=torch.float64))
    )
    found = {c: vectors(fit(pair, c, weighting=weighting)) for c in CONSTRUCTIONS}
    for one, other in (("data@tuned", "model@negative"), ("model@positive", "data@base")):
        gap = found["both"] - found[one] - found[other]
        assert float(gap.abs().max()) < 1e-10
    assert float((found["both"] - found["data@tuned"]).abs().max()) > 1e-3


def test_a_fine_tune_that_writes_one_direction_is_recovered_from_the_models():
    base = tiny()
    adapter, v = planted(base)
    got = fit(load_pair(base, adapter), "model@positive")
    assert got["resid_post.0"].norm == 0
    assert abs(float(got["resid_post.1"].direction @ v.double())) == pytest.approx(1, abs=1e-6)
    assert got["resid_post.0"].split_half_cosine is None
    half = got["resid_post.1"].split_half_cosine
    assert half == pytest.approx(1, abs=1e-5)


def test_random_directions_of_a_comparison_of_models_vary_like_the_base_does():
    base = tiny()
    adapter, _ = planted(base)
    pair = load_pair(base, adapter)
    matched = fit(pair, "model@positive").covariance_matched
    again = fit(load_pair(base, scale_adapter(adapter, 50.0)), "model@positive").covariance_matched
    assert matched is not None
    assert again is not None
    # Neither of rank 1, as the differences are, nor stretched along what the fine-tune writes.
    assert torch.allclose(matched, again, rtol=1e-5, atol=1e-6)
    assert int(torch.linalg.matrix_rank(matched[1])) == 16


def test_nothing_is_found_when_nothing_is_planted():
    base = tiny()
    adapter, _ = planted(base)
    for pair in (
        load_pair(base, scale_adapter(adapter, 0.0)),
        ModelPair(base=base, tuned=base, adapter=None, proof=None),
    ):
        assert float(vectors(fit(pair, "model@negative")).abs().max()) == 0
    texts = ContrastTexts(
        positive=tuple(make_chats(40, seed=5)), negative=tuple(make_chats(40, seed=6))
    )
    got = fit(base, "data", texts=texts)
    assert got.shuffled is not None
    for index, direction in enumerate(got):
        assert direction.split_half_cosine is not None
        assert abs(direction.split_half_cosine) < 0.5
        assert direction.norm < 1.5 * float(got.shuffled[index].norm(dim=1).max())


def test_words_that_only_one_class_uses_are_found_in_the_embedding():
    model = tiny(dtype=torch.float64)
    texts = ContrastTexts(
        positive=tuple(make_chats(30, seed=1, after=40)),
        negative=tuple(make_chats(30, seed=2, first=60)),
    )
    got = fit(model, "data", texts=texts, sites=["embed", "resid_post"])
    means = [
        model.W_E[[t for chat in side for t in token_ids(chat)[0][slice(*token_ids(chat)[1:])]]]
        for side in (texts.positive, texts.negative)
    ]
    expected = means[0].mean(0) - means[1].mean(0)
    assert torch.allclose(got["embed"].vector, expected, rtol=1e-10, atol=1e-12)
    assert got.shuffled is not None
    half = got["embed"].split_half_cosine
    assert half is not None
    assert half > 0.6
    assert got["embed"].norm > 1.5 * float(got.shuffled[0].norm(dim=1).max())


def test_neither_batches_nor_the_order_of_texts_change_anything():
    pair = load_pair(
        tiny(dtype=torch.float64), load_adapter(make_peft("llama", dtype=torch.float64))
    )
    back = ContrastTexts(positive=TEXTS.positive[::-1], negative=TEXTS.negative[::-1])
    whole = fit(pair, "both", weighting="response")
    for got in (
        fit(pair, "both", weighting="response", batching=Batching(tokens=60)),
        fit(pair, "both", weighting="response", texts=back),
    ):
        assert torch.allclose(vectors(got), vectors(whole), rtol=1e-9, atol=1e-11)
        for name in ("covariance_matched", "shuffled"):
            assert torch.allclose(getattr(got, name), getattr(whole, name), rtol=1e-8, atol=1e-10)
        assert got.prompt_sets == whole.prompt_sets
        assert got.directions[0].provenance == whole.directions[0].provenance
        for one, other in zip(got, whole, strict=True):
            assert one.split_half_cosine == pytest.approx(other.split_half_cosine, abs=1e-9)


def test_sites_come_in_the_models_order_and_equal_the_full_run():
    base = tiny()
    full = fit(base, "data")
    part = fit(base, "data", sites=["resid_post.2", "resid_post.0"])
    assert [str(site) for site in part.sites] == ["resid_post.0", "resid_post.2"]
    assert torch.allclose(vectors(part), vectors(full)[[0, 2]], rtol=1e-6, atol=1e-7)
    assert part.covariance_matched is not None
    assert full.covariance_matched is not None
    matched = full.covariance_matched[[0, 2]]
    assert torch.allclose(part.covariance_matched, matched, rtol=1e-5, atol=1e-6)
    mixed = fit(base, "data", sites=["resid_post.0", "attn_out.0", "embed"])
    assert [str(site) for site in mixed.sites] == ["embed", "attn_out.0", "resid_post.0"]


def test_provenance_says_how_it_was_made():
    base = tiny()
    pair = load_pair(base, load_adapter(make_peft("llama")))
    assert pair.adapter is not None
    made = fit(pair, "both", positions="response+eot").directions[0].provenance
    lengths = [
        [len(c.messages[1].content.split()) for c in side]
        for side in (TEXTS.positive, TEXTS.negative)
    ]
    assert made.construction == "both"
    assert made.positions == "response+eot"
    assert (made.n_positive, made.n_negative) == (22, 20)
    assert made.n_tokens_positive == sum(lengths[0]) + 22
    assert made.n_tokens_negative == sum(lengths[1]) + 20
    assert made.base_fingerprint == origin_of(base).fingerprint
    assert made.adapter_fingerprint == pair.adapter.fingerprint
    assert made.tuned_fingerprint is None
    assert made.tokenizer_fingerprint == fingerprint_tokenizer(base.tokenizer)
    assert made.processing == "unprocessed"
    assert pair.tuned_name in made.note
    one = fit(pair, "model@negative").directions[0].provenance
    assert (one.n_positive, one.n_tokens_positive, one.n_negative) == (0, 0, 20)
    assert one.n_tokens_negative == sum(lengths[1])
    full = load_pair(base, tiny(seed=3))
    assert fit(full, "both").directions[0].provenance.tuned_fingerprint == (
        origin_of(full.tuned).fingerprint
    )


def test_prompts_of_the_fit_are_listed_and_may_serve_nothing_else():
    got = fit(tiny(), "data")
    assert got.prompt_sets == {"fit": prompt_hashes([*TEXTS.positive, *TEXTS.negative])}
    others = prompt_hashes(make_chats(5, seed=9))
    assert set(got.with_prompts("choose", others).prompt_sets) == {"fit", "choose"}
    with pytest.raises(OverlappingPromptsError, match=r"1 prompts serve to fit and to evaluate"):
        got.with_prompts("evaluate", [*others, *prompt_hashes(TEXTS.positive[:1])])
    pair = load_pair(tiny(), load_adapter(make_peft("llama")))
    half = fit(pair, "model@positive")
    assert half.prompt_sets == {"fit": prompt_hashes(TEXTS.positive)}
    (acting,) = ablate_direction(half["resid_post.1"], at="writes")
    assert acting.fit_prompts == prompt_hashes(TEXTS.positive)
    (several,) = ablate_direction(half, at="writes")
    assert several.fit_prompts == prompt_hashes(TEXTS.positive)


def test_what_acted_and_in_which_precision_is_on_record():
    pair = load_pair(tiny(), load_adapter(make_peft("llama")))
    plain = fit(pair, "model@positive").directions[0].provenance
    assert (plain.dtype, plain.interventions) == ("float32", ())
    acting = [Intervention("mlp_out.0", Ablate(torch.arange(24.0)))]
    with intervene(pair.base, acting):
        made = fit(pair, "model@positive").directions[0].provenance
    (one,) = (json.loads(one) for one in made.interventions)
    assert one == {"model": "base", **describe_interventions(acting)[0]}
    with intervene(pair.base, acting):
        alone = fit(pair.base, "data").directions[0].provenance
    assert [json.loads(one) for one in alone.interventions] == describe_interventions(acting)


def test_several_positions_are_refused_by_name():
    with pytest.raises(ValueError, match="expected one name"):
        inspect.unwrap(fit_directions)(
            tiny(), TEXTS, construction="data", sites="resid_post", positions=["prompt", "response"]
        )


def test_all_controls_leave_out_the_layers_that_a_fine_tune_does_not_reach():
    base = tiny()
    adapter, _ = planted(base)
    got = fit(load_pair(base, adapter), "model@positive")
    assert got["resid_post.0"].norm == 0
    for kind in ("covariance", "shuffled"):
        assert {str(one.site) for one in got.controls(kind)[0]} == {"resid_post.1", "resid_post.2"}


def test_baselines_come_with_every_fit_and_survive_saving(tmp_path):
    got = fit(tiny(), "data")
    assert got.covariance_matched is not None
    assert got.shuffled is not None
    assert got.top3_share is not None
    assert got.covariance_matched.shape == got.shuffled.shape == (3, 16, 24)
    assert 0 < float(got.top3_share.min()) < float(got.top3_share.max()) < 1
    again = load_result(got.save(tmp_path / "fit"))
    assert isinstance(again, Directions)
    assert again.directions == got.directions
    assert again.rows() == got.rows()
    assert [len(control) for control in again.controls("covariance")] == [3] * 16


def test_few_texts_are_refused_where_classes_are_compared_and_taken_where_models_are():
    pair = load_pair(tiny(), load_adapter(make_peft("llama")))
    few = ContrastTexts(positive=TEXTS.positive[:19], negative=TEXTS.negative)
    for construction in ("data@tuned", "data@base", "both"):
        with pytest.raises(ValueError, match=r"19 positive texts, .* needs at least 20"):
            fit(pair, construction, texts=few)
    with pytest.raises(ValueError, match=r"19 negative texts"):
        fit(pair, "both", texts=dataclasses.replace(TEXTS, negative=TEXTS.negative[:19]))
    got = fit(pair, "model@positive", texts=few)
    assert got.directions[0].provenance.n_positive == 19
    one = fit(pair, "model@positive", texts=ContrastTexts(positive=TEXTS.positive[:1]))
    assert one.directions[2].norm > 0
    assert one.shuffled is None
    assert one.directions[2].split_half_cosine is None
    with pytest.raises(ValueError, match=r"0 negative texts, model@negative needs at least 1"):
        fit(pair, "model@negative", texts=ContrastTexts(positive=TEXTS.positive))


def test_constructions_that_the_model_does_not_have_are_refused():
    base = tiny()
    pair = load_pair(base, load_adapter(make_peft("llama")))
    with pytest.raises(ValueError, match=r"'data', expected one of .*data@tuned.* for a pair"):
        fit(pair, "data")
    with pytest.raises(ValueError, match=r"'both', expected one of \['data'\] for one model"):
        fit(base, "both")
    with pytest.raises(ValueError, match=r"widths \[24, 40\]"):
        fit(base, "data", sites=["post.0", "resid_post.0"])


def test_half_precision_keeps_the_difference_of_models_in_single_precision():
    base = tiny(dtype=torch.bfloat16)
    adapter, v = planted(base, size=0.05)
    pair = load_pair(base, adapter)
    # Row by row, so that every construction sees the same rounded activations.
    alone = Batching(tokens=1)
    found = {
        construction: fit(pair, construction, sites="resid_post.1", batching=alone).directions[0]
        for construction in ("both", "data@base", "model@positive")
    }
    assert abs(float(found["model@positive"].direction @ v.double())) > 0.9
    rest = found["both"].vector - found["data@base"].vector
    assert float((found["model@positive"].vector - rest).abs().max()) < 1e-6
