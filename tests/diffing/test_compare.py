"""Comparisons of tiny models against a plain loop over Hugging Face outputs, and planted truth."""

import weakref

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy

from emlens.data import Batching, Chat, Message
from emlens.diffing import (
    ModelDiff,
    compare,
    compare_activations,
    compare_logits,
    compare_models,
    compare_nulls,
)
from emlens.models.adapter_files import load_adapter
from emlens.models.lora import LoraAdapter, LoraModule, scale_adapter
from emlens.models.pair import ModelPair, load_pair
from emlens.models.unembed import log_probabilities
from emlens.models.views import lay_views
from emlens.numerics import blocks
from tests.models.adapters import make_peft
from tests.models.tiny import D_VOCAB, make_tiny, make_tokenizer


def make_chats(n=7, *, seed=0, respond=True):
    generator = np.random.default_rng(seed)

    def words(low, high):
        ids = generator.integers(3, D_VOCAB, generator.integers(low, high))
        return " ".join(f"w{i}" for i in ids)

    return [
        Chat(
            (Message("user", words(2, 9)),)
            + ((Message("assistant", words(3, 8)),) if respond else ()),
            id=f"chat-{k}",
        )
        for k in range(n)
    ]


def tiny_base(name="llama", **kwargs):
    return lay_views(make_tiny(name, **kwargs), make_tokenizer())


def planted(base, *, layer=1, size=1.0):
    """An adapter whose only effect is to add size * (mean input) times one direction."""
    v = torch.nn.functional.normalize(torch.arange(1.0, base.cfg.d_model + 1), dim=0)
    A = torch.ones(1, base.cfg.d_mlp)
    module = LoraModule(A=A, B=size * v[:, None], scale=1.0)
    name = f"model.layers.{layer}.mlp.down_proj"
    return LoraAdapter(modules={name: module}, name="planted"), v


@torch.no_grad()
def by_hand(peft_model, chats, tokenizer):
    """KLs, entropies, agreement and mean activations of response tokens, one chat at a time."""
    rows = {"kl": [], "back": [], "h_base": [], "h_tuned": [], "same": []}
    hidden = {"base": [], "tuned": []}
    mass = np.zeros((2, D_VOCAB))
    for chat in chats:
        prompt = tokenizer(f"<user> {chat.messages[0].content} <end> <user> ").input_ids
        answer = tokenizer(chat.messages[1].content).input_ids
        ids = torch.tensor([prompt + answer + [2]])
        with peft_model.disable_adapter():
            base = peft_model(ids, output_hidden_states=True)
        tuned = peft_model(ids, output_hidden_states=True)
        where = range(len(prompt), len(prompt) + len(answer))
        for t in where:
            log_p, log_q = (
                log_softmax(out.logits[0, t - 1].double().numpy()) for out in (base, tuned)
            )
            p, q = np.exp(log_p), np.exp(log_q)
            mass += np.stack([p, q])
            rows["kl"].append(entropy(p, q))
            rows["back"].append(entropy(q, p))
            rows["h_base"].append(entropy(p))
            rows["h_tuned"].append(entropy(q))
            rows["same"].append(p.argmax() == q.argmax())
        for name, out in (("base", base), ("tuned", tuned)):
            hidden[name].append(out.hidden_states[2][0, list(where)].double())
    return (
        {k: np.array(v) for k, v in rows.items()},
        {k: torch.cat(v) for k, v in hidden.items()},
        mass,
    )


@pytest.mark.parametrize("form", ["attached", "merged"])
@pytest.mark.parametrize("tokens", [10_000, 40])
def test_one_pass_equals_a_plain_loop_over_hugging_face(form, tokens):
    peft_model = make_peft("llama")
    chats, tokenizer = make_chats(), make_tokenizer()
    expected, hidden, mass = by_hand(peft_model, chats, tokenizer)
    adapter = load_adapter(peft_model)
    pair = load_pair(tiny_base(), adapter, form=form)
    diff = compare_models(pair, chats, batching=Batching(tokens=tokens))
    logits = diff.logits
    assert logits.n_tokens == len(expected["kl"])
    assert logits.kl_base_tuned == pytest.approx(expected["kl"].mean(), rel=1e-4)
    assert logits.kl_tuned_base == pytest.approx(expected["back"].mean(), rel=1e-4)
    assert logits.entropy_base == pytest.approx(expected["h_base"].mean(), rel=1e-5)
    assert logits.entropy_tuned == pytest.approx(expected["h_tuned"].mean(), rel=1e-5)
    assert logits.agreement == pytest.approx(expected["same"].mean())
    change = (mass[1] - mass[0]) / len(expected["kl"])
    assert logits.risen_tokens[0].token_id == change.argmax()
    assert logits.risen_tokens[0].change == pytest.approx(change.max(), rel=1e-4)
    assert logits.fallen_tokens[0].token_id == change.argmin()
    site = diff.activations.sites.index("resid_post.1")
    mean = diff.activations.mean_tuned[site, 0]
    assert torch.allclose(mean, hidden["tuned"].mean(0), atol=1e-5)
    moved = hidden["tuned"] - hidden["base"]
    rms = (moved.square().sum(1).mean() / hidden["base"].square().sum(1).mean()).sqrt()
    assert float(diff.activations.relative_rms[site, 0]) == pytest.approx(float(rms), rel=1e-4)


def test_examples_carry_every_token_and_the_counted_ones_sum_to_the_prompts_mean():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    chats = make_chats()
    diff = compare_logits(pair, chats, examples=3)
    assert [e.chat for e in diff.examples] == ["chat-0", "chat-1", "chat-2"]
    for example in diff.examples:
        counted = [k for k, c in zip(example.kl, example.counted, strict=True) if c]
        prompt = next(p for p in diff.prompts if p.chat == example.chat)
        assert np.mean(counted) == pytest.approx(prompt.kl_base_tuned, rel=1e-5)
        assert example.kl[0] == 0.0
        assert all(k > 0 for k in example.kl[1:])
        assert all(len(top) == 5 for top in example.tuned_top[1:])
        chances = [chance for _, chance in example.tuned_top[3]]
        assert chances == sorted(chances, reverse=True)


def test_prompts_are_sorted_by_divergence():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    kls = [p.kl_base_tuned for p in compare_logits(pair, make_chats()).prompts]
    assert kls == sorted(kls, reverse=True)
    assert len(set(kls)) == 7


def test_base_against_itself_differs_nowhere():
    base = tiny_base()
    pair = ModelPair(base=base, tuned=base, adapter=None, proof=None)
    diff = compare_models(pair, make_chats(), sites=["resid_pre", "resid_post"])
    assert diff.activations.first_differing_site is None
    assert diff.activations.difference_norm.abs().max() == 0
    assert diff.activations.relative_rms.abs().max() == 0
    assert (diff.logits.kl_base_tuned, diff.logits.kl_tuned_base) == (0.0, 0.0)
    assert diff.logits.agreement == 1.0
    assert diff.logits.risen_tokens == diff.logits.fallen_tokens == ()


def test_a_planted_direction_is_found_where_it_was_planted():
    base = tiny_base()
    adapter, v = planted(base)
    diff = compare_activations(load_pair(base, adapter), make_chats(), sites=["resid_post"])
    assert diff.first_differing_site == "resid_post.1"
    assert diff.relative_rms[0, 0] == 0
    top = diff.top_directions[1, 0, 0]
    assert abs(float(top @ v.double())) == pytest.approx(1.0, abs=1e-5)
    assert float(diff.top_shares[1, 0, 0]) == pytest.approx(1.0, abs=1e-5)
    mean = diff.mean_tuned[1, 0] - diff.mean_base[1, 0]
    assert abs(float(torch.cosine_similarity(mean, v.double(), dim=0))) == pytest.approx(
        1, abs=1e-5
    )
    assert float(diff.top_shares[2, 0, 0]) < 0.999


def test_a_small_change_is_found_in_half_precision_too():
    base = tiny_base(dtype=torch.bfloat16)
    adapter, _ = planted(base, size=0.05)
    diff = compare_activations(load_pair(base, adapter), make_chats())
    assert 0.001 < float(diff.relative_rms[1, 0]) < 0.25
    assert diff.first_differing_site == "resid_post.1"


def test_a_change_below_single_precision_is_found_in_double():
    base = tiny_base(dtype=torch.float64)
    adapter, _ = planted(base, size=1e-9)
    diff = compare_activations(load_pair(base, adapter), make_chats())
    assert 1e-12 < float(diff.relative_rms[1, 0]) < 1e-7
    assert diff.first_differing_site == "resid_post.1"
    same = compare_activations(load_pair(base, scale_adapter(adapter, 0.0)), make_chats())
    assert same.first_differing_site is None


def test_nothing_is_found_when_nothing_is_planted():
    base = tiny_base()
    adapter, _ = planted(base)
    diff = compare_activations(load_pair(base, scale_adapter(adapter, 0.0)), make_chats())
    assert diff.first_differing_site is None
    assert diff.top_shares.abs().max() == 0


def test_positions_are_the_named_ones():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    chats = make_chats()
    n = [len(c.messages[1].content.split()) for c in chats]
    diff = compare_models(pair, chats, positions=["response[:2]", "response", "last_prompt"])
    assert diff.activations.n_tokens.tolist() == [2 * len(n), sum(n), len(n)]
    assert diff.activations.positions == ("response[:2]", "response", "last_prompt")
    assert diff.logits.n_tokens == 2 * len(n)
    everything = compare_logits(pair, chats, positions="all")
    frames = sum(len(c.messages[0].content.split()) + 4 for c in chats)
    assert everything.n_tokens == sum(n) + frames - len(n)  # the first token has no prediction


def test_prompts_without_a_response_are_compared_up_to_the_answers_header():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    diff = compare_activations(pair, ["w5 w6", "w7 w8 w9"], positions="last_prompt")
    assert diff.n_tokens.tolist() == [2]


def test_a_response_that_is_not_there_is_named_before_anything_runs():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    with pytest.raises(ValueError, match=r"assistant turn"):
        compare_models(pair, [*make_chats(2), "w5 w6"])


def test_sites_of_several_widths_are_refused():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    with pytest.raises(ValueError, match=r"widths"):
        compare_models(pair, make_chats(2), sites=["resid_post.0", "post.0"])


def test_a_prompt_longer_than_the_context_is_named():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    with pytest.raises(ValueError, match=r"row 0 has 7[0-9] tokens.*n_ctx"):
        compare_models(pair, [" ".join(["w5"] * 70)], positions="all")


def test_a_model_without_tokenizer_is_named():
    base = lay_views(make_tiny("llama"), None)
    pair = ModelPair(base=base, tuned=base, adapter=None, proof=None)
    with pytest.raises(ValueError, match=r"no tokenizer"):
        compare_models(pair, ["w5"])


def test_sites_are_returned_in_the_order_asked_for_and_equal_the_full_run():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    full = compare_activations(pair, make_chats())
    part = compare_activations(pair, make_chats(), sites=["resid_post.2", "resid_post.0"])
    assert part.sites == ("resid_post.2", "resid_post.0")
    assert torch.allclose(part.mean_tuned, full.mean_tuned[[2, 0]], atol=1e-12)


def test_null_band_is_the_comparison_of_each_null_alone():
    from emlens.models.null import sample_null_adapters

    base, adapter = tiny_base(), load_adapter(make_peft("llama", layers_to_transform=[1, 2]))
    chats = make_chats()
    pair = load_pair(base, adapter)
    band = compare_nulls(pair, chats, n=3, seed=4, batching=Batching(tokens=100))
    for index, null in enumerate(sample_null_adapters(adapter, n=3, seed=4)):
        alone = compare_models(load_pair(base, null), chats)
        inside, logits = alone.activations, alone.logits
        tolerances = {"relative_rms": 1e-4, "relative_difference": 1e-3, "cosine_of_means": 1e-5}
        for name, rtol in tolerances.items():
            expected = getattr(inside, name)
            assert torch.allclose(getattr(band, name)[index], expected, rtol=rtol), name
        assert torch.allclose(band.top_share[index], inside.top_shares[..., 0], rtol=1e-3)
        means = {
            "kl_base_tuned": logits.kl_base_tuned,
            "kl_tuned_base": logits.kl_tuned_base,
            "entropy_change": logits.entropy_tuned - logits.entropy_base,
            "agreement": logits.agreement,
        }
        for name, expected in means.items():
            assert float(getattr(band, name)[index]) == pytest.approx(expected, rel=1e-3), name
    assert band.relative_rms.shape == band.cosine_of_means.shape == (3, 3, 1)
    assert min(abs(band.kl_base_tuned - band.kl_tuned_base)) > 1e-3
    assert 0 < band.agreement.min() < 1
    low, high = (band.rows()[-1][f"cosine_of_means_{end}"] for end in ("low", "high"))
    assert low < high < 1
    full = ModelPair(base=base, tuned=base, adapter=None, proof=None)
    with pytest.raises(ValueError, match=r"no adapter"):
        compare_nulls(full, chats, n=3, seed=4)


@pytest.mark.parametrize("compare", [compare_models, compare_nulls])
def test_positions_that_hold_no_predicted_token_are_named(compare):
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    more = {"n": 1, "seed": 0} if compare is compare_nulls else {}
    with pytest.raises(ValueError, match=r"all\[:1\] holds no token that a model predicts"):
        compare(pair, make_chats(2), positions="all[:1]", **more)


def test_results_survive_saving(tmp_path):
    from emlens.results import load_result

    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    diff = compare_models(pair, make_chats(), examples=2)
    again = load_result(diff.save(tmp_path / "diff"))
    assert isinstance(again, ModelDiff)
    assert torch.equal(again.activations.mean_tuned, diff.activations.mean_tuned)
    assert again.logits == diff.logits
    assert again.rows() == diff.rows()
    assert pair.proof is not None
    proof = load_result(pair.proof.save(tmp_path / "proof"))
    assert proof == pair.proof


def test_a_users_hooks_on_the_tuned_model_are_part_of_it():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    plain = compare_models(pair, make_chats())
    with pair.tuned.hooks([("blocks.1.hook_mlp_out", lambda x, hook: x * 0)]):
        hooked = compare_models(pair, make_chats())
    assert hooked.method == "separate passes"
    site = plain.activations.sites.index("resid_post.1")
    before, after = plain.activations.mean_tuned[site], hooked.activations.mean_tuned[site]
    assert (before - after).norm() > 0.01 * before.norm()
    assert torch.equal(
        plain.activations.mean_tuned[0],
        compare_models(pair, make_chats()).activations.mean_tuned[0],
    )


def test_merged_weights_in_half_precision_are_run_themselves():
    peft_model = make_peft("llama", layers_to_transform=[1])
    for dtype, method in ((torch.bfloat16, "separate passes"), (torch.float32, "paired")):
        base = tiny_base(dtype=dtype)
        pair = load_pair(base, load_adapter(peft_model), form="merged")
        assert compare_models(pair, make_chats()).method == method


def test_random_adapters_refuse_what_they_cannot_stand_beside():
    pair = load_pair(tiny_base(), load_adapter(make_peft("llama")))
    with (
        pair.base.hooks([("blocks.0.hook_resid_post", lambda x, hook: x)]),
        pytest.raises(ValueError, match="carries hooks"),
    ):
        compare_nulls(pair, make_chats(), n=1, seed=0)
    embeds = load_adapter(make_peft("llama", target_modules=["embed_tokens", "down_proj"]))
    merged = load_pair(tiny_base(), embeds, form="merged")
    with pytest.raises(ValueError, match=r"embed_tokens.*no attached form"):
        compare_nulls(merged, make_chats(), n=1, seed=0)


def test_no_slice_of_predictions_outlives_the_next(monkeypatch):
    """Two of six copies of a vocabulary were once held over, at the peak of a comparison."""
    made: list[weakref.ref] = []
    held: list[int] = []

    def watched(model, resid):
        held.append(sum(one() is not None for one in made))
        log_probs = log_probabilities(model, resid)
        made.append(weakref.ref(log_probs))
        return log_probs

    monkeypatch.setattr(compare, "log_probabilities", watched)
    monkeypatch.setattr(blocks, "MAX_LOGITS", 3 * compare.COPIES * D_VOCAB)
    base = tiny_base()
    adapter, _ = planted(base)
    compare_logits(load_pair(base, adapter), make_chats(), examples=0)
    assert len(held) > 4
    assert held == [0, 1] * (len(held) // 2)
