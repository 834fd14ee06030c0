"""The paired forward against forwards of their own, for each model alone."""

from typing import Any

import pytest
import torch

from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.hooks import HookNeverFiredError, watch_sites
from emlens.models.loading import load_base
from emlens.models.lora import scale_adapter
from emlens.models.merge import merge_adapter
from emlens.models.null import sample_null_adapters
from emlens.models.pair import load_pair
from emlens.models.paired import forward_many, tuned_parts
from emlens.sites import SiteError, expand_sites, parse_site
from tests.models.adapters import make_peft
from tests.models.tiny import make_ids

MIDDLE: dict[str, Any] = {"layers_to_transform": [1, 2]}


def padded():
    ids = make_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


def run(base, tuned, sites=("resid_post",), ids_mask=None):
    ids, mask = ids_mask or padded()
    seen = {}
    chosen = expand_sites(list(sites), base.cfg)
    out = forward_many(
        base, tuned, ids, mask, sites=chosen, visit=lambda s, x: seen.update({str(s): x.clone()})
    )
    return out, seen


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "neox"])
@pytest.mark.parametrize("settings", [{}, MIDDLE])
def test_paired_equals_each_model_alone(name, settings):
    peft_model = make_peft(name, **settings)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    out, seen = run(base, [adapter], sites=("resid_post", "attn_out", "ln1_normalized"))
    ids, mask = padded()
    assert out.method == "paired"
    assert out.shared_layers == (1 if settings else 0)
    for index, model in enumerate((base, attach_adapter(base, adapter))):
        _, cache = model.run_with_cache(ids, attention_mask=mask)
        for site, value in seen.items():
            expected = cache[parse_site(site).hook_name]
            gap = (value[index] - expected)[mask.bool()].abs().max()
            assert gap <= 1e-5 * expected.abs().max(), site
    assert torch.equal(seen["resid_post.2"], out.resid)


def test_base_half_is_unchanged_by_the_adapter_beside_it():
    peft_model = make_peft("llama", **MIDDLE)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    with_adapter, _ = run(base, [adapter])
    with_zero, _ = run(base, [scale_adapter(adapter, 0.0)])
    assert torch.equal(with_adapter.resid[0], with_zero.resid[0])


@pytest.mark.parametrize("settings", [{}, MIDDLE])
def test_a_zero_adapter_forced_through_the_hooks_gives_the_base(settings):
    peft_model = make_peft("qwen2", **settings)
    zero = scale_adapter(load_adapter(peft_model), 0.0)
    out, _ = run(load_base(peft_model), [zero])
    mask = padded()[1].bool()
    gap = (out.resid[1] - out.resid[0])[mask].abs().max()
    assert gap <= 1e-6 * out.resid[0][mask].abs().max()


def test_base_against_base_as_separate_passes_is_exactly_zero():
    base = load_base(make_peft("llama"))
    out, seen = run(base, [base])
    assert out.method == "separate passes"
    assert torch.equal(out.resid[0], out.resid[1])
    assert all(torch.equal(value[0], value[1]) for value in seen.values())


def test_many_adapters_run_over_one_base():
    peft_model = make_peft("llama", **MIDDLE)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    nulls = sample_null_adapters(adapter, n=3, seed=0)
    together, _ = run(base, [adapter, *nulls])
    mask = padded()[1].bool()
    for index, item in enumerate((adapter, *nulls), start=1):
        alone, _ = run(base, [item])
        gap = (together.resid[index] - alone.resid[1])[mask].abs().max()
        assert gap <= 1e-5 * alone.resid[1][mask].abs().max()


@pytest.mark.parametrize("last", [False, True], ids=["in a shared layer", "beside the adapter"])
def test_hooks_are_gone_afterwards_even_if_a_visitor_fails(last):
    peft_model = make_peft("llama", **MIDDLE)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    ids, mask = padded()
    before = base(ids, attention_mask=mask)

    sites = expand_sites("resid_post", base.cfg)

    def fail(site, x):
        if site == sites[-1 if last else 0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forward_many(base, [adapter], ids, mask, sites=sites, visit=fail)
    assert torch.equal(base(ids, attention_mask=mask), before)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())


def test_a_merged_pair_sharing_no_layer_takes_passes_of_its_own():
    peft_model = make_peft("llama")
    adapter = load_adapter(peft_model)
    merged = load_pair(load_base(peft_model), adapter, form="merged")
    attached = load_pair(load_base(peft_model), adapter)
    assert tuned_parts(merged) == (merged.tuned,)
    assert tuned_parts(attached) == (attached.placed_adapter,)
    first, _ = run(merged.base, tuned_parts(merged))
    second, _ = run(attached.base, tuned_parts(attached))
    mask = padded()[1].bool()
    assert (first.resid - second.resid)[:, mask].abs().max() <= 1e-5 * first.resid.abs().max()


def test_adapters_and_models_are_not_mixed():
    peft_model = make_peft("llama")
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    with pytest.raises(ValueError, match=r"not both"):
        run(base, [adapter, merge_adapter(base, adapter)])


def test_a_site_that_is_never_reached_is_an_error():
    base = load_base(make_peft("llama"))
    ids, mask = padded()
    with pytest.raises(HookNeverFiredError, match=r"ln_final_normalized"):
        run(base, [], sites=("ln_final_normalized",))
    with (
        pytest.raises(SiteError, match=r"nearest|no resid_post"),
        watch_sites(base, [parse_site("resid_post.9")], lambda s, x: None),
    ):
        base(ids, attention_mask=mask)
    with (
        pytest.raises(RuntimeError, match=r"first error"),
        watch_sites(base, expand_sites("resid_post", base.cfg), lambda s, x: None),
    ):
        raise RuntimeError("first error")


def test_full_checkpoint_shares_every_equal_tensor(tmp_path):
    from emlens.models.export import save_checkpoint

    peft_model = make_peft("llama", target_modules=["down_proj"])
    base = load_base(peft_model)
    save_checkpoint(base, tmp_path / "base")
    save_checkpoint(merge_adapter(base, load_adapter(peft_model)), tmp_path / "tuned")
    pair = load_pair(str(tmp_path / "base"), str(tmp_path / "tuned"), dtype="float32")
    assert pair.adapter is None
    shared = {p.data_ptr() for p in pair.base.parameters()}
    owned = [n for n, p in pair.tuned.named_parameters() if p.data_ptr() not in shared]
    assert owned == [f"blocks.{layer}.mlp.W_out" for layer in range(3)]


def test_models_of_other_sizes_make_no_pair():
    with pytest.raises(ValueError, match=r"differ in"):
        load_pair(load_base(make_peft("llama")), load_base(make_peft("qwen2")))
