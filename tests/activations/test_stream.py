"""Streaming over tiny models, against a plain loop over Hugging Face outputs."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.memory import live_tensors, storages
from emlens.activations import (
    ActivationStatistics,
    accumulate_activations,
    plan_reading,
    stream_activations,
    summarise_activations,
)
from emlens.data import Batching
from emlens.interventions import Ablate, Add, Intervention, describe_interventions, intervene
from emlens.models import load_adapter, load_pair
from emlens.models.tokens_in_flight import tokens_in_flight
from emlens.models.views import lay_views
from emlens.numerics.moments import MomentsAccumulator
from emlens.numerics.validation import WidthError
from emlens.results import load_result
from emlens.sites import SiteError
from tests.activations.chats import make_chats, token_ids
from tests.interventions.vectors import draw
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

EVERYTHING = ("mean", "variance", "covariance", "norm")


def tiny(name="llama", **kwargs):
    return lay_views(make_tiny(name, **kwargs), make_tokenizer())


@torch.no_grad()
def by_hand(hf, chats, layer, where):
    """Activations [n d] after a block at the chosen tokens, one chat at a time."""
    found = []
    for chat in chats:
        ids, start, stop = token_ids(chat)
        kept = range(start, stop) if where == "response" else range(len(ids))
        out = hf(torch.tensor([ids]), output_hidden_states=True)
        found.append(out.hidden_states[layer + 1][0, list(kept)])
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize("tokens", [10_000, 30])
def test_statistics_are_those_of_a_plain_loop_over_hugging_face(tokens):
    hf, chats = make_tiny("llama"), make_chats()
    got = stream_activations(
        lay_views(hf, make_tokenizer()),
        chats,
        sites=["resid_post.1", "resid_post.0"],
        positions=["response", "all"],
        statistics=EVERYTHING,
        batching=Batching(tokens=tokens),
    )
    assert got.streams == ("model",)
    assert got.sites == ("resid_post.1", "resid_post.0")
    assert got.mean is not None
    assert got.variance is not None
    assert got.covariance is not None
    assert got.norm_quantiles is not None
    for site, layer in enumerate((1, 0)):
        for position, where in enumerate(("response", "all")):
            x = by_hand(hf, chats, layer, where)
            at = (0, site, position)
            assert int(got.n_tokens[position]) == len(x)
            np.testing.assert_allclose(got.mean[at], x.mean(0), atol=1e-5)
            np.testing.assert_allclose(got.variance[at], x.var(0), rtol=1e-4)
            expected = np.cov(x, rowvar=False, bias=True)
            np.testing.assert_allclose(got.covariance[at], expected, atol=1e-4 * expected.max())
            quantiles = np.quantile(np.linalg.norm(x, axis=1), got.norm_levels)
            np.testing.assert_allclose(got.norm_quantiles[at], quantiles, rtol=0.0051)


@pytest.mark.parametrize("form", ["attached", "merged"])
def test_of_a_pair_base_tuned_and_difference_are_counted(form):
    peft_model, chats = make_peft("llama"), make_chats()
    pair = load_pair(tiny(), load_adapter(peft_model), form=form)
    got = stream_activations(
        pair, chats, sites="resid_post.2", positions="response", statistics=EVERYTHING
    )
    with peft_model.disable_adapter():
        base = by_hand(peft_model, chats, 1, "response")
    assert got.streams == ("base", "tuned", "difference")
    got_1 = stream_activations(
        pair, chats, sites="resid_post.1", positions="response", statistics=EVERYTHING
    )
    tuned = by_hand(peft_model, chats, 1, "response")
    assert got_1.mean is not None
    assert got_1.variance is not None
    for stream, x in enumerate((base, tuned, tuned - base)):
        np.testing.assert_allclose(got_1.mean[stream, 0, 0], x.mean(0), atol=1e-5)
        np.testing.assert_allclose(got_1.variance[stream, 0, 0], x.var(0), rtol=1e-3, atol=1e-6)
    assert pair.adapter is not None
    assert got.adapter_fingerprint == pair.adapter.fingerprint
    assert got.tuned == pair.tuned_name


def test_shards_of_chats_merge_to_the_whole():
    model, chats = tiny(dtype=torch.float64), make_chats(8)
    arguments = {"sites": "resid_post", "positions": "response", "batching": Batching()}
    whole = stream_activations(model, chats, statistics=EVERYTHING, **arguments)
    plans = [plan_reading(model, part, **arguments) for part in (chats[5:], chats[:5])]
    first, second = (accumulate_activations(plan, EVERYTHING) for plan in plans)
    first.merge(second)
    merged = summarise_activations(plans[0], first)
    assert torch.equal(merged.n_tokens, whole.n_tokens)
    for name in ("mean", "variance", "covariance"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=1e-10, atol=1e-12)
    assert merged.norm_quantiles is not None
    assert whole.norm_quantiles is not None
    assert torch.equal(merged.norm_quantiles, whole.norm_quantiles)


def test_sites_of_one_block_and_after_the_last_are_read():
    model, chats = tiny(), make_chats(3)
    for sites in (["embed"], ["z.1"], ["post.0"], ["ln_final_normalized"]):
        got = stream_activations(model, chats, sites=sites, positions="all")
        assert got.mean is not None
        assert got.mean.shape[-1] == {"post.0": 40}.get(sites[0], 24)
        assert float(got.mean.abs().max()) > 0


def test_blocks_behind_the_last_site_are_not_run():
    model = tiny()
    ran = []
    model.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    stream_activations(model, make_chats(2), sites="resid_post.1", positions="all")
    assert ran == []
    stream_activations(model, make_chats(2), sites="resid_post.2", positions="all")
    assert ran == [2]


@pytest.mark.parametrize("site", ["mlp_out.2", "ln_final_normalized", "embed"])
def test_what_acts_behind_the_last_site_is_reached_too(site):
    model, chats = tiny(), make_chats(2)
    plain = stream_activations(model, chats, sites="resid_post.0", positions="all")
    with intervene(model, [Intervention(site, Add(draw(24)))]):
        got = stream_activations(model, chats, sites="resid_post.0", positions="all")
    assert got.mean is not None
    assert plain.mean is not None
    assert torch.equal(got.mean, plain.mean) == (site != "embed")
    seen: list[Any] = []
    point: Any = model.hook_dict["blocks.2.attn.hook_z"]
    handle = point.register_forward_hook(lambda module, given, x: seen.append(x))
    stream_activations(model, chats, sites="resid_post.0", positions="all")
    handle.remove()
    assert seen


def test_what_acted_and_in_which_precision_is_on_record():
    model, chats = tiny(dtype=torch.bfloat16), make_chats(2)
    plain = stream_activations(model, chats, sites="resid_post.0", positions="all")
    assert (plain.dtype, plain.interventions) == ("bfloat16", ())
    acting = [Intervention("mlp_out.0", Ablate(draw(24)))]
    with intervene(model, acting):
        got = stream_activations(model, chats, sites="resid_post.0", positions="all")
    assert [json.loads(one) for one in got.interventions] == describe_interventions(acting)
    pair = load_pair(tiny(), load_adapter(make_peft("llama")))
    with intervene(pair.tuned, acting):
        both = stream_activations(pair, chats, sites="resid_post.0", positions="all")
    (one,) = (json.loads(one) for one in both.interventions)
    assert one == {"model": "tuned", **describe_interventions(acting)[0]}


def test_the_tokens_that_run_are_published():
    model, seen = tiny(), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(tokens_in_flight(model)))
    stream_activations(model, make_chats(2), sites="resid_post.1", positions="all")
    assert seen[0] is not None
    assert tokens_in_flight(model) is None


def test_what_cannot_be_read_is_named_before_anything_runs():
    model = tiny()
    model.blocks[0].register_forward_hook(lambda *_: pytest.fail("the model ran"))
    chats = make_chats(2)
    with pytest.raises(ValueError, match=r"widths \[24, 40\]"):
        stream_activations(model, chats, sites=["resid_post.0", "post.0"], positions="all")
    with pytest.raises(ValueError, match=r"assistant turn"):
        stream_activations(model, [*chats, "w5"], sites="resid_post", positions="response")
    with pytest.raises(SiteError, match=r"nearest"):
        stream_activations(model, chats, sites="resid_pst.0", positions="all")
    with pytest.raises(SiteError, match=r"no pos_embed"):
        stream_activations(model, chats, sites="pos_embed", positions="all")
    with pytest.raises(ValueError, match=r"pattern.0 has axes"):
        stream_activations(model, chats, sites="pattern.0", positions="all")
    with pytest.raises(ValueError, match=r"empty list"):
        stream_activations(model, chats, sites="resid_post", positions=[])
    with pytest.raises(ValueError, match=r"no tokenizer"):
        plan_reading(
            lay_views(make_tiny("llama"), None),
            chats,
            sites="resid_post",
            positions="all",
            batching=Batching(),
        )


def test_an_accumulator_refuses_another_width_by_name():
    from emlens.activations import ActivationAccumulator

    with pytest.raises(WidthError, match=r"expected \[n, 3\]"):
        ActivationAccumulator(3, ["norm"]).update(torch.zeros(2, 4))


def test_statistics_survive_saving(tmp_path):
    got = stream_activations(
        tiny(), make_chats(3), sites="resid_post", positions="all", statistics=["variance", "norm"]
    )
    assert got.mean is None
    again = load_result(got.save(tmp_path / "statistics"))
    assert isinstance(again, ActivationStatistics)
    assert again.rows() == got.rows()
    assert set(got.rows()[0]) >= {"site", "total_variance", "norm_0.5"}


def test_no_tensor_is_kept_from_batch_to_batch():
    (chat,) = make_chats(1)
    alike = [replace(chat, id=str(n)) for n in range(12)]
    plan = plan_reading(
        tiny(), alike, sites="resid_post", positions="all", batching=Batching(tokens=30)
    )
    counted = MomentsAccumulator(24)
    held = []
    for _ in plan.read(lambda _site, x, chosen: counted.update(chosen[0].take(x)[0]), "reading"):
        held.append(sum(storages(live_tensors()).values()))
    assert len(held) > 3
    of_a_text = 4 * 24 * plan.tokenized.lengths[0]  # at one site in float32
    assert max(held) - held[0] < of_a_text, held
