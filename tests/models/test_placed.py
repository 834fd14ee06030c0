"""Factors made ready once: the same numbers as those made ready for a batch, and held once."""

import copy
from typing import Any

import pytest
import torch

from emlens.data import Batching
from emlens.diffing import compare_models, compare_nulls, null_band
from emlens.models import pair as pairs
from emlens.models import paired
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import _Reader, _Writer, attach_adapter, placed_on
from emlens.models.hooks import watch_sites
from emlens.models.layout import part_rows
from emlens.models.loading import load_base
from emlens.models.lora import find_targets
from emlens.models.merge import merge_adapter
from emlens.models.pair import ModelPair, load_pair
from emlens.models.paired import forward_many, tuned_parts
from emlens.models.placed import PlacedAdapter, place_adapter
from emlens.models.views import lay_views
from emlens.sites import expand_sites
from tests.activations.chats import make_chats
from tests.models.adapters import make_peft
from tests.models.tiny import make_ids, make_tiny, make_tokenizer

LATE: dict[str, Any] = {"layers_to_transform": [1, 2]}


def run(base: Any, parts: Any) -> torch.Tensor:
    ids = make_ids(2, 9)
    return forward_many(
        base, parts, ids, torch.ones_like(ids), sites=(), visit=lambda site, x: None
    ).resid


def hold(model: Any) -> dict[int, torch.Tensor]:
    """Every factor that a hook on a model holds, by the memory it lies in."""
    modules = model.modules()
    hooks = [
        h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    found = [owner.A for owner in owners if isinstance(owner, _Reader)]
    found += [owner.B for owner in owners if isinstance(owner, _Writer)]
    return {factor.data_ptr(): factor for factor in found}


def tensors(placed: PlacedAdapter) -> list[torch.Tensor]:
    return [x for g in placed.groups for x in (g.A, *(write.B for write in g.writes))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_factors_are_scaled_in_float32_and_rounded_once(name: str, dtype: torch.dtype):
    adapter = load_adapter(make_peft(name, lora_alpha=7, dtype=torch.bfloat16))
    base = lay_views(make_tiny(name, dtype=dtype), None)
    placed = place_adapter(adapter, base)
    found, expected = [], []
    for group in placed.groups:
        found += [group.A, *(write.B for write in group.writes)]
        assert {x.dtype for x in found} == {dtype}
        assert all(x.is_contiguous() for x in found)
    by_input: dict[Any, list[Any]] = {}
    for target in find_targets(base, adapter):
        by_input.setdefault((target.layer, target.place.reads), []).append(target)
    for targets in by_input.values():
        expected.append(torch.cat([target.lora.A.to(dtype) for target in targets]))
        for target in targets:
            B = (target.lora.B.float() * (7 / 4)).to(dtype)
            expected += [B[rows] for rows in part_rows(len(B), target.place, base.cfg.d_head)]
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


@pytest.mark.parametrize("settings", [{}, LATE])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_placed_adapter_gives_the_bits_of_one_placed_for_the_batch(name: str, settings: Any):
    peft_model = make_peft(name, **settings)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    placed = place_adapter(adapter, base)
    assert torch.equal(run(base, [placed]), run(base, [adapter]))
    assert placed.first_layer == (1 if settings else 0)


def test_an_attached_pair_holds_its_factors_once():
    peft_model = make_peft("llama")
    adapter = load_adapter(peft_model)
    before = copy.deepcopy(adapter)
    pair = load_pair(load_base(peft_model), adapter)
    (placed,) = tuned_parts(pair)
    assert placed is placed_on(pair.tuned)
    assert isinstance(placed, PlacedAdapter)
    assert set(hold(pair.tuned)) == {x.data_ptr() for x in tensors(placed)}
    seen: list[set[int]] = []
    sites = expand_sites("resid_post.2", pair.base.cfg)
    for _ in range(2):
        with watch_sites(pair.base, sites, lambda site, x: seen.append(set(hold(pair.base)))):
            run(pair.base, [placed])
    assert seen == [set(hold(pair.tuned))] * 2
    for name, module in adapter.modules.items():  # nothing is scaled in place
        assert torch.equal(module.B, before.modules[name].B)


@pytest.mark.parametrize("form", ["attached", "merged"])
def test_a_pair_places_its_adapter_once_for_all_batches(form: Any, monkeypatch: pytest.MonkeyPatch):
    counted: list[str] = []

    def count(adapter: Any, model: Any) -> PlacedAdapter:
        counted.append(adapter.name)
        return place_adapter(adapter, model)

    base = lay_views(make_tiny("llama"), make_tokenizer())
    adapter = load_adapter(make_peft("llama", **LATE))
    pair = load_pair(base, adapter, form=form)
    for module in (pairs, paired, null_band):
        monkeypatch.setattr(module, "place_adapter", count)
    batching = Batching(tokens=40)
    for _ in range(2):
        assert compare_models(pair, make_chats(), batching=batching).method == "paired"
    assert len(counted) == {"attached": 0, "merged": 1}[form]
    counted.clear()
    compare_nulls(pair, make_chats(), n=3, seed=0, batching=Batching(tokens=100))
    assert len(counted) == len(set(counted)) == 3


def test_a_pair_whose_base_moved_places_what_was_read_anew():
    adapter = load_adapter(make_peft("llama", **LATE))
    base: Any = lay_views(make_tiny("llama", dtype=torch.bfloat16), None)
    pair = load_pair(base, adapter)
    half = pair.placed_adapter
    assert half is not None
    base.to(torch.float32, print_details=False)
    (wide,) = tuned_parts(pair)
    assert isinstance(wide, PlacedAdapter)
    assert wide.dtype == torch.float32
    assert wide is pair.placed_adapter
    # Not what bfloat16 had left of it.
    assert torch.equal(run(base, [wide]), run(base, [adapter]))
    assert not torch.equal(run(base, [wide]), run(base, [half]))


def test_another_adapter_than_the_attached_one_is_placed_itself():
    peft_model = make_peft("llama", **LATE)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    other = load_adapter(make_peft("llama", r=2, **LATE))
    pair = ModelPair(base=base, tuned=attach_adapter(base, other), adapter=adapter, proof=None)
    assert pair.placed_adapter is not placed_on(pair.tuned)
    assert torch.equal(run(base, tuned_parts(pair)), run(base, [adapter]))
    full = ModelPair(base=base, tuned=merge_adapter(base, other), adapter=None, proof=None)
    assert full.placed_adapter is None


def test_an_adapter_of_embeddings_is_not_placed():
    peft_model = make_peft("llama", target_modules=["embed_tokens", "down_proj"])
    with pytest.raises(ValueError, match=r"embed_tokens.*form='merged'"):
        place_adapter(load_adapter(peft_model), load_base(peft_model))
