"""Two models compared by latents: against loops over single chats, a planted latent, and scipy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity

from emlens.codecs import CodecError
from emlens.data import Batching, Chat, Message
from emlens.features import (
    FeatureDiff,
    SaeHealth,
    check_sae,
    compare,
    compare_features,
    rank_features,
)
from emlens.features.accumulate import PromptSums
from emlens.features.compare import measure_changes
from emlens.features.latents import read_latents
from emlens.features.reading import accumulate_codes, group_by_prompt, plan_codes
from emlens.models import load_adapter, load_pair
from emlens.models.pair import ModelPair
from emlens.models.views import lay_views
from emlens.numerics.sign_flips import METHODS
from emlens.results import load_result
from tests.activations.chats import make_chats, token_ids
from tests.codecs.builders import draw, make_sae
from tests.features.planted import PLANTED, SITE, make_codec, make_pair
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return make_pair(make_codec())


@pytest.fixture(scope="module")
def codec():
    return make_sae("jumprelu", d_in=24, d_sae=40, threshold=torch.full((40,), 1.5))


@pytest.fixture(scope="module")
def placed(codec):
    return replace(codec, site=SITE)


@torch.no_grad()
def read_responses(model, chats) -> list[torch.Tensor]:
    """Activations of each chat's response, one chat at a time, without this package's reading."""
    found = []
    for chat in chats:
        ids, start, stop = token_ids(chat)
        _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=SITE.hook_name)
        found.append(cache[SITE.hook_name][0, start:stop])
    return found


def test_means_frequencies_and_tests_are_those_of_a_plain_loop(pair, placed):
    chats = make_chats(25)
    found = compare_features(
        pair, placed, chats=chats, positions="response", batching=Batching(tokens=80)
    )
    rows = [read_responses(model, chats) for model in (pair.base, pair.tuned)]
    codes = [[placed.encode(x).values.double().numpy() for x in side] for side in rows]
    means = np.array([[x.mean(0) for x in side] for side in codes])
    np.testing.assert_allclose(found.mean_base, means[0].mean(0), atol=1e-5)
    np.testing.assert_allclose(found.mean_tuned, means[1].mean(0), atol=1e-5)
    np.testing.assert_allclose(found.delta, (means[1] - means[0]).mean(0), atol=1e-5)
    for side, frequency in zip(codes, (found.frequency_base, found.frequency_tuned), strict=True):
        np.testing.assert_allclose(frequency, (np.concatenate(side) > 0).mean(0), atol=1e-9)
    fired = (means > 0).any(0).sum(0)
    np.testing.assert_array_equal(found.prompts_fired, fired)
    moved = np.abs(means[1] - means[0]).max(0) > 0
    theirs = stats.ttest_rel(means[1][:, moved], means[0][:, moved])
    np.testing.assert_allclose(found.t[torch.from_numpy(moved)], theirs.statistic, rtol=1e-3)
    tested = ~found.p_value.isnan().numpy()
    np.testing.assert_array_equal(tested, fired >= 12)
    assert 0 < tested.sum() < 40
    np.testing.assert_allclose(
        found.q_value[tested], stats.false_discovery_control(found.p_value[tested]), rtol=1e-9
    )
    x = [np.array([part.double().mean(0).numpy() for part in side]) for side in rows]
    gap = (x[1] - x[0]).mean(0)
    np.testing.assert_allclose(found.mean_difference, gap, atol=1e-5)
    W_dec = placed.W_dec.numpy()
    cosine = W_dec @ gap / np.linalg.norm(W_dec, axis=1) / np.linalg.norm(gap)
    np.testing.assert_allclose(found.decoder_cosine, cosine, atol=1e-5)
    assert found.n_tokens.tolist() == [sum(map(len, rows[0]))] * 2
    assert found.responses == "same"


def test_health_is_that_of_a_plain_loop(pair, placed):
    chats = make_chats(9)
    found = check_sae(pair, placed, chats=chats, positions="response")
    sides = [torch.cat(read_responses(m, chats)).double() for m in (pair.base, pair.tuned)]
    rebuilt = [placed.decode(placed.encode(x.float())).double() for x in sides]
    for k, (x, y) in enumerate(zip(sides, rebuilt, strict=True)):
        total = (x - x.mean(0)).square().sum()
        explained = 1 - (x - y).square().sum() / total
        assert float(found.explained_variance[k]) == pytest.approx(float(explained), rel=1e-5)
        active = placed.encode(x.float()).values > 0
        assert float(found.l0[k]) == pytest.approx(float(active.double().sum(1).mean()))
        assert float(found.dead_share[k]) == pytest.approx(float((~active.any(0)).double().mean()))
    gap, caught = sides[1] - sides[0], rebuilt[1] - rebuilt[0]
    share = 1 - (gap - caught).square().sum() / gap.square().sum()
    assert found.captured_share == pytest.approx(float(share), rel=1e-4)
    assert found.underpowered  # random weights explain nothing
    assert found.streams == ("base", "tuned")
    alone = check_sae(pair.base, placed, chats=chats, positions="response")
    assert alone.streams == ("model",)
    assert float(alone.l0[0]) == float(found.l0[0])
    assert (alone.captured_share, alone.worse_on_tuned) == (None, None)


def test_a_planted_latent_comes_first(pair):
    planted = make_codec()
    found = compare_features(pair, planted, chats=make_chats(20), positions="all")
    for by in ("delta", "abs_delta", "t", "cosine"):
        assert rank_features(found, by=by).top(1) == [PLANTED], by
    assert float(found.q_value[PLANTED]) < 0.01
    assert found.decoder_cosine[PLANTED] > 0.9
    others = found.delta[torch.arange(len(found.delta)) != PLANTED]
    assert float(found.delta[PLANTED]) > 3 * float(others.abs().max())
    assert found.health.captured_share is not None
    assert found.health.captured_share > 0.4
    backwards = ModelPair(base=pair.tuned, tuned=pair.base, adapter=None, proof=None)
    turned = compare_features(backwards, planted, chats=make_chats(20), positions="all")
    assert rank_features(turned, by="delta").bottom(1) == [PLANTED]


def test_a_base_compared_with_itself_is_exactly_zero(pair, placed):
    same = load_pair(pair.base, pair.base)
    found = compare_features(same, placed, chats=make_chats(14), positions="response")
    for name in ("delta", "t", "mean_difference", "decoder_cosine"):
        assert not getattr(found, name).any(), name
    assert torch.equal(found.mean_base, found.mean_tuned)
    tested = ~found.p_value.isnan()
    assert found.n_tested == int(tested.sum()) > 0
    assert bool((found.p_value[tested] == 1).all())
    assert bool((found.q_value[tested] == 1).all())
    assert METHODS[int(found.p_method[tested][0])] == "no difference"
    assert found.health.captured_share is None
    assert found.health.worse_on_tuned is False
    assert found.health.explained_change is not None
    assert (found.health.explained_change.low, found.health.explained_change.high) == (0, 0)


def test_rows_that_both_models_share_are_encoded_once(pair, placed, monkeypatch):
    seen = []
    cls, encode = type(placed), type(placed).encode_active
    monkeypatch.setattr(cls, "encode_active", lambda s, x: seen.append(len(x)) or encode(s, x))
    chats = make_chats(3)
    check_sae(load_pair(pair.base, pair.base), placed, chats=chats)
    once = sum(seen)
    check_sae(pair, placed, chats=chats)
    assert sum(seen) == 3 * once


def test_responses_to_one_prompt_are_one_unit(pair, placed):
    chats = make_chats(4)
    doubled = [
        Chat((chat.messages[0], Message("assistant", f"{chat.messages[1].content} w{k + 5}")))
        for k in range(3)
        for chat in chats
    ]
    found = compare_features(pair, placed, chats=doubled, positions="response")
    assert found.n_prompts == 4 == len(found.prompts)
    numbers, _ = group_by_prompt(doubled)
    assert numbers.tolist() == [0, 1, 2, 3] * 3
    sides = [read_responses(model, doubled) for model in (pair.base, pair.tuned)]
    by_prompt = [
        [torch.cat([side[k + 4 * r] for r in range(3)]) for k in range(4)] for side in sides
    ]
    means = [
        torch.stack([placed.encode(x).values.mean(0) for x in side]).mean(0) for side in by_prompt
    ]
    assert torch.allclose(found.delta.float(), means[1] - means[0], atol=1e-5)


def test_each_models_own_responses_are_paired_by_prompt(pair, placed):
    chats = make_chats(13)
    swapped = [
        Chat((chat.messages[0], Message("assistant", f"w{9 + k} w{30 + k} w7")))
        for k, chat in enumerate(chats)
    ]
    found = compare_features(
        pair, placed, chats=chats, tuned_chats=swapped[::-1], positions="response"
    )
    assert found.responses == "own"
    assert found.health.captured_share is None
    base, tuned = read_responses(pair.base, chats), read_responses(pair.tuned, swapped)
    means = [np.array([placed.encode(x).values.mean(0).numpy() for x in s]) for s in (base, tuned)]
    np.testing.assert_allclose(found.delta, (means[1] - means[0]).mean(0), atol=1e-5)
    moved = np.abs(means[1] - means[0]).max(0) > 0
    theirs = stats.ttest_rel(means[1][:, moved], means[0][:, moved])
    np.testing.assert_allclose(found.t[torch.from_numpy(moved)], theirs.statistic, rtol=1e-3)
    assert found.n_tokens.tolist() == [sum(map(len, base)), sum(map(len, tuned))]
    with pytest.raises(ValueError, match="1 of those in chats have no response of the fine-tune"):
        compare_features(pair, placed, chats=chats, tuned_chats=swapped[1:], positions="response")


def test_too_few_prompts_give_a_result_that_says_so(pair, placed):
    found = compare_features(pair, placed, chats=make_chats(11), positions="response")
    assert (found.n_tested, bool(found.q_value.isnan().all())) == (0, True)
    assert found.why_untested.startswith("11 prompts, 12 needed")
    assert bool(found.t.isfinite().all())
    assert compare_features(pair, placed, chats=make_chats(12)).why_untested == ""
    rare = replace(placed, threshold=torch.full((40,), 1e6))
    assert "no latent fires" in compare_features(pair, rare, chats=make_chats(12)).why_untested


def test_shards_of_chats_merge_to_the_whole(pair, placed):
    chats = make_chats(8)
    prompts, names = group_by_prompt(chats)

    def count(part: slice):
        settings = {"positions": "all", "batching": Batching(tokens=60)}
        plan = plan_codes(pair, placed, chats[part], **settings)
        return accumulate_codes(plan, placed, prompts=prompts[part], n_prompts=len(names))

    whole, first, second = count(slice(None)), count(slice(5, None)), count(slice(5))
    first.merge(second)
    found, expected = (
        measure_changes(*(part.result() for part in own.models), seed=0) for own in (first, whole)
    )
    for name in ("delta", "mean_tuned", "prompts_fired"):
        a, b = getattr(found, name).double(), getattr(expected, name).double()
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name


def test_positions_default_to_those_of_the_codec(pair, placed):
    late = replace(placed, positions="all[4:]")
    chats = make_chats(5)
    found = check_sae(pair, late, chats=chats)
    assert found.positions == "all[4:]"
    assert int(found.n_tokens[0]) == sum(len(token_ids(chat)[0]) - 4 for chat in chats)


def test_some_latents_are_read_prompt_by_prompt(pair, placed):
    chats = make_chats(6)
    latents = [7, 0, 33]
    found = read_latents(pair, placed, latents=latents, chats=chats, positions="response")
    for stream, model in enumerate((pair.base, pair.tuned)):
        rows = read_responses(model, chats)
        expected = torch.stack([placed.encode(x).values[:, latents].mean(0) for x in rows])
        assert torch.allclose(found.codes[stream].float(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="expected some from 0 to 39"):
        read_latents(pair, placed, latents=[40], chats=chats)


def test_a_codec_that_does_not_fit_is_refused_before_anything_runs(pair, placed):
    wide = replace(make_sae("standard", d_in=25, d_sae=40), site=SITE)
    with pytest.raises(CodecError, match=r"width 25.* 24"):
        compare_features(pair, wide, chats=make_chats(2))
    deep = replace(placed, site=replace(SITE, layer=7))
    with pytest.raises(CodecError, match=r"resid_post\.7.* 3 layers"):
        check_sae(pair, deep, chats=make_chats(2))


def test_results_survive_saving(pair, placed, tmp_path):
    found = compare_features(pair, placed, chats=make_chats(13))
    again = load_result(found.save(tmp_path / "diff"))
    assert isinstance(again, FeatureDiff)
    assert again.to_dict() == found.to_dict()
    assert str(again.rows()) == str(found.rows())  # NaN is not NaN
    assert len(found.rows()) == 40
    health = load_result(found.health.save(tmp_path / "health"))
    assert isinstance(health, SaeHealth)
    assert health.rows() == found.health.rows()


def test_an_adapter_attached_or_merged_gives_the_same_changes(placed):
    peft_model, chats = make_peft("llama"), make_chats(13)
    base = lay_views(make_tiny("llama"), make_tokenizer())
    found = [
        compare_features(load_pair(base, load_adapter(peft_model), form=form), placed, chats=chats)
        for form in ("attached", "merged")
    ]
    assert found[0].adapter_fingerprint == found[1].adapter_fingerprint is not None
    assert float(found[0].delta.abs().max()) > 0.1
    assert torch.allclose(found[0].delta, found[1].delta, atol=1e-4)
    # The first block that an adapter touches comes after its own input.
    early = replace(placed, site=replace(SITE, stream="resid_pre", layer=0))
    same = compare_features(load_pair(base, load_adapter(peft_model)), early, chats=chats)
    assert not same.delta.any()
    assert float(same.mean_base.abs().max()) > 0


def test_cosines_are_those_of_scikit_learn_and_brought_over_once(monkeypatch):
    W_dec, direction = draw(10, 3, seed=1), draw(3, seed=2, dtype=torch.float64)
    W_dec[4] = 0
    moved = []
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x.shape) or plain(x))
    monkeypatch.setattr(compare, "_BLOCK_VALUES", 6)
    found = compare.decoder_cosines(W_dec, direction)
    assert moved == [(10,)]
    expected = cosine_similarity(W_dec.double().numpy(), direction[None].numpy())[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert not compare.decoder_cosines(W_dec, 0 * direction).any()


def make_sums(codes: torch.Tensor) -> PromptSums:
    """One token a prompt."""
    prompts, latents = codes.nonzero(as_tuple=True)
    nothing = torch.zeros(len(codes), dtype=torch.float64)
    return PromptSums(
        d_sae=codes.shape[1],
        n_tokens=torch.ones(len(codes), dtype=torch.int64),
        prompts=prompts,
        latents=latents,
        codes=codes[prompts, latents],
        firings=(codes != 0).sum(0),
        activations=nothing[:, None],
        squares=nothing,
        missed=nothing,
    )


@pytest.mark.parametrize(("shift", "most"), [(0.0, 0.088), (3.0, 0.06)])
def test_false_discoveries_are_as_rare_as_promised_over_seeds(shift: float, most: float):
    """Codes of two models that are alike but for 30 of 150 latents, on 26 prompts, 300 times."""
    shares, found = [], []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(1, 26, 150, generator=generator, dtype=torch.float64)
        noise = torch.randn(2, 26, 150, generator=generator, dtype=torch.float64).pow(3)
        codes = own + 0.5 * noise - 0.3
        codes[1, :, :30] += shift
        changes = measure_changes(*map(make_sums, codes.relu()), seed=seed)
        called = changes.q_value <= 0.05
        true = called[:30] if shift else called[:0]
        shares.append(float((called.sum() - true.sum()) / called.sum().clamp(min=1)))
        found.append(float(true.double().mean()) if shift else 1.0)
    # .05 is promised, .04 where a fifth truly differs; three standard errors are allowed.
    assert np.mean(shares) <= most
    assert np.mean(found) > 0.5
