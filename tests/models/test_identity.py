"""A model's identity: the same for the same numbers, another for any other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.checkpoints import fingerprint_weights
from emlens.models.copies import copy_weights
from emlens.models.identity import (
    foreign_hooks,
    hash_weights,
    identify_model,
    refuse_foreign_hooks,
)
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.merge import merge_adapter
from emlens.models.pair import load_pair
from emlens.models.reading import identify
from emlens.models.views import lay_views, origin_of, share_model
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer


@pytest.fixture(scope="module")
def base() -> Any:
    return lay_views(make_tiny("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def adapter() -> LoraAdapter:
    return load_adapter(make_peft("llama"))


def test_the_same_weights_are_the_same_under_another_name(base: Any):
    again = lay_views(make_tiny("llama"), make_tokenizer(), name="elsewhere")
    first, second = identify_model(base), identify_model(again)
    assert first.name != second.name
    assert (first.weights, first.tokenizer) == (second.weights, second.tokenizer)
    assert identify_model(share_model(base)) == first


@pytest.mark.parametrize("place", [(0, 0), (57, 11), (-1, -1)])
def test_one_changed_value_anywhere_is_another_model(base: Any, place: tuple[int, int]):
    other = lay_views(make_tiny("llama"), make_tokenizer())
    before = hash_weights(other)
    with torch.no_grad():
        weight = other.W_E[place]
        weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))
    assert hash_weights(other) != before
    assert hash_weights(base) == before


def test_seed_and_precision_are_part_of_it(base: Any):
    names = {hash_weights(base)}
    names.add(hash_weights(lay_views(make_tiny("llama", seed=1), make_tokenizer())))
    half = lay_views(make_tiny("llama", dtype=torch.bfloat16), make_tokenizer())
    names.add(hash_weights(half))
    assert len(names) == 3
    assert identify_model(half).dtype == "bfloat16"


def test_adapters_count_with_scale_and_form(base: Any, adapter: LoraAdapter):
    models = [base]
    for scale in (1.0, 2.0, 1.0001):
        scaled = scale_adapter(adapter, scale)
        models += [attach_adapter(base, scaled), merge_adapter(base, scaled)]
    one = {(m.weights, m.adapter) for m in map(identify_model, models)}
    assert len(one) == 7
    again = identify_model(attach_adapter(base, scale_adapter(adapter, 1.0)))
    assert again == identify_model(models[1])
    assert again.name == f"local + {adapter.name} x 1"


def test_a_merged_model_is_not_on_record_as_its_base(base: Any, adapter: LoraAdapter):
    def mark(model: Any) -> str:
        found = identify(model)
        assert found.base_fingerprint == origin_of(model).fingerprint
        return found.base_fingerprint

    merged = merge_adapter(base, adapter)
    double = merge_adapter(base, scale_adapter(adapter, 2.0))
    twice = merge_adapter(merged, adapter)
    assert len({mark(model) for model in (base, merged, double, twice)}) == 4
    assert mark(merge_adapter(base, adapter)) == mark(merged)
    for same in (share_model(merged), copy_weights(merged)):
        assert mark(same) == mark(merged)
    # As it is, an attached adapter is named beside the base.
    attached = identify(attach_adapter(base, adapter))
    assert attached.base_fingerprint == mark(base)
    assert attached.adapter_fingerprint == adapter.fingerprint
    pair = load_pair(base, merged)
    assert identify(pair).tuned_fingerprint == mark(merged) != identify(pair).base_fingerprint


def test_replaced_weights_are_on_record_by_their_numbers(base: Any):
    weight = base.blocks[1].mlp.W_out.detach()
    name = "blocks.1.mlp.W_out"
    first, second = (share_model(base, {name: factor * weight}) for factor in (2.0, 3.0))
    marks = {origin_of(model).fingerprint for model in (base, first, second)}
    assert len(marks) == 3
    again = share_model(base, {name: 2.0 * weight})
    assert origin_of(again).fingerprint == origin_of(first).fingerprint
    lineage = origin_of(share_model(first, {name: weight})).lineage
    assert lineage[:2] == (origin_of(base).fingerprint, origin_of(first).fingerprint)
    assert len(set(lineage)) == 3


def test_a_full_fine_tune_that_shares_weights_keeps_its_own_mark(base: Any, tmp_path: Path):
    tuned = make_tiny("llama")
    tuned.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.05)
    tuned.save_pretrained(tmp_path)
    pair = load_pair(base, str(tmp_path))
    assert origin_of(pair.tuned).fingerprint == fingerprint_weights(tuned)


def test_the_template_is_part_of_it(base: Any):
    other = make_tokenizer()
    other.chat_template = f"{other.chat_template} "
    shell = lay_views(make_tiny("llama"), other)
    assert identify_model(shell).tokenizer != identify_model(base).tokenizer


def test_hooks_of_others_are_found_and_ours_are_not(base: Any, adapter: LoraAdapter):
    attached: Any = attach_adapter(base, adapter)
    assert list(foreign_hooks(attached)) == []
    attached.add_hook("blocks.1.hook_resid_post", lambda value, hook: value)
    assert list(foreign_hooks(attached)) == ["blocks.1.hook_resid_post"]
    attached.reset_hooks()
    handle = attached.hook_dict["hook_embed"].register_forward_hook(lambda *_: None)
    assert list(foreign_hooks(attached)) == ["hook_embed"]
    handle.remove()
    assert list(foreign_hooks(attached)) == []


def test_hooks_on_modules_that_are_no_hook_points_are_found(base: Any, adapter: LoraAdapter):
    attached: Any = attach_adapter(base, adapter)
    refuse_foreign_hooks(attached)
    mlp, attn = attached.blocks[1].mlp, attached.blocks[0].attn
    handles = [
        mlp.register_forward_hook(lambda _module, _args, output: 2 * output),
        attn.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
        attached.register_forward_hook(lambda *_: None),
    ]
    assert list(foreign_hooks(attached)) == ["model", "blocks.0.attn", "blocks.1.mlp"]
    with pytest.raises(ValueError, match=r"at model, blocks\.0\.attn, blocks\.1\.mlp: rows"):
        refuse_foreign_hooks(attached)
    for handle in handles:
        handle.remove()
    refuse_foreign_hooks(attached)
